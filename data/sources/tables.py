"""Tables of (image, label): parquet files, arrow files of `save_to_disk` or of the hub's cache."""

import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from common.text import printable
from data.files import TEST_NAMES, Records, decode_records, keyed_split
from data.image_set import Decoded
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
    """Records of tables by split name; image and label columns found by name, else by type."""
    train = splits.pop("train", None) or (splits.popitem()[1] if len(splits) == 1 else None)
    if not train:
        raise UserError(
            f"{origin} has no train split, only {', '.join(map(repr, splits))}.",
            code="no-train-split",
        )
    image, label, classes = _columns(train[0].schema, origin)
    items, raw_labels = _rows(train, image, label, origin)
    is_test = [False] * len(items)
    names = [f"row {row} of train in {origin}" for row in range(len(items))]
    for split in (name for name in TEST_NAMES if name in splits):
        more_items, more_labels = _rows(splits[split], image, label, origin)
        if set(more_labels) <= {-1, None}:  # a competition's test set keeps its labels secret
            continue
        items += more_items
        raw_labels += more_labels
        is_test += [True] * len(more_items)
        names += [f"row {row} of {split} in {origin}" for row in range(len(more_items))]
        break
    if None in raw_labels:
        raise UserError(
            f"{names[raw_labels.index(None)]} has no label in column '{label}'.", code="no-label"
        )
    if classes is None or any(isinstance(value, str) for value in raw_labels):
        for name, value in zip(names, raw_labels, strict=True):
            if not isinstance(value, str) and (value != int(value) or value < 0):
                raise UserError(
                    f"{name} has the label {value} in column '{label}': labels are whole numbers "
                    "from 0, or text; mend the column or drop the row.",
                    code="bad-label",
                )
        values = sorted(set(raw_labels))
        classes = tuple(map(str, values))
        places = {value: place for place, value in enumerate(values)}
        raw_labels = [places[value] for value in raw_labels]
    if not any(is_test):
        keys = (item if isinstance(item, bytes) else os.fsencode(item.name) for item in items)
        is_test = keyed_split(keys, raw_labels)
    return Records(items, names, raw_labels, is_test, classes)


def _columns(schema: "pyarrow.Schema", origin: str) -> tuple[str, str, tuple[str, ...] | None]:
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})

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
    classes = features.get(label, {}).get("names")
    return image, label, tuple(classes) if classes else None


def _rows(
    tables: list["pyarrow.Table"], image: str, label: str, origin: str
) -> tuple[list[bytes | Path], list]:
    import pyarrow
    import pyarrow.compute

    items, labels = [], []
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
    for row, item in enumerate(items):
        # A path may name a device or a pipe, which would never end.
        if not (item if isinstance(item, bytes) else isinstance(item, Path) and item.is_file()):
            raise UserError(
                f"row {row} of {origin} has no image in column '{image}'.", code="no-image"
            )
    return items, labels


def read(path: Path, image_size: int | None, skip_bad: bool) -> Decoded:
    """The pictures of tables on the disk, decoded."""
    return decode_records(read_tables(path), image_size, skip_bad)


def _holds(path: Path) -> bool:
    if path.is_file():
        return path.suffix in {".parquet", ".arrow"}
    return bool(table_files(path))


TABLES = Layout("tables", _holds, table_files, read)
