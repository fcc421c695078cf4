"""What only a GPU can show: keyed numbers equal the CPU's, the loop never waits, exact repeats.

`python -m bench.gpu_checks keyed|waits|repeats`. `waits` lets torch raise an error at whatever
makes the host wait for the device, in steps of the ordinary trainer that write no row.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from config import parse_or_exit
from data.augment import Augment
from data.keyed_random import AUGMENT, uniforms

QUIET_STEPS = range(3, 10)  # the first steps warm up, the last one writes a row
SMALL = ["--dataset", "synthetic", "--weights", "none", "--log-every", "1000", "--epochs", "1"]
SMALL += ["--batch-size", "64"]  # of 2,048 images: enough steps


def keyed() -> str:
    """Uniform numbers equal bit for bit, augmented images to rounding."""
    samples = torch.arange(50_000)
    cpu = uniforms(7, 3, samples, 8, AUGMENT)
    gpu = uniforms(7, 3, samples.cuda(), 8, AUGMENT)
    if not torch.equal(cpu, gpu.cpu()):
        raise SystemExit("keyed numbers on the GPU differ from those on the CPU")
    images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)
    largest = 0.0
    for kind in ("flip", "crop", "translate", "resized_crop"):
        augment = Augment(kind, 32, (0.5,) * 3, (0.25,) * 3, seed=1, cutout=8)
        here = augment.train(images, samples[:256], 2)
        there = augment.train(images.cuda(), samples[:256].cuda(), 2)
        largest = max(largest, float((here - there.cpu()).abs().max()))
    if largest > 0.02:  # TF32 in the two matrix products of resized_crop
        raise SystemExit(f"augmented images differ by {largest} from those of the CPU")
    return f"400,000 keyed numbers equal; augmented images differ by at most {largest:.1e}"


def train(flags: list[str]) -> int:
    """Run the ordinary trainer; the number of its steps that were watched for waits."""
    import run
    from train import main

    watched = 0

    class Watched(run.Run):
        def batches(self):
            nonlocal watched
            for number, batch in enumerate(super().batches()):
                watching = number in QUIET_STEPS and "--deterministic" not in flags
                torch.cuda.set_sync_debug_mode("error" if watching else "default")
                watched += watching
                yield batch

    run.Run = Watched
    status = run.guarded(main, parse_or_exit(flags))
    if status:
        raise SystemExit(status)
    return watched


def waits(model: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        steps = str(QUIET_STEPS.stop + 1)
        flags = [*SMALL, "--model", model, "--max-steps", steps, "--run-dir", f"{folder}/run"]
        if (watched := train(flags)) < len(QUIET_STEPS):
            raise SystemExit(f"{model}: only {watched} steps of {len(QUIET_STEPS)} were watched")
    return f"{model}: the host waits for nothing in {len(QUIET_STEPS)} steps"


def repeats(model: str) -> str:
    """Two runs under --deterministic write the same losses."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("one", "two"):
            flags = [*SMALL, "--model", model, "--deterministic", "--max-steps", "8"]
            train([*flags, "--log-every", "1", "--run-dir", f"{folder}/{name}"])
            lines = (Path(folder) / name / "metrics.jsonl").read_text().splitlines()
            rows.append([json.loads(line).get("train/loss") for line in lines])
    if rows[0] != rows[1]:
        raise SystemExit(f"{model} --deterministic: two runs differ: {rows}")
    return f"{model} --deterministic: {len(rows[0])} losses equal in two runs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("check", choices=("keyed", "waits", "repeats"))
    parser.add_argument("--model", default="alexnet")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this check needs a CUDA GPU")
    if arguments.check == "keyed":
        print(keyed())
    else:
        print({"waits": waits, "repeats": repeats}[arguments.check](arguments.model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
