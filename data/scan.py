"""The first look at photographs: headers only, by many threads; then mean and std of a sample."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.cpus import cpus
from common.errors import UserError
from common.progress import progress
from common.text import counted, duration, printable
from data.ahead import Threads, pool_of
from data.cuts import Cuts, default_resize
from data.files import SAMPLED, Item, Part, Records, cannot_decode
from data.grey import grey
from data.image_set import Levels
from data.keyed_random import SAMPLE, permutation
from data.photographs import PhotoSet, header, reason

PART_HEAD = 65536  # bytes of a part of a file, in which its header is looked for
HEAD = 4096  # bytes of a file that its fingerprint is made of, beside its length
CHUNK = 256  # pictures that a thread looks at before it asks for more
MOST_THREADS = 16  # on a network disk most of the time is waiting


@dataclass(frozen=True)
class Scanned:
    """Records that are photographs, of which only the headers were read: those that are kept."""

    records: Records
    sizes: Tensor  # int32 (N, 2), height and width, upright
    kinds: Tensor  # uint8 (N,), as in Photos
    heads: tuple[str, ...]  # a digest of length and first bytes of each
    skipped: tuple[str, ...] = ()
    levels: Levels | None = None


def scan(
    records: Records, skip_bad: bool, levels: Levels | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Scanned:  # fmt: skip
    """Sizes and kinds of all records that are pictures; `levels` of those that have 16 bits.

    Raises UserError on the first that is none, or leaves such out.
    """
    total, began = len(records.items), time.monotonic()
    ranges = [range(i, min(i + CHUNK, total)) for i in range(0, total, CHUNK)]
    kept: list[int] = []
    rows: list[tuple[int, int, int]] = []
    heads, skipped = [], []
    with (
        progress("reading headers", "pictures") as count,
        pool_of(min(MOST_THREADS, 4 * cpus())) as pool,
    ):
        looked = pool.map(lambda chunk: [_look(records.items[i]) for i in chunk], ranges)
        for chunk, found in zip(ranges, looked, strict=True):
            for index, one in zip(chunk, found, strict=True):
                if isinstance(one, str):
                    problem = f"{records.names[index]}: {one}"
                    if not skip_bad:
                        raise cannot_decode(problem)
                    skipped.append(problem)
                    continue
                kept.append(index)
                rows.append(one[:3])
                heads.append(one[3])
            count(chunk.stop, total)
    if not kept:
        raise UserError(
            f"not one image could be read; the first: {[*skipped, 'none there'][0]}",
            code="bad-image",
        )
    numbers = torch.tensor(rows)
    bad = f", {len(skipped):,} of which cannot be read" if skipped else ""
    took = duration(time.monotonic() - began)
    say(f"read the headers of {counted(total, 'photograph')} in {took}{bad}")
    return Scanned(
        records.part(kept), numbers[:, :2].int(), numbers[:, 2].to(torch.uint8), tuple(heads),
        tuple(skipped), levels,
    )  # fmt: skip


def _look(item: Item) -> tuple[int, int, int, str] | str:
    try:
        if isinstance(item, Part):
            length, part = item.length, item.read(PART_HEAD)
            head, item = part[:HEAD], _header_or_all(item, part)
        elif isinstance(item, bytes):
            length, head = len(item), item[:HEAD]
        else:
            with item.open("rb") as file:
                head, length = file.read(HEAD), os.fstat(file.fileno()).st_size
        state = hashlib.blake2b(f"{length} ".encode(), digest_size=16)
        state.update(head)
        return (*header(item), state.hexdigest())
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds on damaged files
        return reason(error)


def _header_or_all(item: Part, head: bytes) -> bytes:
    """The bytes of a picture whose header does not fit into the first of them, else those."""
    try:
        header(head)
    except Exception:  # cut off within the header, or no picture at all
        return item.read()
    return head


def root_and_names(records: Records) -> tuple[Path, list[str]]:
    """The folder that holds all files of the records, and their names below it."""
    paths = [item.absolute() for item in records.items if isinstance(item, Path)]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    return root, [path.relative_to(root).as_posix() for path in paths]


@dataclass(frozen=True)
class RowStore:
    """Pictures in the rows of a table, in memory: on their way into a pack."""

    items: Sequence[Item]
    words: str = "in memory"

    def encoded(self, place: int) -> bytes:
        """See Store."""
        item = self.items[place]
        if isinstance(item, bytes):
            return item
        return item.read() if isinstance(item, Part) else item.read_bytes()

    def raw(self, place: int) -> None:
        """See Store."""
        return None

    def name_of(self, path: Path) -> str:
        """See Store."""
        return str(path)


def mean_and_std_of(
    train: PhotoSet, image_size: int, channels: int = 3
) -> tuple[list[float], list[float]]:
    """Per channel, in 0..1, of up to 2,048 training pictures as evaluation sees them.

    Of one channel it is the brightness. Which pictures is the same in every run. Damaged ones do
    not count.
    """
    from data.sources.describe import mean_and_std_of_counts

    chosen = permutation(0, 0, len(train), SAMPLE)[:SAMPLED].sort().values
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    done = 0
    with progress("mean and deviation of a sample", "pictures", after=1.0) as count:
        for images, bad in seen(train.part(chosen), image_size):
            good = [row for row in range(len(images)) if row not in set(bad)]
            counts += level_counts(images[good], channels)
            done += len(images)
            count(done, len(chosen))
    if not counts.any():
        raise UserError(
            f"not one of {len(chosen)} sampled training images could be decoded; the first: "
            f"{printable(next(iter(train.photos.damage.found.values()), ''))}",
            code="bad-image",
        )
    return mean_and_std_of_counts(counts)


def level_counts(images: Tensor, channels: int = 3) -> Tensor:
    """How often each level occurs in uint8 (n, 3, H, W), int64 (channels, 256).

    Of one channel it is the brightness that has levels.
    """
    if channels == 1:
        images = grey(images.float()).round().long()
    each = (images[:, channel].flatten() for channel in range(channels))
    return torch.stack([torch.bincount(levels, minlength=256) for levels in each])


def seen(pictures: PhotoSet, image_size: int) -> Iterator[tuple[Tensor, list[int]]]:
    """Uint8 (n, 3, S, S) of all pictures in turn as evaluation sees them, and the damaged rows."""
    side = default_resize(image_size)
    cuts = Cuts("none", image_size, image_size, side, "crop", 0)
    with Threads(cpus()) as threads:
        for places in pictures.places.split(64):
            boxes = cuts.evaluation(pictures.photos.sizes[places])
            work, images, bad = pictures.photos.batch(places.tolist(), boxes, (0, 0, 0), threads)
            work.wait()
            yield images, bad
