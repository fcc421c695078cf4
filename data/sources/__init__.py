"""Where the pictures come from: a table of names, a table of layouts, and one file for each row.

This file imports no torch, so that the command line can read the tables at once.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from common.errors import UserError
from common.progress import progress
from common.text import nearest, not_permitted, printable
from data.image_set import ImageSet, Source, limited

if TYPE_CHECKING:
    from data.cache import Entry
    from data.files import Records
    from data.image_set import Levels, Reasons
    from data.sources.layout import Layout
    from data.sources.published import Published
    from data.splits import Wanted

__all__ = [
    "NAMES", "SOURCES", "ImageSet", "Source", "choose_dataset", "limited", "load_source",
    "save_source",
]  # fmt: skip


@dataclass(frozen=True)
class SourceEntry:
    """A data set that is known by a name.

    target: "module:name" in this folder, of a function (origin, seed) -> Source that makes it where
        it is used, or of a `Published` data set, of which a copy is found or fetched.
    recipe: values of TrainConfig fields that suit it, whatever the model.
    """

    target: str
    summary: str
    made: bool = True
    recipe: Mapping[str, object] = field(default_factory=dict)


SOURCES = {
    "cifar10": SourceEntry(
        "cifar10:CIFAR10",
        "CIFAR-10: 60,000 photographs, 32x32, 10 classes (local copy or Hugging Face hub)",
        made=False,
    ),
    "digits": SourceEntry(
        "digits:make",
        "scikit-learn's handwritten digits: 1,797 images, 8x8, no download",
        recipe={"augment": "none"},  # a moved or mirrored digit of 8 pixels is another digit
    ),
    "synthetic": SourceEntry(
        "synthetic:make", "made-up learnable images: 2,560, 32x32, 10 classes, no download"
    ),
    "line": SourceEntry(
        "line:make", "thirty points of y = 2x + 3 with a little noise, for linear regression"
    ),
}
AUTOMATIC = ("cifar10", "digits")  # the first if it can be had, else the second
NAMES = ("auto", *SOURCES, "folder")  # folder: the one that --data-dir names

# How a copy may lie on a disk, in the order in which a path is asked; "hub" lies elsewhere.
LAYOUTS = {
    "pack": "pack:PACK",
    "batches": "cifar_batches:BATCHES",
    "archive": "cifar_batches:ARCHIVE",
    "tables": "tables:TABLES",
    "tensors": "carried:TENSORS",
    "imagenet": "archives:IMAGENET",
    "webdataset": "archives:WEBDATASET",
    "listed": "listed:LISTED",
    "folder": "folder:FOLDER",
}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find(target: str) -> Any:  # noqa: ANN401 - each table knows what its rows name
    """What a row of a table names; its file is imported only now."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(f"data.sources.{module}"), name)


@dataclass(frozen=True)
class Copy:
    """Where a data set lies: the kind of layout and its absolute path, or "hub" and its name."""

    name: str  # as the user typed it
    kind: str
    where: str

    @property
    def published(self) -> Published | None:
        entry = SOURCES.get(self.name)
        return find(entry.target) if entry and not entry.made else None

    @property
    def layout(self) -> Layout | None:
        return find(LAYOUTS[self.kind]) if self.kind in LAYOUTS else None

    @property
    def can_be_split(self) -> bool:
        """Whether its pictures have names to be split by."""
        return not self.layout or bool(self.layout.listing or self.layout.rows)

    @property
    def origin(self) -> str:
        if not self.layout:
            return f"Data: {printable(self.where)} from the Hugging Face hub."
        label = self.published.title if self.published else "images"
        return f"Data: {label} from {self.layout.words} at {printable(self.where)}."

    def key(
        self, image_size: int | None, skip_bad: bool, wanted: Wanted | None = None,
        status: list | None = None,
    ) -> list:  # fmt: skip
        """What a cached entry depends on; a hub data set is kept as it was first fetched.

        status: of its files, where they were looked at.
        """
        status = self.status() if status is None else status
        which = self.name if self.published else False
        which = True if which == "cifar10" else which  # as in caches of old
        by_name = self.kind in ("tables", "hub") and not self.published
        meaning = ["labels by name"] if by_name else []  # not so in entries of old
        meaning += [] if self.published else ["16 bits by their range"]
        meaning += wanted.key() if wanted else []
        return [which, self.kind, self.where, image_size, skip_bad, status, *meaning]

    def status(self) -> list:
        """What tells whether its files are others: of a layout without a listing.

        A file is another one when its size, its time, its inode or the time of its last move
        differs: pictures that change places keep the first two.
        """
        if not self.layout or not self.layout.files:
            return []
        return [_mark(path) for path in self.layout.files(Path(self.where))]

    def refuse(self, why: str) -> UserError:
        return UserError(f"{self.cannot_be_had(why)} {self.what_to_type}", code="data-unreachable")

    def cannot_be_had(self, why: str) -> str:
        return f"{printable(self.name)} cannot be had: there is no local copy, and {why}."

    @property
    def what_to_type(self) -> str:
        if of := self.published:
            return (
                f"With a copy of {of.title} type --dataset {self.name} --data-dir FOLDER "
                f"(or set {of.variable})."
            )
        name = printable(self.name)
        return f"With a copy on disk type --dataset FOLDER; '{name}' is no folder here."

    def reached(self) -> tuple[bool, str]:
        """Can a data set of the hub be had from a cache or from there, and why not."""
        from data.cache import entry_path
        from data.sources import hub

        if self.published and entry_path(self.key(None, False)).exists():
            return True, ""
        return (True, "") if hub.folder_of(self.where) else hub.reach(self.where)


