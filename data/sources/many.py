"""Pictures with any number of classes, or none: from lists of names to a yes or no for each class.

Readers, cache and packs keep each set of names that occurs as if it were a class, called by all of
its names; a run takes them apart again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from common.errors import UserError
from common.text import class_name, printable, some
from data.image_set import Source, class_counts
from data.sources.describe import lacking
from data.splits import class_names

BETWEEN = "|"
PARTS = (BETWEEN, ";", ",")  # what stands between names in a cell: the first that a column has
YES = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


def apart(cells: Iterable[str], rows_of_one: bool = False) -> Callable[[str], list[str]]:
    """What makes names of a cell: they are parted by |, by ; or by a comma, else by spaces.

    rows_of_one: a picture has a row for each of its classes, so spaces are part of a name.
    """
    cells = list(cells)
    mark = next((mark for mark in PARTS if any(mark in cell for cell in cells)), None)
    mark = mark or ("\n" if rows_of_one else None)
    return lambda cell: [name for part in cell.split(mark) if (name := class_name(part.strip()))]


def yes_columns(columns: Iterable[str], rows: Sequence[dict[str, str]]) -> tuple[str, ...]:
    """The columns of classes: 0 or 1 in each row; an empty cell is a no."""

    def holds(column: str) -> bool:
        cells = {str(row.get(column) or "").strip().casefold() for row in rows} - {""}
        return bool(cells) and cells <= YES.keys()

    return tuple(column for column in columns if column and holds(column))


def says_yes(cell: str | None) -> bool:
    """What a cell of such a column says."""
    return YES.get(str(cell or "").strip().casefold(), False)


def combined(
    sets: Sequence[Iterable[str]], known: Sequence[str] = (), at: str = "the data"
) -> tuple[tuple[str, ...], list[int]]:
    """The sets of names as classes, and the number of each picture's; the first has all names.

    known: the names in their order, those that nothing has among them.
    """
    names = tuple(known) or class_names([name for those in sets for name in those])
    if not names:
        raise UserError(
            f"{at} gives no picture a class: with --task multilabel a cell holds names parted by "
            "|, ; or spaces, or each class has a column of 0 and 1.",
            code="no-label",
        )
    if odd := next((name for name in names if BETWEEN in name), None):
        raise UserError(
            f"the class {printable(odd)} of {at} has a {BETWEEN} in its name, which stands between "
            "names here: call it otherwise.",
            code="bad-label",
        )
    place = {name: number for number, name in enumerate(names)}
    texts = [BETWEEN.join(sorted(set(those), key=place.__getitem__)) for those in sets]
    classes = tuple(dict.fromkeys((BETWEEN.join(names), *texts)))
    numbers = {text: number for number, text in enumerate(classes)}
    return classes, [numbers[text] for text in texts]


def multi_hot(source: Source) -> Source:
    """The data set with a row for each picture, int8 (N, classes): whether it has each class.

    Of a data set of another kind each picture has the one class that it has.
    """
    sets = [list(filter(None, text.split(BETWEEN))) for text in source.classes]
    names = tuple(dict.fromkeys(name for those in sets for name in those))
    place = {name: number for number, name in enumerate(names)}
    table = torch.zeros(len(sets), len(names), dtype=torch.int8)
    for row, those in zip(table, sets, strict=True):
        row[[place[name] for name in those]] = 1
    train, test = (replace(part, labels=table[part.labels]) for part in (source.train, source.test))
    notes = []
    if names != source.classes:
        learned = torch.ones(len(train), dtype=torch.bool)
        if source.held_out is not None:
            learned[source.held_out] = False
        counts = [class_counts(labels, names) for labels in (train.labels[learned], test.labels)]
        notes = [*lacking(names, *counts), _how_many(table, train.labels, names)]
    return replace(
        source, task="multilabel", classes=names, train=train, test=test,
        notes=(*source.notes, *notes),
    )  # fmt: skip


def _how_many(table: torch.Tensor, labels: torch.Tensor, names: tuple[str, ...]) -> str:
    """A sentence on the classes, by which a person sees whether cells were read as meant."""
    each = labels.sum(1, dtype=torch.int64)
    none = f"; {int((each == 0).sum()):,} have none" if (each == 0).any() else ""
    mean = float(each.double().mean())
    return f"{len(names)} classes ({some(names, 5)}), {mean:.2f} a training picture{none}"
