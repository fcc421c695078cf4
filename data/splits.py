"""Which picture trains, validates or tests: by folder names, by a hash, by an older run's list."""

import csv
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from common.disk import csv_text, digest, write_csv
from common.errors import UserError
from common.text import class_name, printable, some
from data.files import Hashed, Records
from data.image_set import ImageSet, LeftOut, Source, labels_in_words
from data.keyed_random import SPLIT, permutation
from data.photographs import PhotoSet

TEST_PART = 5  # one in so many tests, of a data set that has no test split
SPLIT_FILE = "split.csv"  # in a run folder
HEAD = ("name", "split", "class")
LEFT_OUT = "left_out"  # a fourth column, where some count for nothing: why
WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "val"),
}


@dataclass(frozen=True)
class Wanted:
    """How a user wants it split. split: a list, or a run that has one; group_by: column or regex.

    What shares a group stays on one side.
    """

    split: str | None = None
    group_by: str | None = None
    many: bool = False  # a picture has any number of classes: see data/sources/many.py

    def key(self) -> list[str]:
        """What a cached data set depends on; nothing where nothing is asked for."""
        notes = [] if self.group_by is None else [f"group all by {self.group_by}"]
        if self.split is not None:
            notes.append(f"split {digest(_file_of(self.split).read_bytes(), 16)}")
        if self.many:
            notes.append("many labels")
        return notes


AS_IT_IS = Wanted()


def split_word(name: str) -> str:
    """The split ("train", "val", "test") that a folder, file or cell names, or ""."""
    return WORDS.get(name.strip().casefold(), "")


def test_and_val(found: Iterable[str]) -> dict[str, str]:
    """Which of the splits there tests and which validates: without a test split, "val" tests."""
    named = set(found)
    if "val" in named and "test" not in named:
        return {"val": "test"}
    return {"val": "val", "test": "test"}


# --- a hash decides ------------------------------------------------------------------------------


def _hashed(
    keys: Sequence[bytes], labels: Sequence[int], groups: Sequence[str] | None
) -> tuple[list[bytes], dict[bytes, int], list[set[bytes]]]:
    """What each picture is called here, the hash of each name, and the names of each class.

    The class of the fewest names is the last: where groups hold several, it has the last word.
    """
    names = [os.fsencode(group) for group in groups] if groups else list(keys)
    words = {name: _word(name) for name in set(names)}
    units = defaultdict(set)
    for name, label in zip(names, labels, strict=True):
        units[label].add(name)
    return names, words, sorted(units.values(), key=len, reverse=True)


def _word(name: bytes) -> int:
    return int(name.hex() if isinstance(name, Hashed) else digest(name), 16)


