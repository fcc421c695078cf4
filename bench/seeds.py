"""Accuracy over seeds: mean, standard deviation and 95 % confidence interval of the mean.

`python -m bench.seeds --runs 5 -- --model speednet --dataset cifar10` runs the ordinary trainer
with seeds 0 to 4. Counted is the evaluation after the last step, never the best epoch. With
`--tta 1|2` each finished run is evaluated again with test-time augmentation, and told apart.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev

from bench.measure import REPOSITORY, arguments_of, finish, table

# Student's t, two-sided 95 %, by degrees of freedom; between two rows the upper one, to be safe.
STUDENT = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
    10: 2.228, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980,
}  # fmt: skip


def statistics(values: list[float]) -> dict[str, float]:
    """Mean, sd and the half width of the interval; one value has neither (nan)."""
    n = len(values)
    sd = stdev(values) if n > 1 else math.nan
    t = STUDENT[max(df for df in STUDENT if df <= max(1, n - 1))]
    return {"n": n, "mean": fmean(values), "sd": sd, "half_width": t * sd / math.sqrt(n)}


def train(flags: list[str]) -> str:
    words = [sys.executable, "train.py", *flags]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def with_votes(flags: list[str], folder: Path, tta: int) -> float:
    """Accuracy of a finished run's last weights under test-time augmentation."""
    weights = ["--weights", str(folder / "last.safetensors"), "--eval-only", "--tta", str(tta)]
    return accuracy_said(train([*flags, *weights]))


def accuracy_said(text: str) -> float:
    """That of the test images, of what --eval-only prints; a balanced one may come before it."""
    found = re.search(r"test +[\d,]+ images: .*\baccuracy ([\d.]+)", text)
    assert found, text
    return float(found[1])


def markdown(results: dict) -> str:
    """A row for each way to evaluate; all of them share the seconds of training."""
    rows = []
    for name in results["values"]:
        r = results[name]
        interval = f" ± {100 * r['half_width']:.2f}" if r["n"] > 1 else ""
        sd = f"{100 * r['sd']:.2f}" if r["n"] > 1 else "-"
        took = f"{fmean(results['seconds']):.1f}"
        rows.append([name, r["n"], f"{100 * r['mean']:.2f} %{interval}", sd, took])
    return table(["accuracy", "n", "mean, 95 % interval", "sd", "seconds"], rows)


def main() -> int:
    parser = arguments_of(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tta", type=int, default=0, choices=(0, 1, 2))
    parser.add_argument("flags", nargs="*", help="after --: flags of the trainer")
    arguments = parser.parse_args()
    accuracies: dict[str, list[float]] = {"plain": []}
    seconds = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.runs):
            folder = Path(temporary) / str(seed)
            flags = [*arguments.flags, "--seed", str(seed)]
            train([*flags, "--tta", "0", "--run-dir", str(folder)])
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            accuracies["plain"].append(summary["test/accuracy"])
            seconds.append(summary["seconds"])
            if arguments.tta:
                name = f"tta {arguments.tta}"
                voted = with_votes(flags, folder, arguments.tta)
                accuracies.setdefault(name, []).append(voted)
            said = ", ".join(f"{name} {100 * v[-1]:.2f} %" for name, v in accuracies.items())
            print(f"seed {seed}: {said}, {seconds[-1]:.1f} s", flush=True)
    results = {name: statistics(values) for name, values in accuracies.items()}
    results |= {"seconds": seconds, "values": accuracies}
    print("\n" + markdown(results))
    finish(arguments, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
