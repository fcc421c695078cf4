"""How far long work is: a bar on stderr where that is a terminal, else a line now and then."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from common.streams import in_cell
from common.text import duration

Count = Callable[[int, int], None]  # how much is done, of how much
BETWEEN_LINES = 30.0  # seconds, where nobody sees a bar


@contextlib.contextmanager
def progress(doing: str, unit: str, after: float = 0.0) -> Iterator[Count]:
    """What is called with how much is done, of how much: "pictures" or "bytes".

    The bar appears with the first call, or with the first one after so many seconds, shows the time
    to come, and is gone at the end.
    """
    began = time.monotonic()
    if sys.stderr is None or not sys.stderr.isatty() or in_cell():
        yield _lines(doing, unit)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    words = "" if unit == "bytes" else f" {unit}"
    columns = (TextColumn(doing), BarColumn(), amount, TextColumn(f"{words},"))
    columns = (*columns, TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn())
    same = sys.stdout is not None and sys.stdout.isatty()  # what is printed stays above the bar
    with Progress(
        *columns, TextColumn("to come"), console=Console(stderr=True), transient=True,
        redirect_stdout=same,
    ) as bar:  # fmt: skip
        task = None

        def count(done: int, total: int) -> None:
            nonlocal task
            if time.monotonic() - began < after:
                return
            if task is None:
                task = bar.add_task("", total=total)
            bar.update(task, completed=done, total=total)

        yield count


def _lines(doing: str, unit: str) -> Count:
    began = last = time.monotonic()

    def count(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < BETWEEN_LINES or not done:
            return
        last = now
        left = duration((now - began) * (total - done) / done)
        of = f"{100 * done // total} %" if unit == "bytes" else f"{done:,} of {total:,} {unit}"
        print(f"{doing}: {of}, about {left} to come", file=sys.stderr, flush=True)

    return count
