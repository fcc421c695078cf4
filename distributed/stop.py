"""Stop requests: signals, the STOP file, the time limit -> all processes leave at the same step.

A signal handler only sets a flag. Each call of `poll` is one beat that all processes share; every
K beats (about a second) an asynchronous vote on the control group (gloo) starts, and all processes
act on it at the beat where the next vote starts, so nobody waits and everybody stops together.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from common.errors import STOPPED, UserError
from common.parent import launched, orphaned

MEETING_SECONDS = 10  # in which peers may yet come, to agree on a stop
SECONDS_PER_ROW = 0.5  # at least, where rows are due by time: on a GPU
REQUEUE = "requeue"  # in the STOP file of a job that its script puts back into the queue
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOP_FILE, TIME_LIMIT, SIGNAL, ORPHAN, DAMAGED, SAVE_FAILED, MOVED = 1, 2, 3, 4, 5, 6, 7
REASONS = {
    STOP_FILE: "the STOP file",
    TIME_LIMIT: "the time limit (--max-time)",
    SIGNAL: "a stop signal",
    ORPHAN: "the launcher is gone",
    DAMAGED: "an image that cannot be decoded",
    SAVE_FAILED: "a checkpoint could not be written",
    MOVED: "the run folder was renamed or deleted",
}


T = TypeVar("T")
Handler = Callable[[int, FrameType | None], object] | int | None  # as signal.signal has them


class StopVote:
    """Collects stop requests of this process and agrees on them with the others.

    A `guest` ends no process that is not its own: its second interrupt raises KeyboardInterrupt.
    """

    def __init__(self, interval: float = 1.0, guest: bool = False):
        self.interval, self.guest = interval, guest
        self.code = 0  # what this process wishes or knows
        self.reason = 0  # what all agreed on
        self.signal_name = ""
        self.deadline: float | None = None
        self.save_every: float | None = None  # seconds between checkpoints, on the main clock
        self.save_agreed = False  # set for all processes at the same beat; the loop clears it
        self.snapshot_every: float | None = None  # between snapshots in memory; None: not now
        self.snapshot_agreed = False  # as save_agreed
        self.row_every: float | None = None  # least seconds between rows that are due by time
        self.row_agreed = False  # for one beat, the same on all processes
        self.stop_file: Path | None = None
        self.group = None
        self._handlers: dict[int, Handler] = {}
        self.is_main = True
        self._launched = launched()
        self._last_save = self._last_row = self._last_snapshot = time.monotonic()
        self._first_interrupt = 0.0
        self.before_the_end = lambda: None  # of a second Ctrl-C
        self._beats = 0
        self._next = 0
        self._pending = None
        self._last_vote = time.monotonic()
        self._beats_per_vote = 1
        self._began_at = 0  # the beat of the latest vote
        self._new_phase = False

    def install(self) -> "StopVote":
        """Take over the stop signals; the first thing a process does."""
        for name in SIGNALS:
            if hasattr(signal, name):  # Windows has no SIGUSR1
                number = getattr(signal, name)
                if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup: the terminal may go
                with contextlib.suppress(ValueError, OSError):
                    self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def uninstall(self) -> None:
        """Give the signals back to who had them."""
        for number, handler in self._handlers.items():
            with contextlib.suppress(ValueError, OSError, TypeError):
                signal.signal(number, handler)
        self._handlers.clear()

    def interruptible(self, work: Callable[[], T]) -> Callable[[], T]:
        """The work, which an interrupt ends with a UserError: no step comes that would vote."""

        def wrapped() -> T:
            before = signal.getsignal(signal.SIGINT)
            if self.guest or before != self._on_signal:
                return work()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                return work()
            except KeyboardInterrupt:
                raise UserError(
                    "stopped before the first step. What is finished stays: the same command goes "
                    "on.",
                    code="stopped-early",
                ) from None
            finally:
                signal.signal(signal.SIGINT, before)

        return wrapped

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """While the processes look for each other: whose launcher is gone waits for nobody.

        Nor does who is told to stop, and whose peers, which may be gone already, do not come.
        """
        met = threading.Event()
        hears, tells = socket.socketpair()

        def look() -> None:
            waited = 0
            while not met.wait(1.0):
                waited += bool(waited) or came(hears, self._handlers)
                gone = self._launched and orphaned()
                if gone or waited > MEETING_SECONDS:
                    what = "the launcher is gone" if gone else "told to stop"
                    print(f"lockstep: {what} before its processes had met: this one ends",
                          file=sys.stderr, flush=True)  # fmt: skip
                    os._exit(STOPPED)

        with hears, tells, contextlib.ExitStack() as undo:
            for end in (hears, tells):
                end.setblocking(False)
            if self._launched or not self.guest:
                threading.Thread(target=look, daemon=True).start()
                undo.callback(met.set)
            if not self.guest and threading.current_thread() is threading.main_thread():
                # Our handlers run between two lines of Python, and one of them is the waiting.
                before = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
                undo.callback(signal.set_wakeup_fd, before)
            yield

    def connect(self, group: dist.ProcessGroup | None, is_main: bool) -> None:
        """Vote in this group (None: alone) from now on."""
        self.group, self.is_main = group, is_main

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # SLURM and an agent may both send TERM in the same millisecond: a second signal is no
        # "now". Only a person at a terminal who presses Ctrl-C again two seconds later means it.
        now = time.monotonic()
        if number == signal.SIGINT and self.guest:
            if self._first_interrupt:
                raise KeyboardInterrupt
            self._first_interrupt = now
        elif number == signal.SIGINT and at_a_terminal():
            if self._first_interrupt and now - self._first_interrupt > 2:
                # On a thread of its own: what it needs may be held by what it interrupts.
                words = threading.Thread(target=self.before_the_end, daemon=True)
                words.start()
                words.join(1.0)
                os._exit(130)
            self._first_interrupt = self._first_interrupt or now
        self.signal_name = self.signal_name or signal.Signals(number).name
        self.code = max(self.code, SIGNAL)

    def request(self, code: int) -> None:
        self.code = max(self.code, code)

    def launcher_is_interrupted(self) -> bool:
        """Whether the launcher heard the same Ctrl-C: it dies at once, with a traceback."""
        return self.signal_name == "SIGINT" and self._launched and at_a_terminal()

    def _look(self) -> int:
        """This process's own wish."""
        if self.is_main and self.stop_file is not None and self.stop_file.exists():
            self.request(STOP_FILE)
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.request(TIME_LIMIT)
        if self._launched and orphaned():
            self.request(ORPHAN)
        return self.code

    def _save_is_due(self) -> bool:
        return is_due(self.save_every, self._last_save)

    def _snapshot_is_due(self) -> bool:
        return is_due(self.snapshot_every, self._last_snapshot)

    def _row_is_due(self) -> bool:
        return is_due(self.row_every, self._last_row)

    def _agree_on_row(self, due: bool) -> None:
        self.row_agreed = due
        if due:
            self._last_row = time.monotonic()

    def saved(self) -> None:
        """The loop has saved: the clock of the next checkpoint starts."""
        self.save_agreed, self._last_save = False, time.monotonic()

    def snapshotted(self) -> None:
        """The loop has taken a snapshot: the clock of the next one starts."""
        self.snapshot_agreed, self._last_snapshot = False, time.monotonic()

    def poll(self) -> int:
        """One shared beat: 0, or the agreed reason; the same answer on every process."""
        self.reason = self.reason or self._poll()
        return self.reason

    def _poll(self) -> int:
        self.row_agreed = False
        if self.group is None:
            now = time.monotonic()
            if now - self._last_vote > 0.2:  # the file and the clock need no look at each step
                self._last_vote = now
                self._look()
                self.save_agreed = self.save_agreed or self._save_is_due()
                self.snapshot_agreed = self.snapshot_agreed or self._snapshot_is_due()
                self._agree_on_row(self._row_is_due())
            return self.code
        agreed = 0
        if self._beats == self._next:
            agreed = self._collect()
            self._start()
        self._beats += 1
        return agreed

    def new_phase(self) -> None:
        """Beats get another length from here on, on every process: vote at the next one."""
        self._next, self._began_at, self._new_phase = self._beats, self._beats, True
        self._last_row = time.monotonic()  # each phase ends with a row

    def ask_all(self) -> int:
        """A vote that waits for everyone: at the end of phases that have no beats."""
        if self.group is None:
            self.reason = self._look()
            return self.reason
        agreed = self._collect()
        self._start()
        self.reason = max(agreed, self._collect())
        return self.reason

    def _start(self) -> None:
        now, beats = time.monotonic(), self._beats - self._began_at
        per_beat = (now - self._last_vote) / max(1, beats)
        self._last_vote, self._began_at = now, self._beats
        # At most twice as many as were timed: the first beats on a GPU only fill its queue.
        wish = max(1, int(min(self.interval / max(per_beat, 1e-6), 2 * beats, 10_000)))
        mine = [self._look(), 0, 0, 0, 0]
        if self.is_main:
            save = self._save_is_due() and not self.save_agreed
            snapshot = self._snapshot_is_due() and not self.snapshot_agreed
            mine[1:] = wish, int(save), int(self._row_is_due()), int(snapshot)
        ballot = torch.tensor(mine, dtype=torch.int64)
        work = dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        self._pending = (work, ballot)
        self._next = self._beats + self._beats_per_vote

    def _collect(self) -> int:
        old_phase, self._new_phase = self._new_phase, False
        if self._pending is None:
            self._beats_per_vote = 1
            return 0
        work, ballot = self._pending
        self._pending = None
        work.wait()
        code, wish, save, row, snapshot = ballot.tolist()
        self._beats_per_vote = 1 if old_phase else wish
        self.code = max(self.code, code)
        self.save_agreed = self.save_agreed or bool(save)
        self.snapshot_agreed = self.snapshot_agreed or bool(snapshot)
        self._agree_on_row(bool(row) and not old_phase)
        return code

    def leaves(self) -> bool:
        """Whether to stop at once, between two beats: who is alone need agree with nobody."""
        if self.group is None and self._look():
            self.reason = self.code
            return True
        return False

    def goes_on_by_itself(self) -> bool:
        """Whether the job's script asked for this stop, and will start the job again."""
        with contextlib.suppress(OSError):
            if self.stop_file is not None:
                return self.stop_file.read_text(encoding="utf-8").strip() == REQUEUE
        return False

    def rest_goes_on(self, processes: int) -> bool:
        """Whether the agent of one node is gone, and those of the others start again without it."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", str(processes)))
        return self.reason == ORPHAN and here < processes and restarts_left()

    def why(self, code: int) -> str:
        """The agreed reason in words."""
        if self.goes_on_by_itself():
            return "the job's time limit or a preemption"
        name = f" ({self.signal_name})" if code == SIGNAL and self.signal_name else ""
        return REASONS.get(code, "a stop request") + name


def came(hears: socket.socket, numbers: Container[int]) -> bool:
    """Whether one of these signals has come, as the system wrote it down."""
    with contextlib.suppress(OSError):
        return any(number in numbers for number in hears.recv(64))
    return False


def is_due(every: float | None, last: float) -> bool:
    """Whether so many seconds are over since then; None: never."""
    return every is not None and time.monotonic() - last > every


def at_a_terminal() -> bool:
    """Whether a person may type to this process."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def restarts_left() -> bool:
    """Whether an elastic agent stands above us that would restart a process with status 75."""
    most = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) < most
