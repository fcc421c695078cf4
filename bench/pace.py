"""What naming stragglers costs, whom it names in an even run, and whom beside a busy core.

One run of two processes trains a tiny model, whose step is nearly all the host's: the worst case.
In windows of its steps, in turned order, it has its pace (distributed/pace.py) and one that does
nothing; ratios are taken pair by pair, of CPU time (user and system of both processes) and of the
clock. Then even runs of a small network, with a row each five steps so that the judge has every
chance to err: on two processes, on three, and on two beside a process that never rests, which
begins when a third of the run is done; there once as the system places them, once with each process
held to a core and the busy one on the last's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bench.cost import FLAGS as TINY_FLAGS
from bench.cost import interval
from bench.measure import REPOSITORY, arguments_of, finish, table
from config import parse_or_exit
from distributed.checkpoint import Progress
from distributed.pace import Pace
from distributed.world import World
from report.ending import run_to_exit
from train import main as train_main
from training.data import Batch, Data
from training.learner import Learner
from training.observer import Observer
from training.schedule import Schedule

WARM, STEPS = 22, 44  # of a window: one epoch, and two
WHAT = {"cpu": "CPU µs a step, both processes", "wall": "µs a step, by the clock"}
TINY = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 32), nn.ReLU())
        self.head = nn.Linear(32, num_classes)

    def forward(self, x):
        return self.head(self.body(x))
"""
ROW = 5  # steps: as often as the judge takes them
OWN = f"--log-every {ROW} --snapshot-every off --epochs 1000000 --eval-every 1000000"
EVEN = "--model my_cnn --dataset digits --image-size 32 --batch-size 48 --threads 1 --no-plots"
EVEN += f" --epochs 1000000 --eval-every 1000000 --log-every {ROW} --lr 0.001"


class NoPace(Pace):
    """Times nothing, tells nothing, judges nobody."""

    def follow(self, parameters: Iterable) -> None: ...
    def asks(self, first: bool = False) -> None: ...
    def lap(self) -> None: ...
    def shard_done(self, waits: bool) -> None: ...

    def numbers(self, like: Tensor) -> Tensor:
        return like[:0]


class Windows(Observer):
    """An ordinary run whose pace is there, or not, in windows of its steps that take turns."""

    def __init__(self, world: World, pairs: int, file: Path) -> None:
        self.world, self.file = world, file
        self.order = [turn for pair in range(pairs) for turn in (pair % 2, 1 - pair % 2)]
        self.window, self.done = -1, WARM + STEPS  # the first begins with the first step
        self.mark = (0.0, 0.0)

    def started(self, learner: Learner, data: Data, schedule: Schedule, progress: Progress) -> None:
        self.learner = learner

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self.done == WARM + STEPS:
                self._change()
            elif self.done == WARM:
                self.mark = time.process_time(), time.perf_counter()
            self.done += 1
            yield batch

    def _change(self) -> None:
        if self.window >= 0:
            now = time.process_time(), time.perf_counter()
            took = [1e6 * (b - a) / STEPS for a, b in zip(self.mark, now, strict=True)]
            with self.file.open("a", encoding="utf-8") as file:
                print(json.dumps([self.order[self.window], *took]), file=file)
        self.window, self.done = self.window + 1, 0
        if self.window < len(self.order):
            self._take(Pace if self.order[self.window] else NoPace)

    def _take(self, kind: type[Pace]) -> None:
        world, learner = self.world, self.learner
        world.pace.let_go()
        pace = kind(world.process_index, world.num_processes, world.device)
        pace.shares = learner.batch.shares
        world.pace = learner.pace = learner.shards.pace = pace
        pace.follow(learner.parameters)


def windows(pairs: int, folder: Path, flags: list[str]) -> int:
    """One process of the run that takes turns."""

    def run(world: World, _: Observer) -> int:
        file = folder / f"windows-{world.process_index}.jsonl"
        return train_main(world, Windows(world, pairs, file))

    return run_to_exit(run, parse_or_exit(flags))


