"""The same picture twice, byte for byte: in training and test, or in two classes."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.text import printable
from data.ahead import pool_of
from data.files import Item, Part, Records

SAMPLE = 512  # bytes from the middle, before whole files are read
THREADS = 8  # most of the time is the disk's

Places = list[int]


def told_twice(records: Records) -> list[str]:
    """A sentence for each kind of picture that stands twice where it may not.

    Of files that share their size the middle is compared, and where that is equal a hash of all.
    """
    groups: list[Places] = [list(range(len(records.items)))]
    with pool_of(THREADS) as pool:
        for look in (_size, _middle, _whole):
            groups = _apart(records, groups, look, pool)
    across: list[tuple[str, str, str]] = []
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
        other = next((p for p in places if records.labels[p] != records.labels[places[0]]), None)
        if other is not None:
            two.append((printable(records.ids[places[0]]), printable(records.ids[other])))
    told = []
    for side in ("test", "validation"):
        if found := [pair for pair in across if pair[0] == side]:
            told.append(
                f"{_number(len(found), f'{side} picture')} also in training, byte for byte "
                f"({found[0][1]} is {found[0][2]}): what is measured on them flatters"
            )
    if two:
        told.append(
            f"{_number(len(two), 'picture')} in two classes, byte for byte ({two[0][0]} is "
            f"{two[0][1]}): one of the labels is wrong"
        )
    return told


def _number(count: int, thing: str) -> str:
    return f"1 {thing} stands" if count == 1 else f"{count:,} {thing}s stand"


def _side(records: Records, place: int) -> str:
    if records.is_test[place]:
        return "test"
    return "validation" if records.is_val[place] else "training"


def _apart(
    records: Records, groups: Iterable[Places], look: Callable[[Item], Hashable],
    pool: ThreadPoolExecutor,
) -> list[Places]:  # fmt: skip
    """The groups parted by what a look at each picture finds, as far as a group matters."""
    found = []
    flat = [(number, place) for number, places in enumerate(groups) for place in places]
    looks = pool.map(look, (records.items[place] for _, place in flat))
    parted: dict[Hashable, Places] = defaultdict(list)
    for (number, place), seen in zip(flat, looks, strict=True):
        parted[number, seen].append(place)
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
