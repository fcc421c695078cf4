"""What a reader of pictures on disk is: how it knows its files, and how it reads them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.image_set import Decoded
from data.scan import Scanned


@dataclass(frozen=True)
class Layout:
    """A way in which a copy of a data set may lie on a disk."""

    words: str  # as in `Data: images from <words> at PATH`
    holds: Callable[[Path], bool]
    files: Callable[[Path], list[Path]]  # sorted: their sizes and times tell whether it changed
    # Of a path, an image size and whether to skip what is damaged; None: see carried.py.
    read: Callable[[Path, int | None, bool], Decoded | Scanned] | None