def launch(words: list[str], processes: int, folder: Path, **env: str) -> float:
    """Run under torchrun; its seconds. SystemExit with its words where it fails."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={processes}", *words]
    own = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    own |= {"ACCELERATE_USE_CPU": "true"} | env
    began, log = time.perf_counter(), folder / "log.txt"
    with log.open("w") as file:
        done = subprocess.run(torchrun, cwd=folder, env=os.environ | own, stdout=file, stderr=file)
    if done.returncode:
        raise SystemExit(f"it went wrong:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - began


def calls_alone(steps: int = 20_000) -> float:
    """µs that the calls of a step take where nothing else runs between them, rows included."""
    took = {}
    for kind in (NoPace, Pace):
        pace, like = kind(0, 2, torch.device("cpu")), torch.zeros(1)
        parameter = torch.nn.Parameter(like.clone())
        pace.asks(first=True)
        began = time.process_time()
        for step in range(steps):
            for _ in range(3):
                pace.lap()
            if kind is Pace:
                pace.arrived(parameter)
            pace.shard_done(waits=True)
            pace.asks()
            if step % ROW == ROW - 1:
                numbers = pace.numbers(like).tolist()
                pace.hear(numbers[: len(numbers) // 2] * 2)
                pace.judge(step, "rank {}".format)
        took[kind] = time.process_time() - began
    return 1e6 * (took[Pace] - took[NoPace]) / steps


def overhead(pairs: int, folder: Path) -> dict:
    """Ratios of a step with pace to one without, each pair's."""
    (folder / "tiny.py").write_text(TINY)
    steps = 2 * pairs * (WARM + STEPS) + 1
    flags = f"--model tiny.py:Net {TINY_FLAGS} {OWN} --max-steps {steps} --run-dir tiny".split()
    own = ["--worker", str(folder), "--pairs", str(pairs), "--"]
    launch(["-m", "bench.pace", *own, *flags], 2, folder)
    windows = [
        [json.loads(line) for line in (folder / f"windows-{rank}.jsonl").open()]
        for rank in range(2)
    ]
    measures = {}
    for place, what in enumerate(WHAT, 1):
        both = [
            (one[0], one[place] + other[place] if what == "cpu" else one[place])
            for one, other in zip(*windows, strict=True)
        ]
        series = {kind: [value for has, value in both if has == kind] for kind in (0, 1)}
        ratios = [a / b for a, b in zip(series[1], series[0], strict=True)]
        measures[what] = {
            "without": median(series[0]), "with": median(series[1]), "ratio": interval(ratios),
            "ratios": ratios,
        }  # fmt: skip
    return {"pairs": pairs, "steps of a window": STEPS, "measures": measures,
            "calls": calls_alone()}  # fmt: skip


BUSY = "import os, sys\nif len(sys.argv) > 1: os.sched_setaffinity(0, {int(sys.argv[1])})\n"
BUSY += "while True: pass"


class Beside(threading.Thread):
    """Begins to be busy, on some core, when the rows of a run have come to a step."""

    def __init__(self, rows: Path, step: int, where: list[str]) -> None:
        super().__init__()
        self.rows, self.step, self.where = rows, step, where
        self.began: int | None = None
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            if (step := self._reached()) >= self.step:
                self.began = step
                other = subprocess.Popen([sys.executable, "-c", BUSY, *self.where])
                self.over.wait()
                other.kill()
                other.wait()

    def _reached(self) -> int:
        if not self.rows.exists():
            return 0
        with self.rows.open("rb") as file:
            file.seek(max(0, self.rows.stat().st_size - 2000))
            lines = file.read().split(b"\n")
        return json.loads(lines[-2])["step"] if len(lines) > 2 else 0

    def end(self) -> None:
        self.over.set()
        self.join()


