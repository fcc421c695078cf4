"""Pictures: encoded in files or rows -> upright RGB, uint8, of one size."""

import functools
import importlib
import importlib.util
import io
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar, overload

import numpy as np
import torch

from common.cpus import cpus
from common.disk import digest
from common.errors import UserError
from common.progress import progress
from common.text import printable
from data.ahead import pool_of
from data.image_set import Decoded, Levels, Reasons
from data.keyed_random import SAMPLE, permutation

if TYPE_CHECKING:
    from PIL import Image

    from data.scan import Scanned

HEIC = {".heic", ".heif"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", *HEIC}
OPTIONAL = {"AVIF": "PIL.AvifImagePlugin", "HEIF": "pillow_heif"}  # format -> who reads it
FORMATS = (  # Pillow's others include programs (EPS)
    *("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"),
    *(name for name, module in OPTIONAL.items() if importlib.util.find_spec(module)),
)
MAX_PIXELS = 89_000_000
SAMPLED = 2048  # training pictures that what takes pixels is taken from, before the first step
SMALL = 64  # pixels: pictures that share a size up to this one are kept as they are


@dataclass(frozen=True, slots=True)
class Part:
    """A picture that is a part of a file, as of an archive."""

    file: Path
    start: int
    length: int

    def read(self, most: int | None = None) -> bytes:
        """Its bytes, or the first of them."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(self.length if most is None else min(most, self.length))


Item = bytes | Path | Part
T = TypeVar("T")


class Hashed(bytes):
    """What a picture is told apart by: eight bytes of digest in place of its own."""

    @classmethod
    def of(cls, content: bytes | memoryview) -> Self:
        """That of these bytes."""
        return cls(bytes.fromhex(digest(bytes(content))))


class Lazy(Sequence[T]):
    """What is made or read when it is asked for."""

    def chosen(self, kept: Sequence[int]) -> Self:
        """Those of these positions."""
        raise NotImplementedError


class Made(Lazy[T]):
    """What is made of names when it is asked for: a million paths would take half a gigabyte."""

    def __init__(self, names: Sequence[str], make: Callable[[str], T]) -> None:
        self.names, self.make = names, make

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> "Made[T]": ...
    def __getitem__(self, place: int | slice) -> "T | Made[T]":
        """One, or some of them."""
        if isinstance(place, slice):
            return Made(self.names[place], self.make)
        return self.make(self.names[place])

    def chosen(self, kept: Sequence[int]) -> "Made[T]":
        """See Lazy."""
        return Made([self.names[place] for place in kept], self.make)


@dataclass(frozen=True)
class Records:
    """Encoded pictures, bytes or where they lie, with a name for errors, label and split.

    What validates counts as training, too: `is_val` says which of it. `ids` are the names that a
    list of the splits has: split/row, or paths below `root` where that is given. `left_out`: why
    how many other files are not among them, and one of those; `notes`: sentences to be told.
    """

    items: Sequence[Item]
    names: Sequence[str]
    labels: list[int]
    is_test: list[bool]
    classes: tuple[str, ...]
    ids: list[str]
    is_val: list[bool]
    groups: list[str] = field(default_factory=list)  # [] where none were asked for
    left_out: Reasons = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    root: Path | None = None
    hashed: bool = False  # what tests was chosen by a hash
    many: bool = False  # each class is a set of names: see data/sources/many.py

    def part(self, kept: Sequence[int]) -> Self:
        """Those of these positions; all of them is this itself."""
        if len(kept) == len(self.items):
            return self
        each = ("items", "names", "labels", "is_test", "ids", "is_val", "groups")
        lists = {name: of for name in each if (of := getattr(self, name))}
        return replace(self, **{
            name: of.chosen(kept) if isinstance(of, Lazy) else [of[index] for index in kept]
            for name, of in lists.items()
        })  # fmt: skip


class Large(Exception):
    """Pictures of more than 64 pixels a side, which are not kept decoded."""


def cannot_decode(problem: str) -> UserError:
    """Of a picture that ends what reads it: its name and what is wrong."""
    return UserError(
        f"cannot decode {problem}. Replace or remove that image, or leave such images out with "
        "--skip-bad-images.",
        code="bad-image",
    )


def decode_records(
    records: Records, image_size: int | None, skip_bad: bool, levels: Levels | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> "Decoded | Scanned":  # fmt: skip
    """The pictures of the records that can be read, with what belongs to each.

    Decoded where all of them are small; photographs are only looked at. levels: of pictures of 16
    bits, by default those of a sample of them.
    """
    _refuse_heic(records, skip_bad)
    levels, clipped = levels or levels_of(records), []
    try:
        images, kept, skipped = decode_all(records, image_size, skip_bad, levels, clipped)
    except Large:
        from data.scan import scan

        return scan(records, skip_bad, levels, say)
    records = records.part(kept)
    return Decoded(
        images, records.labels, records.is_test, records.classes, skipped, records, levels,
        tuple(clipped),
    )  # fmt: skip


def levels_of(records: Records) -> Levels | None:
    """The least and the largest value of those images of a sample that have 16 bits, if any has.

    The sample is of training images, and the same in every run.
    """
    places = [place for place, tests in enumerate(records.is_test) if not tests]
    chosen = permutation(0, 0, len(places), SAMPLE)[:SAMPLED].tolist() if places else []
    chosen.sort()  # neighbours may have to be read together
    known = []
    with (
        progress("looking for 16 bits in a sample", "pictures", after=1.0) as count,
        pool_of(cpus()) as pool,
    ):
        found = pool.map(lambda place: _levels(records.items[places[place]]), chosen)
        for done, levels in enumerate(found, 1):
            known += [levels] if levels else []
            count(done, len(chosen))
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def _levels(item: Item) -> Levels | None:
    try:
        with opened(item.read() if isinstance(item, Part) else item) as image:
            if not image.mode.startswith("I"):
                return None
            refuse_too_large(image)
            values = np.asarray(image)
            return int(values.min()), int(values.max())
    except MemoryError:
        raise
    except Exception:  # told when it is decoded
        return None


def told_levels(levels: Levels | None, clipped: Sequence[int] = ()) -> list[str]:
    """A sentence on what becomes of images of 16 bits, if there are any."""
    if levels is None:
        return []
    step = round((levels[1] - levels[0]) / 255)
    merged = f" ({step:,} levels become one)" if step > 1 else ""
    message = (
        f"16-bit images: the values {levels[0]:,} to {levels[1]:,}, as training images have them, "
        f"become 0 to 255{merged}"
    )
    return [f"{message}; {clipped_in_words(clipped)}" if clipped else message]


def clipped_in_words(clipped: Sequence[int]) -> str:
    """How many values lie outside of the levels, of so many in each of some images."""
    images = "one image" if len(clipped) == 1 else f"{len(clipped):,} images"
    return f"{sum(clipped):,} values of {images} lie outside and are clipped"


def _refuse_heic(records: Records, skip_bad: bool) -> None:
    """UserError on the first HEIC picture where nothing reads it."""
    rows = isinstance(records.items, Lazy) and not isinstance(records.items, Made)
    if skip_bad or "HEIF" in FORMATS or rows:
        return
    for item in records.items:
        if isinstance(item, Path) and item.suffix.lower() in HEIC:
            raise UserError(
                f"{printable(item)} is HEIC, which takes a package of its own: pip install "
                "pillow-heif, or leave such images out with --skip-bad-images.",
                code="no-heic",
            )


def decode_all(
    records: Records, image_size: int | None, skip_bad_images: bool, levels: Levels | None = None,
    clipped: list[int] | None = None,
) -> tuple[torch.Tensor, list[int], tuple[str, ...]]:  # fmt: skip
    """All pictures as one tensor (N, 3, H, W) uint8, the indices kept, and those left out.

    With `image_size` S each becomes S x S: resized so that the shorter side is S, then cropped at
    the centre, unless all of them already are squares of one size. A picture that cannot be decoded
    whole is an error or left out. Raises Large on one of more than 64 pixels a side. `levels` and
    `clipped` are as of `decode`.
    """
    from PIL import Image

    def attempt(chunk: range) -> list[np.ndarray | str]:
        results = []
        for index in chunk:
            try:
                results.append(decode(records.items[index], SMALL, levels, clipped))
            except Large:
                raise
            except Exception as error:  # Pillow raises many kinds on damaged files
                results.append(str(error) or type(error).__name__)
        return results

    kept, arrays, skipped = [], [], []
    chunks = [range(i, min(i + 64, len(records.items))) for i in range(0, len(records.items), 64)]
    with (
        progress("decoding", "pictures", after=1.0) as count,
        warnings.catch_warnings(),
        pool_of(min(8, os.cpu_count() or 1)) as pool,
    ):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)  # odd metadata, not damaged pixels
        for chunk, results in zip(chunks, pool.map(attempt, chunks), strict=True):
            for index, result in zip(chunk, results, strict=True):
                if not isinstance(result, str):
                    kept.append(index)
                    arrays.append(result)
                    continue
                reason = f"{records.names[index]}: {printable(result).rstrip('.')}"
                if not skip_bad_images:
                    raise cannot_decode(reason)
                skipped.append(reason)
            count(chunk.stop, len(records.items))
    if not arrays:
        raise UserError(
            f"not one image could be decoded; the first: {[*skipped, 'none there'][0]}",
            code="bad-image",
        )
    height, width, _ = arrays[0].shape
    same = all(array.shape == (height, width, 3) for array in arrays)
    if image_size and not (same and height == width <= SMALL):
        height = width = image_size
    elif not same:
        other = next(array.shape for array in arrays if array.shape != arrays[0].shape)
        raise UserError(
            f"the images differ in size ({width}x{height}, {other[1]}x{other[0]}): say what they "
            "shall become, for example --image-size 64.",
            code="sizes-differ",
        )
    images = np.empty((len(arrays), 3, height, width), dtype=np.uint8)
    for place in range(len(arrays)):
        array, arrays[place] = arrays[place], None  # frees as it goes: half the peak memory
        if image_size and array.shape[:2] != (height, width):
            array = np.asarray(square(Image.fromarray(array), image_size))
        images[place] = array.transpose(2, 0, 1)
    return torch.from_numpy(images), kept, tuple(skipped)


def opened(item: bytes | Path) -> "Image.Image":
    """A picture of which the header was read; to be closed. Raises whatever Pillow raises."""
    from PIL import Image

    if "HEIF" in FORMATS:
        _let_pillow_read_heic()
    return Image.open(io.BytesIO(item) if isinstance(item, bytes) else item, formats=FORMATS)


@functools.cache
def _let_pillow_read_heic() -> None:
    importlib.import_module("pillow_heif").register_heif_opener()


def refuse_too_large(image: "Image.Image") -> None:
    """ValueError where it would take too much memory."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS // 10**6} million")