def _mark(path: Path | str) -> tuple[str, int, int, int, int]:
    try:
        seen = os.stat(path)  # noqa: PTH116 - of a million, text as it comes
    except PermissionError:
        raise not_permitted(Path(path).parent) from None
    return str(path), seen.st_size, seen.st_mtime_ns, seen.st_ino, seen.st_ctime_ns


def _marks_of(records: Records) -> str:
    """A digest of which files there are, where each belongs, and whether one is another one."""
    state = hashlib.blake2b(repr(records.classes).encode("utf-8", "surrogatepass"), digest_size=16)
    paths: Iterable[Path | str] = (item for item in records.items if isinstance(item, Path))
    if records.root is not None:  # text alone: a million paths take seconds
        paths = (os.path.join(records.root, name) for name in records.ids)  # noqa: PTH118
    sides = zip(
        paths, records.labels, records.is_test, records.is_val,
        records.groups or itertools.repeat(""), strict=False,
    )  # fmt: skip
    with progress("looking at the files", "pictures", after=1.0) as count:
        for number, (item, *belongs) in enumerate(sides):
            state.update(repr((*_mark(item), *belongs)).encode("utf-8", "surrogatepass"))
            if number % 1000 == 0:
                count(number, len(records.labels))
    return state.hexdigest()


@dataclass(frozen=True)
class Look:
    """What one process of a node finds of a data set at a start, for all of them.

    records: of a listing that was made by this process itself; the others need `notes` and
    `left_out` of it alone.
    """

    copy: Copy
    status: list
    notes: tuple[str, ...] = ()
    left_out: Reasons | None = None  # None: nothing is listed
    records: Records | None = None

    @classmethod
    def at(cls, name: str, data_dir: str | None, wanted: Wanted) -> Self:
        """A look at what lies there, its files one by one."""
        copy = locate(name, data_dir)
        if not copy.layout or not copy.layout.listing:
            return cls(copy, copy.status())
        records = copy.layout.listing(Path(copy.where), wanted)
        return cls(copy, [_marks_of(records)], records.notes, records.left_out, records)

    @classmethod
    def shared(cls, start: str, name: str, data_dir: str | None, wanted: Wanted) -> Self:
        """The same, of which the first process of this node to ask in a start tells the others."""
        from data.cache import looked_once

        if not start:
            return cls.at(name, data_dir, wanted)
        mine: list[Self] = []

        def look() -> dict:
            try:
                one = cls.at(name, data_dir, wanted)
            except UserError as error:
                return {"error": str(error), "code": error.code}
            mine.append(one)
            return {
                "copy": [one.copy.name, one.copy.kind, one.copy.where], "status": one.status,
                "notes": one.notes, "left_out": one.left_out,
            }  # fmt: skip

        key = [str(Path.cwd()), name, data_dir, *wanted.key()]
        found = looked_once(start, key, look)
        if "error" in found:
            raise UserError(found["error"], code=found["code"])
        if mine:
            return mine[0]
        left_out = found["left_out"]
        if left_out is not None:
            left_out = {reason: (count, one) for reason, (count, one) in left_out.items()}
        return cls(Copy(*found["copy"]), found["status"], tuple(found["notes"]), left_out)


def choose_dataset(dataset: str, data_dir: str | None = None) -> tuple[str, str]:
    """The name to load and a sentence about it; looks at disk and network, so ask one process.

    Raises UserError for a name nobody knows, and for a named data set that cannot be had.
    """
    if dataset == "auto":
        return _choose_automatically(data_dir)
    if dataset in SOURCES and SOURCES[dataset].made:
        return dataset, f"Data: {SOURCES[dataset].summary}."
    copy = locate(dataset, data_dir)
    if copy.kind == "hub":
        reached, why = copy.reached()
        if not reached:
            raise copy.refuse(why)
    return dataset, copy.origin


