"""From decoded pictures to a data set: checked, split, with its mean, std and fingerprint."""

import errno
import json
import os
from collections.abc import Mapping, Sequence

import torch

from common.disk import digest
from common.text import class_name, some
from data.cache import Entry, digest_of
from data.files import Records
from data.image_set import Decoded, ImageSet, LeftOut, Reasons, Source, Tally
from data.sources.twice import told_twice
from errors import UserError

UNREADABLE = ("damaged", "may not be read")  # why a picture that was found is left out


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


def entry_of(found: Decoded, at: str) -> Entry:
    """What a reader found, split and checked."""
    labels, is_test = torch.tensor(found.labels), torch.tensor(found.is_test)
    check(labels, is_test, found.classes, at)
    train = (found.images[~is_test], labels[~is_test])
    test = (found.images[is_test], labels[is_test])
    return describe(train, test, found.classes, found.skipped)


def with_records(entry: Entry, records: Records | None, at: str) -> Entry:
    """The entry with the names of its pictures, and with what only a look at all of them tells."""
    tensors, meta = entry
    meta = {**meta, "at": at}
    if records is None:
        return tensors, meta
    is_test = torch.tensor(records.is_test)
    pairs = list(zip(records.ids, records.is_test, strict=True))
    train = [name for name, test in pairs if not test]
    tensors = {**tensors, **packed({"train": train, "test": [n for n, test in pairs if test]})}
    if any(records.is_val):  # they may change without a pixel: the run is another one then
        tensors["held_out"] = torch.tensor(records.is_val)[~is_test].nonzero().flatten()
        words = [meta["fingerprint"], digest_of(tensors["held_out"])]
        meta["fingerprint"] = digest(json.dumps(words))
    if records.groups:
        numbers = {name: number for number, name in enumerate(dict.fromkeys(records.groups))}
        groups = torch.tensor([numbers[name] for name in records.groups])
        tensors["groups"] = groups[~is_test]
    notes = [*_lacking(tensors, meta["classes"]), *told_twice(records)]
    meta |= {"notes": notes, "record_notes": records.notes, "left_out": records.left_out}
    return tensors, meta


def packed(names: Mapping[str, Sequence[str]]) -> dict[str, torch.Tensor]:
    """The names of each part as the bytes of a text: no name holds a zero."""
    found = {}
    for split, those in names.items():
        content = bytearray("\0".join(those).encode("utf-8", "surrogateescape"))
        found[f"{split}_names"] = torch.frombuffer(content, dtype=torch.uint8)
    return found


def _unpacked(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    found = {}
    for split in ("train", "test"):
        if (packed := tensors.get(f"{split}_names")) is not None:
            text = packed.numpy().tobytes().decode("utf-8", "surrogateescape")
            found[split] = tuple(text.split("\0"))
    return found


def _lacking(tensors: dict[str, torch.Tensor], classes: tuple[str, ...]) -> list[str]:
    """A sentence on the classes that have no picture to learn from, and on those without a test."""
    told = []
    held, train = tensors.get("held_out"), tensors["train_labels"]
    if held is not None:
        train = train[~torch.isin(torch.arange(len(train)), held)]
    for word, labels, what in (
        ("training", train, "it cannot be learned"),
        ("test", tensors["test_labels"], "nothing tells how well it is known"),
    ):
        counts = torch.bincount(labels, minlength=len(classes)).tolist()
        if missing := [name for name, count in zip(classes, counts, strict=True) if not count]:
            told.append(f"no {word} picture that can be read is of class {some(missing)}: {what}")
    return told


def source_of(
    name: str, entry: Entry, origin: str, records: Records | None = None, *,
    no_flip: bool = False, notes: Sequence[str] = (),
) -> Source:  # fmt: skip
    """A data set of a cached entry, described and ready to be trained on.

    `records` are those of a listing made just now: what is beside the pictures may have changed.
    """
    tensors, meta = entry
    fresh = records is not None
    left = LeftOut(records.left_out if fresh else _reasons(meta))
    for line in meta["skipped"]:
        denied = os.strerror(errno.EACCES) in line
        place = line.partition(": ")[0].split("/")
        left.add(UNREADABLE[denied], "/".join(place[-2:]))
    used = len(tensors["train_labels"]) + len(tensors["test_labels"])
    counted = "left_out" in meta
    told = records.notes if fresh else meta.get("record_notes", ())
    return Source(
        name=name,
        task="classification",
        train=ImageSet(tensors["train_images"], tensors["train_labels"]),
        test=ImageSet(tensors["test_images"], tensors["test_labels"]),
        classes=tuple(map(class_name, meta["classes"])),
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        fingerprint=meta["fingerprint"],
        origin=origin,
        skipped=tuple(meta["skipped"]),
        no_flip=no_flip,
        names=_unpacked(tensors),
        held_out=tensors.get("held_out"),
        groups=tensors.get("groups"),
        tally=Tally(used, left.reasons) if counted else None,
        notes=(*told, *meta.get("notes", ()), *notes),
    )


def _reasons(meta: dict) -> Reasons:
    """Why files were left out, as JSON gives it back."""
    found = meta.get("left_out", {})
    return {reason: (count, example) for reason, (count, example) in found.items()}


def fingerprint_of(classes: tuple[str, ...], checksums: dict[str, str]) -> str:
    """A digest of classes, shapes, labels and pixels."""
    return digest(json.dumps([classes, checksums]))


def mean_and_std(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Per channel of uint8 (N, 3, H, W), in 0..1; from exact counts, so the same on any machine."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(3):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256)
        share = counts / counts.sum().double()
        mean.append((share * levels).sum().item())
        variance = (share * (levels - mean[-1]).square()).sum().item()
        std.append(max(variance**0.5, 1 / 255))  # a channel without contrast must not divide by 0
    return mean, std
