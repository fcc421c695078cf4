"""From decoded pictures to a data set: checked, split, with its mean, std and fingerprint."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from common.disk import Json, digest
from common.text import class_name
from data.cache import Entry, cached, digest_of, entry_path
from data.files import Part
from data.image_set import Decoded, ImageSet, Source
from data.pack import Form, Say, open_pack, pack, silent, store_of
from data.photographs import PHOTOGRAPH, FileStore, Names, Photos, PhotoSet, Store, decoder
from data.scan import RowStore, Scanned, mean_and_std_of, root_and_names
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


def entry_of(
    found: Decoded | Scanned, at: str, image_size: int | None, folder: Path, say: Say = silent
) -> Entry:
    """What a reader found, split and checked; photographs stay where they are.

    folder: for those that lie in rows of a table, see `entry_of_photographs`.
    """
    if isinstance(found, Scanned):
        return entry_of_photographs(found, at, image_size or PHOTOGRAPH, folder, say)
    labels, is_test = torch.tensor(found.labels), torch.tensor(found.is_test)
    check(labels, is_test, found.classes, at)
    train = (found.images[~is_test], labels[~is_test])
    test = (found.images[is_test], labels[is_test])
    return describe(train, test, found.classes, found.skipped)


def entry_of_photographs(found: Scanned, at: str, image_size: int, folder: Path, say: Say) -> Entry:
    """The index of photographs: tensors of sizes, kinds, names, places; no pixels.

    Those that lie in no file that can be read when a batch needs them are packed into `folder`.
    """
    records = found.records
    labels, is_test = torch.tensor(records.labels), torch.tensor(records.is_test)
    check(labels, is_test, records.classes, at)
    tensors, facts, store, below = where_they_lie(found)
    names = Names.of(below)
    tensors |= {
        "sizes": found.sizes, "kinds": found.kinds, "names": names.text, "name_ends": names.ends
    }  # fmt: skip
    for split, chosen in (("train", ~is_test), ("test", is_test)):
        places = chosen.nonzero()[:, 0]
        tensors |= {f"{split}_places": places, f"{split}_labels": labels[places]}
    train, test = photographs_of(tensors, store)
    mean, std = mean_and_std_of(train, image_size)
    rows = [records.classes, records.labels, records.is_test, below, found.heads]
    facts |= {"classes": records.classes, "mean": mean, "std": std, "skipped": found.skipped}
    facts |= {"content": digest(json.dumps(rows))}
    if not isinstance(store, RowStore):
        return tensors, facts
    pack(
        described("", train, test, facts, ""), Form("jpeg"), folder, image_size=image_size,
        command=["--dataset", at], wait=True, say=say,
    )  # fmt: skip
    return {"none": torch.zeros(1)}, {"packed": str(folder)}


def in_pack(key: Json, entry: Entry, make: Callable[[], Entry], image_size: int | None) -> Entry:
    """The entry, or that of the pack in the cache which it names; made again if that is gone."""
    for _ in range(2):
        if "packed" not in entry[1]:
            break
        try:
            return open_pack(Path(entry[1]["packed"]), image_size)
        except UserError:
            entry_path(key).unlink(missing_ok=True)
            entry = cached(key, make)
    return entry


def at_hand(key: Json, entry: Entry, say: Say) -> Entry:
    """The entry; of a folder that is small enough, that of its decoded pixels in the cache.

    Nobody decodes the same small folder in every epoch. What is read there are the same pixels, so
    it depends on the machine alone: a quarter of its memory, and room on the disk of the cache.
    """
    tensors, meta = entry
    if "root" not in meta:
        return entry
    total = 3 * int(tensors["sizes"].long().prod(dim=1).sum())
    folder = entry_path([key, decoder()]).with_suffix(".pack")
    if total > memory() / 4 or os.environ.get("LOCKSTEP_CACHE_SIZE") == "0":
        return entry
    try:
        found = open_pack(folder, None)
    except UserError:
        source = source_of("", entry, "")
        say(
            f"{len(tensors['sizes']):,} photographs are decoded once, into the cache: later epochs "
            "read their pixels"
        )
        try:
            pack(
                source, Form("raw"), folder, image_size=PHOTOGRAPH, skip_bad=True, wait=True,
                command=["--dataset", meta["root"], "--store", "raw"], say=say,
            )  # fmt: skip
            found = open_pack(folder, None)
        except UserError as error:
            if error.code not in ("disk-full", "output-unwritable"):
                raise
            return entry
    levels = {name: meta[name] for name in ("mean", "std", "skipped")}
    return found[0], found[1] | levels | {"came_from": meta["root"]}


def memory() -> int:
    """Bytes of memory of this machine, or of what a job may use of it."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no such question here: not much is sure
        found = 8 * 2**30
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found = min(found, int(Path(file).read_text()))
    return found


def where_they_lie(
    found: Scanned,
) -> tuple[dict[str, torch.Tensor], dict, Store, list[str]]:
    """What tells where photographs lie: tensors and facts for an index, the store; their names."""
    items = found.records.items
    if all(isinstance(item, Path) for item in items):
        root, below = root_and_names(found.records)
        return {}, {"root": str(root)}, FileStore(root, Names.of(below)), below
    parts = [item for item in items if isinstance(item, Part)]
    if len(parts) < len(items):
        return {}, {}, RowStore(items), found.records.names
    files = {file: number for number, file in enumerate(dict.fromkeys(p.file for p in parts))}
    tensors = {
        "which": torch.tensor([files[part.file] for part in parts]),
        "offsets": torch.tensor([part.start for part in parts]),
        "lengths": torch.tensor([part.length for part in parts]),
    }
    facts = {"parts": "", "files": list(map(str, files))}
    return tensors, facts, store_of(tensors, facts), found.records.names


def photographs_of(tensors: dict[str, torch.Tensor], store: Store) -> tuple[PhotoSet, PhotoSet]:
    """Training and test pictures of an index."""
    names = Names(tensors["names"], tensors["name_ends"])
    photos = Photos(store, names, tensors["sizes"], tensors["kinds"])
    train, test = (
        PhotoSet(photos, tensors[f"{split}_places"], tensors[f"{split}_labels"])
        for split in ("train", "test")
    )
    return train, test


def source_of(name: str, entry: Entry, origin: str, no_flip: bool = False) -> Source:
    """A data set of a cached entry, described and ready to be trained on."""
    tensors, meta = entry
    if "root" in meta:
        names = Names(tensors["names"], tensors["name_ends"])
        train, test = photographs_of(tensors, FileStore(Path(meta["root"]), names))
    elif "files" in meta:
        train, test = photographs_of(tensors, store_of(tensors, meta))
    else:
        train = ImageSet(tensors["train_images"], tensors["train_labels"])
        test = ImageSet(tensors["test_images"], tensors["test_labels"])
    return described(name, train, test, meta, origin, no_flip)


def described(
    name: str, train: ImageSet | PhotoSet, test: ImageSet | PhotoSet, meta: dict, origin: str,
    no_flip: bool = False,
) -> Source:  # fmt: skip
    """The data set of these pictures; what photographs look like depends on who decodes them."""
    content, by = meta.get("content", ""), meta.get("decoder", "")
    return Source(
        name=name,
        task="classification",
        train=train,
        test=test,
        classes=tuple(map(class_name, meta["classes"])),
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        fingerprint=digest(content + (by or decoder())) if content else meta["fingerprint"],
        origin=origin,
        skipped=tuple(meta["skipped"]),
        no_flip=no_flip,
        content=content,
        decoder=by,
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