def decode(
    item: Item, most: int | None = None, levels: Levels | None = None,
    clipped: list[int] | None = None, times: int = 1,
) -> np.ndarray:  # fmt: skip
    """One picture as upright RGB (H, W, 3) uint8; raises Large if a side has more than `most`.

    levels: of a picture of 16 bits; `clipped` gets how many of its values lie outside, if some do.
    times: what the sides of a JPEG are divided by while it is decoded.
    """
    item = item.read() if isinstance(item, Part) else item
    with opened(item) as image:
        if most is not None and max(image.size) > most:
            raise Large
        refuse_too_large(image)
        if times > 1:
            width, height = image.size
            image.draft(None, (width // times, height // times))
        image.load()
        return np.asarray(upright_rgb(image, levels, clipped))


def upright_rgb(
    image: "Image.Image", levels: Levels | None = None, clipped: list[int] | None = None
) -> "Image.Image":
    """Any mode -> RGB: EXIF rotation applied, transparency laid on white, 16 bit scaled to 8."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits at 255
        values, (low, high) = np.asarray(image), levels or (0, 65535)
        outside = int(((values < low) | (values > high)).sum())
        if outside and clipped is not None:
            clipped.append(outside)
        wide = (values.astype(np.float32) - low) / (max(high - low, 1) / 255)
        image = Image.fromarray(wide.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image: "Image.Image", size: int) -> "Image.Image":
    """The middle square of a picture, resized to `size` pixels a side."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
