"""Photographs in tar files, read where they lie: WebDataset's shards, and ImageNet as published."""

import io
import itertools
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from common.text import class_name, printable
from data.files import SUFFIXES, Part, Records
from data.image_set import LeftOut
from data.sources.layout import Layout
from data.sources.tables import split_of
from data.splits import AS_IT_IS, Wanted, arranged, test_and_val

MOST_TEXT = 2**20  # bytes of a label or of a table of names
TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
SYNSET = re.compile(r"n\d{8}")


def members(path: Path, start: int = 0) -> Iterator[tuple[str, int, int]]:
    """Name, place in the file and length of each file in a tar, which may lie within another."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isreg():
                        yield member.name, member.offset_data, member.size
                    # A million of them would stay in memory.
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(
            f"{printable(path)} is a damaged archive: {printable(error)}. Fetch it again.",
            code="bad-archive",
        ) from None


# --- WebDataset ---------------------------------------------------------------------------------


def shards(path: Path) -> list[Path]:
    """The tar files of a path: itself, or those that lie in it and one folder below."""
    if path.is_file():
        return [path] if path.suffix == ".tar" else []
    return sorted([*path.glob("*.tar"), *path.glob("*/*.tar")]) if path.is_dir() else []


def read_webdataset(path: Path, wanted: Wanted = AS_IT_IS) -> Records:
    """KEY.jpg beside KEY.cls (a number or a name) or KEY.json (`label`, `cls` or `class`)."""
    base = path if path.is_dir() else path.parent
    items, names, values, splits, left = [], [], [], [], LeftOut()
    for shard in shards(path):
        pictures: dict[str, Part] = {}
        labels: dict[str, str | int] = {}
        for name, start, length in members(shard):
            folder, _, last = name.rpartition("/")
            key, _, kind = last.partition(".")
            key, suffix = f"{folder}/{key}", "." + kind.lower().rpartition(".")[2]
            part = Part(shard, start, length)
            if suffix in SUFFIXES and key not in pictures:
                pictures[key] = part
            elif suffix in (".cls", ".json"):
                label = _label(part, suffix) if length <= MOST_TEXT else None
                if label is not None:
                    labels.setdefault(key, label)
            else:
                again = suffix in SUFFIXES
                reason = "second pictures of a key" if again else "of another suffix"
                left.add(reason, f"{shard.name}/{name}")
        for key, part in pictures.items():
            if key not in labels:
                raise UserError(
                    f"{printable(key.strip('/'))} in {printable(shard)} has no label: it needs a "
                    "file KEY.cls, or KEY.json with label, cls or class, beside the picture.",
                    code="no-label",
                )
            items.append(part)
            names.append(f"{shard.relative_to(base).as_posix()}/{key.strip('/')}")
            values.append(labels[key])
            splits.append(split_of(shard.relative_to(base)))
    texts = {isinstance(value, str) for value in values}
    if len(texts) > 1:
        raise UserError(
            f"{printable(path)} has numbers and names as labels: give one or the other.",
            code="bad-label",
        )
    known = sorted(set(values))
    numbers = {value: number for number, value in enumerate(known)}
    which = test_and_val(splits)
    sides = [which.get(split) for split in splits]
    records = Records(
        items, list(map(printable, names)), [numbers[value] for value in values],
        [side == "test" for side in sides], tuple(map(class_name, known)), names,
        [side == "val" for side in sides], left_out=left.reasons,
    )  # fmt: skip
    return arranged(records, wanted)


def _label(part: Part, suffix: str) -> str | int | None:
    text = part.read().decode("utf-8", "replace").strip()
    value: str | int | None = text
    if suffix == ".json":
        try:
            found = json.loads(text)
        except ValueError:
            return None
        found = found if isinstance(found, dict) else {}
        value = next((found[n] for n in ("label", "cls", "class") if n in found), None)
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        return int(value)
    return value if isinstance(value, str | int) else None


# --- ImageNet -----------------------------------------------------------------------------------


def read_imagenet(path: Path, wanted: Wanted = AS_IT_IS) -> Records:
    """The folder with the archives of 2012: a tar of a tar per class, 50,000 files of validation.

    The development kit tells what `n01440764` is called, and the classes of the validation files;
    these may lie in their archive or unpacked.
    """
    words, answers = _devkit(path / DEVKIT)
    items, names, labels, is_test = [], [], [], []
    synsets = []
    for name, start, _ in members(path / TRAIN):
        synset = Path(name).stem
        if not SYNSET.fullmatch(synset) or not name.endswith(".tar"):
            continue
        synsets.append(synset)
        for inner, inner_start, inner_length in members(path / TRAIN, start):
            items.append(Part(path / TRAIN, inner_start, inner_length))
            names.append(f"{synset}/{Path(inner).name}")
            labels.append(synset)
            is_test.append(False)
    number_of = {synset: number for number, synset in enumerate(sorted(synsets))}
    for name, item in _validation(path):
        place = int(name.removesuffix(".JPEG")[-8:]) - 1
        if place >= len(answers) or answers[place] not in number_of:
            raise UserError(
                f"{DEVKIT} does not tell the class of {name}, or {TRAIN} lacks it: fetch both "
                "again.",
                code="imagenet-incomplete",
            )
        items.append(item)
        names.append(f"val/{name}")
        labels.append(answers[place])
        is_test.append(True)
    if not synsets or not any(is_test):
        raise UserError(
            f"{printable(path)} lacks {TRAIN if not synsets else VAL}: both are needed, with "
            f"{DEVKIT}.",
            code="imagenet-incomplete",
        )
    classes = _called([words.get(synset) or synset for synset in number_of], list(number_of))
    records = Records(
        items, list(map(printable, names)), [number_of[s] for s in labels], is_test, classes, names,
        [False] * len(names),
    )  # fmt: skip
    return arranged(records, wanted)


def _called(words: list[str], synsets: list[str]) -> tuple[str, ...]:
    """Names of the classes; two are cranes, and two are maillots: those keep their number too."""
    return tuple(
        class_name(word if words.count(word) == 1 else f"{word} ({synset})")
        for word, synset in zip(words, synsets, strict=True)
    )


def _validation(path: Path) -> Iterator[tuple[str, Part]]:
    if (path / VAL).is_file():
        for name, start, length in sorted(members(path / VAL)):
            if VALIDATION.fullmatch(last := Path(name).name):
                yield last, Part(path / VAL, start, length)
        return
    for file in _flat(path):
        yield file.name, Part(file, 0, file.stat().st_size)


def _flat(path: Path) -> list[Path]:
    """The validation files, where they were unpacked."""
    folders = (path, path / "val", path / "ILSVRC2012_img_val")
    found = (sorted(folder.glob("ILSVRC2012_val_*.JPEG")) for folder in folders)
    return next(filter(None, found), [])


def _devkit(path: Path) -> tuple[dict[str, str], list[str]]:
    """What each synset is called, and the synset of each validation file in turn."""
    from scipy.io import loadmat

    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                last = Path(member.name).name
                wanted = last in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
                if wanted and member.isreg() and member.size < 2**26:
                    file = tar.extractfile(member)
                    found[last] = file.read() if file else b""
        table = loadmat(io.BytesIO(found["meta.mat"]), squeeze_me=True)["synsets"]
        answers = found["ILSVRC2012_validation_ground_truth.txt"].split()
        rows = [(int(r["ILSVRC2012_ID"]), str(r["WNID"]), str(r["words"])) for r in table]
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{printable(path)} cannot be read: {printable(error)}. ImageNet's development kit "
            "(tasks 1 and 2) names the classes; fetch it beside the archives.",
            code="imagenet-incomplete",
        ) from None
    by_number = {number: synset for number, synset, _ in rows}
    words: dict[str, str] = {synset: text.partition(",")[0] for _, synset, text in rows}
    return words, [by_number.get(int(answer), "") for answer in answers]


# --- as rows of the table -----------------------------------------------------------------------


def _is_webdataset(path: Path) -> bool:
    """Whether the first pictures of the first tar have a label beside them."""
    found: dict[str, set[bool]] = defaultdict(set)
    try:
        for name, _, _ in itertools.islice(members(shards(path)[0]), 8):
            folder, _, last = name.rpartition("/")
            key, _, kind = last.partition(".")
            if kind.lower() in ("cls", "json") or f".{kind.lower()}" in SUFFIXES:
                found[f"{folder}/{key}"].add(kind.lower() in ("cls", "json"))
    except (UserError, IndexError):
        return path.suffix == ".tar" and path.is_file()
    return {True, False} in found.values()


def _imagenet_files(path: Path) -> list[Path]:
    archives = [file for name in (TRAIN, DEVKIT, VAL) if (file := path / name).is_file()]
    return [*archives, *([] if (path / VAL).is_file() else _flat(path))]


WEBDATASET = Layout(
    "WebDataset's tar files", _is_webdataset, files=shards,
    rows=lambda path, wanted, _: read_webdataset(path, wanted),
)  # fmt: skip
IMAGENET = Layout(
    "ImageNet's archives", lambda path: (path / TRAIN).is_file(), files=_imagenet_files,
    rows=lambda path, wanted, _: read_imagenet(path, wanted),
)  # fmt: skip
