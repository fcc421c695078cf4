"""Seconds to --help, to a flag error, to the first step; against the bare imports.

The bare program imports torch, accelerate and rich, builds the same model and an optimizer (which
makes torch import its compiler) and does one step: what any trainer of this kind has to wait for.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measure import REPOSITORY, arguments_of, finish, ratio, shown, spread, table

BARE = """
import torch, accelerate, rich, safetensors.torch
from models import build_model
accelerate.Accelerator(cpu=not torch.cuda.is_available())
model = build_model({model!r}, num_classes=10, image_size={size})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model(torch.zeros({batch}, 3, {size}, {size})).sum().backward()
optimizer.step()
print("stepped", flush=True)
"""


def seconds_of(words: list[str], status: int) -> float:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True)
    took = time.perf_counter() - began
    if done.returncode != status:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return took


def seconds_to_bare_step(code: str) -> float:
    began = time.perf_counter()
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        took = time.perf_counter() - began
        process.kill()
    if line != "stepped\n":
        raise SystemExit(f"the bare program said {line!r}")
    return took


def seconds_to_first_step(flags: list[str]) -> float:
    """Until the first row stands in metrics.jsonl; then the run is killed."""
    with tempfile.TemporaryDirectory() as temporary:
        rows = Path(temporary) / "run" / "metrics.jsonl"
        words = [sys.executable, "train.py", *flags, "--run-dir", str(rows.parent)]
        began = time.perf_counter()
        process = subprocess.Popen(
            words, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not (rows.exists() and rows.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
            time.sleep(0.005)
        took = time.perf_counter() - began
        process.kill()
        process.wait()
    return took


def markdown(results: dict) -> str:
    return table(["", "seconds"], [[name, shown(values)] for name, values in results.items()])


def main() -> int:
    parser = arguments_of(__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model, size, batch = arguments.model, arguments.image_size, arguments.batch_size
    flags = ["--model", model, "--image-size", str(size), "--batch-size", str(batch)]
    flags += ["--dataset", "synthetic", "--weights", "none", "--log-every", "1"]
    bare = BARE.format(model=model, size=size, batch=batch)
    measurements = {
        "--help": lambda: seconds_of(["train.py", "--help"], 0),
        "flag error": lambda: seconds_of(["train.py", "--modle", "alexnet"], 2),
        "bare imports": lambda: seconds_to_bare_step(bare),
        "first step": lambda: seconds_to_first_step(flags),
    }
    series: dict[str, list[float]] = {name: [] for name in measurements}
    seconds_to_bare_step(bare)  # reads torch from the disk
    for turn in range(arguments.rounds):
        for name in sorted(measurements, reverse=bool(turn % 2)):
            series[name].append(measurements[name]())
    results = {name: spread(values) for name, values in series.items()}
    results["first step / bare imports"] = ratio(series["first step"], series["bare imports"])
    print(f"Seconds, median (range) of {arguments.rounds} rounds, {model}:\n")
    print(markdown(results))
    finish(arguments, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
