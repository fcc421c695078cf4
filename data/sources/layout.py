"""What a reader of pictures on disk is: how it knows its files, and how it reads them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.cache import Entry
from data.files import Records
from data.image_set import Decoded
from data.splits import Wanted

if TYPE_CHECKING:
    from data.sources.published import Published


@dataclass(frozen=True)
class Aside:
    """Where a reader puts what it must convert, a folder in the cache; and who hears of it."""

    folder: Path
    say: Callable[[str], None]


@dataclass(frozen=True)
class Layout:
    """A way in which a copy of a data set may lie on a disk; it has one of the four readers."""

    words: str  # as in `Data: images from <words> at PATH`
    holds: Callable[[Path], bool]
    files: Callable[[Path], list[Path]] | None = None  # what tells whether it changed
    listing: Callable[[Path, Wanted], Records] | None = None  # cheap: no file but lists is read
    rows: Callable[[Path, Wanted, Aside], Records] | None = None  # reads all that there is
    read: Callable[[Path], Decoded] | None = None  # what is not encoded one by one
    # What the cache would give, where it was made before: of a path, an image size, the published
    # data sets and the name that was asked for.
    entry: Callable[[Path, int | None, Mapping[str, "Published"], str], Entry] | None = None
