"""The same picture twice, byte for byte: in two splits, or in two classes."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.progress import progress
from common.text import printable
from data.ahead import pool_of
from data.files import Item, Part, Records
from data.rows import Rows

SAMPLE = 512  # bytes from the middle, before whole files are read
THREADS = 8  # most of the time is the disk's
CHUNK = 64  # pictures that a thread looks at before it asks for more

Places = list[int]


def told_twice(records: Records) -> list[str]:
    """A sentence for each kind of picture that stands twice where it may not.

    Of files that share their size the middle is compared, and where that is equal a hash of all.
    """
    groups: list[Places] = [list(range(len(records.items)))]
    if isinstance(records.items, Rows):
        groups = _that_matter(
            records, zip(records.items.hashes, range(len(records.items)), strict=True)
        )
    else:
        with pool_of(THREADS) as pool:
            for doing, look in LOOKS.items():
                groups = _apart(records, groups, look, pool, doing)
    across: list[tuple[str, str, str]] = []
    chosen: list[tuple[str, str]] = []  # in test and in what chooses the best epoch
    two: list[tuple[str, str]] = []
    for places in groups:
        first = {}
        for place in places:
            first.setdefault(_side(records, place), place)
        if "training" in first and len(first) > 1:
            for place in places:
                if (side := _side(records, place)) != "training":
                    copy, original = records.ids[place], records.ids[first["training"]]
                    across.append((side, printable(copy), printable(original)))
        elif len(first) > 1:
            chosen.append(
                (printable(records.ids[first["test"]]), printable(records.ids[first["validation"]]))
            )
        other = next((p for p in places if records.labels[p] != records.labels[places[0]]), None)
        if other is not None:
            two.append((printable(records.ids[places[0]]), printable(records.ids[other])))
    notes = []
    for side in ("test", "validation"):
        if found := [pair for pair in across if pair[0] == side]:
            notes.append(
                f"{_number(len(found), f'{side} picture')} also in training, byte for byte "
                f"({found[0][1]} is {found[0][2]}): what is measured on them flatters"
            )
    if chosen:
        notes.append(
            f"{_number(len(chosen), 'test picture')} also in validation, byte for byte "
            f"({chosen[0][0]} is {chosen[0][1]}): the epoch that is best on them is chosen"
        )
    if two:
        notes.append(
            f"{_number(len(two), 'picture')} in two classes, byte for byte ({two[0][0]} is "
            f"{two[0][1]}): one of the labels is wrong"
        )
    return notes


def _number(count: int, thing: str) -> str:
    return f"1 {thing} stands" if count == 1 else f"{count:,} {thing}s stand"


def _side(records: Records, place: int) -> str:
    if records.is_test[place]:
        return "test"
    return "validation" if records.is_val[place] else "training"


def _apart(
    records: Records, groups: Iterable[Places], look: Callable[[Item], Hashable],
    pool: ThreadPoolExecutor, doing: str,
) -> list[Places]:  # fmt: skip
    """The groups parted by what a look at each picture finds, as far as a group matters."""
    flat = [(number, place) for number, places in enumerate(groups) for place in places]
    chunks = [flat[i : i + CHUNK] for i in range(0, len(flat), CHUNK)]

    def looked(chunk: list[tuple[int, int]]) -> list[tuple[Hashable, int]]:
        return [((number, look(records.items[place])), place) for number, place in chunk]

    found: list[tuple[Hashable, int]] = []
    with progress(f"looking for the same picture twice: {doing}", "pictures", after=1.0) as count:
        for some in pool.map(looked, chunks):
            found += some
            count(len(found), len(flat))
    return _that_matter(records, found)


def _that_matter(records: Records, seen: Iterable[tuple[Hashable, int]]) -> list[Places]:
    """The places that look alike, where not all are of one side and one class."""
    parted: dict[Hashable, Places] = defaultdict(list)
    for what, place in seen:
        parted[what].append(place)
    found = []
    for places in parted.values():
        sides = {(_side(records, place), records.labels[place]) for place in places}
        if len(sides) > 1:
            found.append(places)
    return found


def _size(item: Item) -> int:
    if isinstance(item, Part):
        return item.length
    return len(item) if isinstance(item, bytes) else item.stat().st_size


def _middle(item: Item) -> bytes:
    half = _size(item) // 2
    if isinstance(item, bytes):
        return item[half:][:SAMPLE]
    whole = Part(item, 0, 2 * half) if isinstance(item, Path) else item
    return Part(whole.file, whole.start + half, whole.length - half).read(SAMPLE)


def _whole(item: Item) -> bytes:
    content = item.read() if isinstance(item, Part) else item
    content = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.blake2b(content, digest_size=16).digest()


LOOKS = {"sizes": _size, "middles": _middle, "hashes": _whole}
