"""What a checkpoint costs: seconds a step has to wait, and the share of a run.

AlexNet's 61 million parameters with AdamW's state (733 MB). A step waits for the copy to host
memory; the rest is written by a thread, which slows the steps beside it. Goal: less than 1 % of a
run that saves every five minutes.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from bench.measure import arguments_of, finish, shown, spread, synchronize, table
from distributed.checkpoint import Progress, Writer, capture
from models import build_model


def markdown(results: dict) -> str:
    rows = [
        ["written, MB", f"{results['megabytes']:.0f}"],
        ["a step waits, s", shown(results["stall"])],
        ["written beside the steps, s", shown(results["write"])],
        ["those steps take longer by, s", shown(results["steps slowed by"])],
        [f"share of a run that saves every {results['every']:.0f} s, %",
         shown({k: v if k == "n" else 100 * v for k, v in results["share"].items()})],
    ]  # fmt: skip
    return table(["a checkpoint", "median (range)"], rows)


def measure(arguments: argparse.Namespace) -> dict:
    """Seconds and megabytes of so many saves while a model trains."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = arguments.image_size
    model = build_model(arguments.model, num_classes=1000, image_size=size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(arguments.batch_size, 3, size, size, device=device)

    def step() -> float:
        began = time.perf_counter()
        model(images).logsumexp(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        return time.perf_counter() - began

    step()
    stalls, writes, slowed, shares = [], [], [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        writer = Writer(Path(folder), keep=1, on_done=lambda _: None)
        for number in range(arguments.rounds):
            alone = median(step() for _ in range(3))
            began = time.perf_counter()
            files = capture(model, optimizer)
            writer.start(files, Progress(step=number + 1), {})
            stalls.append(time.perf_counter() - began)
            beside = []
            while writer.busy():
                beside.append(step())
            writer.wait()
            if writer.error:
                raise SystemExit(writer.error)
            writes.append(time.perf_counter() - began - stalls[-1])
            slowed.append(sum(beside) - len(beside) * alone)
            shares.append((stalls[-1] + max(0.0, slowed[-1])) / arguments.every)
        writer.end()
    megabytes = sum(t.numel() * t.element_size() for part in files.values() for t in part.values())
    return {
        "stall": spread(stalls), "write": spread(writes), "steps slowed by": spread(slowed),
        "share": spread(shares), "stall share": spread([s / arguments.every for s in stalls]),
        "megabytes": megabytes / 1e6, "every": arguments.every,
    }  # fmt: skip


def main() -> int:
    parser = arguments_of(__doc__)
    parser.add_argument("--model", default="alexnet")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="saves")
    parser.add_argument("--every", type=float, default=300.0, help="seconds between saves of a run")
    parser.add_argument("--folder", help="where to write; the disk of the runs is what counts")
    arguments = parser.parse_args()
    results = measure(arguments)
    print(f"Median (range) of {arguments.rounds} saves:\n")
    print(markdown(results))
    finish(arguments, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
