"""A data set in memory: images and labels of training and test, and what is known of them.

This file imports no torch, so that the command line can read the table of data sets at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common.text import places

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ImageSet:
    """images (N, 3, H, W) uint8 and labels (N,) int64; regression: (N, F) and (N, 1) float32."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


def limited(images: ImageSet, limit: int) -> ImageSet:
    """So many of the images, 0: all; evenly spread, for they may lie in the order of classes."""
    if not limit or limit >= len(images):
        return images
    import torch

    spread = torch.arange(limit) * len(images) // limit
    return ImageSet(images.images[spread], images.labels[spread])


@dataclass(frozen=True)
class Source:
    """A data set in memory. `mean` and `std` are those of the training images, in 0..1."""

    name: str
    task: str  # "classification" or "regression"
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str  # of classes, shapes, labels and pixels
    origin: str  # a sentence
    skipped: tuple[str, ...] = ()  # images left out, with the reason
    no_flip: bool = False  # mirrored digits are no digits


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
        ImageSet(images.images, numbers[images.labels]) for images in (source.train, source.test)
    )
    return replace(source, train=train, test=test, classes=classes)
