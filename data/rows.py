"""Pictures in the rows of tables: read where they lie or copied out once, never all in memory."""

import contextlib
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self, overload

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from common.cpus import cpus, memory
from common.disk import read_json, whole, write_json
from common.errors import UserError
from common.progress import progress
from common.text import counted, in_bytes, printable
from data.ahead import pool_of
from data.cache import trim, use
from data.files import Hashed, Item, Lazy, Part
from data.pack import LOCK, disk_told

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

# Bytes of a row group that are read for each picture in it: of two cores here, a group of 2 MB took
# 0.5 ms, one of 10 MB 2.7 ms, decoding one of its pictures 0.8 ms.
SMALL_GROUP = 2_000_000
HELD = 64_000_000  # bytes of the row groups that stay in memory
AT_A_TIME = 4_000_000  # bytes of pictures that are read at once where all of them are
MOST_ROWS = 256
PAGE_TAKES = 2.5  # bytes of memory for each of a page that is read: 2.3 with snappy, 1.8 without

Say = Callable[[str], None]


@dataclass(frozen=True)
class Parts(Lazy[Part]):
    """Pictures that are parts of files, made when they are asked for.

    copied: the folder in the cache that these files were made in, if they were.
    """

    files: tuple[Path, ...]
    which: Tensor  # (n,) the file of each, its first byte and its length
    starts: Tensor
    lengths: Tensor
    copied: Path | None = None

    def __len__(self) -> int:
        return len(self.which)

    @overload
    def __getitem__(self, place: int) -> Part: ...
    @overload
    def __getitem__(self, place: slice) -> list[Part]: ...
    def __getitem__(self, place: int | slice) -> Part | list[Part]:
        """One, or some of them."""
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        file = self.files[int(self.which[place])]
        return Part(file, int(self.starts[place]), int(self.lengths[place]))

    def chosen(self, kept: Sequence[int]) -> Self:
        """Those of these positions."""
        each = ("which", "starts", "lengths")
        places = torch.tensor(kept, dtype=torch.int64)
        return replace(self, **{name: getattr(self, name)[places] for name in each})


class Groups:
    """Row groups of parquet files, of which the latest few stay in memory. For any thread.

    column: that of the bytes, "image" or "image.bytes". largest: bytes of a group, at most.
    """

    def __init__(self, files: Sequence[Path], column: str, largest: int) -> None:
        self.files, self.column, self.largest = tuple(files), column, largest
        self._most = max(2, HELD // max(1, largest))
        self._known: dict[int, pyarrow.parquet.FileMetaData] = {}
        self._held: OrderedDict[tuple[int, int], _Held] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, file: int, group: int, row: int) -> bytes:
        """The bytes in a row of a group; OSError where they cannot be read."""
        with self._lock:
            one = self._held.setdefault((file, group), _Held())
            self._held.move_to_end((file, group))
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        with one.lock:  # who comes second waits for the first one's
            cells = self._load(file, group) if one.cells is None else one.cells
            one.cells = cells
        return cells[row].as_py()

    def _load(self, file: int, group: int) -> "pyarrow.Array":
        import pyarrow.parquet

        if file not in self._known:
            self._known[file] = pyarrow.parquet.read_metadata(self.files[file])
        opened = pyarrow.parquet.ParquetFile(
            self.files[file], metadata=self._known[file], pre_buffer=False
        )
        with opened:
            table = opened.read_row_group(group, columns=[self.column], use_threads=False)
        return cells_of(table.column(0).combine_chunks())


@dataclass
class _Held:
    lock: threading.Lock = field(default_factory=threading.Lock)
    cells: "pyarrow.Array | None" = None


@dataclass(frozen=True)
class InGroups:
    """Pictures by where they stand in row groups."""

    groups: Groups
    which: Tensor  # (n,) the file of each, its group and its row in that
    group: Tensor
    row: Tensor

    def encoded(self, place: int) -> bytes:
        """The bytes of a picture; OSError where they cannot be read."""
        return self.groups.read(
            int(self.which[place]), int(self.group[place]), int(self.row[place])
        )


