"""Tables of (image, label): parquet files, arrow files of `save_to_disk` or of the hub's cache."""

import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.text import both_sides, class_name, places, printable, some
from data.files import SMALL, Records
from data.image_set import LeftOut
from data.photographs import header
from data.rows import (
    MOST_ROWS,
    SMALL_GROUP,
    Column,
    Hashed,
    Lazy,
    cells_of,
    copied_out,
    hashes_of,
    joined,
    lying_in_arrow,
    read_where_they_lie,
)
from data.sources import many
from data.sources.layout import Aside, Layout
from data.splits import AS_IT_IS, Wanted, arranged, split_word, test_and_val
from data.splits import Column as Cells

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

IMAGES = ("img", "image", "file_name")  # columns of pictures, or of the paths of files
TRIED = 16  # rows of the first table tell whether its pictures are photographs


@dataclass(frozen=True)
class Placed:
    """A table, and the folder that its paths are seen from.

    pictures: those of its rows, where they are photographs and may lie elsewhere; it may then lack
    the column of their bytes.
    """

    table: "pyarrow.Table"
    folder: Path | None
    pictures: range | None = None  # places among those of all tables


def table_files(path: Path) -> list[Path]:
    """The parquet files below a path, else the arrow files of `save_to_disk` or the hub's cache."""
    if path.is_file():
        return [path]
    ends = (".parquet", ".arrow")
    found = [
        Path(base, name)
        for base, _, names in os.walk(path)
        for name in names
        if name.endswith(ends)
    ]
    arrow = (p for p in found if p.suffix == ".arrow" and not p.name.startswith("cache-"))
    return sorted(p for p in found if p.suffix == ".parquet") or sorted(arrow)


def watched_files(path: Path) -> list[Path]:
    """The tables, and the files that their rows point to."""
    found = []
    for file in table_files(path):
        found += [file, *_pointed(file)]
    return found


def _pointed(file: Path) -> list[Path]:
    """The files that a table names in place of holding them; few bytes of it are read."""
    import pyarrow
    import pyarrow.parquet

    try:
        if file.suffix == ".parquet":
            return _pointed_in_parquet(file)
        with pyarrow.memory_map(str(file)) as source:
            whole = pyarrow.ipc.open_stream(source).read_all()
            column = next((name for name in IMAGES if name in whole.schema.names), None)
            if column is None or pyarrow.types.is_binary(whole[column].type):
                return []
            return [path for part in whole[column].chunks for path in _paths_of(part, file.parent)]
    except (pyarrow.ArrowException, OSError):
        return []  # told when it is read


def _pointed_in_parquet(file: Path) -> list[Path]:
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as table:
        schema = table.schema_arrow
        column = next((name for name in IMAGES if name in schema.names), None)
        if column is None:
            return []
        kind = schema.field(column).type
        strings = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        if not strings and not (pyarrow.types.is_struct(kind) and _lacks_bytes(table, column)):
            return []
        parts = table.iter_batches(MOST_ROWS, columns=[column], use_threads=False)
        return [path for part in parts for path in _paths_of(part.column(0), file.parent)]


def _paths_of(column: "pyarrow.Array", folder: Path) -> list[Path]:
    """The files that cells name which hold no bytes."""
    import pyarrow

    if pyarrow.types.is_struct(column.type) and "bytes" in [f.name for f in column.type]:
        column = column.filter(cells_of(column).is_null())
    cells = _cells(pyarrow.chunked_array([column]), folder)
    return [path for path in cells if isinstance(path, Path) and path.is_file()]


def _lacks_bytes(table: "pyarrow.parquet.ParquetFile", column: str) -> bool:
    """Whether some row of a struct (bytes, path) may hold no bytes, by what the file says of it."""
    meta = table.metadata
    for group in range(meta.num_row_groups):
        parts = [meta.row_group(group).column(i) for i in range(meta.num_columns)]
        part = next((p for p in parts if p.path_in_schema == f"{column}.bytes"), None)
        if part is None or part.statistics is None or not part.statistics.has_null_count:
            return True
        if part.statistics.null_count:
            return True
    return False


def split_of(relative: Path) -> str:
    """The split ("train", "val", "test", "") of a file's name, else of its folders, inner first."""
    for word in reversed(re.split("[^a-z]+", relative.as_posix().lower())):
        if found := split_word(word):
            return found
    return ""


