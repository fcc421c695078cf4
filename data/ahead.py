"""Work for the batches to come, by threads, in the order of the batches."""

import contextlib
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Self, TypeVar

import torch

from common.errors import Left

T = TypeVar("T")
R = TypeVar("R")

Piece = Callable[[], None]
SWITCH = 0.0005  # seconds after which a thread is asked to let another one run Python
PATIENCE = 2.0  # seconds that who is to stop still waits for work that does not come
SLOW = 20.0  # seconds after which a person hears what is waited for


@contextlib.contextmanager
def pool_of(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for one piece of work; an error or an interrupt waits for nothing not yet begun."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Threads:
    """Daemon threads that do pieces of work: a read that hangs keeps no process from ending.

    While they are there, who waits for the interpreter's lock asks for it ten times as often as
    usual: a picture takes many short turns of it, and the loop that they work for some more.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._usual = 0.0
        self._pieces: queue.SimpleQueue[tuple[Work, Piece] | None] = queue.SimpleQueue()
        self._started = False
        self._there: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def do(self, pieces: list[Piece]) -> "Work":
        """Begin with these pieces, after all that were given before."""
        if not self._started:  # with the first batch: a fork may come before it
            self._started = True
            self._start()
        work = Work(len(pieces))
        for piece in pieces:
            self._pieces.put((work, piece))
        return work

    def _start(self) -> None:
        self._usual = sys.getswitchinterval()
        sys.setswitchinterval(min(self._usual, SWITCH))
        ready = threading.Barrier(self.count + 1)
        for number in range(self.count):
            name = f"decode-{number}"
            one = threading.Thread(target=self._run, args=(ready,), name=name, daemon=True)
            one.start()
            self._there.append(one)
        mine = torch.get_num_threads()
        ready.wait()  # each has told torch that it works alone: a team of its own would be slower,
        torch.set_num_threads(mine)  # and what it told would hold for later threads too

    def end(self) -> None:
        """No more work comes: the threads leave when they have done what there is.

        They are waited for, though not for long: an interpreter that ends beside a thread of
        torch's may abort.
        """
        for _ in self._there:
            self._pieces.put(None)
        until = time.monotonic() + 2.0
        for one in self._there:
            one.join(max(0.0, until - time.monotonic()))
        self._there.clear()
        if self._started:
            self._started = False
            sys.setswitchinterval(self._usual)

    def _run(self, ready: threading.Barrier) -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # only a reading in this thread makes it hold
        ready.wait()
        while (one := self._pieces.get()) is not None:
            work, piece = one
            try:
                if not work.dropped:
                    piece()
            except BaseException as error:
                work.error = work.error or error
            work.count_one()


class Work:
    """Pieces of work that somebody waits for; the first error among them is raised there."""

    def __init__(self, pieces: int) -> None:
        self.dropped = False
        self.error: BaseException | None = None
        self._left = pieces
        self._lock = threading.Lock()
        self._done = threading.Event()
        if not pieces:
            self._done.set()

    def count_one(self) -> None:
        """One piece is done."""
        with self._lock:
            self._left -= 1
            if not self._left:
                self._done.set()

    def wait(
        self, leaves: Callable[[], bool] = lambda: False, slow: Callable[[], None] = lambda: None
    ) -> None:
        """Until all pieces are done; in short turns, so that a signal is heard.

        Raises Left if they do not come and `leaves` says so; calls `slow` once if they are SLOW.
        """
        began, said = time.monotonic(), False
        while not self._done.wait(0.2):
            waited = time.monotonic() - began
            if waited > PATIENCE and leaves():
                raise Left
            if waited > SLOW and not said:
                said = True
                slow()
        if self.error is not None:
            raise self.error


class Ahead(Generic[T, R]):
    """Begins what later items need while earlier ones are used; counts the seconds waited.

    `leaves` is asked, and `slow` called, where an item does not come, see Work.wait.
    """

    def __init__(self, depth: int, slow: Callable[[], None] = lambda: None) -> None:
        self.depth, self.slow = depth, slow
        self.leaves: Callable[[], bool] = lambda: False
        self._waited = self._used = 0.0

    def take_wait(self) -> float:
        """The share of the time that was spent waiting, since this was last asked."""
        total = self._waited + self._used
        share = self._waited / total if total else 0.0
        self._waited = self._used = 0.0
        return share

    def over(
        self, items: Iterable[T], begin: Callable[[T], tuple[Work, Callable[[], R]]]
    ) -> Iterator[R]:
        """What begin(item) gives once its work is done, item by item, `depth` of them in flight."""
        flying: deque[tuple[Work, Callable[[], R]]] = deque()
        source = iter(items)
        try:
            for item in source:
                flying.append(begin(item))
                if len(flying) > self.depth:
                    yield from self._landed(flying.popleft())
            while flying:
                yield from self._landed(flying.popleft())
        finally:
            for work, _ in flying:  # left in mid-epoch: nobody will ask for them
                work.dropped = True

    def _landed(self, one: tuple[Work, Callable[[], R]]) -> Iterator[R]:
        work, result = one
        began = time.perf_counter()
        work.wait(self.leaves, self.slow)
        ready = time.perf_counter()
        self._waited += ready - began
        yield result()
        self._used += time.perf_counter() - ready