def _choose_automatically(data_dir: str | None) -> tuple[str, str]:
    if data_dir and kind_of(_existing(data_dir, "--data-dir")) in ("folder", "pack"):
        return choose_dataset(data_dir)
    first, second = AUTOMATIC
    copy = locate(first, data_dir)
    if copy.kind == "hub":
        reached, why = copy.reached()
        if not reached:
            return second, (
                f"{copy.cannot_be_had(why)} This run takes scikit-learn's 8x8 digits instead. "
                f"{copy.what_to_type}"
            )
    return first, copy.origin


def load_source(
    name: str,
    *,
    data_dir: str | None = None,
    image_size: int | None = None,
    skip_bad_images: bool = False,
    seed: int = 0,
    split: str | None = None,
    group_by: str | None = None,
    keep_decoded: bool = False,
    stage: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    before: Entry | None = None,
    excluded: Collection[str] = (),
    levels: Levels | None = None,
    many: bool = False,
    start: str = "",
) -> Source:
    """Load a data set by name or path, from the cache when it was decoded before.

    Safe to call from all processes of a node at once: one decodes, the others wait for its file.
    `image_size` applies to folders and tables (see `files.decode_all`), `seed` to `line` alone.
    `split` and `group_by` are as in `splits.Wanted`.
    `keep_decoded`: photographs that many epochs will read are decoded once, where they are few.
    `stage`: a folder of this node that a pack is copied to, once, and read from.
    `say` hears of work that takes long, before it begins.
    `levels`: what becomes of 16 bits, where that was decided before.
    `many`: a picture has any number of classes; each set of them is a class: see many.multi_hot.
    `before`: the index that a run began with; what is `excluded` since may be gone or another file.
    `start`: a word that all processes of one start share, and no other start: one of a node looks
    at the files for all of them.
    """
    if name in SOURCES and SOURCES[name].made:
        if stage:
            raise _nothing_to_stage(name)
        _refuse_splitting(name, split, group_by)
        return find(SOURCES[name].target)(f"Data: {SOURCES[name].summary}.", seed)
    from data.cache import cached, landed
    from data.sources.describe import at_hand, in_pack, source_of, without
    from data.splits import Wanted

    wanted = Wanted(split, group_by, many)
    look = Look.shared(start, name, data_dir, wanted)
    copy = look.copy
    if stage:
        copy = _staged(copy, Path(stage).expanduser(), say)
    if copy.published:
        image_size = None  # its pictures share one small size
    if not copy.can_be_split:
        _refuse_splitting(copy.kind if copy.kind == "pack" else name, split, group_by)
    if copy.layout and copy.layout.entry:
        entry = build(copy, image_size, skip_bad_images, wanted, None, say)  # a cached one already
        return source_of(name, entry, copy.origin)

    def found(skip_bad: bool) -> tuple[list, Entry]:
        key = copy.key(image_size, skip_bad, wanted, look.status)
        key += [f"16 bits from {levels}"] if levels else []
        make = partial(build, copy, image_size, skip_bad, wanted, look.records, say, levels)
        return key, in_pack(key, cached(key, make), make, image_size)

    try:
        key, entry = found(skip_bad_images)
    except UserError as error:
        if before is None or error.code != "bad-image":
            raise
        key, entry = found(True)
    index = entry if "root" in entry[1] else None
    if before and index and before[1]["content"] != index[1]["content"]:
        entry = without(index, before, excluded) or entry
    elif keep_decoded:
        entry = at_hand(copy.key(None, skip_bad_images, wanted, look.status), entry, say)
    beside = None if look.left_out is None else (look.notes, look.left_out)
    source = source_of(name, entry, copy.origin, beside, notes=landed(key, entry))
    return replace(source, index=index)


def _refuse_splitting(name: str, split: str | None, group_by: str | None) -> None:
    for flag, value in (("--split", split), ("--group-by", group_by)):
        if value is not None:
            why = "its pictures have no names; drop the flag. It is for folders and tables."
            if name == "pack":
                why = "keeps it; drop the flag, and give it to python -m data prepare instead."
            raise UserError(
                f"{flag} {printable(value)}: {printable(name)} comes with a split of its own and "
                f"{why}",
                code="no-names",
            )


def _staged(copy: Copy, folder: Path, say: Callable[[str], None]) -> Copy:
    from data.pack import staged

    if copy.kind != "pack":
        raise _nothing_to_stage(copy.where)
    return replace(copy, where=str(staged(Path(copy.where), folder, say)))


def _nothing_to_stage(name: str) -> UserError:
    return UserError(
        f"--stage copies a pack, and {printable(name)} is none: make one with python -m data "
        "prepare --out FOLDER, or leave --stage out",
        code="nothing-to-stage",
    )


