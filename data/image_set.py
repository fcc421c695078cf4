"""A data set in memory: images and labels of training and test, and what is known of them.

This file imports no torch, so that the command line can read the table of data sets at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self, TypeVar

from common.text import places
from errors import UserError

if TYPE_CHECKING:
    import torch

    from data.photographs import PhotoSet


@dataclass(frozen=True)
class ImageSet:
    """images (N, 3, H, W) uint8 and labels (N,) int64; regression: (N, F) and (N, 1) float32."""

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
    task: str  # "classification" or "regression"
    train: ImageSet | PhotoSet
    test: ImageSet | PhotoSet
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str  # of classes, shapes, labels and pixels
    origin: str  # a sentence
    skipped: tuple[str, ...] = ()  # images left out, with the reason
    no_flip: bool = False  # mirrored digits are no digits
    content: str = ""  # the fingerprint of photographs before somebody decodes them
    decoder: str = ""  # what decoded them, where their pixels lie on the disk


@dataclass(frozen=True)
class Decoded:
    """Pictures of one size with their labels, as a reader found them."""

    images: torch.Tensor  # (N, 3, H, W) uint8
    labels: list[int]
    is_test: list[bool]
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()  # left out, with the reason


def numbered_as(source: Source, classes: tuple[str, ...]) -> Source:
    """The data set with the numbers that these classes have; itself where they are others."""
    there = places(source.classes, classes)
    if None in there or len(there) != len(classes) or source.classes == classes:
        return source
    import torch

    numbers = torch.tensor(there)
    train, test = (
        replace(images, labels=numbers[images.labels]) for images in (source.train, source.test)
    )
    return replace(source, train=train, test=test, classes=classes)
