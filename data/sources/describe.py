"""From decoded pictures to a data set: checked, split, with its mean, std and fingerprint."""

import json
from pathlib import Path

import torch

from common.disk import digest
from common.text import class_name
from data.cache import Entry, digest_of
from data.image_set import Decoded, ImageSet, Source
from data.photographs import PHOTOGRAPH, FileStore, Names, Photos, PhotoSet, decoder
from data.scan import Scanned, mean_and_std_of, root_and_names
from errors import UserError


def check(labels: torch.Tensor, is_test: torch.Tensor, classes: tuple[str, ...], at: str) -> None:
    """UserError where nothing could be learned from these labels, or nothing tested."""
    if len(classes) < 2:
        raise UserError(
            f"{at} has {len(classes)} class(es): telling classes apart takes two.",
            code="too-few-classes",
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(
            f"{at} has labels from {labels.min()} to {labels.max()}, but {len(classes)} classes: "
            f"labels must lie in 0..{len(classes) - 1}; mend the label column.",
            code="bad-label",
        )
    for split, there in (("training", ~is_test), ("test", is_test)):
        if not there.any():
            raise UserError(
                f"{at} has no {split} images that can be read: add some.", code="empty-split"
            )


def describe(
    train: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    classes: tuple[str, ...],
    skipped: tuple[str, ...] = (),
) -> Entry:
    """(images, labels) of both splits -> the tensors, and what is known of them."""
    tensors = {
        "train_images": train[0],
        "train_labels": train[1],
        "test_images": test[0],
        "test_labels": test[1],
    }
    mean, std = mean_and_std(train[0])
    checksums = {name: digest_of(tensor) for name, tensor in tensors.items()}
    fingerprint = fingerprint_of(classes, checksums)
    facts = {"classes": classes, "mean": mean, "std": std, "skipped": skipped}
    return tensors, {**facts, "fingerprint": fingerprint}


def entry_of(found: Decoded | Scanned, at: str, image_size: int | None) -> Entry:
    """What a reader found, split and checked; photographs stay where they are."""
    if isinstance(found, Scanned):
        return entry_of_photographs(found, at, image_size or PHOTOGRAPH)
    labels, is_test = torch.tensor(found.labels), torch.tensor(found.is_test)
    check(labels, is_test, found.classes, at)
    train = (found.images[~is_test], labels[~is_test])
    test = (found.images[is_test], labels[is_test])
    return describe(train, test, found.classes, found.skipped)


def entry_of_photographs(found: Scanned, at: str, image_size: int) -> Entry:
    """The index of photographs: tensors of sizes, kinds, names, places; no pixels."""
    records = found.records
    labels, is_test = torch.tensor(records.labels), torch.tensor(records.is_test)
    check(labels, is_test, records.classes, at)
    root, below = root_and_names(records)
    names = Names.of(below)
    tensors = {
        "sizes": found.sizes, "kinds": found.kinds, "names": names.text, "name_ends": names.ends
    }  # fmt: skip
    for split, chosen in (("train", ~is_test), ("test", is_test)):
        places = chosen.nonzero()[:, 0]
        tensors |= {f"{split}_places": places, f"{split}_labels": labels[places]}
    photos = Photos(FileStore(root, names), names, found.sizes, found.kinds)
    train = PhotoSet(photos, tensors["train_places"], tensors["train_labels"])
    mean, std = mean_and_std_of(train, image_size)
    rows = [records.classes, records.labels, records.is_test, below, found.heads]
    facts = {"classes": records.classes, "mean": mean, "std": std, "skipped": found.skipped}
    facts |= {"root": str(root), "fingerprint": digest(json.dumps([*rows, decoder()]))}
    return tensors, facts


def photographs_of(tensors: dict[str, torch.Tensor], root: Path) -> tuple[PhotoSet, PhotoSet]:
    """Training and test pictures of an index whose files lie below `root`."""
    names = Names(tensors["names"], tensors["name_ends"])
    photos = Photos(FileStore(root, names), names, tensors["sizes"], tensors["kinds"])
    train, test = (
        PhotoSet(photos, tensors[f"{split}_places"], tensors[f"{split}_labels"])
        for split in ("train", "test")
    )
    return train, test


def source_of(name: str, entry: Entry, origin: str, no_flip: bool = False) -> Source:
    """A data set of a cached entry, described and ready to be trained on."""
    tensors, meta = entry
    if "root" in meta:
        train, test = photographs_of(tensors, Path(meta["root"]))
    else:
        train = ImageSet(tensors["train_images"], tensors["train_labels"])
        test = ImageSet(tensors["test_images"], tensors["test_labels"])
    return Source(
        name=name,
        task="classification",
        train=train,
        test=test,
        classes=tuple(map(class_name, meta["classes"])),
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        fingerprint=meta["fingerprint"],
        origin=origin,
        skipped=tuple(meta["skipped"]),
        no_flip=no_flip,
    )


def fingerprint_of(classes: tuple[str, ...], checksums: dict[str, str]) -> str:
    """A digest of classes, shapes, labels and pixels."""
    return digest(json.dumps([classes, checksums]))


def mean_and_std(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Per channel of uint8 (N, 3, H, W), in 0..1; from exact counts, so the same on any machine."""
    channels = (images[:, channel].flatten() for channel in range(3))
    counts = [torch.bincount(channel, minlength=256) for channel in channels]
    return mean_and_std_of_counts(torch.stack(counts))


def mean_and_std_of_counts(counts: torch.Tensor) -> tuple[list[float], list[float]]:
    """The same from how often each level occurs, int64 (3, 256)."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(3):
        share = counts[channel] / counts[channel].sum().double()
        mean.append((share * levels).sum().item())
        variance = (share * (levels - mean[-1]).square()).sum().item()
        std.append(max(variance**0.5, 1 / 255))  # a channel without contrast must not divide by 0
    return mean, std
