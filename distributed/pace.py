"""Stragglers: names the process that the others wait for in each step, and where its time goes.

Each process times its own part of a step: the wait for its batch, and forward and backward of its
shards up to the last gradient, because from there on a collective makes all of them equally late.
Beside that it counts how long its thread waited for a core that other work has, were it its own
save. What a row adds up over the processes carries the numbers of the newest steps: no wait of its
own.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from common.disk import Json

BLOCKS, STEPS = 5, 5  # of so many steps in a row
NEWEST = 3  # of the blocks: in each of them a slow process is the slower one
PARTS = ("data", "forward", "backward", "core")  # the last: waits for one, in all of a step
OWN = 3  # of the parts: together they are a process's own time of a step
NUMBERS = BLOCKS * len(PARTS) + 2  # of a process in a row: a mean of each, and two errors
WARM_UP = 2  # steps that say nothing
WORTH_TELLING = 0.05  # of a step's time: a process that loses less is not called slow
ERRORS = 5.0  # what it loses is so many standard errors of all blocks together
MOST_KEPT = 20  # the newest, in status.json
MOSTLY = 2 / 3  # of what is lost: the reason


@dataclass
class Slow:
    """A process that the others wait for: how long in a step, and what the run loses by it."""

    rank: int
    where: str
    reason: str  # one of PARTS, or "all"
    seconds: float  # of a step that it takes longer than the others
    faster: float  # 0.2: the run would be 20 % faster
    since: int
    until: int | None = None  # it keeps up again


@dataclass
class Lost:
    """Seconds of a step that others wait for a process, by one measure: oldest block first."""

    blocks: list[float]
    error: float  # of their mean

    @property
    def newest(self) -> float:
        return statistics.median(self.blocks[-NEWEST:])

    def stands_out(self, worth: float) -> bool:
        """In each new block worth telling, and in all of them more than chance makes."""
        in_all = statistics.fmean(self.blocks)
        return min(self.blocks[-NEWEST:]) > worth and in_all > ERRORS * self.error

    def is_over(self, worth: float) -> bool:
        return statistics.fmean(self.blocks[-NEWEST:]) < max(worth, self.error)


class CoreWaits:
    """Seconds that this thread could have run so far and had no core; 0 where nobody tells."""

    def __init__(self) -> None:
        self._file = -1
        with contextlib.suppress(OSError):  # Linux only
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)

    def __call__(self) -> float:
        return int(os.pread(self._file, 64, 0).split()[1]) / 1e9 if self._file >= 0 else 0.0


class HostClock:
    """On a CPU a mark is the time."""

    mark = staticmethod(time.perf_counter)

    @staticmethod
    def seconds(begin: float, end: float) -> float:
        return end - begin

    @staticmethod
    def known(mark: float) -> bool:
        return True


class DeviceClock:
    """On a GPU a mark is an event in its queue; nobody waits for it."""

    @staticmethod
    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def seconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1e3

    @staticmethod
    def known(mark: torch.cuda.Event) -> bool:
        return mark.query()


class Pace:
    """This process's times in the newest steps, and on the main process who is slow.

    A step's marks: it asks for a batch, has it, and for each shard begins the forward, begins the
    backward, has its last gradient.
    """

    def __init__(self, rank: int, processes: int, device: torch.device) -> None:
        self.rank, self.processes = rank, processes
        self.shares = [1] * processes
        self.clock = DeviceClock if device.type == "cuda" else HostClock
        self.slow: dict[int, Slow] = {}
        self.all: deque[Slow] = deque(maxlen=MOST_KEPT)  # and those that have been
        self._marks: list = []  # of the step under way; none where nobody times it
        self._last: float | torch.cuda.Event | None = None  # the last gradient so far
        self._steps = self._told_at = 0
        # Not yet known: a GPU is behind its host.
        self._begun: deque[tuple[float, list]] = deque(maxlen=2 * BLOCKS * STEPS)
        self._core_waits: Callable[[], float] = CoreWaits() if processes > 1 else float
        self._waited = 0.0  # for a core, until this step
        self._times: deque[tuple[float, ...]] = deque(maxlen=NEWEST * STEPS)
        self._block: list[tuple[float, ...]] = []  # of them, until it is whole
        self._blocks: deque[tuple[list[float], float, float]] = deque(maxlen=BLOCKS)
        self._heard: list[float] = []
        self._hooks: dict[Tensor, torch.utils.hooks.RemovableHandle] = {}
        self._latest: Tensor | None = None

    # --- in each step, on each process ----------------------------------------------------------

    def asks(self, first: bool = False) -> None:
        """A step is over, and the next batch is asked for; `first`: something else was before."""
        if self.processes == 1:
            return
        mark, marks = self.clock.mark(), self._marks
        waited, self._waited = self._waited, self._core_waits()
        self._steps += not first
        if self._steps > WARM_UP and len(marks) > 2 and len(marks) % 3 == 2 and not first:
            self._begun.append((self._waited - waited, [*marks, mark]))
        self._marks = [mark]

    def lap(self) -> None:
        """It has its batch, or begins the next part of a shard."""
        if self._marks:
            self._marks.append(self.clock.mark())

    def shard_done(self, waits: bool) -> None:
        """A shard's backward is over; `waits`: at its end it may have waited for the others."""
        if not self._marks:
            return
        if not waits:
            self.lap()
        elif self._last is not None:  # else nobody knows, and the step is left out
            self._marks.append(self._last)
            self._keep_one_hook()
        self._last = None

    def follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Where DDP waits in the backward itself: whose gradient is the last one, we see soon."""
        self.let_go()
        for p in parameters if self.processes > 1 else ():
            self._hooks[p] = p.register_post_accumulate_grad_hook(self.arrived)

    def arrived(self, parameter: Tensor) -> None:
        """A parameter's gradient is there: the last one of a step ends this process's own part."""
        if self._marks:
            self._last, self._latest = self.clock.mark(), parameter

    def let_go(self) -> None:
        """Follow no parameter any more."""
        while self._hooks:
            self._hooks.popitem()[1].remove()

    def _keep_one_hook(self) -> None:
        if len(self._hooks) > 1 and self._steps:
            for p in [p for p in self._hooks if p is not self._latest]:
                self._hooks.pop(p).remove()

    # --- with a row -----------------------------------------------------------------------------

    def numbers(self, like: Tensor) -> Tensor:
        """What a row adds up over all processes: everybody's means, of which we know our own."""
        mine: list[float] = []
        while self._begun and self.clock.known(self._begun[0][1][-1]):
            self._take(self._parts(*self._begun.popleft()))
        due = self._steps >= self._told_at + STEPS  # for all processes in the same row
        if due:
            self._told_at = self._steps
        if due and len(self._blocks) == BLOCKS:
            means, own, waits = zip(*self._blocks, strict=True)
            mine = [seconds for block in means for seconds in block]
            mine += [error_of(own), error_of(waits)]
        rest = self.processes - 1 - self.rank
        return like.new_tensor(
            [0.0] * NUMBERS * self.rank + (mine or [0.0] * NUMBERS) + [0.0] * NUMBERS * rest
        )

    def _take(self, parts: tuple[float, ...]) -> None:
        """Keep the times of a step; of each block what a row tells of it."""
        self._times.append(parts)
        self._block.append(parts)
        if len(self._block) == STEPS:
            *means, _ = [sum(part) / STEPS for part in zip(*self._block, strict=True)]
            own = squares_of([sum(parts[:OWN]) for parts in self._block])
            self._blocks.append((means, own, squares_of([parts[OWN] for parts in self._block])))
            self._block = []

    def _parts(self, waited: float, marks: list) -> tuple[float, ...]:
        """Seconds of each part, and of the whole step."""
        between, found = self.clock.seconds, [0.0, 0.0]
        for place in range(2, len(marks) - 1, 3):
            for part in range(2):
                found[part] += between(*marks[place + part : place + part + 2])
        return between(marks[0], marks[1]), *found, waited, between(marks[0], marks[-1])

    def hear(self, numbers: list[float]) -> None:
        """Everybody's means; none on one process."""
        self._heard = numbers

    def judge(self, step: int, where: Callable[[int], str]) -> list[Slow]:
        """Main process: who became slow with this row, for another reason, or keeps up again."""
        size, heard = NUMBERS, self._heard
        everyones = [heard[first : first + size] for first in range(0, len(heard), size)]
        self._heard = []
        if not everyones or not all(map(any, everyones)):
            return []
        whole = statistics.median(parts[-1] for parts in self._times)
        worth = WORTH_TELLING * whole
        blocks = [blocks_of(numbers) for numbers in everyones]
        own = [[sum(parts[:OWN]) for parts in mine] for mine in blocks]
        waits = [[parts[OWN] for parts in mine] for mine in blocks]
        by_time = waited_for(own, [numbers[-2] for numbers in everyones], self.shares)
        by_core = waited_for(waits, [numbers[-1] for numbers in everyones], self.shares)
        changed = []
        for rank, (late, waiting) in enumerate(zip(by_time, by_core, strict=True)):
            old, measures = self.slow.get(rank), [late, waiting]
            if self.clock is DeviceClock:
                measures = [late]  # a GPU has work enough while its host waits
            out = [lost.newest for lost in measures if lost.stands_out(worth)]
            if old is not None and all(lost.is_over(worth) for lost in measures):
                old.until = step
                changed.append(self.slow.pop(rank))
            elif out:
                reasons = reasons_of(rank, blocks, self.shares)[-NEWEST:]
                if waiting.newest > late.newest / 2:
                    reasons = ["core"] * NEWEST
                if old is not None:
                    if len(set(reasons)) > 1 or reasons[0] == old.reason:
                        continue
                    old.until = step
                seconds, reason = max(out), statistics.mode(reasons)
                faster = seconds / max(whole - seconds, seconds / 100)
                slow = Slow(rank, where(rank), reason, seconds, faster, step)
                self.slow[rank] = slow
                self.all.append(slow)
                changed.append(slow)
        return changed

    def history(self) -> list[Json]:
        """All that were slow in this life, as status.json keeps them."""
        return [asdict(slow) for slow in self.all]


