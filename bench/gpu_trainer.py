"""The only door of the GPU's rows into the trainer: run it in this process, look at it, time it."""

import contextlib
import gc
import hashlib
import io
import itertools
import json
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

import train
from bench.measure import synchronize
from bench.throughput import bare_steps
from config import parse_or_exit
from run import Run, guarded

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1")]


class Enough(Exception):
    """Raised by a watch: what was to be seen was seen."""


class Watch:
    """What a measurement may see of a run; this one looks at nothing."""

    def step(self, number: int) -> None:
        """A batch was fetched and its step is about to be made: 0, 1, ... over all epochs."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around each row, save, evaluate, augment, optimizer."""
        yield


NOTHING = Watch()


@dataclass(frozen=True)
class Ended:
    status: int
    words: str  # what it said on stderr, or the refusal's sentence
    evaluation_batches: int = 0
    skipped: int = 0  # updates


def trained(flags: list[str], watch: Watch = NOTHING, bare: bool = False) -> Ended:
    """Run the ordinary trainer here. With `bare`, its set-up and then steps on one batch alone.

    An error that is no refusal ends this process, as it ends the trainer's.
    """
    facts = {}

    def main(run: Run) -> int:
        try:
            if bare:
                return bare_steps(run, lambda: numbered(itertools.repeat(None), watch))
            attach(run, watch)
            return train.main(run)
        except Enough:
            return 0
        finally:
            run.watch.stop()
            with contextlib.suppress(AttributeError):  # it may have been refused before these were
                facts["evaluation_batches"] = len(run.test_loader)
                facts["skipped"] = run.guard.report()["skipped"]

    told, handlers = Tee(), {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with contextlib.redirect_stderr(told):
            status = guarded(main, parse_or_exit(flags))
    except SystemExit as error:
        status = int(error.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        forget(compiled="--compile" in flags)
    return Ended(status, told.getvalue().strip(), **facts)


def attach(run: Run, watch: Watch) -> None:
    """Let the watch see a run's steps and phases."""

    def watched(thing: object, name: str, phase: str) -> None:
        function = getattr(thing, name)

        def inside(*arguments, **keywords):
            with watch.phase(phase):
                return function(*arguments, **keywords)

        setattr(thing, name, inside)

    numbers = itertools.count()  # over all epochs
    batches, ready = run.batches, run.ready
    evaluation_loaders, keep = run.evaluation_loaders, run.keep
    evaluation = contextlib.ExitStack()

    def made_ready(*prepared) -> None:
        ready(*prepared)
        watched(run.augment, "train", "augment")
        watched(run.optimizer, "step", "optimizer")

    def begin_evaluation():
        evaluation.enter_context(watch.phase("evaluate"))
        return evaluation_loaders()

    def end_evaluation(results) -> None:
        evaluation.close()
        keep(results)

    run.batches, run.ready = (lambda: numbered(batches(), watch, numbers)), made_ready
    run.evaluation_loaders, run.keep = begin_evaluation, end_evaluation
    watched(run, "_write_row", "row")
    watched(run, "save", "save")


def numbered(batches: Iterable, watch: Watch, numbers: Iterator[int] | None = None) -> Iterator:
    """The batches; the watch hears of each before the loop gets it."""
    for batch, number in zip(batches, numbers or itertools.count(), strict=False):
        watch.step(number)
        yield batch


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
    """metrics.jsonl, without what a clock decides."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("speed/")} for line in lines
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