def keyed_split(
    keys: Sequence[bytes], labels: Sequence[int], groups: Sequence[str] | None = None
) -> list[bool]:
    """True for the fifth that tests, by a hash of each picture's key or of its group.

    What is added later moves nothing that was there. Only a class of which the hash takes none or
    all, or less than half or more than one and a half times its fifth, is mended, by as few
    pictures as will do.
    """
    names, words, rarest_last = _hashed(keys, labels, groups)
    tests = {name for name, word in words.items() if word < 2**64 // TEST_PART}
    for members in rarest_last:
        if (most := len(members)) > 1:
            ordered = sorted(members, key=lambda name: (words[name], name))
            low = min(most - 1, max(1, math.ceil(most / TEST_PART / 2)))
            high = min(most - 1, max(1, math.floor(most / TEST_PART * 1.5)))
            chosen = sum(name in tests for name in ordered)
            if chosen < low:
                spare = [name for name in ordered if name not in tests]
                tests.update(spare[: low - chosen])
            elif chosen > high:
                there = [name for name in ordered if name in tests]
                tests.difference_update(there[high - chosen :])
        else:
            tests -= members
    return [name in tests for name in names]


def keyed_folds(
    keys: Sequence[bytes], labels: Sequence[int], count: int, groups: Sequence[str] | None = None
) -> list[int]:
    """The one of `count` folds, from 0, in which each picture tests, by the hash of `keyed_split`.

    What shares a group stays in one fold. A class of which some fold has less than half or more
    than one and a half times its part is mended, by as few pictures as will do; where groups hold
    several classes, the rarest has the last word.
    """
    names, words, rarest_last = _hashed(keys, labels, groups)
    chosen = {name: word * count >> 64 for name, word in words.items()}
    for members in rarest_last:
        ordered = sorted(members, key=lambda name: (words[name], name))
        part = len(members) / count
        low, high = math.ceil(part / 2), math.floor(part * 1.5)
        folds = [[name for name in ordered if chosen[name] == fold] for fold in range(count)]
        while True:
            most, least = max(folds, key=len), min(folds, key=len)
            if len(most) - len(least) < 2 or (len(least) >= low and len(most) <= high):
                break
            least.append(moved := most.pop())
            chosen[moved] = folds.index(least)
    return [chosen[name] for name in names]


def folded(source: Source, fold: str | None) -> Source:
    """The data set with one part of all its pictures as test, and the others to train on.

    fold: "1/5" is the first of five parts; None leaves the data set's own split. Pictures without
    names are called by their place in it; mean and std stay those of the data set.
    """
    if fold is None:
        return source
    number, count = map(int, fold.split("/"))
    groups: list[int] = []
    if source.train is source.test:
        raise UserError(
            f"--fold {fold}: {printable(source.name)} tests on what it trains on; drop the flag.",
            code="no-folds",
        )
    if source.groups is not None:
        if source.test_groups is None:
            raise UserError(
                f"--fold {fold}: {printable(source.name)} was made without the groups of its test "
                "pictures; make it again.",
                code="no-folds",
            )
        groups = torch.cat([source.groups, source.test_groups]).tolist()
    names = [
        name
        for side, part in (("train", source.train), ("test", source.test))
        for name in names_of(source, side) or [f"{side}/{place}" for place in range(len(part))]
    ]
    whole = together(source.train, source.test)
    labels = whole.labels if whole.labels.dim() == 1 else torch.zeros(len(whole)).long()
    first: dict[int, str] = {}  # a group is called by one of its pictures: numbers may change
    for group, name in zip(groups, names, strict=False):
        first[group] = min(name, first.get(group, name))
    keys = [os.fsencode(name) for name in names]
    folds = keyed_folds(keys, labels.tolist(), count, [first[group] for group in groups])
    tests = torch.tensor(folds) == number - 1
    if tests.all() or not tests.any():
        raise UserError(
            f"--fold {fold}: leaves no picture to {'train on' if tests.all() else 'test'}; choose "
            "fewer parts.",
            code="no-folds",
        )
    sides = {"train": (~tests).nonzero().flatten(), "test": tests.nonzero().flatten()}
    found = {side: whole.part(chosen) for side, chosen in sides.items()}
    kept = {side: [names[i] for i in chosen.tolist()] for side, chosen in sides.items()}
    train_groups, test_groups = (
        torch.tensor(groups)[chosen] if groups else None for chosen in sides.values()
    )
    return replace(
        source, **found, names=kept, held_out=None, hashed=True, groups=train_groups,
        test_groups=test_groups,
        fingerprint=digest(f"{source.fingerprint} fold {fold}"),
    )  # fmt: skip


def together(train: ImageSet | PhotoSet, test: ImageSet | PhotoSet) -> ImageSet | PhotoSet:
    """Training and test pictures as one."""
    labels = torch.cat([train.labels, test.labels])
    if isinstance(train, PhotoSet) and isinstance(test, PhotoSet):
        return replace(test, places=torch.cat([train.places, test.places]), labels=labels)
    assert isinstance(train, ImageSet) and isinstance(test, ImageSet)
    return replace(test, images=torch.cat([train.images, test.images]), labels=labels)


def split_validation(
    labels: Tensor, fraction: float, seed: int, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sorted indices (training, validation): `fraction` of each class, rounded, is held out.

    A class keeps at least one sample on each side, where it has two; what shares a number in
    `groups` stays on one side. Labels that are no classes (of a regression) are all one class.
    """
    n = len(labels)
    held_out = round(n * fraction)
    if not 0 < held_out < n:
        raise UserError(
            f"a validation fraction of {fraction} holds out {held_out} of {n} samples; "
            "choose one between 0 and 1 that leaves samples on both sides, e.g. 0.1",
            code="bad-split",
        )
    order = permutation(seed, 0, n, SPLIT)
    if labels.dim() != 1 or labels.is_floating_point():
        labels = torch.zeros(n, dtype=torch.int64)
    counts = torch.bincount(labels)
    exact = counts * (held_out / n)
    quotas = exact.floor().long()
    rest = held_out - int(quotas.sum())  # to the classes that lost most by rounding
    quotas[(quotas - exact).sort(stable=True).indices[:rest]] += 1
    quotas = torch.minimum(quotas.clamp(min=1), (counts - 1).clamp(min=0))
    chosen = torch.zeros(n, dtype=torch.bool)
    if groups is None:
        ordered = order[labels[order].sort(stable=True).indices]
        for part, quota in zip(ordered.split(counts.tolist()), quotas.tolist(), strict=True):
            chosen[part[:quota]] = True
    else:
        chosen = _whole_groups(labels, groups, order, quotas)
    if not chosen.any() or chosen.all():
        raise UserError(
            f"a validation fraction of {fraction} cannot hold out whole groups: there are "
            f"{len(groups.unique()) if groups is not None else n}; choose other groups",
            code="bad-split",
        )
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def _whole_groups(labels: Tensor, groups: Tensor, order: Tensor, quotas: Tensor) -> Tensor:
    """Groups in a random order, each taken where it brings the classes nearer to their quotas."""
    num_classes = len(quotas)
    table = torch.zeros(int(groups.max()) + 1, num_classes, dtype=torch.int64)
    table.index_put_((groups, labels), torch.ones_like(labels), accumulate=True)
    left, kept, taken = quotas.clone(), table.sum(0), []
    for group in dict.fromkeys(groups[order].tolist()):
        row = table[group]
        leaves = ((kept - row > 0) | (row == 0)).all()  # some of each class, to train on
        nearer = (left - row).abs().sum() < left.abs().sum()
        if leaves and nearer:
            taken.append(group)
            left, kept = left - row, kept - row
    return torch.isin(groups, torch.tensor(taken, dtype=groups.dtype))


# --- a list decides ------------------------------------------------------------------------------


def _file_of(split: str) -> Path:
    path = Path(split).expanduser()
    path = path / SPLIT_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"--split {printable(split)}: there is no list {printable(path)}; give a run that has "
            "one, or a file that python -m data list --out FILE made.",
            code="no-split-file",
        )
    return path


def read_split(split: str) -> dict[str, str]:
    """Name of each picture -> "train", "val" or "test", of a run or of its list."""
    path = _file_of(split)
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.reader(file))
    except (OSError, csv.Error) as error:
        raise UserError(
            f"--split {printable(path)} cannot be read: {error}", code="bad-split-file"
        ) from None
    head = [name.strip().casefold() for name in rows[0]] if rows else []
    if not {"name", "split"} <= set(head):
        raise UserError(
            f"--split {printable(path)} has the columns {some(head)}: it takes a table with name "
            "and split, as python -m data list prints it.",
            code="bad-split-file",
        )
    name, where = head.index("name"), head.index("split")
    found: dict[str, str] = {}
    for row in rows[1:]:
        if len(row) <= max(name, where):
            continue
        word = split_word(row[where])
        if found.setdefault(row[name], word) != word:
            raise UserError(
                f"--split {printable(path)} puts {printable(row[name])} into two splits: leave one "
                "of its rows.",
                code="bad-split-file",
            )
    if odd := next((key for key, word in found.items() if not word), None):
        raise UserError(
            f"--split {printable(path)} puts {printable(odd)} into no split that is known: write "
            "train, val or test.",
            code="bad-split-file",
        )
    return found


def split_text(rows: Iterable[tuple[str, str, str]]) -> str:
    """The list as a file: a row (name, split, class) for each picture."""
    return csv_text([HEAD, *rows])


def write_split(
    path: Path, rows: Iterable[tuple[str, str, str]], left_out: Mapping[str, str] | None = None
) -> None:
    """The list on disk, whole or not at all; `left_out` is why some names count for nothing."""
    if not left_out:
        return write_csv(path, [HEAD, *rows])
    return write_csv(path, [(*HEAD, LEFT_OUT), *((*row, left_out.get(row[0], "")) for row in rows)])


# --- records -------------------------------------------------------------------------------------

Column = Callable[[str], Sequence[object] | None]  # values by a column's name; None: no such


def arranged(
    records: Records, wanted: Wanted, keys: Callable[[], Sequence[bytes]] | None = None,
    column: Column = lambda name: None,
) -> Records:  # fmt: skip
    """The records in the splits that are wanted; without a test split a fifth tests, by a hash.

    `keys` gives what is hashed, by default the names.
    """
    if wanted.group_by is not None:
        records = replace(records, groups=_groups(records.ids, wanted.group_by, column))
    if wanted.split is not None:
        return _as_listed(records, wanted.split)
    if any(records.is_test):
        return replace(records, notes=(*records.notes, *_parted(records)))
    hashed = keys() if keys else [os.fsencode(name) for name in records.ids]
    labels = [0] * len(hashed) if wanted.many else records.labels
    is_test = keyed_split(hashed, labels, records.groups)
    if records.groups and not any(is_test):
        raise UserError(
            f"--group-by {printable(wanted.group_by)} makes {len(set(records.groups))} groups "
            f"({some(sorted(set(records.groups)), 3)}), and no class has pictures in two of them: "
            "none can test; choose smaller groups.",
            code="bad-group",
        )
    return replace(records, is_test=is_test, hashed=True)


def _groups(names: Sequence[str], group_by: str, column: Column) -> list[str]:
    if (values := column(group_by)) is not None:
        groups = ["" if value is None else str(value) for value in values]
        if nowhere := groups.count(""):
            first = names[groups.index("")]
            raise UserError(
                f"--group-by {printable(group_by)}: {nowhere:,} of {len(names):,} pictures have no "
                f"{printable(group_by)} (the first: {printable(first)}), and would all be one "
                "group: fill the column in; a name of its own for each keeps them apart.",
                code="bad-group",
            )
        return groups
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise UserError(
            f"--group-by {printable(group_by)} is no column of the data, and no regular expression "
            f"either ({error}).",
            code="bad-group",
        ) from None
    found = []
    for name in names:
        match = pattern.search(name)
        if match is None:
            raise UserError(
                f"--group-by {printable(group_by)} is no column of the data and, as a regular "
                f"expression, finds nothing in {printable(name)}: every picture needs a group.",
                code="bad-group",
            )
        found.append((match[1] if pattern.groups else match[0]) or "")
    return found


def _parted(records: Records) -> list[str]:
    """A sentence where the splits of the data set itself cut a group in two."""
    if not records.groups:
        return []
    sides = defaultdict(set)
    for group, test in zip(records.groups, records.is_test, strict=True):
        sides[group].add(test)
    both = sorted(group for group, found in sides.items() if len(found) > 1)
    if not both:
        return []
    return [
        f"{len(both)} of {len(sides)} groups stand in training and in test, as the data set's own "
        f"splits have it ({some(both, 3)})"
    ]


def _as_listed(records: Records, split: str) -> Records:
    known, left = read_split(split), LeftOut(records.left_out)
    kept = []
    for index, name in enumerate(records.ids):
        if name in known:
            kept.append(index)
        else:
            left.add(f"not in {printable(Path(split).name)}", name)
    if not kept:
        first = printable(next(iter(known), "nothing"))
        raise UserError(
            f"--split {printable(split)} names none of these pictures: it has {first}, the data "
            f"set {printable(records.ids[0])}.",
            code="other-split",
        )
    chosen = records.part(kept)
    words = [known[name] for name in chosen.ids]
    notes = list(records.notes)
    there = set(chosen.ids)
    if missing := [name for name in known if name not in there]:
        notes.append(
            f"{len(missing):,} pictures of --split {printable(split)} are not there "
            f"({printable(missing[0])})"
        )
    which = test_and_val(words)
    sides = [which.get(word, "train") for word in words]
    return replace(
        chosen,
        is_test=[side == "test" for side in sides],
        is_val=[side == "val" for side in sides],
        left_out=left.reasons,
        notes=tuple(notes),
    )


# --- a run's parts -------------------------------------------------------------------------------


def divided(source: Source, limit: int, val_fraction: float, seed: int) -> dict[str, Tensor]:
    """Sorted places in the training set ("train" and, where there is one, "val") and the test set.

    Validation is the data set's own split, or a fraction of the training images.
    """
    places = {"train": _spread(len(source.train), limit), "test": _spread(len(source.test), limit)}
    train = places["train"]
    if source.held_out is not None:
        if val_fraction:
            raise UserError(
                f"--val-fraction {val_fraction}: {printable(source.name)} has a validation split "
                f"of {len(source.held_out)} images, which chooses the best epoch; drop the flag.",
                code="contradiction",
            )
        held = torch.isin(train, source.held_out)
        if held.any() and not held.all():
            return {"train": train[~held], "val": train[held], "test": places["test"]}
    if val_fraction:
        groups = None if source.groups is None else source.groups[train]
        kept, held = split_validation(source.train.labels[train], val_fraction, seed, groups)
        return {"train": train[kept], "val": train[held], "test": places["test"]}
    return places


def _spread(n: int, limit: int) -> Tensor:
    """So many places of n, 0: all; evenly spread, for images may lie in the order of classes."""
    if not limit or limit >= n:
        return torch.arange(n)
    return torch.arange(limit) * n // limit


def names_of(source: Source, side: str) -> Sequence[str]:
    """Of the pictures in "train" or "test", in their order; nothing where they have none."""
    pictures = source.test if side == "test" else source.train
    return pictures.names if isinstance(pictures, PhotoSet) else source.names.get(side, ())


def rows_of(source: Source, places: Mapping[str, Tensor]) -> list[tuple[str, str, str]]:
    """(name, split, class) of the pictures at these places; nothing where they have no names."""
    rows = []
    for split, chosen in places.items():
        side = "test" if split == "test" else "train"
        if names := names_of(source, side):
            words = labels_in_words(getattr(source, side).labels[chosen], source.classes)
            numbers = chosen.tolist()
            rows += [(names[i], split, w) for i, w in zip(numbers, words, strict=True)]
    return rows


def class_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The classes of labels that are text; whole numbers stand in the order of numbers."""
    whole = all(re.fullmatch("[0-9]+", label) for label in labels)
    distinct = dict.fromkeys(class_name(label) for label in labels)
    return tuple(sorted(distinct, key=int if whole else str))
