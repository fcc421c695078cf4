"""What a kill -9 costs: a small training under launch/torchrun.sh, one of whose ranks is killed.

Each kill is taken apart: until the last process of that life is gone (detect), until the agent has
started the next ones (restart), until those have imported the packages, met and opened the run
folder (import), until they stand before their first step (load), and until the step is reached
again at which the victim died (repeat). `expected` makes the losses of larger runs of it.
"""

import argparse
import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from bench.measure import REPOSITORY, arguments_of, finish, shown, spread, table
from common.disk import read_json
from report.doctor import resumed

FLAGS = "--model my_cnn --dataset digits --image-size 32 --batch-size 64 --threads 1 --log-every 1"
FLAGS += " --no-plots --epochs 1000000 --eval-every 1000000"
PARTS = ("detect", "restart", "import", "load", "repeat")
LOOK = 0.02  # seconds between two looks at files and processes
PATIENCE = 300.0  # seconds for what takes a few
# Interruptions of a GPU's day. Llama 3 405B: 419 that nobody had planned in 54 days on 16,384 H100
# (arXiv 2407.21783, section 3.3.4).
PER_GPU_DAY = 419 / (54 * 16_384)
SIZES = (8, 64, 1_024)
DAY = 86_400.0


def markdown(results: dict) -> str:
    """Seconds of each part of a kill."""
    rows = [[part, shown(results[part])] for part in (*PARTS, "in all")]
    rows.append(["steps made again", shown(results["steps"], 0)])
    rows.append(["load average of the machine then", f"{results['load of the machine']:.1f}"])
    return table([f"of {results['detect']['n']} kills", "seconds, median (range)"], rows)


def expected(results: dict) -> str:
    """What runs of other sizes lose by kills of this cost; and without snapshots, by disk alone."""
    cost = results["in all"]["median"] - results["repeat"]["median"]
    disk = results["checkpoint every"] / 2
    rows = []
    for size in SIZES:
        per_day = size * PER_GPU_DAY
        lost = per_day * results["in all"]["median"]
        lost_by_disk = per_day * (cost + disk)
        rows.append([
            f"{size:,}", f"{1 / per_day:,.1f}", f"{lost:.3g} s ({100 * lost / DAY:.2g} %)",
            f"{lost_by_disk:.3g} s ({100 * lost_by_disk / DAY:.2g} %)",
        ])  # fmt: skip
    head = ["GPUs", "days between two kills", "lost a day", "lost a day, from the disk alone"]
    return table(head, rows)


def wait_for(condition: Callable[[], bool], launch: subprocess.Popen, log: Path) -> float:
    """The time at which a condition holds; SystemExit with the launch's words if it never does."""
    end = time.time() + PATIENCE
    while not condition():
        if launch.poll() is not None or time.time() > end:
            raise SystemExit(f"it went wrong:\n{log.read_text()[-3000:]}")
        time.sleep(LOOK)
    return time.time()


def places(run: Path) -> dict[int, int]:
    """Rank -> process, as the heartbeats say."""
    found = [read_json(path, {}) for path in (run / "crash").glob("heartbeat-*.json")]
    return {place["rank"]: place["pid"] for place in found if place}


def one_kill(
    run: Path, launch: subprocess.Popen, log: Path, chance: random.Random, seconds: float
) -> dict[str, float]:
    """Let it train for a while, kill a rank and watch the next life until it is where it was."""

    def status() -> dict:
        return read_json(run / "status.json", {})

    life = status().get("life", 0)
    time.sleep(chance.uniform(1.0, seconds))
    before, step = places(run), status()["step"]
    os.kill(before[chance.choice(sorted(before))], signal.SIGKILL)
    killed = time.time()
    gone = wait_for(lambda: not any(map(running, before.values())), launch, log)
    new: list[psutil.Process] = []

    def started() -> bool:
        with contextlib.suppress(psutil.Error):
            new[:] = [p for p in psutil.Process(launch.pid).children(recursive=True) if trains(p)]
        return len(new) == len(before)

    wait_for(started, launch, log)
    born = max(process.create_time() for process in new)
    numbers = {process.pid for process in new}
    opened = wait_for(lambda: set(places(run).values()) == numbers, launch, log)
    wait_for(lambda: status()["life"] == life + 1 and status()["step"] > resumed(status()),
             launch, log)  # fmt: skip
    last = status()["lives"][-1]
    ready = last["born"] + last["seconds"]["start"]
    again = wait_for(lambda: status()["step"] >= step, launch, log)
    parts = {"detect": gone - killed, "restart": max(0.0, born - gone), "import": opened - born,
             "load": ready - opened, "repeat": again - ready, "in all": again - killed}  # fmt: skip
    return {**parts, "steps": step - last["step"]}


def running(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def trains(process: psutil.Process) -> bool:
    """Whether this is a rank: it runs train.py, and no launcher's module."""
    words = process.cmdline()
    return any(w.endswith("train.py") for w in words) and "torch.distributed.run" not in words


def measure(arguments: argparse.Namespace) -> dict:
    """Every kill of one run, part by part."""
    chance, kills = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder, "run"), Path(folder, "log")
        words = [
            "bash",
            str(REPOSITORY / "launch" / "torchrun.sh"),
            "--nproc",
            "2",
            "--id",
            "kills",
        ]
        words += ["--max-restarts", str(arguments.kills + 1), "--", *shlex.split(FLAGS)]
        env = os.environ | {"LOCKSTEP_PYTHON": sys.executable}
        with log.open("w") as file:
            launch = subprocess.Popen(
                [*words, "--run-dir", str(run)], cwd=folder, env=env, stdout=file, stderr=file
            )
        try:
            wait_for(lambda: read_json(run / "status.json", {}).get("step", 0) > 20, launch, log)
            for number in range(arguments.kills):
                kills.append(one_kill(run, launch, log, chance, arguments.seconds))
                seconds = ", ".join(f"{name} {kills[-1][name]:.2f}" for name in (*PARTS, "in all"))
                print(f"kill {number + 1}: {seconds}; {kills[-1]['steps']} steps again", flush=True)
        finally:
            launch.terminate()
            launch.wait()
    spreads = {name: spread([kill[name] for kill in kills]) for name in kills[0]}
    return {**spreads, "checkpoint every": 300.0, "load of the machine": os.getloadavg()[1]}


def main() -> int:
    parser = arguments_of(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of training at most, before one"
    )
    parser.add_argument("--seed", type=int, default=0, help="when, and which rank")
    arguments = parser.parse_args()
    results = measure(arguments)
    print(markdown(results), expected(results), sep="\n\n")
    finish(arguments, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
