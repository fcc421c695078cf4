"""CPU seconds of a start and of a step, beside another commit: `python -m bench.cost COMMIT`.

In each pair both trees train the same tiny model, started cold. The model itself tells what the
process has spent when it is called for the 20th time, which is the start, and a thousand steps
later: nearly all of such a step is the host's. What counts is the CPU time of user and system,
which other work on the machine hardly moves; images per second go by the clock. The tree of the
other commit is taken from this clone's history.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.golden import take
from bench.measure import REPOSITORY, arguments_of, finish, table

FIRST, BATCH = 20, 64
WHAT = ("start and 20 steps, CPU s", "a step, CPU µs", "images/s")
TINY = """
import os, time
from torch import nn


class Net(nn.Module):
    calls = 0

    def __init__(self, num_classes=10):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 32), nn.ReLU())
        self.head = nn.Linear(32, num_classes)

    def forward(self, x):
        if self.training:
            Net.calls += 1
            if Net.calls in (FIRST, LAST):
                with open("times.txt", "a") as file:
                    print(time.process_time(), time.perf_counter(), file=file)
            if Net.calls == LAST:
                os._exit(0)
        return self.head(self.body(x))
"""
FLAGS = f"--dataset digits --image-size 8 --batch-size {BATCH} --threads 1 --epochs 1000"
FLAGS += " --eval-every 1000 --checkpoint-every 100000 --augment crop --no-plots"


def run(tree: Path, folder: Path, steps: int) -> tuple[float, float, float]:
    """CPU seconds until the first call that tells, CPU µs of a step after it, images per second."""
    times, log = folder / "times.txt", folder / "log.txt"
    times.unlink(missing_ok=True)
    words = [sys.executable, str(tree / "train.py"), "--model", "tiny.py:Net", *FLAGS.split()]
    words += ["--run-dir", "run", "--fresh"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's second start compiles nothing
    with log.open("w") as file:
        done = subprocess.run(words, cwd=folder, env=env, stdout=file, stderr=file)
    if done.returncode:
        raise SystemExit(f"{tree}/train.py failed:\n{log.read_text()[-3000:]}")
    (start, began), (end, ended) = (map(float, line.split()) for line in times.open())
    return start, 1e6 * (end - start) / steps, BATCH * steps / (ended - began)


def interval(values: list[float]) -> dict[str, float]:
    """Median and, whatever the distribution, an interval that holds the true one in 95 of 100.

    Between the k-th smallest and the k-th largest value, k from the binomial distribution.
    """
    ordered, n = sorted(values), len(values)
    chance, k, ways = 0.0, 0, 1
    while k < n and chance + ways / 2**n <= 0.025:  # P(fewer than k + 1 lie below the median)
        chance += ways / 2**n
        ways = ways * (n - k) // (k + 1)
        k += 1
    k = max(k, 1)
    return {"median": median(values), "low": ordered[k - 1], "high": ordered[-k], "n": n}


def markdown(results: dict) -> str:
    rows = []
    for name, values in results["measures"].items():
        r, digits = values["ratio"], 2 if "start" in name else 0
        ratio = f"{r['median']:.3f} ({r['low']:.3f}-{r['high']:.3f})"
        rows.append([name, f"{values['old']:.{digits}f}", f"{values['new']:.{digits}f}", ratio])
    return table(["", results["commit"], "this tree", "new/old, 95 % interval"], rows)


def main() -> int:
    parser = arguments_of(__doc__)
    parser.add_argument("commit", help="of this clone's history")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, other = Path(temporary), Path(temporary, "tree")
        other.mkdir()
        take(arguments.commit, other)
        text = TINY.replace("FIRST", str(FIRST)).replace("LAST", str(FIRST + arguments.steps))
        (folder / "tiny.py").write_text(text)
        trees = {"old": other, "new": REPOSITORY}
        for tree in trees.values():  # compiles the modules
            run(tree, folder, arguments.steps)
        for pair in range(arguments.pairs):
            measured = []
            for name in sorted(trees, reverse=bool(pair % 2)):
                values = run(trees[name], folder, arguments.steps)
                measured.append(f"{name} {' '.join(f'{value:.3f}' for value in values)}")
                for what, value in zip(WHAT, values, strict=True):
                    found.setdefault(what, {"old": [], "new": []})[name].append(value)
            said = "; ".join(sorted(measured))
            print(f"pair {pair + 1} of {arguments.pairs}: {said}", file=sys.stderr, flush=True)
    measures = {}
    for what, series in found.items():
        ratios = [new / old for new, old in zip(series["new"], series["old"], strict=True)]
        medians = {name: median(values) for name, values in series.items()}
        measures[what] = {**medians, "ratio": interval(ratios), "series": series}
    results = {"commit": arguments.commit, "pairs": arguments.pairs, "measures": measures}
    print(f"Medians of {arguments.pairs} pairs:\n\n{markdown(results)}")
    finish(arguments, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
