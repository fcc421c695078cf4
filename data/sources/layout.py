"""What a reader of pictures on disk is: how it knows its files, and how it reads them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.cache import Entry
from data.image_set import Decoded
from data.scan import Scanned

if TYPE_CHECKING:
    from data.sources.published import Published


@dataclass(frozen=True)
class Layout:
    """A way in which a copy of a data set may lie on a disk."""

    words: str  # as in `Data: images from <words> at PATH`
    holds: Callable[[Path], bool]
    files: Callable[[Path], list[Path]]  # sorted: their sizes and times tell whether it changed
    # Of a path, an image size and whether to skip what is damaged; None: `entry` does it.
    read: Callable[[Path, int | None, bool], Decoded | Scanned] | None
    # What the cache would give, where it was made before: of a path, an image size, the published
    # data sets and the name that was asked for.
    entry: Callable[[Path, int | None, Mapping[str, "Published"], str], Entry] | None = None
