"""Photographs: an index of what lies where, and pixels that are decoded when a batch needs them.

Whole pictures stay encoded on the disk. Each is decoded, and its part that is seen cut out and
scaled, by one of the threads that work ahead of the step; never more than a few batches are there.
"""

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from common.text import printable, some
from data.ahead import SLOW, Piece, Threads, Work
from data.cuts import Boxes, Cuts, default_resize
from data.files import decode, opened, refuse_too_large
from data.grey import mean_colour
from data.image_set import Levels
from data.kept import WORTH, Kept

PLAIN = 16  # in a picture's kind: a JPEG whose colours need no thought; below it: its orientation
RETRIES = (1.0, 3.0, 6.0)  # seconds before a picture that cannot be read is tried once more
PIECE = 4  # pictures that a thread takes at a time
PHOTOGRAPH = 224  # pixels a side, where nobody says how large photographs are seen
SCALING = {  # antialiased, as torch.nn.functional.interpolate calls them
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}
REDUCTIONS = (8, 4, 2)  # what libjpeg can divide the sides of a picture by while it decodes


class Store(Protocol):
    """Where whole pictures lie, by place; all of it may be asked from any thread."""

    @property
    def words(self) -> str:
        """How pictures come from there, for a person."""
        ...

    def encoded(self, place: int) -> bytes:
        """The bytes of a picture's file; OSError where they cannot be read."""
        ...

    def raw(self, place: int) -> np.ndarray | None:
        """The upright pixels (H, W, 3) uint8, where they lie decoded."""
        ...

    def name_of(self, path: Path) -> str:
        """The name that a file of the data set has in it."""
        ...


@dataclass(frozen=True)
class Names:
    """Many names in one tensor of bytes: a million strings would cost a hundred megabytes."""

    text: Tensor  # uint8
    ends: Tensor  # int64 (n,)

    @classmethod
    def of(cls, names: Sequence[str]) -> Self:
        """These names, packed."""
        parts = [name.encode("utf-8", "surrogateescape") for name in names]
        text = torch.frombuffer(bytearray(b"".join(parts) or b"\0"), dtype=torch.uint8)
        return cls(text, torch.tensor([len(part) for part in parts]).cumsum(0))

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        text, start = self.text.numpy().tobytes(), 0
        for end in self.ends.tolist():
            yield text[start:end].decode("utf-8", "surrogateescape")
            start = end

    def __getitem__(self, place: int) -> str:
        start = int(self.ends[place - 1]) if place else 0
        part = self.text[start : int(self.ends[place])]
        return part.numpy().tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class FileStore:
    """Pictures that stay the files that they are."""

    root: Path
    names: Names
    words: str = "decoded from their files"

    def encoded(self, place: int) -> bytes:
        """See Store."""
        return (self.root / self.names[place]).read_bytes()

    def raw(self, place: int) -> np.ndarray | None:
        """See Store."""
        return None

    def name_of(self, path: Path) -> str:
        """See Store."""
        return Path(os.path.relpath(path, self.root)).as_posix()


@dataclass
class Damage:
    """Pictures that could not be decoded; each weighs nothing, whoever meets it."""

    excluded: frozenset[int] = frozenset()  # places that the user wants left out
    found: dict[int, str] = field(default_factory=dict)  # place: why; what was met stays left out
    notice: Callable[[], None] | None = None  # called, from any thread, when one was met

    def add(self, place: int, why: str) -> None:
        """A picture that was met for the first time."""
        self.found[place] = why
        if self.notice is not None:
            self.notice()


