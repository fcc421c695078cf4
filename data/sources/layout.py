"""What a reader of pictures on disk is: how it knows its files, and how it reads them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.files import Records
from data.image_set import Decoded
from data.splits import Wanted


@dataclass(frozen=True)
class Layout:
    """A way in which a copy of a data set may lie on a disk; it has one of the three readers.

    None of them: see carried.py.
    """

    words: str  # as in `Data: images from <words> at PATH`
    holds: Callable[[Path], bool]
    files: Callable[[Path], list[Path]] | None = None  # what tells whether it changed
    listing: Callable[[Path, Wanted], Records] | None = None  # cheap: no file but lists is read
    rows: Callable[[Path, Wanted], Records] | None = None  # reads all that there is
    read: Callable[[Path], Decoded] | None = None  # what is not encoded one by one
