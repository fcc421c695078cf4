"""The ordinary trainer with one fault planted from outside: what bench.verify must catch.

`python -m bench.planted NAME -- FLAGS` (or through torchrun -m). NAME `none` plants nothing; `up`,
`down` and `turns` are no faults but the controls: weights moved by one unit in the last place.
"""

import itertools
import sys
from collections.abc import Iterable

import torch

from config import parse_or_exit
from distributed.checkpoint import Progress
from distributed.shards import Shards
from report.ending import run_to_exit
from train import main
from training.data import Batch, Data
from training.learner import Learner
from training.observer import Observer
from training.recorder import observer_asked_for
from training.schedule import Schedule


class Planted(Observer):
    """Another observer's run with a fault in it."""

    def __init__(self, fault: str, recorder: Observer) -> None:
        self.fault, self.recorder = fault, recorder

    def started(self, learner: Learner, data: Data, schedule: Schedule, progress: Progress) -> None:
        self.recorder.started(learner, data, schedule, progress)
        self.progress, self.schedule = progress, schedule
        rank, count = learner.accelerator.process_index, learner.accelerator.num_processes
        match self.fault:
            case "up" | "down" | "turns":
                nudge(learner.parameters, self.fault)
            case "seed":  # the last rank draws its augmentation from another seed
                data.augment.seed += rank == count - 1
            case "schedule":  # the rate moves on once per process, as a prepared scheduler would
                total = max(1, schedule.total_steps // count)
                object.__setattr__(schedule, "total_steps", total)
            case "batchnorm":  # running statistics move with every shard of a process
                Shards.buffers = []  # pyright: ignore[reportAttributeAccessIssue] - the fault
            case "buffers":  # each rank evaluates with its own running statistics
                learner.shards.broadcast_buffers = lambda: None

    def batches(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        begins = self.schedule.place(self.progress.step)[1] == 0
        if self.fault == "skip" and begins:  # every epoch begins with its second batch
            batches = itertools.islice(batches, 1, None)
        return self.recorder.batches(batches)


def nudge(parameters: list[torch.nn.Parameter], towards: str) -> None:
    """The smallest change there is, to see how far rounding alone carries a run."""
    ways = {"up": (1, 1), "down": (-1, -1), "turns": (1, -1)}[towards]
    for number, p in enumerate(parameters):
        limit = torch.full_like(p.data, ways[number % 2] * torch.inf)
        p.data.copy_(torch.nextafter(p.data, limit))


if __name__ == "__main__":
    fault, flags = sys.argv[1], sys.argv[3:]
    raise SystemExit(run_to_exit(main, parse_or_exit(flags), Planted(fault, observer_asked_for())))