@dataclass(frozen=True)
class Rows(InGroups, Lazy[bytes]):
    """Pictures in the row groups of parquet files; each is read when it is asked for."""

    lengths: Tensor
    hashes: Sequence[Hashed]

    def __len__(self) -> int:
        return len(self.which)

    @overload
    def __getitem__(self, place: int) -> bytes: ...
    @overload
    def __getitem__(self, place: slice) -> list[bytes]: ...
    def __getitem__(self, place: int | slice) -> bytes | list[bytes]:
        """One, or some of them."""
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        return self.encoded(place)

    def chosen(self, kept: Sequence[int]) -> Self:
        """Those of these positions."""
        each = ("which", "group", "row", "lengths")
        places = torch.tensor(kept, dtype=torch.int64)
        found = {name: getattr(self, name)[places] for name in each}
        return replace(self, **found, hashes=[self.hashes[place] for place in kept])


class GroupStore(InGroups):
    """Pictures of an index that are read from the row groups that they lie in."""

    @property
    def words(self) -> str:
        """See Store."""
        return f"decoded from row groups of at most {in_bytes(self.groups.largest)}"

    def raw(self, place: int) -> None:
        """See Store."""
        return None

    def name_of(self, path: Path) -> str:
        """See Store."""
        return str(path)


def holds_bytes(schema: "pyarrow.Schema", image: str) -> bool:
    """Whether the cells of a column are bytes, or have such a part; text names files."""
    import pyarrow

    if image not in schema.names:
        return False
    kind = schema.field(image).type
    if pyarrow.types.is_struct(kind):
        kind = next((one.type for one in kind if one.name == "bytes"), kind)
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def cells_of(column: "pyarrow.Array") -> "pyarrow.Array":
    """The bytes in a column of pictures, where they are a part of each cell, too."""
    import pyarrow

    return column.field("bytes") if pyarrow.types.is_struct(column.type) else column


