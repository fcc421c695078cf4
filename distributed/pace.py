"""Stragglers: names the process that the others wait for in each step, and where its time goes.

Each process times its own part of a step: the wait for its batch, and forward and backward of its
shards up to the last gradient, because from there on a collective makes all of them equally late.
What a row adds up over the processes carries the times of the newest steps: no wait of its own.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from common.disk import Json

BLOCKS, STEPS = 3, 5  # of so many steps in a row: in each of them a slow process is the slower one
PARTS = ("data", "forward", "backward")
NUMBERS = BLOCKS * len(PARTS) + 1  # of a process in a row: a median of each, and the spread
WARM_UP = 2  # steps that say nothing
WORTH_TELLING = 0.05  # of a step's time: a process that loses less is not called slow
SPREADS = 3.0  # what it loses in each block stands out by so many of its standard errors
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
        self._begun: deque[list] = deque(maxlen=2 * BLOCKS * STEPS)  # a GPU is behind its host
        self._times: deque[tuple[float, ...]] = deque(maxlen=BLOCKS * STEPS)
        self._heard: list[float] = []
        self._hooks: dict[Tensor, torch.utils.hooks.RemovableHandle] = {}
        self._latest: Tensor | None = None

    # --- in each step, on each process ----------------------------------------------------------

    def asks(self, first: bool = False) -> None:
        """A step is over, and the next batch is asked for; `first`: something else was before."""
        if self.processes == 1:
            return
        mark, marks = self.clock.mark(), self._marks
        self._steps += not first
        if self._steps > WARM_UP and len(marks) > 2 and len(marks) % 3 == 2 and not first:
            self._begun.append([*marks, mark])
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
            self._hooks[p] = p.register_post_accumulate_grad_hook(self._arrived)

    def let_go(self) -> None:
        """Follow no parameter any more."""
        while self._hooks:
            self._hooks.popitem()[1].remove()

    def _arrived(self, parameter: Tensor) -> None:
        if self._marks:
            self._last, self._latest = self.clock.mark(), parameter

    def _keep_one_hook(self) -> None:
        if len(self._hooks) > 1 and self._steps:
            for p in [p for p in self._hooks if p is not self._latest]:
                self._hooks.pop(p).remove()

    # --- with a row -----------------------------------------------------------------------------

    def numbers(self, like: Tensor) -> Tensor:
        """What a row adds up over all processes: everybody's medians, of which we know our own."""
        mine = [0.0] * NUMBERS
        while self._begun and self.clock.known(self._begun[0][-1]):
            self._times.append(self._parts(self._begun.popleft()))
        due = self._steps >= self._told_at + STEPS  # for all processes in the same row
        if due:
            self._told_at = self._steps
        if due and len(self._times) == BLOCKS * STEPS:
            own = [sum(parts[:3]) for parts in self._times]
            spread = statistics.median(abs(a - b) for a, b in zip(own[1:], own, strict=False))
            mine = [seconds for block in self._blocks() for seconds in block[:3]] + [spread]
        rest = self.processes - 1 - self.rank
        return like.new_tensor([0.0] * NUMBERS * self.rank + mine + [0.0] * NUMBERS * rest)

    def _parts(self, marks: list) -> tuple[float, ...]:
        """Seconds of data, forward, backward, and of the whole step."""
        between, found = self.clock.seconds, [0.0, 0.0]
        for place in range(2, len(marks) - 1, 3):
            for part in range(2):
                found[part] += between(*marks[place + part : place + part + 2])
        return between(marks[0], marks[1]), *found, between(marks[0], marks[-1])

    def _blocks(self) -> Iterator[list[float]]:
        """The median of each part in each block of steps, the oldest first."""
        times = list(self._times)
        for first in range(0, len(times), STEPS):
            parts = zip(*times[first : first + STEPS], strict=True)
            yield [statistics.median(part) for part in parts]

    def hear(self, numbers: list[float]) -> None:
        """Everybody's medians; none on one process."""
        self._heard = numbers

    def judge(self, step: int, where: Callable[[int], str]) -> list[Slow]:
        """Main process: who became slow with this row, for another reason, or keeps up again."""
        size, heard = NUMBERS, self._heard
        told = [heard[first : first + size] for first in range(0, len(heard), size)]
        self._heard = []
        if not told or not all(map(any, told)):
            return []
        whole = statistics.median(parts[3] for parts in self._times)
        blocks = [blocks_of(numbers) for numbers in told]
        lost, by_chance = waited_for(blocks, self.shares), noise(told, self.shares)
        changed = []
        for rank, seconds in enumerate(lost):
            old, bar = self.slow.get(rank), max(WORTH_TELLING * whole, by_chance[rank])
            if old is not None and max(seconds) < bar:
                old.until = step
                changed.append(self.slow.pop(rank))
            elif min(seconds) > bar:
                reasons = reasons_of(rank, blocks, self.shares)
                if old is not None:
                    if len(set(reasons)) > 1 or reasons[0] == old.reason:
                        continue
                    old.until = step
                mean, reason = statistics.mean(seconds), statistics.mode(reasons)
                faster = mean / max(whole - mean, mean / 100)
                slow = Slow(rank, where(rank), reason, mean, faster, step)
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


def blocks_of(told: list[float]) -> list[list[float]]:
    """Seconds of each part in each block, of what a process told."""
    count = len(PARTS)
    return [told[block * count : (block + 1) * count] for block in range(BLOCKS)]


def waited_for(blocks: list[list[list[float]]], shares: Sequence[int]) -> list[list[float]]:
    """For each process the seconds of a step, in each block, that all others wait for it.

    An even process needs in proportion to its shards what the median of all needs; a process is
    waited for as far as it is later than the last of the even ones.
    """
    own = [[sum(parts) for parts in mine] for mine in blocks]
    even = [
        middle([mine[block] / share for mine, share in zip(own, shares, strict=True)])
        for block in range(BLOCKS)
    ]
    last = [seconds * max(shares) for seconds in even]
    return [[a - b for a, b in zip(mine, last, strict=True)] for mine in own]


def reasons_of(rank: int, blocks: list[list[list[float]]], shares: Sequence[int]) -> list[str]:
    """In each block, what a process is slow in."""
    found = []
    for block, mine in enumerate(blocks[rank]):
        usual = []
        for part in range(len(PARTS)):
            each = zip(blocks, shares, strict=True)
            usual.append(shares[rank] * middle([its[block][part] / n for its, n in each]))
        found.append(reason(mine, usual))
    return found


def noise(told: list[list[float]], shares: Sequence[int]) -> list[float]:
    """What each process may seem to lose by chance: SPREADS standard errors of a block's median.

    `told` ends with the median difference of neighbouring steps, which a drift does not enlarge.
    """
    error = 1.05 * 1.25 / STEPS**0.5  # of a normal distribution: its sigma, and a median's error
    spreads = [error * numbers[-1] for numbers in told]
    usual = middle([spread / share for spread, share in zip(spreads, shares, strict=True)])
    return [SPREADS * (mine**2 + (usual * max(shares)) ** 2) ** 0.5 for mine in spreads]


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