def build(
    copy: Copy, image_size: int | None, skip_bad: bool, wanted: Wanted, records: Records | None,
    say: Callable[[str], None], levels: Levels | None = None,
) -> Entry:  # fmt: skip
    """Read and decode a data set that is not in the cache; `records` where they were listed."""
    from data.cache import entry_path
    from data.files import decode_records
    from data.sources import hub
    from data.sources.describe import entry_of
    from data.sources.layout import Aside

    layout, where = copy.layout, Path(copy.where)
    aside = Aside(entry_path([*copy.key(None, False), "rows"]).with_suffix(".rows"), say)
    if layout and layout.entry:
        known = {name: find(e.target) for name, e in SOURCES.items() if not e.made}
        return layout.entry(where, image_size, known, copy.name)
    if layout and layout.read:
        found = layout.read(where)
    else:
        if layout and layout.rows:
            records = layout.rows(where, wanted, aside)
        elif layout and layout.listing:
            records = records or layout.listing(where, wanted)
        else:
            if not hub.folder_of(copy.where):
                reached, why = hub.reach(copy.where)
                if not reached:
                    raise copy.refuse(why)
            records = hub.read_records(copy.where, wanted, aside)
        found = decode_records(records, image_size, skip_bad, levels, say)
    if copy.published:
        found = copy.published.recognised(found, copy.where)
    key = [*copy.key(None, skip_bad, wanted), levels]  # whatever the size
    folder = entry_path(key).with_suffix(".pack")
    return entry_of(found, printable(copy.where), image_size, folder, say)


def save_source(source: Source, path: Path, image_size: int | None) -> None:
    """All of a data set in one checksummed file, which takes its place where a path is asked for.

    It needs no decoder and none of the packages that read tables. image_size is what the pictures
    were decoded for.
    """
    if source.name in SOURCES and SOURCES[source.name].made:
        copies = ", ".join(name for name, entry in SOURCES.items() if not entry.made)
        raise UserError(
            f"{source.name} needs no file, it is made where it is used; --out is for {copies}, "
            "a folder, tables or a hub name",
            code="needs-no-file",
        )
    find("carried:save")(source, path, image_size)


def locate(name: str, data_dir: str | None) -> Copy:
    """Where the data set of a name or a path lies: on this disk, or on the hub."""
    entry = SOURCES.get(name)
    if entry and not entry.made:
        of = find(entry.target)
        local = data_dir or os.environ.get(of.variable)
        if not local:
            return Copy(name, "hub", of.hub)
        path = _existing(local, "--data-dir" if data_dir else f"the variable {of.variable}")
        kind = kind_of(path)
        if kind == "folder":
            raise UserError(
                f"{printable(path)} holds class folders, not a copy of {of.title}; to train on "
                f"them type --dataset {printable(path)}.",
                code="other-data-set",
            )
        return Copy(name, kind, str(path))
    if name == "folder":
        if not data_dir:
            raise UserError(
                "--dataset folder needs --data-dir FOLDER, one subfolder per class.",
                code="no-data-dir",
            )
        path = _existing(data_dir, "--data-dir")
        return Copy(name, kind_of(path), str(path))
    path = Path(name).expanduser()
    if _exists(path):
        return Copy(name, kind_of(path), str(path.absolute()))
    if HUB_NAME.fullmatch(name) and not name.startswith("."):
        return Copy(name, "hub", name)
    if os.sep in name or "/" in name:
        raise UserError(
            f"there is no folder or file {printable(name)}: check the path.", code="no-such-path"
        )
    close = nearest(name.lower(), NAMES)
    raise UserError(
        f"there is no data set '{printable(name)}'{f'; did you mean {close}?' if close else '.'}"
        f" Known: {', '.join(NAMES)}, the path of a folder, or a hub name like user/name.",
        code="unknown-data-set",
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        raise not_permitted(path.parent) from None


def _existing(path: str, said_by: str) -> Path:
    found = Path(path).expanduser()
    if not _exists(found):
        raise UserError(
            f"{said_by} names {printable(path)}, which does not exist: check the path.",
            code="no-such-path",
        )
    return found.absolute()


def kind_of(path: Path) -> str:
    """What lies there: the kind of the first layout that knows its files."""
    for kind, target in LAYOUTS.items():
        try:
            if find(target).holds(path):
                return kind
        except PermissionError:
            raise not_permitted(path) from None
    raise UserError(
        f"{printable(path)} holds no pictures this program can read: give a folder with one "
        "subfolder of images per class or with a metadata.csv (file_name, label), a parquet file "
        "or a folder of them, a save_to_disk folder, WebDataset's tar files, ImageNet's archives, "
        "a pack, or the cifar-10-batches-py folder.",
        code="unknown-layout",
    )
