"""Is it the same run on 1, 2 and 4 processes? `python -m bench.verify --model resnet18`.

Runs the ordinary trainer on each number of processes, and three controls on one process whose
weights start one unit in the last place away: all upwards, all downwards, in turns. Index streams
and augmented pixels must be equal; losses, gradient norms, final weights and evaluation must agree
within 1e-6 at the first step and within three times the farthest control's distance after it.
Prints the first divergence and its class: data, augmentation, forward, reduction or evaluation.
Exit status 0: the same run; 1: not.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file

from launch.preloaded import Interpreter
from models import lookup
from training.recorder import read_all

REPOSITORY = Path(__file__).resolve().parent.parent
FIRST_STEP = 1e-6  # relative; before the first update only the order of additions differs
TIMES_CONTROL = 3.0
CONTROLS = ("up", "down", "turns")  # of bench/planted.py
GENTLE = 0.02  # of the recipe's learning rate: at full rate rounding alone grows to percents


class Launcher:
    """Starts runs of the ordinary trainer; without a GPU all are forks of one interpreter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        forks = hasattr(os, "fork") and not torch.cuda.is_available()  # CUDA survives no fork
        self.interpreter = Interpreter(self.env) if forks else None

    def run(self, name: str, processes: int, plant: str, flags: list[str]) -> Path:
        """One run; its folder, with what it recorded in `NAME-record` beside it."""
        run, log = self.folder / name, self.folder / f"{name}.log"
        words = ["-m", "bench.planted", plant, "--", *flags, "--run-dir", str(run)]
        env = self.env | {"LOCKSTEP_RECORD": str(self.folder / f"{name}-record")}
        if self.interpreter:
            status = self.interpreter.start(words, REPOSITORY, log, processes, env).wait()
        else:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            torchrun += ["--nproc-per-node", str(processes)]
            words = [sys.executable, *(torchrun if processes > 1 else []), *words]
            with log.open("w") as file:
                done = subprocess.run(words, cwd=REPOSITORY, env=env, stdout=file, stderr=file)
            status = done.returncode
        if status:
            said = log.read_text()[-3000:]
            raise SystemExit(f"the run on {processes} processes failed:\n{said}")
        return run

    def close(self) -> None:
        if self.interpreter:
            self.interpreter.close()


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def step_losses(shards: dict) -> dict[int, float]:
    steps: dict[int, list[float]] = {}
    for (step, _), row in sorted(shards.items()):
        steps.setdefault(step, []).append(row["loss"])
    return {step: math.fsum(values) for step, values in steps.items()}


def length(tensors: Iterable[torch.Tensor]) -> float:
    """The Euclidean norm of all numbers of all tensors."""
    return math.sqrt(math.fsum(float(t.double().pow(2).sum()) for t in tensors))


def weight_distance(a: Path, b: Path) -> dict[str, float]:
    """Relative distance of all weights and of all running statistics at the end of two runs."""
    newest = [sorted((run / "checkpoints").glob("step-*"))[-1] for run in (a, b)]
    result = {}
    for file in sorted(p.name for p in newest[0].glob("*.safetensors") if "optim" not in p.name):
        one, two = (load_file(path / file) for path in newest)
        for kind in ("weights", "statistics"):
            names = [n for n in one if ("running_" in n) == (kind == "statistics")]
            names = [n for n in names if one[n].is_floating_point()]
            if names:
                apart = math.sqrt(
                    sum(float((one[n] - two[n]).double().pow(2).sum()) for n in names)
                )
                size = math.sqrt(sum(float(one[n].double().pow(2).sum()) for n in names))
                result[f"{file.removesuffix('.safetensors')} {kind}"] = apart / max(size, 1e-30)
    return result


def evaluations(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row["test/loss"] for row in map(json.loads, lines) if "test/loss" in row]


