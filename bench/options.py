"""The step of the trainer, with each of its options the other way: what does each one bring?

One process for each row, all with the set-up of the ordinary run (bench.throughput's compute limit:
forward, backward and update on one batch); they take turns in windows of a few steps. A ratio
above 1 says that the trainer's own choice is the faster one.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bench.measure import (
    Arm,
    Gate,
    arguments_of,
    give_memory_back,
    ratio,
    shown,
    spread,
    table,
    take_turns,
)
from bench.throughput import Limit, flags_of, of_each_model
from config import parse_or_exit
from distributed.checkpoint import Progress
from report.ending import run_to_exit
from train import main as train_main
from training.data import Data
from training.learner import Learner
from training.schedule import Schedule

CPU = (
    "as trained", "other memory layout", "optimizer not fused", "memory given back", "bf16",
    "compiled", "loss read each step", "DDP", "DDP, gradients copied",
)  # fmt: skip
GPU = (
    "as trained", "other memory layout", "optimizer not fused", "fp32", "fp32 without TF32",
    "no cudnn.benchmark", "compiled", "loss read each step", "DDP", "DDP, gradients copied",
)  # fmt: skip
FLAGS = {
    "bf16": ["--mixed-precision", "bf16"],
    "fp32": ["--mixed-precision", "no"],
    "fp32 without TF32": ["--mixed-precision", "no"],
    "compiled": ["--compile"],
}


class Changed(Limit):
    """The limit's loop after one thing of the set-up was turned round."""

    def __init__(self, gate: Gate, option: str) -> None:
        super().__init__(gate, read=option == "loss read each step")
        self.option = option

    def started(self, learner: Learner, data: Data, schedule: Schedule, progress: Progress) -> None:
        match self.option:
            case "other memory layout":
                learner.channels_last = not learner.channels_last
                layout = torch.channels_last if learner.channels_last else torch.contiguous_format
                learner.bare.to(memory_format=layout)
            case "optimizer not fused":
                for group in learner.optimizer.param_groups:
                    group["fused"] = False
            case "memory given back":
                give_memory_back()
            case "no cudnn.benchmark":
                torch.backends.cudnn.benchmark = False
            case "fp32 without TF32":
                torch.set_float32_matmul_precision("highest")
                torch.backends.cudnn.allow_tf32 = False
            case "DDP" | "DDP, gradients copied":
                backend = "nccl" if torch.cuda.is_available() else "gloo"
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
                learner.model = DistributedDataParallel(
                    learner.model, gradient_as_bucket_view=self.option == "DDP",
                    broadcast_buffers=False,
                )  # fmt: skip
        super().started(learner, data, schedule, progress)


def measure(model: str, arguments: argparse.Namespace, folder: Path) -> dict:
    """Windows of all options: images per second, the ratio to "as trained", memory."""
    arms, left_out = {}, {}
    os.environ.pop("OMP_NUM_THREADS", None)
    try:
        for name in arguments.options:
            words = [sys.executable, "-m", "bench.options", "--arm", name, "--models", model]
            words += ["--folder", str(folder / name.replace(" ", "-"))]
            words += ["--steps", str(arguments.steps), "--batch-size", str(arguments.batch_size)]
            arms[name] = Arm(words, TORCHINDUCTOR_CACHE_DIR=str(folder / "compiled"))
        for name in list(arms):
            try:
                arms[name].ready().window()  # compiles, tunes
            except SystemExit as error:
                if name == "as trained":
                    raise
                left_out[name] = (str(error).strip().splitlines() or ["ended at once"])[-1]
                arms.pop(name).close()
        windows = take_turns(arms, arguments.rounds)
    finally:
        for arm in arms.values():
            arm.close()
    base = [w["speed"] for w in windows["as trained"]]
    found = {}
    for name, seen in windows.items():
        speeds = [w["speed"] for w in seen]
        found[name] = {
            "images_per_second": spread(speeds), "as trained/this": ratio(base, speeds),
            "host_mb": seen[-1]["host_mb"], "device_mb": seen[-1]["device_mb"],
        }  # fmt: skip
    return found | {name: {"left out": why} for name, why in left_out.items()}


def markdown(results: dict) -> str:
    """A row for each model and option."""
    rows = []
    for model, found in results.items():
        for name, seen in found.items():
            if "left out" in seen:
                rows.append([model, name, "left out: " + seen["left out"], "", ""])
                continue
            memory = f"{seen['host_mb']:.0f}"
            if seen["device_mb"]:
                memory += f", GPU {seen['device_mb']:.0f}"
            speed, times = shown(seen["images_per_second"], 1), shown(seen["as trained/this"])
            rows.append([model, name, speed, times, memory])
    head = ["", "option", "images/s", "as trained / this", "peak MB"]
    return table(head, rows)


def main() -> int:
    names = GPU if torch.cuda.is_available() else CPU
    parser = arguments_of(__doc__)
    parser.add_argument("--models", default="my_cnn,alexnet,resnet18")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a window")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--options", default=";".join(names), help="with ; between")
    parser.add_argument("--arm", help="be one of the measured processes")
    parser.add_argument("--folder", help="the measured run's folder")
    arguments = parser.parse_args()
    if arguments.arm:
        option, model = arguments.arm, arguments.models
        gate = Gate(arguments.steps, 1, arguments.batch_size)
        flags = flags_of(model, "synthetic", arguments.batch_size, arguments.folder)
        settings = parse_or_exit(flags + FLAGS.get(option, []))
        return run_to_exit(train_main, settings, Changed(gate, option))
    arguments.options = list(dict.fromkeys(["as trained", *arguments.options.split(";")]))
    if unknown := [name for name in arguments.options if name not in names]:
        parser.error(f"no such option: {unknown[0]}; known: {'; '.join(names)}")
    return of_each_model(parser, arguments, measure, markdown)


if __name__ == "__main__":
    sys.exit(main())
