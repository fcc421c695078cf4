"""Tables of (image, label): parquet files, arrow files of `save_to_disk` or of the hub's cache."""

import itertools
import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from common.text import both_sides, class_name, places, printable
from data.files import TEST_NAMES, Records, decode_records, keyed_split
from data.image_set import Decoded
from data.scan import Scanned
from data.sources.layout import Layout
from errors import UserError

if TYPE_CHECKING:
    import pyarrow


def table_files(path: Path) -> list[Path]:
    """The parquet files below a path, else the arrow files of `save_to_disk` or the hub's cache."""
    if path.is_file():
        return [path]
    arrow = (p for p in path.rglob("*.arrow") if not p.name.startswith("cache-"))
    return sorted(path.rglob("*.parquet")) or sorted(arrow)


def split_of(relative: Path) -> str:
    """The split ("train", "test", "") of a file's name, else from its folders, innermost first."""
    for word in reversed(re.split("[^a-z]+", relative.as_posix().lower())):
        if word == "train" or word in TEST_NAMES:
            return word
    return ""


def read_tables(path: Path) -> Records:
    """Rows of (image, label) from the table files below a path; splits by file or folder name."""
    import pyarrow
    import pyarrow.parquet

    files = table_files(path)
    base = path if path.is_dir() else path.parent
    splits = defaultdict(list)
    folders = set()
    for file in files:
        relative = file.relative_to(base)
        split = split_of(relative)
        folders.add(relative.parent.parent if split_of(relative.parent) else relative.parent)
        try:
            if file.suffix == ".parquet":
                table = pyarrow.parquet.ParquetFile(file).read()
            else:
                with pyarrow.OSFile(str(file)) as source:
                    table = pyarrow.ipc.open_stream(source).read_all()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{printable(file)} is damaged or no table: {error}", code="bad-table"
            ) from None
        splits[split].append(table)
    if len(folders) > 1:
        names = ", ".join(sorted(printable(folder) for folder in folders))
        raise UserError(
            f"{printable(path)} holds several data sets ({names}): give one of them.",
            code="several-data-sets",
        )
    return records_of_tables(dict(splits), printable(path))


def records_of_tables(splits: dict[str, list["pyarrow.Table"]], origin: str) -> Records:
    """Records of tables by split name; image and label columns found by name, else by type.

    Each table may name its classes in an order of its own: labels are matched by name.
    """
    train = splits.pop("train", None) or (splits.popitem()[1] if len(splits) == 1 else None)
    if not train:
        raise UserError(
            f"{origin} has no train split, only {', '.join(map(repr, splits))}.",
            code="no-train-split",
        )
    image, label = _columns(train[0].schema, origin)
    items, values, lists = _rows(train, image, label, origin)
    is_test = [False] * len(items)
    names = [f"row {row} of train in {origin}" for row in range(len(items))]
    for split in (name for name in TEST_NAMES if name in splits):
        more_items, more_values, more_lists = _rows(splits[split], image, label, origin)
        if all(value in (-1, None) for value in more_values):  # a competition keeps them secret
            continue
        items += more_items
        values += more_values
        lists += more_lists
        is_test += [True] * len(more_items)
        names += [f"row {row} of {split} in {origin}" for row in range(len(more_items))]
        break
    classes, labels = _by_name(values, lists, names, label)
    if not any(is_test):
        keys = (item if isinstance(item, bytes) else os.fsencode(item.name) for item in items)
        is_test = keyed_split(keys, labels)
    return Records([*items], names, labels, is_test, classes)


