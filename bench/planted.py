"""The ordinary trainer with one fault planted from outside: what bench.verify must catch.

`python -m bench.planted NAME -- FLAGS` (or through torchrun -m). NAME `none` plants nothing; `up`,
`down` and `turns` are no faults but the controls: weights moved by one unit in the last place.
"""

import os
import sys

import torch

from config import parse_or_exit
from run import Run, guarded
from train import main


def nudge(run: Run, directions: tuple[float, float]) -> None:
    """The smallest change there is, to see how far rounding alone carries a run."""
    for number, p in enumerate(run.parameters):
        towards = torch.full_like(p.data, directions[number % 2])
        p.data.copy_(torch.nextafter(p.data, towards))


def up(run: Run) -> None:
    nudge(run, (torch.inf, torch.inf))


def down(run: Run) -> None:
    nudge(run, (-torch.inf, -torch.inf))


def turns(run: Run) -> None:
    nudge(run, (torch.inf, -torch.inf))


def seed(run: Run) -> None:
    """The last rank draws its augmentation from another seed."""
    if last_rank(run):
        run.augment.seed += 1


def skip(run: Run) -> None:
    """Every epoch begins with its second batch."""
    start = run.sampler.start
    run.sampler.start = lambda epoch, first=0: start(epoch, first + (first == 0))


def schedule(run: Run) -> None:
    """The learning rate moves on once per process, as a prepared scheduler would."""
    total, run.total_steps = run.total_steps, 0
    run.total_steps = max(1, total // run.accelerator.num_processes)


def batchnorm(run: Run) -> None:
    """Running statistics move with every shard of a process, not with shard 0 alone."""
    type(run.shards).buffers = []  # on the class: an instance looks them up each time


def buffers(run: Run) -> None:
    """Each rank evaluates with its own running statistics."""
    run.shards.broadcast_buffers = lambda: None


def last_rank(run: Run) -> bool:
    return run.accelerator.process_index == run.accelerator.num_processes - 1


PLANTS = {f.__name__: f for f in (up, down, turns, seed, skip, schedule, batchnorm, buffers)}


def planted_main(run: Run) -> int:
    plant = PLANTS.get(os.environ["LOCKSTEP_PLANT"])
    if plant is not None:
        resume = run.resume

        def resume_with_plant() -> None:
            resume()
            plant(run)

        run.resume = resume_with_plant
    return main(run)


if __name__ == "__main__":
    os.environ["LOCKSTEP_PLANT"] = sys.argv[1]
    raise SystemExit(guarded(planted_main, parse_or_exit(sys.argv[3:])))