def read_tables(path: Path, wanted: Wanted = AS_IT_IS, aside: Aside | None = None) -> Records:
    """Rows of (image, label) from the table files below a path; splits by file or folder name.

    Photographs stay where they lie, or are copied out of large row groups, as `aside` says.
    """
    files = table_files(path)
    base = path if path.is_dir() else path.parent
    folders = set()
    for file in files:
        relative = file.relative_to(base)
        folders.add(relative.parent.parent if split_of(relative.parent) else relative.parent)
    if len(folders) > 1:
        names = ", ".join(sorted(printable(folder) for folder in folders))
        raise UserError(
            f"{printable(path)} holds several data sets ({names}): give one of them.",
            code="several-data-sets",
        )
    splits = {file: split_of(file.relative_to(base)) for file in files}
    first = next((file for file in files if splits[file] == "train"), files[0])
    found = _photographs(files, first, printable(path), wanted, aside) if aside else None
    tables: dict[str, list[Placed]] = defaultdict(list)
    for number, file in enumerate(files):
        if found is None:
            tables[splits[file]].append(Placed(_read(file), file.parent))
        else:
            start, stop = found.ends[number : number + 2]
            table = _read(file, found.columns)
            tables[splits[file]].append(Placed(table, file.parent, range(start, stop)))
    return records_of_tables(dict(tables), printable(path), wanted, found)


def _read(file: Path, columns: list[str] | None = None) -> "pyarrow.Table":
    """A table, or some columns of it; of an arrow file nothing is read before it is needed."""
    import pyarrow
    import pyarrow.parquet

    try:
        if file.suffix == ".parquet":
            return pyarrow.parquet.ParquetFile(file).read(columns)
        if columns is None:
            with pyarrow.OSFile(str(file)) as source:
                return pyarrow.ipc.open_stream(source).read_all()
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{printable(file)} is damaged or no table: {error}", code="bad-table"
        ) from None


@dataclass(frozen=True)
class Photographs:
    """The pictures of all rows of all tables in turn, not in memory."""

    items: Lazy
    image: str
    label: str
    columns: list[str]  # what else is read of each table
    ends: list[int]  # where the rows of each table begin among them, and where the last ends
    hashes: list[Hashed]  # of their bytes; [] where nobody has read them yet


def _photographs(
    files: list[Path], first: Path, origin: str, wanted: Wanted, aside: Aside
) -> Photographs | None:
    """Those of these files, if the first rows are photographs and all hold their bytes."""
    import pyarrow
    import pyarrow.parquet

    try:
        if files[0].suffix != ".parquet":
            return _in_arrow(files, first, origin, wanted)
        schema = pyarrow.parquet.read_schema(first)
        image, label = _columns(schema, origin, wanted.many)
        columns = [one for file in files if (one := Column.of(file, image))]
        if len(columns) < len(files) or len({one.name for one in columns}) > 1:
            return None
        if not all(one.no_nulls for one in columns):
            return None
        if not _some_large(itertools.islice(columns[0].contents(), TRIED)):
            return None
        largest = max(size for one in columns for size in one.sizes)
    except (pyarrow.ArrowException, OSError, UserError):
        return None  # told by who reads them
    if largest <= SMALL_GROUP:
        items: Lazy = read_where_they_lie(columns)
        hashes = list(items.hashes)
    else:
        items, hashes = copied_out(columns, aside.folder, aside.say)
    ends = list(itertools.accumulate((sum(one.rows) for one in columns), initial=0))
    others = [label, *([wanted.group_by] if wanted.group_by in schema.names else [])]
    paths = [f"{image}.path"] if columns[0].name != image else []
    return Photographs(items, image, label, [*paths, *others], ends, hashes)


def _in_arrow(files: list[Path], first: Path, origin: str, wanted: Wanted) -> Photographs | None:
    parts, ends = [], [0]
    image, label = _columns(_read(first, []).schema, origin, wanted.many)
    for file in files:
        found = lying_in_arrow(file, image)
        if found is None or (not parts and not _some_large(p.read() for p in found[:TRIED])):
            return None
        parts.append(found)
        ends.append(ends[-1] + len(found))
    return Photographs(joined(parts), image, label, [image, label], ends, [])