# --- parquet ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """The column of a parquet file that holds pictures, by what the file says of it."""

    file: Path
    name: str  # of its bytes
    rows: tuple[int, ...]  # of each row group
    sizes: tuple[int, ...]  # bytes of each row group, not compressed
    no_nulls: bool

    @classmethod
    def of(cls, file: Path, image: str) -> Self | None:
        """That of the pictures in `image`; None where it holds no bytes."""
        import pyarrow.parquet

        meta = pyarrow.parquet.read_metadata(file)
        if not holds_bytes(meta.schema.to_arrow_schema(), image):
            return None
        rows, sizes, no_nulls, found = [], [], True, ""
        for number in range(meta.num_row_groups):
            group = meta.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            known = (image, f"{image}.bytes")
            one = next((c for c in columns if c.path_in_schema in known), None)
            if one is None or one.physical_type != "BYTE_ARRAY":
                return None
            found, seen = one.path_in_schema, one.statistics
            no_nulls &= seen is not None and seen.has_null_count and not seen.null_count
            rows.append(group.num_rows)
            sizes.append(one.total_uncompressed_size)
        return cls(file, found, tuple(rows), tuple(sizes), no_nulls) if found else None

    def contents(self) -> Iterator[bytes]:
        """The pictures of all rows in turn; a few of them are in memory."""
        import pyarrow.parquet

        mean = max(1, sum(self.sizes) // max(1, sum(self.rows)))
        count = min(MOST_ROWS, max(1, AT_A_TIME // mean))
        number = 0
        with pyarrow.parquet.ParquetFile(self.file, buffer_size=2**20, pre_buffer=False) as opened:
            for batch in opened.iter_batches(count, columns=[self.name], use_threads=False):
                for cell in cells_of(batch.column(0)):
                    content = cell.as_py()
                    if not content:
                        raise UserError(
                            f"row {number} of {printable(self.file)} has no image in column "
                            f"'{self.name.partition('.')[0]}'.",
                            code="no-image",
                        )
                    number += 1
                    yield content


def read_where_they_lie(columns: Sequence[Column]) -> Rows:
    """The pictures of these columns, in small row groups; all are looked at once, for a digest."""
    which, groups, rows, lengths, hashes = [], [], [], [], []
    total = sum(sum(column.sizes) for column in columns)
    done = 0
    with progress("reading rows", "bytes", after=1.0) as count:
        for number, column in enumerate(columns):
            for group, amount in enumerate(column.rows):
                which += [number] * amount
                groups += [group] * amount
                rows += range(amount)
            for content in readable(column):
                lengths.append(len(content))
                hashes.append(Hashed.of(content))
                done += len(content)
                count(min(done, total), total)
    largest = max(size for column in columns for size in column.sizes)
    files = [column.file for column in columns]
    where = torch.tensor([which, groups, rows], dtype=torch.int32)
    held = Groups(files, columns[0].name, largest)
    return Rows(held, where[0], where[1], where[2], torch.tensor(lengths), hashes)


def readable(column: Column) -> Iterator[bytes]:
    """Its pictures; UserError where the file is damaged."""
    import pyarrow

    try:
        yield from column.contents()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{printable(column.file)} is damaged or no table: {printable(error)}", code="bad-table"
        ) from None


def copied_out(columns: Sequence[Column], folder: Path, say: Say) -> tuple[Parts, list[Hashed]]:
    """The pictures of these columns one behind the other in files in `folder`, and their digests.

    A file for each table, whole or not there; what is finished is not made again. One process at a
    time makes them. Raises UserError where something cannot be read or written.
    """
    with disk_told(folder, "LOCKSTEP_CACHE=FOLDER, which moves the cache"):
        folder.mkdir(parents=True, exist_ok=True)
        use(folder)  # nobody shall remove what is half there
        lock = FileLock(folder / LOCK)
        with contextlib.suppress(NotImplementedError):  # no locks there
            lock.acquire()
        try:
            _copy(columns, folder, say)
        finally:
            lock.release()
    trim()
    notes = [read_json(_note(folder, number), {}) for number in range(len(columns))]
    lengths = [torch.tensor(note["lengths"], dtype=torch.int64) for note in notes]
    parts = Parts(
        tuple(_file(folder, number) for number in range(len(columns))),
        torch.cat([torch.full_like(some, n) for n, some in enumerate(lengths)]),
        torch.cat([some.cumsum(0) - some for some in lengths]), torch.cat(lengths), folder,
    )  # fmt: skip
    return parts, [Hashed(bytes.fromhex(text)) for note in notes for text in note["hashes"]]


def _copy(columns: Sequence[Column], folder: Path, say: Say) -> None:
    for left in folder.glob("*.partial"):
        left.unlink()
    to_do = [number for number in range(len(columns)) if not _is_done(folder, number)]
    if not to_do:
        return
    total = sum(sum(columns[number].sizes) for number in to_do)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise UserError(
            f"the disk of {printable(folder)} has {in_bytes(free)} free, and the pictures of these "
            f"tables take about {in_bytes(total)}: LOCKSTEP_CACHE=FOLDER puts them elsewhere",
            code="disk-full",
        )
    groups = [size for column in columns for size in column.sizes]
    # A page of a group is read as a whole, and decompressed, and may be all of it.
    threads = max(1, min(cpus(), int(memory() / 4 / (PAGE_TAKES * max(groups)))))
    takes = int(PAGE_TAKES * sum(sorted(groups)[-threads:]))
    already = f"; {len(columns) - len(to_do)} of {len(columns)} are there" * (
        len(to_do) < len(columns)
    )
    say(
        f"these rows lie in groups of up to {in_bytes(max(groups))}, and each picture would take "
        f"all of its group: the pictures of {counted(len(columns), 'table')} ({in_bytes(total)}) "
        f"are copied out once{already}; into {printable(folder)}; up to {in_bytes(takes)} of "
        "memory meanwhile, where a group is one page"
    )
    done, lock, stop = 0, threading.Lock(), threading.Event()

    def copy(number: int) -> None:
        nonlocal done
        column, note = columns[number], {"lengths": [], "hashes": []}
        before = _state(column.file)
        with whole(_file(folder, number)) as partial:
            with partial.open("wb") as out:
                for content in readable(column):
                    if stop.is_set():
                        raise KeyboardInterrupt
                    out.write(content)
                    note["lengths"].append(len(content))
                    note["hashes"].append(Hashed.of(content).hex())
                    with lock:
                        done += len(content)
                    count(min(done, total), total)
            if _state(column.file) != before:
                raise UserError(
                    f"{printable(column.file)} changed while it was read: begin again once nobody "
                    "writes there",
                    code="source-changed",
                )
        write_json(_note(folder, number), note | {"bytes": sum(note["lengths"])})

    with progress("copying pictures out", "bytes") as count, pool_of(threads) as pool:
        try:
            for _ in pool.map(copy, to_do):
                pass
        finally:
            stop.set()


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _file(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:05}.bin"


def _note(folder: Path, number: int) -> Path:
    """What is known of a file; written once it is whole."""
    return folder / f"rows-{number:05}.json"


def _is_done(folder: Path, number: int) -> bool:
    file, size = _file(folder, number), read_json(_note(folder, number), {}).get("bytes")
    return file.is_file() and file.stat().st_size == size


# --- arrow --------------------------------------------------------------------------------------


def lying_in_arrow(file: Path, image: str) -> Parts | None:
    """Where the pictures of a column lie in an arrow file; None where they lie in no file."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        base, size = source.read_buffer(1).address, source.size()
        source.seek(0)
        column = pyarrow.ipc.open_stream(source).read_all()[image]
        starts, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for chunk in column.chunks:
            if pyarrow.types.is_struct(chunk.type) and "bytes" not in [f.name for f in chunk.type]:
                return None
            cells = cells_of(chunk)
            kind = cells.type
            if not pyarrow.types.is_binary(kind) and not pyarrow.types.is_large_binary(kind):
                return None
            if cells.null_count or chunk.null_count:
                return None
            if not len(cells):
                continue
            _, offsets, content = cells.buffers()
            if content is None or not base <= content.address < base + size:
                return None  # compressed, so it lies in memory
            wide = np.int64 if pyarrow.types.is_large_binary(kind) else np.int32
            ends = np.frombuffer(offsets, wide)[cells.offset : cells.offset + len(cells) + 1]
            ends = ends.astype(np.int64)
            starts.append(content.address - base + ends[:-1])
            lengths.append(np.diff(ends))
    found = torch.from_numpy(np.concatenate(lengths))
    if not found.all():
        return None  # an empty one is told by who reads them
    return Parts((file,), torch.zeros_like(found), torch.from_numpy(np.concatenate(starts)), found)


# --- together -----------------------------------------------------------------------------------


def joined(parts: Sequence[Parts]) -> Parts:
    """The pictures of several files, one behind the other."""
    files = dict.fromkeys(file for one in parts for file in one.files)
    number = {file: place for place, file in enumerate(files)}
    which = [torch.tensor([number[file] for file in one.files])[one.which] for one in parts]
    starts, lengths = (torch.cat([getattr(one, k) for one in parts]) for k in ("starts", "lengths"))
    return Parts(tuple(files), torch.cat(which), starts, lengths, parts[0].copied)


def hashes_of(items: Sequence[Item]) -> list[Hashed]:
    """Of pictures that lie in files; each is read."""
    with (
        progress("reading pictures, to part them", "pictures", after=1.0) as count,
        pool_of(cpus()) as pool,
    ):
        found = []
        chunks = [range(i, min(i + 64, len(items))) for i in range(0, len(items), 64)]
        for some in pool.map(lambda chunk: [_hashed(items[place]) for place in chunk], chunks):
            found += some
            count(len(found), len(items))
    return found


def _hashed(item: Item) -> Hashed:
    if isinstance(item, Path):
        return Hashed.of(item.read_bytes())
    return Hashed.of(item.read() if isinstance(item, Part) else item)
