"""Images per second: the trainer, the lesson's loop, and the bare compute limit, taking turns.

(a) the ordinary trainer, a real run; (b) bench/lesson_loop.py, torch's default threads; (c) the
same under `accelerate launch`'s defaults (one thread); (d) the compute limit: model, precision,
layout, compile, optimizer of (a), on one batch that lies there, without loader, augmentation,
logging, averaging. Each is a process of its own; windows of a few steps take turns.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from bench.measure import (
    Arm,
    Gate,
    arguments_of,
    finish,
    ratio,
    shown,
    spread,
    table,
    take_turns,
)
from config import parse_or_exit
from distributed.checkpoint import Progress
from optim import set_lr
from report.ending import run_to_exit
from train import main as train_main
from training.data import Batch, Data
from training.learner import Learner
from training.observer import Observer
from training.schedule import Schedule

SIZES = {"my_cnn": 224, "alexnet": 224, "vgg11": 32, "resnet18": 32}
ARMS = ("trainer", "lesson", "accelerate", "limit")
PREFETCHED = 4  # batches that the lesson's two workers hold ready when a window begins
REST = 3.0  # seconds they have to make those ready, before another arm has its turn


def is_compiled(model: nn.Module) -> bool:
    """Whether a hook on the model would break the compiler's graph, and be measured with it."""
    return model._compiled_call_impl is not None


class Gated(Observer):
    """The ordinary run: its batches come through the gate, torch's hooks take the time of a step.

    `parts` of a step on a CPU, in order: batch (loader and augmentation), forward, backward (with
    the checks of its gradients), optimizer, rest (rows, votes, saving).
    """

    def __init__(self, gate: Gate) -> None:
        self.gate, self._part, self._mark = gate, "rest", time.perf_counter()

    def started(self, learner: Learner, data: Data, schedule: Schedule, progress: Progress) -> None:
        if not is_compiled(learner.bare):  # there the batch's time has forward and backward in it
            learner.bare.register_forward_pre_hook(lambda *_: self._enter("forward"))
            learner.bare.register_forward_hook(lambda *_: self._enter("backward"))
        learner.optimizer.optimizer.register_step_pre_hook(lambda *_: self._enter("optimizer"))
        learner.optimizer.optimizer.register_step_post_hook(lambda *_: self._enter("rest"))

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in self.gate.through(batches):
            self._enter("batch")
            yield batch
            self._enter("rest")

    def _enter(self, part: str) -> None:
        now = time.perf_counter()
        self.gate.count(self._part, now - self._mark)
        self._part, self._mark = part, now


class Limit(Observer):
    """The set-up of the ordinary run, then forward, backward and update on one batch.

    With `read` the host reads each loss, and so waits for it.
    """

    def __init__(self, gate: Gate, read: bool = False) -> None:
        self.gate, self.read = gate, read

    def started(self, learner: Learner, data: Data, schedule: Schedule, progress: Progress) -> None:
        bare_steps(learner, data, schedule, self.gate.through(itertools.repeat(None)), self.read)
        raise SystemExit(0)


def bare_steps(
    learner: Learner, data: Data, schedule: Schedule, times: Iterable, read: bool = False
) -> None:
    """Forward, backward and update on one batch that lies there, once for each of `times`."""
    set_lr(learner.optimizer, schedule.lr(0))
    indices = torch.arange(data.batch.micro_batch_size)
    batch = data.train.batch(indices)
    images = learner.inputs(data.augment.train(batch["images"], indices, 0))
    labels = batch["labels"].to(images.device)
    learner.model.train()
    for _ in times:
        loss = learner.task.loss(learner.model(images), labels)
        learner.accelerator.backward(loss / len(labels))
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        if read:
            loss.item()


def lesson_arm(gate: Gate, model: str, dataset: str, image_size: int, batch_size: int) -> None:
    from bench import lesson_loop

    class GatedLoader(lesson_loop.DataLoader):
        def __iter__(self):
            return gate.through(super().__iter__())

    lesson_loop.DataLoader = GatedLoader
    lesson_loop.train(model, dataset, image_size, batch_size, epochs=10**6)


def start(arm: str, model: str, arguments: argparse.Namespace, folder: Path) -> Arm:
    words, environment = [sys.executable], {}
    if arm == "accelerate":
        words += ["-m", "accelerate.commands.launch"]
        environment["HF_HOME"] = str(folder)  # not this user's saved answers: the defaults
    words += ["-m", "bench.throughput", "--arm", arm, "--models", model]
    for name in ("steps", "batch_size", "dataset"):
        words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    if arm in ("trainer", "limit"):
        words += ["--folder", str(folder / f"{model}-{arm}"), "--", *arguments.flags]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # the launcher and torch decide
        os.environ.pop(name, None)
    return Arm(words, **environment)