def middle(values: Sequence[float]) -> float:
    """The median; of two that are in the middle the smaller one: of two processes one is slower."""
    return sorted(values)[(len(values) - 1) // 2]


def blocks_of(numbers: list[float]) -> list[list[float]]:
    """Seconds of each part in each block, of what a process told."""
    count = len(PARTS)
    return [numbers[block * count : (block + 1) * count] for block in range(BLOCKS)]


def waited_for(
    seconds: list[list[float]], errors: list[float], shares: Sequence[int]
) -> list[Lost]:
    """What all others wait for each process, of its seconds of a step in each block.

    An even process needs in proportion to its shards what the median of all needs; a process is
    waited for as far as it is later than the last of the even ones.
    """
    even = [
        max(shares) * middle([one / share for one, share in zip(each, shares, strict=True)])
        for each in zip(*seconds, strict=True)
    ]
    lost = []
    for rank, mine in enumerate(seconds):
        others = [error / share for error, share in zip(errors, shares, strict=True)]
        others.pop(rank)
        error = (errors[rank] ** 2 + (max(shares) * middle(others)) ** 2) ** 0.5
        lost.append(Lost([one - usual for one, usual in zip(mine, even, strict=True)], error))
    return lost


def reasons_of(rank: int, blocks: list[list[list[float]]], shares: Sequence[int]) -> list[str]:
    """In each block, what a process is slow in."""
    found = []
    for block, mine in enumerate(blocks[rank]):
        usual = []
        for part in range(OWN):
            each = zip(blocks, shares, strict=True)
            usual.append(shares[rank] * middle([its[block][part] / n for its, n in each]))
        found.append(reason(mine[:OWN], usual))
    return found


def squares_of(block: list[float]) -> float:
    """How far a block's steps are from their mean, in squares."""
    mean = sum(block) / STEPS
    return sum((seconds - mean) ** 2 for seconds in block)


def error_of(squares: Sequence[float]) -> float:
    """The standard error of a step's mean over all blocks; a drift from block to block is none.

    Of means, not of medians: a core that is shared by slices of time makes only some steps late.
    """
    return (sum(squares) / (BLOCKS * (STEPS - 1)) / (BLOCKS * STEPS)) ** 0.5


def reason(mine: Sequence[float], usual: Sequence[float]) -> str:
    """The part that takes longer than is usual, or "all": whatever a process computes."""
    more = [max(0.0, seconds - even) for seconds, even in zip(mine, usual, strict=True)]
    data, forward, backward = more
    if data > MOSTLY * sum(more):
        return "data"
    # As many times longer: what slows a part alone is far from that.
    times = [extra / max(even, 1e-9) for extra, even in zip(more[1:], usual[1:], strict=True)]
    if min(times) > max(times) / 3:
        return "all"
    return "forward" if forward > backward else "backward"