def _by_name(
    values: list, lists: list[tuple[str, ...] | None], rows: list[str], label: str
) -> tuple[tuple[str, ...], list[int]]:
    """The classes, and the number of each row's among them.

    `values` stand in the label column; `lists` are the classes that a row's table names, if it
    does. The first list that there is numbers all of them; without one, the values are the names.
    """
    for row, value in zip(rows, values, strict=True):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if value is None or not (isinstance(value, str) or whole):
            what = "no label" if value is None else f"the label {printable(value)[:60]}"
            raise UserError(
                f"{row} has {what} in column '{label}': labels are whole numbers from 0, or text; "
                "mend the column or drop the row.",
                code="no-label" if value is None else "bad-label",
            )
    texts = [isinstance(value, str) for value in values]
    known = next(filter(None, lists), None)
    if known is None:
        if any(texts) and not all(texts):
            row = rows[texts.index(not texts[0])]
            raise UserError(
                f"{row} has a {'text' if not texts[0] else 'number'} in column '{label}', the rows "
                "before have none: labels are whole numbers in all tables, or text in all.",
                code="bad-label",
            )
        for row, value in zip(rows, values, strict=True):
            if not isinstance(value, str) and value < 0:
                raise UserError(
                    f"{row} has the label {value} in column '{label}': labels are whole numbers "
                    "from 0, or text; mend the column or drop the row.",
                    code="bad-label",
                )
        found = [class_name(value) if isinstance(value, str) else int(value) for value in values]
        numbers = {value: number for number, value in enumerate(sorted(set(found)))}
        return tuple(map(str, numbers)), [numbers[value] for value in found]
    tables = {names: places(names, known) for names in set(filter(None, lists))}
    by_text = {name: number for number, name in enumerate(known)}
    labels: list[int] = []
    for row, value, names in zip(rows, values, lists, strict=True):
        if isinstance(value, str):
            number = by_text.get(class_name(value))
            names = (class_name(value),)
        elif names is None or not 0 <= value < len(names):  # a number out of range is told later
            number = int(value)
        else:
            number = tables[names][int(value)]
        if number is None:
            sides = both_sides("it names", names or (), "the first table names", known)
            raise UserError(
                f"{row} is of a class that the first table does not name: {sides}; mend the names "
                "or drop the rows.",
                code="other-classes",
            )
        labels.append(number)
    return known, labels


def _features(schema: "pyarrow.Schema") -> dict:
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return metadata.get("info", {}).get("features", {})


def _class_names(schema: "pyarrow.Schema", label: str) -> tuple[str, ...] | None:
    """What a table calls the numbers in its label column."""
    names = _features(schema).get(label, {}).get("names")
    return tuple(map(class_name, names)) if names else None


def _columns(schema: "pyarrow.Schema", origin: str) -> tuple[str, str]:
    features = _features(schema)

    def pick(known: tuple[str, ...], kind: str) -> str:
        typed = [
            name
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == kind
        ]
        for name in (*known, *(typed if len(typed) == 1 else ())):
            if name in schema.names:
                return name
        raise UserError(
            f"{origin} has columns {', '.join(map(printable, schema.names))}; this program needs "
            f"one called {' or '.join(known)} (or a single one of type {kind}).",
            code="no-such-column",
        )

    image = pick(("img", "image"), "Image")
    label = pick(("label", "labels", "fine_label"), "ClassLabel")
    return image, label


def _rows(
    tables: list["pyarrow.Table"], image: str, label: str, origin: str
) -> tuple[list[bytes | Path], list, list[tuple[str, ...] | None]]:
    """Pictures, values of the label column, and for each row the classes that its table names."""
    import pyarrow
    import pyarrow.compute

    items, labels, lists = [], [], []
    for table in tables:
        column = table[image]
        if not pyarrow.types.is_struct(column.type):
            items += column.to_pylist()
        else:
            of = pyarrow.compute.struct_field  # pyright: ignore[reportAttributeAccessIssue] - made
            field = {f.name: of(column, f.name) for f in column.type}
            nothing = [None] * len(column)
            blobs = field["bytes"].to_pylist() if "bytes" in field else nothing
            paths = field["path"].to_pylist() if "path" in field else nothing
            items += [
                blob if blob or not path else Path(path)
                for blob, path in zip(blobs, paths, strict=True)
            ]
        labels += table[label].to_pylist()
        lists += itertools.repeat(_class_names(table.schema, label), len(column))
    for row, item in enumerate(items):
        # A path may name a device or a pipe, which would never end.
        if not (item if isinstance(item, bytes) else isinstance(item, Path) and item.is_file()):
            raise UserError(
                f"row {row} of {origin} has no image in column '{image}'.", code="no-image"
            )
    return items, labels, lists


def read(path: Path, image_size: int | None, skip_bad: bool) -> Decoded | Scanned:
    """The pictures of tables on the disk, decoded."""
    return decode_records(read_tables(path), image_size, skip_bad)


def _holds(path: Path) -> bool:
    if path.is_file():
        return path.suffix in {".parquet", ".arrow"}
    return bool(table_files(path))


TABLES = Layout("tables", _holds, table_files, read)
