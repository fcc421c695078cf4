"""Pictures with a list of their labels: metadata.csv, labels.csv, train.csv, or the same as .jsonl.

As `datasets` reads an image folder: a column file_name, seen from the list's own folder, and label.
"""

import csv
import io
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.disk import Json, parse_object
from common.errors import UserError
from common.text import class_name, printable, some
from data.files import Records
from data.image_set import LeftOut
from data.sources import many
from data.sources.folder import subfolders
from data.sources.layout import Layout
from data.sources.walk import entries, is_folder, once, walk
from data.splits import AS_IT_IS, Wanted, arranged, class_names, split_word, test_and_val

SUFFIXES = {".csv": ",", ".tsv": "\t", ".jsonl": ""}  # and what parts the columns
STEMS = ("metadata", "labels", "annotations")
FILE = ("file_name", "filename", "file", "image", "image_path", "path", "image_id", "id")
LABEL = ("label", "class", "target", "category", "labels")
SPLIT = ("split", "set", "subset")
OF_MANY = (*LABEL, "tags", "classes")  # where a picture has any number of classes
FEW = 20  # rows are tried for a picture


@dataclass(frozen=True)
class List:
    """A list that was read: its columns, its rows, and what the columns mean ("" for none)."""

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, str]]
    file: str
    label: str
    split: str


def lists_of(root: Path) -> list[Path]:
    """The lists in a folder and in its split folders: by their known names, else the only one."""
    if root.is_file():
        return [root]
    folders = [root, *(f for f in subfolders(root) if split_word(f.name))]
    found = sorted(p for f in folders for p in entries(f) if p.suffix.lower() in SUFFIXES)
    found = [path for path in found if path.is_file()]
    known = [p for p in found if p.stem.casefold() in STEMS or split_word(p.stem)]
    best = [path for path in known if path.stem.casefold() == "metadata"] or known
    return best or (found if len(found) == 1 else [])


def read_list(path: Path) -> List:
    """A list as text, without a guess what its cells are. UserError where it is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            found = [parse_object(line) for line in text.split("\n") if line.strip()]
            if None in found:
                number = found.index(None) + 1
                raise ValueError(f"entry {number} is no JSON object")
            rows = [{k: _cell(v) for k, v in row.items()} for row in found if row is not None]
            columns = tuple(dict.fromkeys(name for row in rows for name in row))
        else:
            head = text.partition("\n")[0]
            parted = ";" if head.count(";") > head.count(",") else SUFFIXES[path.suffix.lower()]
            # Not splitlines(): to Unicode there are more ends of a line than to a file.
            reader = csv.DictReader(io.StringIO(text), delimiter=parted, restval="")
            rows, columns = list(reader), tuple(reader.fieldnames or ())
    except PermissionError:
        raise UserError(
            f"{printable(path)} may not be read (permission): ask its owner.", code="not-permitted"
        ) from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{printable(path)} cannot be read as a list: {printable(error)}; save it as UTF-8, a "
            "line for each picture, with the columns file_name and label.",
            code="bad-list",
        ) from None
    by_word = {name.strip().casefold(): name for name in reversed(columns) if name is not None}

    def pick(known: Sequence[str]) -> str:
        return next((by_word[word] for word in known if word in by_word), "")

    return List(path, columns, rows, pick(FILE), pick(LABEL), pick(SPLIT))


def _cell(value: Json) -> str:
    if isinstance(value, list):
        return many.BETWEEN.join(map(str, value))
    return "" if value is None else str(value)


def _folders_hold_classes(root: Path) -> bool:
    """Whether there are class folders, which a list of something else does not hide."""
    folders = subfolders(root)
    splits = [folder for folder in folders if split_word(folder.name)]
    return any(subfolders(f) for f in splits) or len(folders) - len(splits) > 1


def _holds(path: Path) -> bool:
    if path.is_file():
        return path.suffix.lower() in SUFFIXES
    if not is_folder(path) or not (paths := lists_of(path)):
        return False
    if not _folders_hold_classes(path):
        return True
    try:
        lists = [one for one in map(read_list, paths) if one.file and one.label]
    except UserError:
        return False
    if not lists:
        return False
    where = _Where(path, [], LeftOut())
    return any(where.find(one, row) for one in lists for row in one.rows[:FEW])


class _Where:
    """The pictures below a folder, found by what a list calls them."""

    def __init__(self, root: Path, lists: Sequence[List], left: LeftOut) -> None:
        self.root = root
        known = {one.path.relative_to(root).as_posix() for one in lists}
        self.names = walk(root, "", left, known=known)
        self._exact = set(self.names)
        self._loose: dict[str, list[str]] | None = None

    def find(self, of: List, row: dict[str, str]) -> str:
        """The path below the root (or an absolute one) of a row's picture; "": it is not there."""
        text = (row.get(of.file) or "").strip().replace("\\", "/")  # as Windows writes paths
        if not text:
            return ""
        here = of.path.parent.relative_to(self.root).as_posix()
        for base in (here, f"{here}/{split_of(of)}", "."):
            name = os.path.normpath(f"{base}/{text}").replace(os.sep, "/")
            if name in self._exact:
                return name
        outside = of.path.parent / text  # an absolute path stays one
        if outside.suffix and outside.is_file():
            return os.path.normpath(outside)
        return self._by_name(Path(text).name, split_of(of))

    def _by_name(self, name: str, split: str) -> str:
        if self._loose is None:
            self._loose = {}
            for path in self.names:
                base = path.rpartition("/")[2]
                for key in {base, Path(base).stem}:
                    self._loose.setdefault(key, []).append(path)
        found = self._loose.get(name, [])
        if len(found) > 1:  # the same number in train and in test
            found = [path for path in found if split and split_in(path) == split]
        return found[0] if len(found) == 1 else ""


