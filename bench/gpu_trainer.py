"""The only door of the GPU's rows into the trainer: run it in this process, look at it, time it."""

import contextlib
import gc
import hashlib
import io
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

import train
from bench.measure import synchronize
from bench.throughput import bare_steps, is_compiled
from config import parse_or_exit
from distributed.checkpoint import Progress
from distributed.world import World
from report.ending import run_to_exit
from training.data import Data
from training.learner import Learner
from training.observer import Observer
from training.schedule import Schedule


class Enough(Exception):
    """Raised by a watch: what was to be seen was seen."""


class Watch:
    """What a measurement may see of a run; this one looks at nothing."""

    def step(self, number: int) -> None:
        """A batch was fetched and its step is about to be made: 0, 1, ... over all epochs."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around each row, save, evaluate, and the parts augment and optimizer of a step."""
        yield


NOTHING = Watch()


@dataclass(frozen=True)
class Ended:
    """How a run of the trainer ended."""

    status: int
    words: str  # what it said on stderr, or the refusal's sentence
    evaluation_batches: int = 0
    skipped: int = 0  # updates


class Watching(Observer):
    """Lets a watch see the steps and phases of a run; with `bare`, steps on one batch alone."""

    def __init__(self, watch: Watch, bare: bool) -> None:
        self.watch, self.bare = watch, bare
        self.numbers = itertools.count()  # over all epochs
        self.learner: Learner | None = None
        self.data: Data | None = None
        self._inner = contextlib.ExitStack()  # the part of a step that is under way

    def started(self, learner: Learner, data: Data, schedule: Schedule, progress: Progress) -> None:
        self.learner, self.data = learner, data
        if self.bare:
            bare_steps(learner, data, schedule, self._numbered(itertools.repeat(None)))
            raise Enough
        if not is_compiled(learner.bare):
            learner.bare.register_forward_pre_hook(lambda *_: self._inner.close())
        optimizer = learner.optimizer.optimizer
        optimizer.register_step_pre_hook(lambda *_: self._enter("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self._inner.close())

    def batches(self, batches: Iterable) -> Iterator:
        for batch in self._numbered(batches):
            if self.learner is None or not is_compiled(self.learner.bare):
                self._enter("augment")  # until the first forward
            yield batch
            self._inner.close()

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self.watch.phase(name)

    def _enter(self, name: str) -> None:
        self._inner.enter_context(self.watch.phase(name))

    def _numbered(self, batches: Iterable) -> Iterator:
        for batch, number in zip(batches, self.numbers, strict=False):
            self.watch.step(number)
            yield batch

    def facts(self) -> dict[str, int]:
        if self.learner is None or self.data is None:  # refused before these were
            return {}
        batches = len(self.data.test_loaders["test"])
        return {
            "evaluation_batches": batches, "skipped": self.learner.guard.report()["skipped"]
        }  # fmt: skip


def trained(flags: list[str], watch: Watch = NOTHING, bare: bool = False) -> Ended:
    """Run the ordinary trainer here. With `bare`, its set-up and then steps on one batch alone.

    An error that is no refusal ends this process, as it ends the trainer's.
    """

    def main(world: World, observer: Observer) -> int:
        try:
            return train.main(world, observer)
        except Enough:
            return 0

    words, watching = Tee(), Watching(watch, bare)
    try:
        with contextlib.redirect_stderr(words):
            status = run_to_exit(main, parse_or_exit(flags), watching)
    except SystemExit as error:
        status = int(error.code or 0)
    facts = watching.facts()
    watching.learner = watching.data = None
    forget(compiled="--compile" in flags)
    return Ended(status, words.getvalue().strip(), **facts)


def forget(compiled: bool) -> None:
    """Undo what a run leaves in the process, so that the next one starts as in a new one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")
    torch.autograd.set_detect_anomaly(False)
    if compiled:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Tee(io.StringIO):
    """Keeps what passes through to stderr."""

    def write(self, text: str) -> int:
        if sys.__stderr__ is not None:
            sys.__stderr__.write(text)
            sys.__stderr__.flush()
        return super().write(text)


class Windows(Watch):
    """Times `count` windows of `steps` steps after `warm` untimed ones; then enough is seen."""

    def __init__(self, warm: int, steps: int, count: int, stop: bool = True):
        self.warm, self.steps, self.count, self.stop = warm, steps, count, stop
        self.seconds: list[float] = []  # of each window
        self.host: dict[str, float] = {}  # milliseconds a step, in which the host issues a phase
        self.first = 0.0  # seconds of the first two steps: compiling, tuning
        self.peak = 0  # bytes of the device, in the windows
        self._began = 0.0
        self._timing = False

    def step(self, number: int) -> None:
        if number in (0, 2):
            synchronize()
            self.first = time.perf_counter() - self.first
        at, rest = divmod(number - self.warm, self.steps)
        if number < self.warm or rest or at > self.count:
            return
        synchronize()
        now = time.perf_counter()
        if at == 0 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if at > 0:
            self.seconds.append(now - self._began)
        if at == self.count:
            self._timing = False
            if torch.cuda.is_available():
                self.peak = torch.cuda.max_memory_allocated()
            self.complete()
            return
        self._timing = True
        self._began = time.perf_counter()

    def complete(self) -> None:
        if self.stop:
            raise Enough

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self._timing:
            took = 1e3 * (time.perf_counter() - began) / (self.steps * self.count)
            self.host[name] = self.host.get(name, 0.0) + took


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl, without what clock and machine decide."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("speed/", "system/"))}
        for line in lines
    ]


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in rows(folder) if "train/loss" in row]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def state(folder: Path) -> dict[str, str]:
    """Name -> blake2b of every file with weights or other state that a finished run left last."""
    newest = max((folder / "checkpoints").glob("step-" + 9 * "[0-9]"))
    files = [*newest.glob("*.safetensors"), folder / "last.safetensors"]
    return {
        f"{file.parent.name}/{file.name}" if file.parent == newest else file.name: hashlib.blake2b(
            file.read_bytes(), digest_size=16
        ).hexdigest()
        for file in sorted(files)
    }