def _some_large(pictures: Iterable[bytes]) -> bool:
    """Whether one of these is larger than what is kept decoded, or none can be read."""
    known = 0
    for content in pictures:
        try:
            height, width, _ = header(content)
        except Exception:  # Pillow raises many kinds on damaged files
            continue
        known += 1
        if max(height, width) > SMALL:
            return True
    return not known


def records_of_tables(
    splits: dict[str, list[Placed]], origin: str, wanted: Wanted = AS_IT_IS,
    photographs: Photographs | None = None,
) -> Records:  # fmt: skip
    """Records of tables by split; image and label columns found by name, else by type.

    Each table may name its classes in an order of its own: labels are matched by name.
    photographs: what was found of their pictures, where they are not read into memory.
    """
    if "train" not in splits and len(splits) == 1:
        splits = {"train": next(iter(splits.values()))}
    if "train" not in splits:
        raise UserError(
            f"{origin} has no train split, only {', '.join(map(repr, splits))}.",
            code="no-train-split",
        )
    if photographs:
        image, label = photographs.image, photographs.label
    else:
        image, label = _columns(splits["train"][0].table.schema, origin, wanted.many)
    left, items, values, lists, places = LeftOut(), [], [], [], []
    order = ("train", *(word for word in ("test", "val") if word in splits))
    for split in order:
        more, more_values, more_lists = _rows(splits[split], image, label, origin)
        if split != "train" and all(value in (-1, None) for value in more_values):
            for row in range(len(more)):  # a competition keeps them secret
                left.add("without a label", f"row {row} of {split}")
            continue
        items += more
        values += more_values
        lists += more_lists
        places += [(split, row) for row in range(len(more))]
    for split in (word for word in splits if word not in order):
        left.add("in no split that is used", f"the rows of {split or 'another table'}")
    names = [f"row {row} of {split} in {origin}" for split, row in places]
    if wanted.many:
        classes, labels = _sets(values, lists, names, label, origin)
    else:
        classes, labels = _by_name(values, lists, names, label)
    which = test_and_val(split for split, _ in places)
    sides = [which.get(split) for split, _ in places]
    if photographs:
        lazy = photographs.items.chosen(items)
        hashes = photographs.hashes and [photographs.hashes[place] for place in items]
        items, keys = lazy, lambda: hashes or hashes_of(lazy)
    else:
        found = [item if isinstance(item, bytes) else os.fsencode(item.name) for item in items]
        keys = lambda: found  # noqa: E731
    records = Records(
        items, names, labels, [side == "test" for side in sides], classes,
        _ids(splits, image, places), [side == "val" for side in sides], left_out=left.reasons,
        many=wanted.many,
    )  # fmt: skip
    return arranged(records, wanted, keys, _values(splits, places))


def _ids(splits: dict[str, list[Placed]], image: str, places: list[tuple[str, int]]) -> list[str]:
    """What a list calls the rows: their paths where the tables have them, else split/row."""
    import pyarrow

    def path_of(cell: dict | str | None) -> str:
        path = cell.get("path") if isinstance(cell, dict) else cell
        return path if isinstance(path, str) else ""

    paths = {}
    for split, parts in splits.items():
        cells = []
        for placed in parts:
            table = placed.table
            if image not in table.schema.names:
                cells += [None] * len(table)
                continue
            column = table[image]
            if pyarrow.types.is_struct(column.type) and "path" in [f.name for f in column.type]:
                cells += _field(column, "path").to_pylist()
            else:
                strings = pyarrow.types.is_string(column.type)
                cells += column.to_pylist() if strings else [None] * len(column)
        paths[split] = [path_of(cell) for cell in cells]
    names = [paths[split][row] for split, row in places]
    if all(names) and len(set(names)) == len(names):
        return names
    return [f"{split}/{row}" for split, row in places]


def _values(splits: dict[str, list[Placed]], places: list[tuple[str, int]]) -> Cells:
    """The cells of any column, by its name."""

    def column(name: str) -> list | None:
        parts = [placed.table for split in splits.values() for placed in split]
        if not all(name in table.schema.names for table in parts):
            return None
        cells = {
            split: [cell for placed in tables for cell in placed.table[name].to_pylist()]
            for split, tables in splits.items()
        }
        return [cells[split][row] for split, row in places]

    return column


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


