"""Standard streams that outlive their reader, their disk and their terminal."""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Steady(io.FileIO):
    """A descriptor whose words may be lost: a pipe's reader ends, a disk is full, a terminal goes.

    What cannot be written is dropped, and `problem` says why: no print, of whatever library, ends a
    run that has hours behind it. Where there is room again, later words are written.
    """

    problem = ""

    def write(self, data: "ReadableBuffer") -> int:
        """Write, or forget."""
        try:
            while (written := super().write(data)) is None:  # another program made it non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            self.problem = error.strerror or str(error)
            return memoryview(data).nbytes


def in_cell() -> bool:
    """Whether a notebook's `!` started this: what looks like a terminal there cannot erase."""
    return "JPY_PARENT_PID" in os.environ


def steady_streams() -> None:
    """Make stdout and stderr steady; to be called before a file is opened that is to stay open.

    Closed ones become the null device: a checkpoint would get their numbers otherwise, and with
    them what a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = _steady(sys.stdout, 1), _steady(sys.stderr, 2)


def exit_told(main: Callable[[], int]) -> NoReturn:
    """Exit with the status of a command whose answer is what it prints.

    A reader that has seen enough (`| head`) is no failure; a disk that took half an answer is.
    """
    steady_streams()
    try:
        status = main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        status = 130
    except SystemExit as leaving:  # --help, a flag that is none
        status = leaving.code
    sys.exit(heard(status))


def heard(status: str | int | None) -> str | int | None:
    """The status of a command that has said all on steady streams: 1, and told, if a part is lost.

    A reader that has seen enough is no loss.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    lost = lost_words()
    if lost and lost != os.strerror(errno.EPIPE) and not status:
        print(f"stdout cannot be written ({lost})", file=sys.stderr)
        return 1
    return status


def lost_words() -> str:
    """Why something that was printed to stdout is lost; "" if all is well."""
    return getattr(_raw(sys.stdout), "problem", "")


def _steady(stream: TextIO | None, number: int) -> TextIO:
    """The same stream, steady; one that is not the process's own (a notebook's) stays."""
    if isinstance(_raw(stream), Steady):
        return stream  # pyright: ignore[reportReturnType] - what is steady is one
    if stream is not None and (type(stream) is not io.TextIOWrapper or stream.fileno() != number):
        return stream
    raw = Steady(number, "w", closefd=False)
    if stream is None:
        raw.problem = "it is closed"
        return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="replace")
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding, errors=stream.errors,
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip


def _raw(stream: TextIO | None) -> io.RawIOBase | None:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)