def split_of(of: List) -> str:
    """The split that a list is for, by its own name or its folder's; "" for any."""
    return split_word(of.path.stem) or split_word(of.path.parent.name)


def split_in(name: str) -> str:
    """The split that a picture's path names."""
    return next((word for part in name.split("/")[:-1] if (word := split_word(part))), "")


def read_listed(path: Path, wanted: Wanted = AS_IT_IS) -> Records:
    """The pictures below a folder that its list gives a label, or those of one list."""
    path = path.resolve()
    root = path if path.is_dir() else path.parent
    lists = [read_list(one) for one in lists_of(path)]
    said = _labels(lists, wanted.many)
    if not lists[0].columns:
        raise UserError(
            f"{printable(lists[0].path)} is empty: it needs a line with the columns file_name and "
            "label, and a line for each picture.",
            code="bad-list",
        )
    if not (used := said.used):
        classes = ", or a column of 0 and 1 for each class" if wanted.many else ""
        raise UserError(
            f"{printable(lists[0].path)} has the columns {some(lists[0].columns)}; this program "
            f"needs one with the file ({', '.join(FILE[:-2])} or id) and one with the class "
            f"({', '.join(LABEL[:-1])}){classes}: rename them in its first line.",
            code="no-such-column",
        )
    left = LeftOut()
    where = _Where(root, lists, left)
    found: dict[str, tuple[str, str, dict[str, str]]] = {}
    said = replace(said, notes=(*said.notes, *itertools.chain(*map(_no_split, used))))
    for one in used:
        for number, row in enumerate(one.rows):
            name, label = where.find(one, row), said.of(one, row)
            if not name:
                file = row.get(one.file) or f"row {number}"
                left.add("rows without their picture", f"{one.path.name}: {file}")
                continue
            if not label and not wanted.many:
                continue  # counted below, with those that no row names
            if name in found and wanted.many:  # a row for each of its classes
                label = many.BETWEEN.join(filter(None, (found[name][1], label)))
                found[name] = (found[name][0], label, row)
            elif name in found and class_name(found[name][1]) != class_name(label):
                raise UserError(
                    f"{printable(name)} is of two classes in {printable(one.path)}: "
                    f"{printable(found[name][1])} and {printable(label)}; a picture has one here, "
                    "so leave one row.",
                    code="two-labels",
                )
            word = split_word(row.get(one.split) or "") if one.split else ""
            found.setdefault(name, (word or split_in(name) or split_of(one), label, row))
    if not found:
        first = next((row.get(used[0].file) for row in used[0].rows), "nothing")
        raise UserError(
            f"none of the pictures that {printable(used[0].path)} names is there (the first: "
            f"{printable(first)}): column '{printable(used[0].file)}' holds paths from the list's "
            "own folder.",
            code="no-image",
        )
    for name in where.names:
        if name not in found:
            left.add("without a label", name)
    return _records(root, found, left, wanted, said)