def _sets(
    values: list, lists: list[tuple[str, ...] | None], rows: list[str], label: str, origin: str
) -> tuple[tuple[str, ...], list[int]]:
    """Each row's set of names as a class, and the number of each row's: see many.combined.

    A cell is a list of names or of numbers, or one of them, or text that holds several names.
    """
    known = next(filter(None, lists), ())
    names_in = many.apart(value for value in values if isinstance(value, str))
    sets = []
    for row, value, names in zip(rows, values, lists, strict=True):
        cell = names_in(value) if isinstance(value, str) else value
        cell = [] if cell is None else cell if isinstance(cell, list) else [cell]
        found = []
        for one in cell:
            if isinstance(one, int) and not isinstance(one, bool):
                one = one if not names else names[one] if 0 <= one < len(names) else None
            if not isinstance(one, str | int) or isinstance(one, bool):
                raise UserError(
                    f"{row} has {printable(value)[:60]} in column '{label}': with --task "
                    "multilabel a cell is a list of class names, or of the numbers of the classes "
                    "that the table names.",
                    code="bad-label",
                )
            found.append(class_name(one))
        if other := next((name for name in found if known and name not in known), None):
            raise UserError(
                f"{row} is of the class {printable(other)}, which the first table does not name: "
                f"it has {some(known)}; mend the names or drop the rows.",
                code="other-classes",
            )
        sets.append(found)
    return many.combined(sets, known, origin)


def _features(schema: "pyarrow.Schema") -> dict:
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return metadata.get("info", {}).get("features", {})


def _class_names(schema: "pyarrow.Schema", label: str) -> tuple[str, ...] | None:
    """What a table calls the numbers in its label column."""
    feature = _features(schema).get(label, {})
    if inner := feature[:1] if isinstance(feature, list) else [feature.get("feature")]:
        feature = inner[0] or feature  # of a list of classes, as older and newer tables write it
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(map(class_name, names)) if names else None


def _columns(schema: "pyarrow.Schema", origin: str, of_many: bool = False) -> tuple[str, str]:
    import pyarrow

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

    image = pick(IMAGES, "Image")
    if of_many:
        listed = [field.name for field in schema if pyarrow.types.is_list(field.type)]
        return image, pick(("labels", "label", "tags", "classes", *listed[:1]), "ClassLabel")
    label = pick(("label", "labels", "fine_label"), "ClassLabel")
    return image, label


def _rows(
    parts: list[Placed], image: str, label: str, origin: str
) -> tuple[list[bytes | Path] | list[int], list, list[tuple[str, ...] | None]]:
    """Pictures, values of the label column, and for each row the classes that its table names.

    Of photographs that lie elsewhere it is their places.
    """
    items, places, labels, lists = [], [], [], []
    for placed in parts:
        table = placed.table
        if placed.pictures is None:
            items += _cells(table[image], placed.folder)
        else:
            places += placed.pictures
        labels += table[label].to_pylist()
        lists += itertools.repeat(_class_names(table.schema, label), len(table))
    for row, item in enumerate(items):
        # A path may name a device or a pipe, which would never end.
        if not (item if isinstance(item, bytes) else isinstance(item, Path) and item.is_file()):
            raise UserError(
                f"row {row} of {origin} has no image in column '{image}'.", code="no-image"
            )
    return items or places, labels, lists


def _cells(column: "pyarrow.ChunkedArray", folder: Path | None) -> list[bytes | Path | None]:
    """Bytes, or the path of a file, seen from the table's folder; neither: None."""
    import pyarrow

    if not pyarrow.types.is_struct(column.type):
        blobs, paths = column.to_pylist(), [None] * len(column)
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            blobs, paths = paths, blobs
    else:
        names = [field.name for field in column.type]
        nothing = [None] * len(column)
        blobs = _field(column, "bytes").to_pylist() if "bytes" in names else nothing
        paths = _field(column, "path").to_pylist() if "path" in names else nothing
    below = Path() if folder is None else folder
    return [
        blob or (below / path if path else None) for blob, path in zip(blobs, paths, strict=True)
    ]


def _field(column: "pyarrow.ChunkedArray", name: str) -> "pyarrow.ChunkedArray":
    import pyarrow.compute

    of = pyarrow.compute.struct_field  # pyright: ignore[reportAttributeAccessIssue] - made
    return of(column, name)


def _holds(path: Path) -> bool:
    if path.is_file():
        return path.suffix in {".parquet", ".arrow"}
    return bool(table_files(path))


TABLES = Layout("tables", _holds, files=watched_files, rows=read_tables)