def distances(base: Path, other: Path) -> tuple[dict[str, list[float]], str]:
    """Distance series by class, and the first exact difference of data or pixels ('' if none)."""
    (ours, our_updates, _), (theirs, their_updates, evaluated) = (
        read_all(f"{run}-record") for run in (base, other)
    )
    first = ""
    if ours.keys() != theirs.keys():
        first = f"data: {len(theirs)} shards were computed instead of {len(ours)}"
    for key in sorted(ours.keys() & theirs.keys()):
        if first:
            break
        where = f"step {key[0]}, shard {key[1]}"
        if ours[key]["indices"] != theirs[key]["indices"]:
            first = f"data: other samples at {where}"
        elif ours[key]["pixels"] != theirs[key]["pixels"]:
            first = f"augmentation: other pixels at {where}"
    for step, states in sorted(evaluated.items()):
        if len(states) > 1 and not first:
            first = f"evaluation: the processes hold {len(states)} different models at step {step}"
    losses = step_losses(ours), step_losses(theirs)
    series = {
        "forward": [relative(losses[0][s], losses[1].get(s, math.inf)) for s in losses[0]],
        "reduction": [
            relative(row["norm"], their_updates.get(step, {"norm": math.inf})["norm"])
            for step, row in sorted(our_updates.items())
        ],
        "evaluation": [
            relative(a, b) for a, b in zip(evaluations(base), evaluations(other), strict=True)
        ],
    }
    for name, value in weight_distance(base, other).items():
        series[f"final {name}"] = [value]
    return series, first


def judge(series: dict, control: dict) -> tuple[str, float]:
    """The first divergence in words ('' if none), and the largest multiple of the control."""
    found, worst = "", 0.0
    for name, values in series.items():
        reach = 0.0
        for step, value in enumerate(values):
            reach = max(reach, control[name][step])
            exact = step == 0 and name in ("forward", "reduction")
            allowed = FIRST_STEP if exact else max(TIMES_CONTROL * reach, FIRST_STEP)
            worst = max(worst, value / max(reach, FIRST_STEP / TIMES_CONTROL))
            if not value <= allowed and not found:
                found = f"{name}: {value:.2e} at place {step}, allowed {allowed:.2e}"
    return found, worst


def verify(
    model: str, processes: list[int], steps: int, plants: list[str], extra: list[str]
) -> int:
    shards = max(4, *processes)
    lr = float(lookup(model).recipe["lr"]) * GENTLE
    flags = ["--model", model, "--dataset", "synthetic", "--limit", str(32 * steps), "--seed", "1"]
    flags += ["--batch-size", str(8 * shards), "--shards", str(shards), "--epochs", "2"]
    flags += ["--stop-after", str(steps), "--ema", "0.9", "--threads", "1", "--warmup", "0"]
    flags += ["--augment", "crop", "--max-time", "1h", "--no-plots", "--lr", str(lr), *extra]
    status = 0
    with (
        tempfile.TemporaryDirectory() as temporary,
        contextlib.closing(Launcher(Path(temporary))) as launcher,
    ):
        base = launcher.run("base", 1, "none", flags)

        def compare(name: str, processes: int, plant: str) -> tuple[dict[str, list[float]], str]:
            """The distances of one more run, whose folder goes at once: gigabytes for vgg11."""
            other = launcher.run(name, processes, plant, flags)
            try:
                return distances(base, other)
            finally:
                shutil.rmtree(other)

        controls = [compare(name, 1, name)[0] for name in CONTROLS]
        control = {
            name: [max(values) for values in zip(*(one[name] for one in controls), strict=True)]
            for name in controls[0]
        }
        for plant in plants:
            for count in processes:
                if count == 1 and plant == "none":
                    continue
                series, first = compare(f"{plant}-on-{count}", count, plant)
                found, worst = judge(series, control)
                status = max(status, int(bool(first or found)))
                planted = "" if plant == "none" else f", planted fault: {plant}"
                print(f"{model} on {count} processes, {shards} shards, {steps} steps{planted}")
                print(f"    verdict: {first or found or 'the same run'}")
                for name, values in series.items():
                    reach = max(control[name])
                    print(f"    {name:22} largest {max(values):.2e}   control {reach:.2e}")
                print(f"    largest multiple of the control: {worst:.1f}", flush=True)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--processes", default="1,2,4", help="numbers of processes to compare")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--plant", default="none", help="faults of bench/planted.py")
    arguments, extra = parser.parse_known_args()
    processes = [int(n) for n in arguments.processes.split(",")]
    plants = arguments.plant.split(",")
    return verify(arguments.model, processes, arguments.steps, plants, extra)


if __name__ == "__main__":
    sys.exit(main())
