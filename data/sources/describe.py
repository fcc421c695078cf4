"""From decoded pictures to a data set: checked, split, with its mean, std and fingerprint."""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from common.cpus import memory
from common.disk import Json, digest
from common.errors import UserError
from common.text import both_sides, class_name, printable, some
from data.cache import Entry, cached, digest_of, entry_path, size_limit, trim, use
from data.files import Part, Records, told_levels
from data.image_set import (
    UNREADABLE,
    Decoded,
    ImageSet,
    LeftOut,
    Reasons,
    Source,
    Tally,
    class_counts,
)
from data.pack import Form, Say, levels_in, open_pack, pack, photos_of, silent, store_of
from data.photographs import PHOTOGRAPH, FileStore, Names, PhotoSet, Store, decoder
from data.rows import Groups, GroupStore, Parts, Rows
from data.scan import RowStore, Scanned, level_counts, mean_and_std_of, root_and_names
from data.sources.twice import told_twice


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
            single = there is is_test and labels.bincount().max() == 1
            why = "add some."
            if single:
                why = "a fifth of each class tests, and each has one picture: give it more."
            raise UserError(
                f"{at} has no {split} images that can be read: {why}", code="empty-split"
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
    entry = describe(train, test, found.classes, found.skipped)
    entry[1]["levels"] = found.levels
    return with_records(entry, found.records, at, told_levels(found.levels, found.clipped))


def entry_of_photographs(found: Scanned, at: str, image_size: int, folder: Path, say: Say) -> Entry:
    """The index of photographs: tensors of sizes, kinds, names, places; no pixels.

    Those that lie in no file that can be read when a batch needs them are packed into `folder`.
    """
    records = found.records
    labels, is_test = torch.tensor(records.labels), torch.tensor(records.is_test)
    check(labels, is_test, records.classes, at)
    tensors, facts, store = where_they_lie(records)
    names = Names.of(records.ids)
    tensors |= {
        "sizes": found.sizes, "kinds": found.kinds, "names": names.text, "name_ends": names.ends
    }  # fmt: skip
    for split, chosen in (("train", ~is_test), ("test", is_test)):
        places = chosen.nonzero()[:, 0]
        tensors |= {f"{split}_places": places, f"{split}_labels": labels[places]}
    facts["levels"] = found.levels
    if "root" in facts:
        tensors["heads"] = torch.tensor([[*bytes.fromhex(head)] for head in found.heads]).byte()
    train, test = photographs_of((tensors, facts), store)
    mean, std = mean_and_std_of(train, image_size)
    rows = [records.classes, records.labels, records.is_test, records.ids, found.heads]
    facts |= {"classes": records.classes, "mean": mean, "std": std, "skipped": found.skipped}
    facts |= {"content": digest(json.dumps(rows))}
    tensors, facts = with_records((tensors, facts), records, at, told_levels(found.levels))
    if not isinstance(store, RowStore):
        return tensors, facts
    source = described("", train, test, (tensors, facts), "")
    _pack_in_cache(source, Form("jpeg"), folder, image_size, ["--dataset", at], say)
    return {"none": torch.zeros(1)}, {"packed": str(folder), "at": at}


def _pack_in_cache(
    source: Source, form: Form, folder: Path, image_size: int, command: list[str], say: Say,
    skip_bad: bool = False,
) -> None:  # fmt: skip
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    use(folder)  # nobody shall remove what is half there
    pack(
        source, form, folder, image_size=image_size, command=command, skip_bad=skip_bad, wait=True,
        say=say,
    )  # fmt: skip
    trim()


def in_pack(key: Json, entry: Entry, make: Callable[[], Entry], image_size: int | None) -> Entry:
    """The entry, or that of the pack in the cache which it names; made again if that is gone.

    So is an entry whose pictures were copied out of their tables, if these copies are gone.
    """
    for _ in range(2):
        if "copied" in entry[1]:
            use(Path(entry[1]["copied"]))
            if are_there(entry):
                break
            entry_path(key).unlink(missing_ok=True)
            entry = cached(key, make)
            continue
        if "packed" not in entry[1]:
            break
        folder = Path(entry[1]["packed"])
        use(folder)
        try:
            return open_pack(folder, image_size)
        except UserError:
            entry_path(key).unlink(missing_ok=True)
            entry = cached(key, make)
    return entry


def are_there(entry: Entry) -> bool:
    """Whether the files that pictures were copied into have all of them."""
    tensors, meta = entry
    ends = torch.zeros(len(meta["files"]), dtype=torch.int64)
    ends.scatter_reduce_(
        0, tensors["which"].long(), tensors["offsets"] + tensors["lengths"], "amax"
    )
    try:
        sizes = [Path(file).stat().st_size for file in meta["files"]]
    except OSError:
        return False
    return all(size >= end for size, end in zip(sizes, ends.tolist(), strict=True))


def at_hand(key: Json, entry: Entry, say: Say) -> Entry:
    """The entry; of a folder that is small enough, that of its decoded pixels in the cache.

    Nobody decodes the same small folder in every epoch. What is read there are the same pixels, so
    it depends on the machine alone: a quarter of its memory, and room in the cache.
    """
    tensors, meta = entry
    if "root" not in meta:
        return entry
    total = 3 * int(tensors["sizes"].long().prod(dim=1).sum())
    folder = entry_path([key, decoder()]).with_suffix(".pack")
    if total > min(memory() / 4, size_limit()):
        return entry
    use(folder)
    try:
        found = open_pack(folder, None)
    except UserError:
        source = source_of("", entry, "")
        say(
            f"{len(tensors['sizes']):,} photographs are decoded once, into the cache: later epochs "
            "read their pixels"
        )
        command = ["--dataset", meta["root"], "--store", "raw"]
        try:
            _pack_in_cache(source, Form("raw"), folder, PHOTOGRAPH, command, say, skip_bad=True)
            found = open_pack(folder, None)
        except UserError as error:
            if error.code not in ("disk-full", "output-unwritable"):
                raise
            why = "has no room for them" if error.code == "disk-full" else "cannot be written"
            say(
                f"the cache {printable(folder.parent)} {why}, so each epoch decodes them; "
                "LOCKSTEP_CACHE=FOLDER puts it elsewhere"
            )
            return entry
    names = ("mean", "std", "levels", "skipped", "at", "notes", "record_notes", "left_out",
             "hashed")  # fmt: skip
    facts = {name: meta[name] for name in names if name in meta}
    return found[0], found[1] | facts | {"came_from": meta["root"]}


def without(now: Entry, before: Entry, excluded: Collection[str]) -> Entry | None:
    """What there was before, if nothing but pictures that are excluded is gone or has changed.

    These keep their places, so the order stays; nobody reads them.
    """
    (tensors, meta), (old_tensors, old_meta) = now, before
    if "root" not in meta:
        return None
    found, known = (
        dict(zip(Names(t["names"], t["name_ends"]), map(bytes, t["heads"].numpy()), strict=True))
        for t in (tensors, old_tensors)
    )
    paths = {Path(os.path.relpath(name, meta["root"])).as_posix() for name in excluded}
    other = {name for name, head in known.items() if found.get(name) != head}
    if not found.keys() <= known.keys() or not other <= {*excluded, *paths}:
        return None
    return old_tensors, old_meta | {"root": meta["root"]}


def where_they_lie(records: Records) -> tuple[dict[str, torch.Tensor], dict, Store]:
    """What tells where photographs lie: tensors and facts for an index; and the store."""
    items = records.items
    if isinstance(items, Rows):
        tensors = {"which": items.which, "group": items.group, "row": items.row}
        groups = items.groups
        facts = {"tables": list(map(str, groups.files)), "column": groups.column}
        return tensors, facts | {"largest": groups.largest}, group_store(tensors, groups)
    if isinstance(items, Parts):
        tensors = {"which": items.which, "offsets": items.starts, "lengths": items.lengths}
        facts = {"parts": "", "files": list(map(str, items.files))}
        if items.copied is not None:
            facts |= {"copied": str(items.copied)}
        return tensors, facts, store_of(tensors, facts)
    if all(isinstance(item, Path) for item in items):
        if records.root is not None:  # their ids are their paths
            return {}, {"root": str(records.root)}, FileStore(records.root, Names.of(records.ids))
        root, below = root_and_names(records)
        paths = Names.of(below)
        tensors = {"paths": paths.text, "path_ends": paths.ends}
        return tensors, {"root": str(root)}, FileStore(root, paths)
    parts = [item for item in items if isinstance(item, Part)]
    if len(parts) < len(items):
        return {}, {}, RowStore(items)
    files = {file: number for number, file in enumerate(dict.fromkeys(p.file for p in parts))}
    tensors = {
        "which": torch.tensor([files[part.file] for part in parts]),
        "offsets": torch.tensor([part.start for part in parts]),
        "lengths": torch.tensor([part.length for part in parts]),
    }
    facts = {"parts": "", "files": list(map(str, files))}
    return tensors, facts, store_of(tensors, facts)


def group_store(tensors: dict[str, torch.Tensor], groups: Groups) -> GroupStore:
    """Pictures of an index that lie in row groups."""
    return GroupStore(groups, tensors["which"], tensors["group"], tensors["row"])


def photographs_of(entry: Entry, store: Store) -> tuple[PhotoSet, PhotoSet]:
    """Training and test pictures of an index."""
    tensors, meta = entry
    photos = photos_of(tensors, meta, store)
    train, test = (
        PhotoSet(photos, tensors[f"{split}_places"], tensors[f"{split}_labels"])
        for split in ("train", "test")
    )
    return train, test


def with_records(entry: Entry, records: Records | None, at: str, more: Sequence[str] = ()) -> Entry:
    """The entry with the names of its pictures, and with what only a look at all of them tells."""
    tensors, meta = entry
    meta = {**meta, "at": at}
    if records is None:
        return tensors, meta
    is_test = torch.tensor(records.is_test)
    if "names" not in tensors:  # of photographs
        pairs = list(zip(records.ids, records.is_test, strict=True))
        train = [name for name, test in pairs if not test]
        tensors = {**tensors, **packed({"train": train, "test": [n for n, test in pairs if test]})}
    if any(records.is_val):  # they may change without a pixel: the run is another one then
        tensors["held_out"] = torch.tensor(records.is_val)[~is_test].nonzero().flatten()
        key = "content" if "content" in meta else "fingerprint"
        meta[key] = digest(json.dumps([meta[key], digest_of(tensors["held_out"])]))
    if records.groups:
        numbers = {name: number for number, name in enumerate(dict.fromkeys(records.groups))}
        groups = torch.tensor([numbers[name] for name in records.groups])
        tensors["groups"], tensors["test_groups"] = groups[~is_test], groups[is_test]
    lack = [] if records.many else _lacking(tensors, meta["classes"], at)
    notes = [*more, *lack, *told_twice(records)]
    meta |= {"notes": notes, "record_notes": records.notes, "left_out": records.left_out}
    return tensors, meta | {"hashed": records.hashed}


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


def _lacking(tensors: dict[str, torch.Tensor], classes: tuple[str, ...], at: str) -> list[str]:
    held, train = tensors.get("held_out"), tensors["train_labels"]
    if held is not None:
        train = train[~torch.isin(torch.arange(len(train)), held)]
    counts = [class_counts(labels, classes) for labels in (train, tensors["test_labels"])]
    if all(map(any, counts)) and not any(map(min, *counts)):
        known, asked = (
            [name for name, count in zip(classes, side, strict=True) if count] for side in counts
        )
        raise UserError(
            f"{at} has no class with pictures both to learn from and to test: "
            f"{both_sides('training has', known, 'the test part has', asked)}; give a class the "
            "same name in both.",
            code="no-common-class",
        )
    return lacking(classes, *counts)


def lacking(classes: tuple[str, ...], train: list[int], test: list[int]) -> list[str]:
    """A sentence on the classes that have no picture to learn from, and on those without a test."""
    notes = []
    for word, counts, what in (
        ("training", train, "it cannot be learned"),
        ("test", test, "nothing tells how well it is known"),
    ):
        if missing := [name for name, count in zip(classes, counts, strict=True) if not count]:
            notes.append(f"no {word} picture that can be read is of class {some(missing)}: {what}")
    return notes


def source_of(
    name: str, entry: Entry, origin: str, beside: tuple[Sequence[str], Reasons] | None = None, *,
    no_flip: bool = False, notes: Sequence[str] = (),
) -> Source:  # fmt: skip
    """A data set of a cached entry, described and ready to be trained on.

    `beside` are notes and what is left out of a listing made just now: they may have changed.
    """
    tensors, meta = entry
    if "root" in meta:
        which = ("paths", "path_ends") if "paths" in tensors else ("names", "name_ends")
        paths = Names(*(tensors[name] for name in which))
        train, test = photographs_of(entry, FileStore(Path(meta["root"]), paths))
    elif "tables" in meta:
        groups = Groups(list(map(Path, meta["tables"])), meta["column"], meta["largest"])
        train, test = photographs_of(entry, group_store(tensors, groups))
    elif "files" in meta:
        train, test = photographs_of(entry, store_of(tensors, meta))
    else:
        train = ImageSet(tensors["train_images"], tensors["train_labels"])
        test = ImageSet(tensors["test_images"], tensors["test_labels"])
    if beside is not None:
        meta = {**meta, "record_notes": beside[0], "left_out": beside[1]}
    meta = {**meta, "notes": (*meta.get("notes", ()), *notes)}
    return described(name, train, test, (tensors, meta), origin, no_flip)


def described(
    name: str, train: ImageSet | PhotoSet, test: ImageSet | PhotoSet, entry: Entry, origin: str,
    no_flip: bool = False,
) -> Source:  # fmt: skip
    """The data set of these pictures; what photographs look like depends on who decodes them."""
    tensors, meta = entry
    content, by = meta.get("content", ""), meta.get("decoder", "")
    left = LeftOut(_reasons(meta))
    for line in meta["skipped"]:
        denied = os.strerror(errno.EACCES) in line
        place = line.partition(": ")[0].split("/")
        left.add(UNREADABLE[denied], "/".join(place[-2:]))
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
        names=_unpacked(tensors),
        held_out=tensors.get("held_out"),
        groups=tensors.get("groups"),
        test_groups=tensors.get("test_groups"),
        levels=levels_in(meta),
        hashed=meta.get("hashed", False),
        tally=Tally(len(train) + len(test), left.reasons) if "left_out" in meta else None,
        notes=(*meta.get("record_notes", ()), *meta.get("notes", ())),
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
    return mean_and_std_of_counts(level_counts(images))


def mean_and_std_of_counts(counts: torch.Tensor) -> tuple[list[float], list[float]]:
    """The same from how often each level occurs, int64 (channels, 256)."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for count in counts:
        share = count / count.sum().double()
        mean.append((share * levels).sum().item())
        variance = (share * (levels - mean[-1]).square()).sum().item()
        std.append(max(variance**0.5, 1 / 255))  # a channel without contrast must not divide by 0
    return mean, std


def grey_levels(train: ImageSet | PhotoSet, image_size: int) -> tuple[float, float]:
    """Mean and deviation of the brightness in 0..1: of all pictures, or of a sample of photographs.

    From exact counts, so the same on any machine.
    """
    if isinstance(train, PhotoSet):
        mean, std = mean_and_std_of(train, image_size, channels=1)
    else:
        counts = sum(level_counts(chunk, 1) for chunk in train.images.split(4096))
        assert isinstance(counts, torch.Tensor)  # there is a picture
        mean, std = mean_and_std_of_counts(counts)
    return mean[0], std[0]