def measure(model: str, arguments: argparse.Namespace, folder: Path) -> dict:
    """Windows of all arms, and what they say."""
    arms = {name: start(name, model, arguments, folder) for name in ARMS}
    try:
        for arm in arms.values():
            arm.ready()
        windows = take_turns(arms, arguments.rounds)
    finally:
        for arm in arms.values():
            arm.close()
    speed = {name: [w["speed"] for w in windows[name]] for name in ARMS}
    parts = windows["trainer"][-1]["milliseconds"]
    return {
        "images_per_second": {name: spread(values) for name, values in speed.items()},
        "trainer/limit": ratio(speed["trainer"], speed["limit"]),
        "trainer/lesson": ratio(speed["trainer"], speed["lesson"]),
        "trainer/accelerate": ratio(speed["trainer"], speed["accelerate"]),
        "host_mb": {name: windows[name][-1]["host_mb"] for name in ARMS},
        "device_mb": {name: windows[name][-1]["device_mb"] for name in ARMS},
        "step_ms": {
            name: spread([w["milliseconds"][name] for w in windows["trainer"]]) for name in parts
        },
        "image_size": SIZES[model],
        "batch_size": arguments.batch_size,
    }


def flags_of(model: str, dataset: str, batch_size: int, folder: str) -> list[str]:
    """A run of the ordinary trainer that goes on as long as it is asked to."""
    flags = ["--model", model, "--weights", "none", "--dataset", dataset]
    flags += ["--image-size", str(SIZES[model]), "--batch-size", str(batch_size)]
    flags += ["--augment", "resized_crop", "--optimizer", "sgd", "--lr", "0.001"]
    return [*flags, "--epochs", "100000", "--eval-every", "100000", "--run-dir", folder]


def markdown(results: dict) -> str:
    """Speeds and ratios, then memory and where the milliseconds of a step of (a) go."""
    rows, parts = [], []
    for model, found in results.items():
        name, speeds = f"{model} at {found['image_size']}", found["images_per_second"]
        rows.append([
            name, *(shown(speeds[arm], 1) for arm in ARMS),
            *(shown(found[f"trainer/{arm}"]) for arm in ("limit", "lesson", "accelerate")),
        ])  # fmt: skip
        times = found["step_ms"]
        step = 1e3 * found["batch_size"] / speeds["trainer"]["median"]
        memory = [f"{found[key][arm]:.0f}" for key in ("host_mb", "device_mb")
                  for arm in ("trainer", "lesson")]  # fmt: skip
        parts.append([
            name, f"{step:.1f}", *(f"{v['median']:.1f}" for v in times.values()),
            " / ".join(memory[:2]), " / ".join(memory[2:]),
        ])  # fmt: skip
    names = ["a: trainer", "b: lesson", "c: b, accelerate", "d: limit", "a/d", "a/b", "a/c"]
    head = ["a: ms of a step", "whole", *times, "host MB a / b", "GPU MB a / b"]
    return table(["images/s", *names], rows) + "\n\n" + table(head, parts)


def short(results: dict) -> str:
    """The medians that matter most."""
    rows = []
    for model, found in results.items():
        speeds = found["images_per_second"]
        rows.append([
            f"{model} at {found['image_size']} px, batch {found['batch_size']}",
            *(f"{speeds[arm]['median']:.0f}" for arm in ("trainer", "lesson")),
            f"{found['trainer/limit']['median']:.2f}",
        ])  # fmt: skip
    return table(["", "Lockstep", "the lesson's loop", "share of the compute limit"], rows)


def of_each_model(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    measure: Callable[[str, argparse.Namespace, Path], dict],
    markdown: Callable[[dict], str],
) -> int:
    """Print and keep what measure(model, arguments, folder) finds for each model asked for."""
    if unknown := [name for name in arguments.models.split(",") if name not in SIZES]:
        parser.error(f"no such model here: {unknown[0]}; known: {', '.join(SIZES)}")
    results = {}
    for model in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results[model] = measure(model, arguments, Path(folder))
    print(f"Batch {arguments.batch_size}, median (range) of {arguments.rounds} rounds.\n")
    print(markdown(results))
    finish(arguments, results)
    return 0


def main() -> int:
    parser = arguments_of(__doc__)
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a window")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--arm", choices=ARMS, help="be one of the measured processes")
    parser.add_argument("--folder", help="the measured run's folder")
    parser.add_argument("flags", nargs="*", help="after --: more flags for the trainer")
    arguments = parser.parse_args()
    if arguments.arm:
        model, size = arguments.models, SIZES[arguments.models]
        lesson = arguments.arm in ("lesson", "accelerate")
        warm, rest = (PREFETCHED, REST) if lesson else (1, 0.0)
        gate = Gate(arguments.steps, warm, arguments.batch_size, rest)
        if lesson:
            lesson_arm(gate, model, arguments.dataset, size, arguments.batch_size)
        flags = flags_of(model, arguments.dataset, arguments.batch_size, arguments.folder)
        observer = Gated(gate) if arguments.arm == "trainer" else Limit(gate)
        return run_to_exit(train_main, parse_or_exit([*flags, *arguments.flags]), observer)
    return of_each_model(parser, arguments, measure, markdown)


if __name__ == "__main__":
    sys.exit(main())
