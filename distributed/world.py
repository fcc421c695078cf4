"""The processes of a run: the accelerator, what they agree on, and how they leave together."""

import contextlib
import gc
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import Left, NumbersGoneBad, UserError
from common.text import seconds
from config import Settings
from distributed import accelerator as machine
from distributed import faults
from distributed.checkpoint import Progress
from distributed.pace import Pace
from distributed.stop import SECONDS_PER_ROW, StopVote
from distributed.watch import Watch

try:
    import resource
except ImportError:  # Windows
    resource = None

T = TypeVar("T")


class World(contextlib.AbstractContextManager):
    """One process among those of a run. A context: leaving it undoes what entering it changed.

    `settings` are the given ones with what only the machine could decide. What is entered with
    `enter` is left first, in turn. On the way out of an error that all processes share, the groups
    end; after any other failure they may hang, and are left to the end of the process.

    A `guest` is alone in a process that lives on: it tunes no malloc, ends no process that stands
    still, and whatever happens leaves no thread behind.
    """

    def __init__(self, settings: Settings, guest: bool = False) -> None:
        self.began, self.guest = time.monotonic(), guest
        self._group_is_ours = not dist.is_initialized()
        self.stop = StopVote(guest=guest).install()
        try:
            with self.stop.meeting():
                self.accelerator, self.settings = machine.build_accelerator(
                    settings, tune_malloc=not guest
                )
                self.device: torch.device = self.accelerator.device
                self.is_main: bool = self.accelerator.is_main_process
                self.num_processes: int = self.accelerator.num_processes
                self.process_index: int = self.accelerator.process_index
                group = machine.control_group() if self.num_processes > 1 else None
            self.stop.connect(group, self.is_main)
        except BaseException:
            self.stop.uninstall()
            raise
        by_time = self.device.type == "cuda" and not self.settings.config.log_every
        self.stop.row_every = SECONDS_PER_ROW if by_time else None
        if self.settings.config.max_time:
            self.stop.deadline = self.began + seconds(self.settings.config.max_time)
        self.watch = Watch(self.process_index, self.num_processes)
        self.watch.device = str(self.device) if self.device.type == "cuda" else ""
        self.pace = Pace(self.process_index, self.num_processes, self.device)
        if guest:
            self.watch.limit = math.inf
        self._contexts = contextlib.ExitStack()
        self._contexts.enter_context(machine.not_installed("lomo_optim"))
        self._frozen = False
        self._failure: tuple[BaseException, str] | None = None
        self.left_behind = False  # something hangs that the interpreter's end would wait for
        self.own_words = ""  # of a mistake that this process met alone

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        try:
            self._contexts.__exit__(kind, error, trace)
        finally:
            if self.guest or error is None or isinstance(error, UserError):
                self._leave(error)
            elif not isinstance(error, KeyboardInterrupt):
                self.failure(error)  # while signals are still ours: a launcher sends TERM to all
            failed = isinstance(error, Exception) and not isinstance(error, UserError)
            if self.guest or not (self.stop.reason or failed):
                self.stop.uninstall()  # else a signal would kill what has saved, or is yet to speak

    def _leave(self, error: BaseException | None) -> None:
        """All processes are here, or will be: where they raise, they raise alike."""
        if error is None and self._group_is_ours:
            machine.end(self.accelerator)
        if error is None or self.is_main:
            self.watch.stop()
        else:
            self.own_words = self.watch.leave(error)
        if self._group_is_ours:
            self.left_behind = not machine.leave() or self.left_behind

    def enter(self, context: contextlib.AbstractContextManager[T]) -> T:
        """Enter a context that ends with this one, before it and before those entered earlier."""
        return self._contexts.enter_context(context)

    def failure(self, error: BaseException) -> str:
        """What went wrong, in words; the first call for an error also writes its crash report."""
        if self._failure is None or self._failure[0] is not error:
            shared = isinstance(error, NumbersGoneBad)  # nobody crashed: all of them say the same
            self._failure = error, str(error) if shared else self.watch.report(error)
        return self._failure[1]

    # --- agreeing -------------------------------------------------------------------------------

    def main_decides(self, decide: Callable[[], T]) -> T:
        """What decide() returns on the main process; its UserError is raised on every process."""
        return machine.main_decides(self.accelerator, decide)

    def broadcast(self, value: T) -> T:
        """The main process's value, on every process."""
        return machine.broadcast(self.accelerator, value)

    def everyones(self, mine: T) -> list[T]:
        """This value of every process, by rank."""
        return machine.everyones(self.accelerator, mine)

    def together(
        self, counts: Tensor, answers: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of every process's counts and answers, (processes, ...) what each kept: here.

        All int64, so that the host waits once.
        """
        sums = self.sum(torch.cat([counts.flatten(), answers.flatten()]))
        kept = cast(Tensor, self.accelerator.gather(kept[None]))
        sizes = [counts.numel(), answers.numel(), kept.numel()]
        host = torch.cat([sums, kept.flatten()]).cpu().split(sizes)
        return host[0].view(counts.shape), host[1].view(answers.shape), host[2].view(kept.shape)

    def all_or_none(self, work: Callable[[], T]) -> T:
        """What work() returns here; a UserError of any process is raised on all, naming it."""
        return machine.all_or_none(self.accelerator, work)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor added up over all processes, on every one."""
        return cast(Tensor, self.accelerator.reduce(tensor, reduction="sum"))

    def refuse_disagreement(self, facts: dict[str, str]) -> None:
        """All processes must hold the same facts; the odd ones are named in a UserError."""
        machine.refuse_disagreement(self.accelerator, facts)

    def describe(self) -> str:
        """`2 x NVIDIA A100`, `CPU (2 threads)`: the devices in words."""
        return machine.describe(self.accelerator)

    def describe_gpu(self) -> dict[str, dict]:
        """Driver, versions, capability and switches of the GPU; nothing on a CPU."""
        return machine.describe_gpu(self.device)

    def unseen_gpu(self) -> str:
        """What to do where this machine has a GPU that torch cannot use; "" if all is well."""
        return machine.unseen_gpu()

    # --- while it runs --------------------------------------------------------------------------

    def phase(self, name: str, step: int, new_beats: bool = False) -> None:
        """Where this process is, for those who wait for it.

        With `new_beats`, beats that follow have another length.
        """
        self.watch.at(name, step)
        if new_beats:
            self.stop.new_phase()

    def watched(self, batches: Iterable[T], progress: Progress) -> Iterator[T]:
        """The batches of an epoch: others see whether this process waits for data or computes."""
        self.phase("data", progress.step, new_beats=True)
        self.pace.asks(first=True)
        for batch in self.until_left(batches):
            faults.hit("step", progress.step)
            self.watch.at("step", progress.step)
            self.pace.lap()
            yield batch
            self.watch.at("data", progress.step)
            self.pace.asks()
            if not self._frozen:  # what there is after a step stays: no collection need walk it
                self._frozen = True
                if not (self.guest and gc.get_freeze_count()):  # which could not be put back
                    gc.freeze()  # a collection before it would walk all of them: 0.3 s

    def until_left(self, batches: Iterable[T]) -> Iterator[T]:
        """Batches, which end where the next does not come to one that is to stop: `stop.reason`."""
        with contextlib.suppress(Left):
            yield from batches

    def beating(
        self, batches: Iterable[T], progress: Progress, point: str = "evaluate"
    ) -> Iterator[T]:
        """The batches of an evaluation, with a vote beat after each; they end early to stop."""
        for batch in self.until_left(batches):
            faults.hit(point, progress.step)
            yield batch
            if self.beat(progress.step):
                return

    def peak_memory(self) -> dict[str, float]:
        """Of this process so far, for a row; nothing where the system does not tell. No host wait.

        On a GPU of what torch allocated there, else of resident memory. The counter is not reset:
        who measures beside a run, or calls it from a notebook, reads it too.
        """
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        elif resource is None:
            return {}
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"system/peak_memory_gb": peak / 1e9}

    def beat(self, step: int) -> bool:
        """One vote beat, in training and in evaluation; whether to leave."""
        self.watch.at(self.watch.phase, step)
        return bool(self.stop.poll())
