"""A data set in memory: images and labels of training and test, and what is known of them.

This file imports no torch, so that the command line can read the table of data sets at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self, TypeVar

from common.errors import UserError
from common.text import places, printable

if TYPE_CHECKING:
    import torch

    from data.cache import Entry
    from data.files import Records
    from data.photographs import PhotoSet

UNREADABLE = ("damaged", "may not be read")  # why a picture that was found is left out
Levels = tuple[int, int]  # of images of 16 bits: what becomes 0, and what becomes 255
Reasons = dict[str, tuple[int, str]]  # why files are left out -> how many, and one of them


class LeftOut:
    """Files that are left out, counted as they are found."""

    def __init__(self, reasons: Reasons | None = None) -> None:
        self.reasons: Reasons = dict(reasons or {})
        self.linked: set[str] = set()  # pictures that are links, or lie behind one

    def add(self, reason: str, example: str) -> None:
        """One more, for this reason."""
        count, first = self.reasons.get(reason, (0, example))
        self.reasons[reason] = (count + 1, first)


@dataclass(frozen=True)
class Tally:
    """Every file of a data set, in or out."""

    used: int
    left_out: Reasons

    def __str__(self) -> str:
        if not self.left_out:
            return f"{self.used:,} pictures found, all used"
        found = self.used + sum(count for count, _ in self.left_out.values())
        parts = (
            f"{count:,} {reason} ({printable(example)})"
            for reason, (count, example) in self.left_out.items()
        )
        return f"{found:,} found, {self.used:,} used; left out: {', '.join(parts)}"


@dataclass(frozen=True)
class ImageSet:
    """images (N, 3, H, W) uint8 and labels (N,) int64; regression: (N, F) and (N, 1) float32.

    Of any number of classes: labels (N, classes) int8, 0 or 1.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, chosen: torch.Tensor) -> Self:
        """Those of these positions."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])


def in_memory(pictures: ImageSet | PhotoSet) -> ImageSet:
    """The same; UserError where they are photographs, which are not kept decoded."""
    if isinstance(pictures, ImageSet):
        return pictures
    raise UserError(
        "these are photographs, which are not kept decoded: python -m data prepare --out FOLDER "
        "packs them",
        code="not-in-memory",
    )


Pictures = TypeVar("Pictures", bound="ImageSet | PhotoSet")


def limited(images: Pictures, limit: int) -> Pictures:
    """So many of the images, 0: all; evenly spread, for they may lie in the order of classes."""
    if not limit or limit >= len(images):
        return images
    import torch

    spread = torch.arange(limit) * len(images) // limit
    return images.part(spread)


@dataclass(frozen=True)
class Source:
    """A data set, in memory or photographs. `mean` and `std` are of training images, in 0..1."""

    name: str
    task: str  # a name of tasks.TASKS
    train: ImageSet | PhotoSet
    test: ImageSet | PhotoSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # of each channel that the model sees: three, or one
    std: tuple[float, ...]
    fingerprint: str  # of classes, shapes, labels and pixels
    origin: str  # a sentence
    skipped: tuple[str, ...] = ()  # images that cannot be read, with the reason
    no_flip: bool = False  # mirrored digits are no digits
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of "train" and "test"
    held_out: torch.Tensor | None = None  # places in `train` of the data set's own validation split
    groups: torch.Tensor | None = None  # a number for each of `train`, where groups were asked for
    test_groups: torch.Tensor | None = None  # the same of `test`
    tally: Tally | None = None  # of files; None where the pictures are none
    notes: tuple[str, ...] = ()  # sentences to be told
    content: str = ""  # the fingerprint of photographs before somebody decodes them
    decoder: str = ""  # what decoded them, where their pixels lie on the disk
    levels: Levels | None = None  # None: no training image of 16 bits was seen
    hashed: bool = False  # what tests was chosen by a hash, and not by who made the data set
    index: Entry | None = None  # of photographs that are files: what was found of them


def kept_beside(source: Source) -> tuple[dict[str, torch.Tensor], dict]:
    """What a file of a data set keeps beside its pictures: tensors, and what JSON can write."""
    tensors = {
        name: tensor
        for name in ("held_out", "groups", "test_groups")
        if (tensor := getattr(source, name)) is not None
    }
    facts: dict = {name: getattr(source, name) for name in ("notes", "levels", "hashed")}
    if source.tally:
        reasons = source.tally.left_out  # those of `skipped` are counted when it is read
        facts["left_out"] = {why: of for why, of in reasons.items() if why not in UNREADABLE}
    return tensors, facts


@dataclass(frozen=True)
class Decoded:
    """Pictures of one size with their labels, as a reader found them."""

    images: torch.Tensor  # (N, 3, H, W) uint8
    labels: list[int]
    is_test: list[bool]
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()  # cannot be read, with the reason
    records: Records | None = None  # what they were made of
    levels: Levels | None = None
    clipped: tuple[int, ...] = ()  # how many values of images lie outside of the levels


def labels_in_words(labels: torch.Tensor, classes: Sequence[str], between: str = "|") -> list[str]:
    """The class of each label (n,), or all those that each row of (n, classes) says yes to."""
    if labels.ndim == 1:
        return [str(classes[label]) for label in labels.tolist()]
    found: list[list[str]] = [[] for _ in labels]
    for row, label in (labels > 0).nonzero().tolist():
        found[row].append(classes[label])
    return [between.join(names) for names in found]


def class_counts(labels: torch.Tensor, classes: Sequence[str]) -> list[int]:
    """How many pictures are of each class."""
    if labels.ndim == 1:
        return labels.bincount(minlength=len(classes)).tolist()
    return (labels > 0).sum(0).tolist()


def renumbered(labels: torch.Tensor, numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Labels of classes that have these numbers among `count` others."""
    if labels.ndim == 1:
        return numbers[labels]
    return labels.new_zeros(len(labels), count).index_copy(1, numbers, labels)


def numbered_as(source: Source, classes: tuple[str, ...]) -> Source:
    """The data set with the numbers that these classes have; itself where they are others."""
    there = places(source.classes, classes)
    if None in there or len(there) != len(classes) or source.classes == classes:
        return source
    import torch

    numbers = torch.tensor(there)
    train, test = (
        replace(images, labels=renumbered(images.labels, numbers, len(classes)))
        for images in (source.train, source.test)
    )
    return replace(source, train=train, test=test, classes=classes)