def even(steps: int, processes: int, folder: Path, busy: bool = False, held: bool = False) -> dict:
    """One ordinary run: who was named, and why."""
    folder.mkdir()
    env, cores = {}, sorted(os.sched_getaffinity(0))
    if held:
        (folder / "sitecustomize.py").write_text(
            f"import os\nif 'LOCAL_RANK' in os.environ:\n    os.sched_setaffinity(0, "
            f"{{{cores}[int(os.environ['LOCAL_RANK']) % {len(cores)}]}})\n"
        )
        env = {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{folder}"}
    where = [str(cores[(processes - 1) % len(cores)])] if held else []
    beside = Beside(folder / "run/metrics.jsonl", steps // 3 if busy else steps + 1, where)
    beside.start()
    try:
        flags = [*EVEN.split(), "--max-steps", str(steps), "--run-dir", "run"]
        seconds = launch([str(REPOSITORY / "train.py"), *flags], processes, folder, **env)
    finally:
        beside.end()
    status = json.loads((folder / "run/status.json").read_text())
    slow = [found for life in status["lives"] for found in life.get("slow", ())]
    return {"processes": processes, "steps": steps, "seconds": seconds, "busy": busy,
            "held": held, "busy from": beside.began, "judged": steps // ROW - 5,
            "slow": slow}  # fmt: skip


def cost(results: dict) -> str:
    rows = []
    for name, values in results["overhead"]["measures"].items():
        r = values["ratio"]
        ratio = f"{r['median']:.4f} ({r['low']:.4f}-{r['high']:.4f})"
        rows.append([WHAT[name], f"{values['without']:.0f}", f"{values['with']:.0f}", ratio])
    rows.append(["its calls alone, CPU µs a step", "", f"{results['overhead']['calls']:.1f}", ""])
    head = [f"{results['overhead']['pairs']} pairs of windows of {STEPS} steps", "without", "with"]
    return table([*head, "with/without, 95 % interval"], rows)


def named(results: dict) -> str:
    rows = []
    for run in results["even"]:
        since = f" from step {run['busy from']} on" if run.get("busy from") else ""
        beside = f"a busy process{since}" if run["busy"] else ""
        beside += ", each held to a core, the busy one on the last's" if run["held"] else ""
        slow_ones = []
        for slow in run["slow"]:
            until = "to the end" if slow["until"] is None else f"to {slow['until']}"
            when, late = f"from step {slow['since']} {until}", 1e3 * slow["seconds"]
            slow_ones.append(
                f"rank {slow['rank']} in {slow['reason']} {when}, {late:.1f} ms a step"
            )
        rows.append([f"{run['processes']} processes", beside or "nothing of ours", run["steps"],
                     f"{1e3 * run['seconds'] / run['steps']:.0f}", len(slow_ones),
                     "; ".join(slow_ones) or "nobody"])  # fmt: skip
    head = [
        "",
        "beside",
        "steps",
        "ms a step, start and end with it",
        "named",
        "who, why, how long",
    ]
    return table(head, rows)


def main() -> int:
    parser = arguments_of(__doc__)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--steps", type=int, default=2000, help="of each even run")
    parser.add_argument("--busy-steps", type=int, default=600, help="of each beside a busy core")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    if arguments.worker:
        return windows(arguments.pairs, Path(arguments.worker), [f for f in flags if f != "--"])
    if flags:
        parser.error(f"not known: {' '.join(flags)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        results: dict = {"load": os.getloadavg()[0], "overhead": overhead(arguments.pairs, folder)}
        print(cost(results), flush=True)
        results["even"] = []
        for number, (steps, processes, busy, held) in enumerate((
            (arguments.steps, 2, False, False), (arguments.steps, 3, False, False),
            (arguments.busy_steps, 2, True, False), (arguments.busy_steps, 2, True, True),
        )):  # fmt: skip
            found = even(steps, processes, folder / str(number), busy, held)
            results["even"].append(found)
            print(f"\n{named({'even': [found]})}", flush=True)
    finish(arguments, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