@dataclass(frozen=True)
class Photos:
    """N photographs: where they lie, their names, and height and width, int32 (N, 2), upright."""

    store: Store
    names: Names
    sizes: Tensor
    kinds: Tensor  # (N,) uint8: EXIF's orientation, and whether it is a PLAIN JPEG
    levels: Levels | None = None  # of those of 16 bits
    damage: Damage = field(default_factory=Damage)
    clipped: dict[int, int] = field(default_factory=dict)  # place: values outside of the levels
    kept: Kept | None = None  # of pictures that lie decoded
    under_way: dict[int, tuple[int, float]] = field(default_factory=dict)  # thread: place, since

    def __len__(self) -> int:
        return len(self.sizes)

    def tell_slow(self) -> None:
        """Say on stderr which pictures do not come: a network disk may be silent for minutes."""
        before = time.monotonic() - SLOW / 2
        names = [self.names[place] for place, since in [*self.under_way.values()] if since < before]
        if names:
            what = f"waiting for {some(sorted(names), 3)}"
            message = f"{what}: its disk has not answered for {SLOW:.0f} s"
            print(message, file=sys.stderr, flush=True)

    def pixels(self, place: int) -> np.ndarray:
        """A whole picture, upright RGB (H, W, 3) uint8, as its size was when it was scanned."""
        return self.reduced(place, 1)[0]

    def reduced(self, place: int, times: int) -> tuple[np.ndarray, int]:
        """A whole picture of which the sides are divided, and by what: 1 where it is no JPEG."""
        found = self.store.raw(place)
        if found is None:
            outside: list[int] = []
            kind = int(self.kinds[place])
            times = times if kind & PLAIN else 1
            found = decoded(self._read(place), kind, self.levels, outside, times)
            if outside:
                self.clipped[place] = sum(outside)
        else:
            times = 1
        height, width = (-(-side // times) for side in self.sizes[place].tolist())
        if found.shape != (height, width, 3):
            raise ValueError(
                f"is {found.shape[1]} x {found.shape[0]} now, was {width} x {height} when the "
                "folder was scanned"
            )
        return found, times

    def _read(self, place: int) -> bytes:
        for pause in RETRIES:  # a network disk has bad seconds
            try:
                return self.store.encoded(place)
            except FileNotFoundError:
                raise
            except OSError:
                time.sleep(pause)
        return self.store.encoded(place)

    def batch(
        self, places: list[int], boxes: Boxes, fill: tuple[int, int, int], threads: Threads,
        pinned: bool = False, scaled: bool = False,
    ) -> tuple[Work, Tensor, list[int]]:  # fmt: skip
        """The work that cuts these pictures; their images, (n, 3, S, S) uint8, once it is done.

        The last are the rows that turned out to be damaged: those are all of the fill colour.
        Place -1 is padding. scaled: JPEGs are decoded smaller, as far as `reduction` allows.
        """
        shape = (len(places), boxes.size, boxes.size, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        pixels, bad = images.numpy(), []

        def piece(rows: range) -> None:
            wanted = boxes.rows
            for row in rows:
                place, part = places[row], pixels[row]
                if place < 0 or not self._cut(
                    place, wanted[row], part, fill, boxes.interpolation, scaled
                ):
                    part[:] = fill
                    if place >= 0:
                        bad.append(row)

        ranges = (range(i, min(i + PIECE, len(places))) for i in range(0, len(places), PIECE))
        pieces: list[Piece] = [functools.partial(piece, rows) for rows in ranges]
        return threads.do(pieces), images.permute(0, 3, 1, 2), bad

    def _cut(
        self, place: int, wanted: list[int], out: np.ndarray, fill: tuple[int, int, int],
        interpolation: str, scaled: bool,
    ) -> bool:  # fmt: skip
        if place in self.damage.excluded or place in self.damage.found:
            return False
        self.under_way[threading.get_ident()] = place, time.monotonic()
        try:
            found = self._as_a_whole(place, wanted, interpolation) if self.kept else None
            if found is None:
                pixels, times = self.reduced(place, reduction(wanted) if scaled else 1)
                found = pixels, in_reduced(wanted, times)
            cut(*found, out, fill, interpolation)
        except MemoryError:
            raise  # says nothing of the picture
        except Exception as error:  # Pillow raises many kinds on damaged files
            self.damage.add(place, reason(error))
            return False
        finally:
            del self.under_way[threading.get_ident()]
        return True

    def _as_a_whole(
        self, place: int, wanted: list[int], interpolation: str
    ) -> tuple[np.ndarray, list[int]] | None:
        """The scaled picture, and the row of Boxes for it; None where a part is to be scaled."""
        left, top, right, bottom, height, width, *_ = wanted
        small = WORTH * height * width <= right * bottom
        if left or top or not small or [bottom, right] != self.sizes[place].tolist():
            return None
        assert self.kept is not None  # who calls asked
        key = (place, height, width, interpolation)
        if (found := self.kept.get(key)) is None:
            found = np.empty((height, width, 3), np.uint8)
            scale(self.pixels(place), found, interpolation)
            self.kept.put(key, found)
        return found, [0, 0, width, height, *wanted[4:]]


def reason(error: Exception) -> str:
    """Why a picture could not be decoded, in words."""
    if isinstance(error, FileNotFoundError):
        return "it is no longer there"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(str(error) or type(error).__name__).rstrip(".")


@dataclass(frozen=True)
class PhotoSet:
    """Some of the photographs, by place, with their labels, int64 (n,) both."""

    photos: Photos
    places: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, chosen: Tensor) -> Self:
        """Those of these positions."""
        return replace(self, places=self.places[chosen], labels=self.labels[chosen])

    @property
    def names(self) -> list[str]:
        """The name of each, in the data set."""
        names = list(self.photos.names)
        return [names[place] for place in self.places.tolist()]

    @property
    def sizes(self) -> Tensor:
        """Height and width of each, int32 (n, 2)."""
        return self.photos.sizes[self.places]


def sizes_in_words(sizes: Tensor) -> str:
    """Height and width, int32 (n, 2), as "300x200 to 4000x3000 pixels", the smallest first."""
    area = sizes.long().prod(dim=1)
    (low, high) = (sizes[int(place)].tolist() for place in (area.argmin(), area.argmax()))
    small, large = (f"{width}x{height}" for height, width in (low, high))
    return f"{small} pixels" if small == large else f"{small} to {large} pixels"


def decoder() -> str:
    """What decodes plain JPEGs here, with its version: a part of a run's fingerprint."""
    jpeg = _simplejpeg()
    if jpeg is not None:
        from importlib.metadata import version

        return f"simplejpeg {version('simplejpeg')}"
    from PIL import features

    return f"Pillow with libjpeg-turbo {features.version('libjpeg_turbo')}"


@functools.cache
def _simplejpeg() -> Callable[..., np.ndarray] | None:
    try:
        from simplejpeg import decode_jpeg
    except ImportError:  # no wheel for this platform: Pillow has the same pixels, more slowly
        return None
    return decode_jpeg


def decoded(
    encoded: bytes, kind: int, levels: Levels | None = None, clipped: list[int] | None = None,
    times: int = 1,
) -> np.ndarray:  # fmt: skip
    """A whole picture, upright RGB (H, W, 3) uint8; levels and clipped are as of `decode`.

    times: what the sides of a PLAIN one are divided by while it is decoded; they are rounded up.
    """
    jpeg = _simplejpeg()
    if not kind & PLAIN or jpeg is None:
        return decode(encoded, None, levels, clipped, times)
    if times == 1:
        return upright(jpeg(encoded, "RGB"), kind % PLAIN)
    from simplejpeg import decode_jpeg_header

    height, width = (-(-int(side) // times) for side in decode_jpeg_header(encoded)[:2])
    smaller = jpeg(encoded, "RGB", min_height=height, min_width=width, min_factor=times)
    return upright(smaller, kind % PLAIN)


def reduction(row: list[int]) -> int:
    """By what a JPEG's sides may be divided while it is decoded, for a row of Boxes: 1, 2, 4, 8.

    What is scaled then still has at least twice the pixels a side that are wanted.
    """
    left, top, right, bottom, height, width = row[:6]
    room = min((bottom - top) // height, (right - left) // width)
    return next((times for times in REDUCTIONS if 2 * times <= room), 1)


def in_reduced(row: list[int], times: int) -> list[int]:
    """A row of Boxes for the picture of which the sides were divided; to the nearest pixel."""
    return row if times == 1 else [*((side + times // 2) // times for side in row[:4]), *row[4:]]


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, 3) turned as EXIF's orientation 1 to 8 says; a view."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def cut(
    pixels: np.ndarray, row: list[int], out: np.ndarray, fill: tuple[int, int, int],
    interpolation: str = "bilinear",
) -> None:  # fmt: skip
    """Put what a row of Boxes takes of a picture (H, W, 3) into `out`, (size, size, 3).

    Scaled by torch's antialiased filter in whole numbers, as torchvision's transforms are.
    """
    left, top, right, bottom, height, width, y, x, flips = row
    size, part = len(out), pixels[top:bottom, left:right]
    whole = height == width == size and not (x or y)
    if part.shape[:2] != (height, width):
        straight = whole and not flips
        scaled = out if straight else np.empty((height, width, 3), np.uint8)
        scale(part, scaled, interpolation)
        if straight:
            return
        part = scaled
    if not whole:
        part = part[max(0, -y) : size - y, max(0, -x) : size - x]
        if part.shape != out.shape:
            out[:] = fill
        (rows, columns, _), y, x = part.shape, max(0, y), max(0, x)
        x = size - x - columns if flips else x
        out = out[y : y + rows, x : x + columns]
    if flips:  # torch turns rows around ten times faster than numpy does
        part = _tensor(part).flip(1).numpy()
    out[:] = part


def scale(pixels: np.ndarray, out: np.ndarray, interpolation: str) -> None:
    """Scale a picture (H, W, 3) into `out`, which lies as a picture does: half the time."""
    SCALING[interpolation](
        _tensor(pixels).permute(2, 0, 1)[None], [*out.shape[:2]], False,
        out=_tensor(out).permute(2, 0, 1)[None],
    )  # fmt: skip


def _tensor(pixels: np.ndarray) -> Tensor:
    """The same memory, or a copy of what torch takes not: turned ones, a page of a pack."""
    if min(pixels.strides) < 0 or not pixels.flags.writeable:
        pixels = pixels.copy()
    return torch.from_numpy(pixels)


def as_evaluated(pixels: np.ndarray, card: Mapping) -> np.ndarray:
    """A picture (H, W, 3) as the evaluation of a run saw its own, (S, S, 3) uint8.

    `card` is what the run's weights say of themselves: image_size, and how photographs were cut or
    the size of small pictures that were kept as they were; older ones kept small squares so.
    """
    from PIL import Image

    from data.files import SMALL, square

    size = card["image_size"]
    height, width, _ = pixels.shape
    older = "dataset" in card and not card.keys() & {"picture_size", "photographs"}
    if [height, width] == card.get("picture_size") or (older and height == width <= SMALL):
        return pixels.copy()
    if not card.get("photographs") and max(pixels.shape[:2]) <= SMALL:
        return np.asarray(square(Image.fromarray(pixels), size)).copy()
    return _cut_as_the_card_says(lambda _: (pixels, 1), (height, width), card)


def reduced_as_evaluated(encoded: bytes, card: Mapping) -> np.ndarray:
    """A picture as the evaluation of a run with --decode scaled saw its own, (S, S, 3) uint8."""
    height, width, kind = header(encoded)

    def pixels(times: int) -> tuple[np.ndarray, int]:
        times = times if kind & PLAIN else 1
        return decoded(encoded, kind, card.get("levels"), times=times), times

    return _cut_as_the_card_says(pixels, (height, width), card)


def _cut_as_the_card_says(
    reduced: Callable[[int], tuple[np.ndarray, int]], shape: tuple[int, int], card: Mapping
) -> np.ndarray:
    # Small pictures that a run was trained on were not cut; nor were those of older runs.
    size = card["image_size"]
    margin = default_resize(size) if card.get("photographs") else size
    cuts = Cuts(
        "none", size, card.get("eval_size", size), card.get("eval_resize", margin),
        card.get("resize", "crop"), 0, interpolation=card.get("interpolation", "bilinear"),
    )  # fmt: skip
    boxes = cuts.evaluation(torch.tensor([shape]))
    out = np.empty((boxes.size, boxes.size, 3), np.uint8)
    pixels, times = reduced(reduction(boxes.rows[0]))
    row = in_reduced(boxes.rows[0], times)
    cut(pixels, row, out, mean_colour(card["mean"]), boxes.interpolation)
    return out


def header(encoded: bytes | Path) -> tuple[int, int, int]:
    """Height, width, upright, and kind of a picture, of which only the header is read.

    Raises whatever Pillow raises where it is none; ValueError where it has too many pixels.
    """
    with opened(encoded) as image:
        refuse_too_large(image)
        width, height = image.size
        orientation = image.getexif().get(0x0112, 1)
        kind = orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
        if kind >= 5:
            width, height = height, width
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            kind |= PLAIN
    return height, width, kind