@dataclass(frozen=True)
class _Labels:
    """The lists that say something of pictures, what a row says, and the classes by their order.

    Where a picture has any number of classes a row says their names, parted by many.BETWEEN.
    """

    used: list[List]
    of: Callable[[List, dict[str, str]], str]
    known: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _labels(lists: list[List], any_number: bool) -> _Labels:
    if not any_number:
        used = [one for one in lists if one.file and one.label]
        said = {(row.get(one.label) or "").strip() for one in used for row in one.rows}
        # A column with an empty cell was a column of floats to the program that wrote it.
        both = {text: cut for text in said if (cut := _whole(text)) != text and cut in said}

        def name_of(one: List, row: dict[str, str]) -> str:
            text = (row.get(one.label) or "").strip()
            return _whole(text) if both else text

        return _Labels(used, name_of, notes=_one_number(both))
    columns = {}
    for one in lists:
        named = next((name for name in one.columns if _word(name) in OF_MANY), "")
        others = [name for name in one.columns if name not in (one.file, one.split)]
        columns[one.path] = (named, () if named else many.yes_columns(others, one.rows))
    used = [one for one in lists if one.file and any(columns[one.path])]
    cells = [row.get(columns[one.path][0]) or "" for one in used for row in one.rows]
    files = [row.get(one.file) for one in used for row in one.rows]
    names_in = many.apart(cells, rows_of_one=len(set(files)) < len(files))

    def names_of(one: List, row: dict[str, str]) -> str:
        named, yes = columns[one.path]
        if named:
            return many.BETWEEN.join(names_in(row.get(named) or ""))
        return many.BETWEEN.join(class_name(c.strip()) for c in yes if many.says_yes(row.get(c)))

    in_words = any(columns[one.path][0] for one in used)
    known = [class_name(name.strip()) for one in used for name in columns[one.path][1]]
    return _Labels(used, names_of, () if in_words else tuple(dict.fromkeys(known)))


def _whole(text: str) -> str:
    """A whole number that was written as "3.0", as "3"; any other text as it is."""
    return text.partition(".")[0] if re.fullmatch(r"[0-9]+\.0+", text) else text


def _one_number(both: dict[str, str]) -> tuple[str, ...]:
    if not both:
        return ()
    as_float, name = min(both.items())
    return (
        f"the label {as_float} is taken for the class {name}, and so is each whole number that is "
        "written in two ways",
    )


def _no_split(of: List) -> list[str]:
    """A sentence where the column of splits names none: it is of something else.

    UserError where only some cells name a split: a test picture must not train for a typing error.
    """
    cells = {(row.get(of.split) or "").strip() for row in of.rows if of.split} - {""}
    odd = sorted(cell for cell in cells if not split_word(cell))
    if not odd:
        return []
    if len(odd) < len(cells):
        raise UserError(
            f"{printable(of.path)} has {some(odd)} in its column '{printable(of.split)}', which "
            "is no split that is known: write train, val or test, or take those rows out.",
            code="bad-split-file",
        )
    return [
        f"the column '{printable(of.split)}' of {printable(of.path.name)} names no split that is "
        f"known ({some(odd)}) and is not used: train, val and test are known"
    ]


def _word(column: str) -> str:
    return column.strip().casefold()


def _records(
    root: Path, found: dict[str, tuple[str, str, dict[str, str]]], left: LeftOut, wanted: Wanted,
    said: _Labels,
) -> Records:  # fmt: skip
    names = sorted(found)
    names = [n for n, keep in zip(names, once(root, names, left), strict=True) if keep]
    sides = [found[name][0] for name in names]
    texts = [found[name][1] for name in names]
    if wanted.many:
        sets = [filter(None, text.split(many.BETWEEN)) for text in texts]
        classes, labels = many.combined(
            [list(those) for those in sets], said.known, printable(root)
        )
    else:
        classes = class_names(texts)
        number = {name: place for place, name in enumerate(classes)}
        labels = [number[class_name(text)] for text in texts]
    which = test_and_val(sides)
    paths = [root / name for name in names]

    def column(asked: str) -> Sequence[object] | None:
        if not any(asked in row for _, _, row in found.values()):
            return None
        return [found[name][2].get(asked, "") for name in names]

    records = Records(
        list(paths), [printable(path) for path in paths],
        labels, [which.get(side) == "test" for side in sides], classes, names,
        [which.get(side) == "val" for side in sides], left_out=left.reasons, root=root,
        notes=said.notes, many=wanted.many,
    )  # fmt: skip
    return arranged(records, wanted, column=column)


LISTED = Layout("a list of labels", _holds, listing=read_listed)
