"""Packs: photographs back to back in a few large files, with an index and a hash for each file."""

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import mmap
import os
import shlex
import shutil
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from common.cpus import cpus
from common.disk import digest, read_json, whole, write_json
from common.errors import UserError
from common.progress import Count, progress
from common.text import duration, in_bytes, printable
from data.ahead import Ahead, Threads, Work, pool_of
from data.cache import Entry, cached, read_entry, write_entry
from data.files import Part, cannot_decode
from data.image_set import Levels, Source, kept_beside
from data.kept import Kept
from data.photographs import PLAIN, FileStore, Names, Photos, PhotoSet, Store, decoder, reason

INDEX = "pack.safetensors"  # written last: a folder with it is a whole pack
BEGUN = "begun.json"  # what the pack is to become
LOCK = ".lock"
SHARD_BYTES = 256_000_000
QUALITY = 90  # of pictures that are encoded anew
PIXEL_BYTES = 0.5  # of such a picture, before one was made
CHUNK, CHUNK_BYTES = 16, 8_000_000  # pictures that a thread takes at a time, at most
STATES = 256  # pictures whose files a thread looks at before it asks for more
TRIED = 32  # pictures that are tried, to say how long all of them take
MOST_OPEN = 512  # files that stay open; a pack of a hundred gigabytes has fewer
READ = 2**23  # bytes that are hashed at a time
UPRIGHT = 1 | PLAIN  # the kind of a JPEG that was made here

Say = Callable[[str], None]


def silent(_: str) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class Form:
    """How pictures lie in a pack.

    store: "jpeg", encoded, or "raw", upright RGB. short_side: what the shorter side is scaled to
    where it is longer; 0 keeps pictures as they are, and with "jpeg" the very bytes of their files.
    """

    store: str
    short_side: int = 0

    @property
    def as_it_is(self) -> bool:
        """Whether the bytes of the files are copied."""
        return self.store == "jpeg" and not self.short_side

    @property
    def words(self) -> str:
        """How pictures lie there, for a person."""
        if self.as_it_is:
            return "the bytes of their files"
        side = f", short side at most {self.short_side}" if self.short_side else ""
        return (f"JPEG of quality {QUALITY}" if self.store == "jpeg" else "decoded pixels") + side

    def sizes(self, sizes: Tensor) -> Tensor:
        """What height and width, int32 (n, 2), become."""
        if not self.short_side:
            return sizes
        short = sizes.min(dim=1, keepdim=True).values.double()
        return (sizes * (self.short_side / short).clamp(max=1)).round().int()


class PackStore:
    """Pictures that lie in a few large files; each is compared with its checksum when first read.

    `which`, `offsets`, `lengths` (n,) say where; `checksums` (n,) are zlib's crc32, None where the
    files are not ours. `sizes` (n, 2) are given where pixels lie there decoded.
    """

    def __init__(
        self, root: Path, files: tuple[str, ...], places: tuple[Tensor, Tensor, Tensor],
        words: str, checksums: Tensor | None = None, sizes: Tensor | None = None,
        damaged: Mapping[int, str] | None = None, base: Path | None = None,
    ) -> None:  # fmt: skip
        self.base = base or root  # the names of the pictures are below it
        self.root, self.files, self.words = root, files, words
        self.which, self.offsets, self.lengths = places
        self.checksums, self.sizes, self.damaged = checksums, sizes, damaged or {}
        self._compared = np.zeros(len(self.which), dtype=bool)
        self._numbers = tuple(part.numpy() for part in places)  # one of them comes ten times faster
        self._shapes = None if sizes is None else sizes.numpy()
        self._opened: dict[int, tuple[int, mmap.mmap]] = {}
        self._lock = threading.Lock()

    def encoded(self, place: int) -> bytes:
        """See Store."""
        if len(self.files) > MOST_OPEN:
            path = self.root / self.files[int(self.which[place])]
            return Part(path, int(self.offsets[place]), int(self.lengths[place])).read()
        descriptor, pages, start, length = self._where(place)
        if hasattr(os, "pread"):  # an error of the disk is an error; in a page it is a signal
            found = os.pread(descriptor, length, start)
        else:
            found = pages[start : start + length]
        self._compare(place, found)
        return found

    def raw(self, place: int) -> np.ndarray | None:
        """See Store."""
        if self._shapes is None:
            return None
        _, pages, start, length = self._where(place)
        pixels = np.frombuffer(pages, np.uint8, length, start)
        self._compare(place, pixels.data)
        return pixels.reshape(*self._shapes[place], 3)

    def name_of(self, path: Path) -> str:
        """See Store."""
        return Path(os.path.relpath(path, self.base)).as_posix()

    def _where(self, place: int) -> tuple[int, mmap.mmap, int, int]:
        if why := self.damaged.get(place):
            raise ValueError(why)
        number, start, length = (int(part[place]) for part in self._numbers)
        if number not in self._opened:
            with self._lock:
                if number not in self._opened:
                    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
                    descriptor = os.open(self.root / self.files[number], flags)
                    weakref.finalize(self, os.close, descriptor).atexit = False
                    pages = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
                    self._opened[number] = descriptor, pages
        return *self._opened[number], start, length

    def _compare(self, place: int, found: bytes | memoryview) -> None:
        if self.checksums is None or self._compared[place]:
            return
        if zlib.crc32(found) != int(self.checksums[place]):
            file = printable(self.files[int(self.which[place])])
            raise ValueError(
                f"its bytes in {file} are damaged: python -m data check names the cure"
            )
        self._compared[place] = True


# --- reading ------------------------------------------------------------------------------------


def is_pack(path: Path) -> bool:
    """Whether a pack lies there, or what there is of one."""
    return path.is_dir() and ((path / INDEX).is_file() or (path / BEGUN).is_file())


def open_pack(path: Path, image_size: int | None) -> Entry:
    """The index of a pack; mean and std are those of pictures seen at `image_size` pixels.

    Raises UserError where it is not whole.
    """
    from data.photographs import PHOTOGRAPH

    image_size = image_size or PHOTOGRAPH
    tensors, meta = _index(path)
    for file, length, _ in _written(meta):
        try:
            found = (path / file).stat().st_size
        except OSError as error:
            raise _damaged(path, f"{file}: {reason(error)}", meta) from None
        if found != length:
            raise _damaged(path, f"{file} has {found:,} bytes, not {length:,}", meta)
    meta = {**meta, "pack": str(path)}
    if meta["image_size"] != image_size:

        def build() -> Entry:
            mean, std = _mean_and_std(tensors, meta, image_size)
            return {"none": torch.zeros(1)}, {"mean": mean, "std": std}

        key = ["mean and std", meta["content"], meta["decoder"] or decoder(), image_size]
        _, levels = cached(key, build)
        meta |= levels
    return tensors, meta


def store_of(tensors: dict[str, Tensor], meta: dict) -> PackStore:
    """Where the pictures of an opened pack lie, or those of an index of parts of files."""
    places = tensors["which"], tensors["offsets"], tensors["lengths"]
    if "pack" not in meta:
        words = "decoded from the files that hold them"
        if "copied" in meta:
            words = "decoded from the cache, as they were copied out of their tables"
        return PackStore(Path(meta["parts"]), tuple(meta["files"]), places, words)
    form = Form(meta["store"], meta["short_side"])
    damaged = {int(place): why for place, why in meta["damaged"].items()}
    return PackStore(
        Path(meta["pack"]), tuple(meta["files"]), places, f"a pack: {form.words}",
        tensors["checksums"], tensors["sizes"] if form.store == "raw" else None, damaged,
        Path(meta["came_from"]) if "came_from" in meta else None,
    )  # fmt: skip


def photos_of(tensors: dict[str, Tensor], meta: dict, store: Store) -> Photos:
    """The pictures of an index, which lie in this store."""
    names = Names(tensors["names"], tensors["name_ends"])
    kept = Kept() if isinstance(store, PackStore) and store.sizes is not None else None
    sizes, kinds = tensors["sizes"], tensors["kinds"]
    return Photos(store, names, sizes, kinds, levels_in(meta), kept=kept)


def levels_in(meta: dict) -> Levels | None:
    """As JSON gives them back, if they are there."""
    low, high = meta.get("levels") or (None, None)
    return None if low is None or high is None else (low, high)


def _index(path: Path) -> Entry:
    entry = read_entry(path / INDEX)
    if entry is not None and "pack_format" in entry[1]:
        return entry
    begun = read_json(path / BEGUN, {})
    if (path / INDEX).is_file():
        raise _damaged(path, f"{INDEX} cannot be read", begun)
    raise UserError(
        f"{printable(path)} is a pack that is not finished; go on with {again(path, begun)}",
        code="pack-unfinished",
    )


def _written(meta: dict) -> list[tuple[str, int, str]]:
    """Name, bytes and hash of each file that the index of a pack tells of."""
    return list(zip(meta["files"], meta["bytes"], meta["hashes"], strict=True))


def again(path: Path, meta: dict) -> str:
    """The command that makes, finishes or mends the pack at a path."""
    words = [*meta.get("command", ["--dataset", "DATASET"]), "--out", str(path)]
    return f"python -m data prepare {printable(shlex.join(words))}"


def _damaged(path: Path, what: str, meta: dict) -> UserError:
    return UserError(
        f"the pack {printable(path)} is damaged: {printable(what)}. Copy it again, or make what is "
        f"damaged again with {again(path, meta)}",
        code="pack-damaged",
    )


def _mean_and_std(
    tensors: dict[str, Tensor], meta: dict, image_size: int
) -> tuple[list[float], list[float]]:
    from data.scan import mean_and_std_of

    photos = photos_of(tensors, meta, store_of(tensors, meta))
    return mean_and_std_of(
        PhotoSet(photos, tensors["train_places"], tensors["train_labels"]), image_size
    )


def check(path: Path) -> int:
    """Read all of a pack and compare each file with its hash; how many files there are.

    Raises UserError that names the first damaged file and the command that mends it.
    """
    _, meta = _index(path)
    files = _written(meta)
    bad = _differing(path, files)
    if bad:
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise _damaged(path, f"{bad[0]} is not what was written{more}", meta)
    return len(files)


def _differing(path: Path, files: list[tuple[str, int, str]]) -> list[str]:
    """Those of these files (name, bytes, hash) that are damaged or missing, in their order."""
    total, done, lock = sum(length for _, length, _ in files), 0, threading.Lock()

    def same(file: tuple[str, int, str], count: Count) -> bool:
        nonlocal done
        state = hashlib.blake2b(digest_size=16)
        try:
            with (path / file[0]).open("rb", buffering=0) as opened:
                while part := opened.read(READ):
                    state.update(part)
                    with lock:
                        done += len(part)
                    count(done, total)
        except OSError:
            return False
        return state.hexdigest() == file[2]

    with progress("comparing", "bytes") as count, pool_of(cpus()) as pool:
        found = pool.map(same, files, itertools.repeat(count))
        return [file[0] for file, ok in zip(files, found, strict=False) if not ok]


def staged(path: Path, folder: Path, say: Say = silent) -> Path:
    """Where a copy of a pack lies in a folder of this node: made by one process, checked by hash.

    Files that are there already stay. Raises UserError where it cannot be copied.
    """
    _, meta = _index(path)
    out = folder.absolute() / f"{path.name}-{digest(json.dumps(meta['hashes']))}"
    files = _written(meta)
    with disk_told(out, "--stage"), _alone(out, True, "--stage"):
        to_do = [file for file in files if not _is_staged(out / file[0], file[1])]
        if not to_do and (out / INDEX).is_file():
            return out
        total, free = sum(file[1] for file in to_do), shutil.disk_usage(out).free
        if total > free:
            raise UserError(
                f"the disk of {printable(out)} has {in_bytes(free)} free, and the pack takes "
                f"{in_bytes(total)}: leave --stage out, or give a folder on another disk",
                code="disk-full",
            )
        say(f"copying {in_bytes(total)} of {printable(path)} to {printable(out)}")
        shutil.copyfile(path / BEGUN, out / BEGUN)

        def copy(file: tuple[str, int, str]) -> None:
            name, _, wanted = file
            _note_of(out / name).unlink(missing_ok=True)
            with whole(out / name) as partial:
                if _copied(path / name, partial, more) != wanted:
                    raise _damaged(path, f"{name} is not what was written", meta)
            shutil.copyfile(_note_of(path / name), _note_of(out / name))  # it is whole

        done, lock = 0, threading.Lock()

        def more(part: int) -> None:
            nonlocal done
            with lock:
                done += part
            count(done, total)

        with progress("copying", "bytes", after=1.0) as count, pool_of(cpus()) as pool:
            list(pool.map(copy, to_do))
        with whole(out / INDEX) as partial:
            shutil.copyfile(path / INDEX, partial)
    return out


def _is_staged(path: Path, length: int) -> bool:
    return _note_of(path).is_file() and path.is_file() and path.stat().st_size == length


def _copied(source: Path, out: Path, more: Callable[[int], None]) -> str:
    """Copy a file; its hash on the way. `more` hears how many bytes came to it."""
    state = hashlib.blake2b(digest_size=16)
    with source.open("rb", buffering=0) as read, out.open("wb") as write:
        while part := read.read(READ):
            state.update(part)
            write.write(part)
            more(len(part))
    return state.hexdigest()


# --- writing ------------------------------------------------------------------------------------


def pack(
    source: Source, form: Form, out: Path, *, image_size: int, command: list[str],
    skip_bad: bool = False, wait: bool = False, say: Say = silent,
) -> None:  # fmt: skip
    """Write all photographs of a data set into a pack; files that are finished already stay.

    image_size: of the pictures that the data set's mean and std were taken from. command: how it is
    made again, without its folder. wait: for another process that writes there, else an error.
    Raises UserError where something cannot be read or written, or lies there already.
    """
    with disk_told(out, "--out"), _alone(out, wait, "--out"):
        _Packing(source, form, out, image_size, command, skip_bad, say).write()


@contextlib.contextmanager
def disk_told(out: Path, flag: str) -> Iterator[None]:
    """Errors of the disk that is written to, as sentences."""
    try:
        yield
    except OSError as error:
        where, why = printable(out), printable(error.strerror or str(error))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of {where} is full. Finished files stay: make room, and the same "
                "command goes on.",
                code="disk-full",
            ) from None
        raise UserError(
            f"{where} cannot be written: {why}; give a folder that can with {flag}",
            code="output-unwritable",
        ) from None


@contextlib.contextmanager
def _alone(out: Path, wait: bool, flag: str) -> Iterator[None]:
    """One process at a time writes a pack; what a killed one left half is removed."""
    if not (out / LOCK).exists():  # else somebody may just have begun there
        _refuse_what_is_no_pack(out, flag)
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock.acquire(timeout=-1 if wait else 0))
        except Timeout:
            raise UserError(
                f"another process is writing the pack {printable(out)}: wait for it",
                code="pack-in-use",
            ) from None
        except NotImplementedError:  # no locks there
            pass
        else:
            for left in out.glob("*.partial"):
                left.unlink()
        _refuse_what_is_no_pack(out, flag)
        yield


def _refuse_what_is_no_pack(out: Path, flag: str) -> None:
    others = {path.name for path in out.iterdir()} - {LOCK} if out.is_dir() else out.exists()
    if others and not is_pack(out):
        raise UserError(
            f"{printable(out)} holds something else than a pack: give a new or empty folder with "
            f"{flag}",
            code="output-not-empty",
        )


class _Packing:
    """One pack on its way: which pictures go into which file, and what is left to do."""

    def __init__(
        self, source: Source, form: Form, out: Path, image_size: int, command: list[str],
        skip_bad: bool, say: Say,
    ) -> None:  # fmt: skip
        assert isinstance(source.train, PhotoSet) and isinstance(source.test, PhotoSet)
        self.source, self.form, self.out, self.image_size = source, form, out, image_size
        store = source.train.photos.store
        if form.as_it_is and isinstance(store, PackStore) and store.sizes is not None:
            raise UserError(
                "the pictures of this data set lie decoded, so there are no bytes of their files: "
                "pack them with --store raw, or with --short-side 256",
                code="no-files-to-keep",
            )
        self.train, self.test, self.photos = source.train, source.test, source.train.photos
        self.skip_bad, self.say, self.command = skip_bad, say, command
        self.sizes = form.sizes(self.photos.sizes)
        self.states = _states(self.photos.store, range(len(self.photos)))
        self.planned = self._planned()
        self.shards = _runs(self.planned, SHARD_BYTES, len(self.planned))
        self.decoder = source.decoder or decoder()

    def _planned(self) -> Tensor:
        """About how many bytes each picture takes, int64 (n,)."""
        pixels = self.sizes.long().prod(dim=1)
        if self.form.store == "raw":
            return 3 * pixels
        if self.form.as_it_is:
            return self.states[:, 0]
        return (PIXEL_BYTES * pixels).long().minimum(self.states[:, 0])

    def write(self) -> None:
        done = self._begin()
        to_do = [number for number in range(len(self.shards)) if number not in done]
        if to_do:
            self._announce(to_do, done)
            with progress("packing", "pictures") as count:
                self._write_shards(to_do, count)
        elif (self.out / INDEX).is_file() and read_entry(self.out / INDEX):
            self.say(f"{printable(self.out)} is whole already")
            return
        self._write_index()

    def _begin(self) -> set[int]:
        """Which files are finished; what else lies there is refused."""
        wanted = {
            "pack_format": 1, "store": self.form.store, "short_side": self.form.short_side,
            "content": self.source.content, "command": self.command,
        }  # fmt: skip
        before = read_json(self.out / BEGUN)
        if not (self.out / INDEX).is_file() and not any(self.out.glob("shard-*.bin")):
            before = None  # nothing came of it: the disk was too small
        if before is not None:
            there = Form(before.get("store", "jpeg"), before.get("short_side", 0))
            if there != self.form:
                raise UserError(
                    f"{printable(self.out)} holds a pack of another kind ({there.words}): give "
                    "another folder with --out, or remove that one",
                    code="other-pack",
                )
            if before.get("content") != self.source.content:
                raise UserError(
                    f"{printable(self.out)} was begun from other pictures, or the data set changed "
                    "since: give another folder with --out, or remove that one",
                    code="source-changed",
                )
        if before != wanted:
            write_json(self.out / BEGUN, wanted)
        done = {number for number in range(len(self.shards)) if self._is_done(number)}
        if (self.out / INDEX).is_file() and done:  # somebody may want it mended
            self.say("comparing the pack with its hashes")
            notes = [(number, self._note(number)) for number in sorted(done)]
            files = [(_name(number), note["bytes"], note["hash"]) for number, note in notes]
            bad = set(_differing(self.out, files))
            done = {number for number in done if _name(number) not in bad}
        return done

    def _note(self, number: int) -> dict:
        return read_json(_note_of(self.out / _name(number)), {})

    def _is_done(self, number: int) -> bool:
        note, file = self._note(number), self.out / _name(number)
        return (
            note.get("signature") == self._signature(number)
            and file.is_file()
            and file.stat().st_size == note["bytes"]
        )

    def _signature(self, number: int) -> str:
        """What decides the bytes of a file."""
        rows = self.shards[number]
        parts = [self.form.store, self.form.short_side, rows.start, rows.stop, self.skip_bad]
        if not self.form.as_it_is:
            parts += [self.decoder, encoder(), *(self.source.levels or ())]
        states = self.states[rows.start : rows.stop].numpy().tobytes()
        return digest(json.dumps(parts).encode() + states, 16)

    def _announce(self, to_do: list[int], done: set[int]) -> None:
        rows = [row for number in to_do for row in self.shards[number]]
        tried = rows[:: max(1, len(rows) // TRIED)][:TRIED]
        began, made = time.perf_counter(), 0
        for row in tried:
            made += len(self._made(row)[0])
        seconds = (time.perf_counter() - began) * len(rows) / len(tried) / cpus()
        room = int(self.planned[torch.tensor(rows)].sum())
        if self.form.store == "jpeg" and self.form.short_side:
            room = made * len(rows) // len(tried)
        free = shutil.disk_usage(self.out).free
        if room > free:
            raise UserError(
                f"the disk of {printable(self.out)} has {in_bytes(free)} free, and the pack takes "
                f"about {in_bytes(room)}: give a folder on another disk with --out",
                code="disk-full",
            )
        already = f", {len(done)} of {len(self.shards)} files are there already" if done else ""
        self.say(
            f"packing {len(rows):,} pictures as {self.form.words}: about {in_bytes(room)} and "
            f"{duration(seconds)}{already}; into {printable(self.out)}"
        )

    def _write_shards(self, to_do: list[int], count: Count) -> None:
        chunks = [
            range(self.shards[number].start + run.start, self.shards[number].start + run.stop)
            for number in to_do
            for run in _runs(
                self.planned[self.shards[number].start : self.shards[number].stop], CHUNK_BYTES,
                CHUNK,
            )
        ]  # fmt: skip
        total, done = sum(map(len, chunks)), 0
        with Threads(cpus()) as threads:
            flow: Iterator[list[tuple[bytes, int, str]]] = Ahead(threads.count + 1).over(
                chunks, functools.partial(self._begin_chunk, threads)
            )
            for number in to_do:
                rows, made = self.shards[number], 0
                note: dict = {"signature": self._signature(number), "lengths": [], "checksums": []}
                damaged: dict[str, str] = {}
                state = hashlib.blake2b(digest_size=16)
                _note_of(self.out / _name(number)).unlink(missing_ok=True)
                with whole(self.out / _name(number)) as partial:
                    with partial.open("wb") as file:
                        while made < len(rows):
                            for content, checksum, why in next(flow):
                                if why:
                                    damaged[str(rows[made])] = why
                                file.write(content)
                                state.update(content)
                                note["lengths"].append(len(content))
                                note["checksums"].append(checksum)
                                made += 1
                                done += 1
                            count(done, total)
                    self._refuse_changed(rows)
                note |= {"bytes": sum(note["lengths"]), "hash": state.hexdigest()}
                write_json(_note_of(self.out / _name(number)), note | {"damaged": damaged})

    def _begin_chunk(
        self, threads: Threads, rows: range
    ) -> tuple[Work, Callable[[], list[tuple[bytes, int, str]]]]:
        made: list[tuple[bytes, int, str]] = []

        def piece() -> None:
            for row in rows:
                content, why = self._made(row)
                made.append((content, zlib.crc32(content), why))

        return threads.do([piece]), lambda: made

    def _made(self, row: int) -> tuple[bytes, str]:
        """The bytes of a picture in the pack; or none, and why it cannot be decoded."""
        try:
            return self._content(row), ""
        except (MemoryError, UserError):
            raise
        except Exception as error:  # Pillow raises many kinds on damaged files
            why = reason(error)
        name = printable(self.photos.names[row])
        if isinstance(self.photos.store, FileStore):
            if not _is_there(self.photos.store, row):
                raise UserError(
                    f"{name} cannot be read any more: {why}. Begin again once the data set is "
                    "whole.",
                    code="source-changed",
                )
            self._refuse_changed(range(row, row + 1))  # a new picture is not a damaged one
        if not self.skip_bad:
            raise cannot_decode(f"{name}: {why}")
        return b"", why

    def _content(self, row: int) -> bytes:
        photos, form = self.photos, self.form
        height, width = self.sizes[row].tolist()
        fits = self.sizes[row].equal(photos.sizes[row])
        upright = int(photos.kinds[row]) == UPRIGHT and photos.store.raw(row) is None
        if form.as_it_is or (form.store == "jpeg" and fits and upright):
            return photos.store.encoded(row)
        pixels = photos.pixels(row)
        if not fits:
            from PIL import Image

            image = Image.fromarray(np.ascontiguousarray(pixels))
            pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        pixels = np.ascontiguousarray(pixels)
        return pixels.tobytes() if form.store == "raw" else encode(pixels)

    def _refuse_changed(self, rows: range) -> None:
        """A file that was written to while it was packed would be half of one, half of another."""
        now = _states(self.photos.store, rows)
        changed = (now != self.states[rows.start : rows.stop]).any(dim=1).nonzero()
        if len(changed):
            name = printable(self.photos.names[rows.start + int(changed[0])])
            raise UserError(
                f"{name} changed while it was packed: begin again once nobody writes there",
                code="source-changed",
            )

    def _write_index(self) -> None:
        notes = [self._note(number) for number in range(len(self.shards))]
        lengths = [torch.tensor(note["lengths"], dtype=torch.int64) for note in notes]
        kinds = self.photos.kinds
        if not self.form.as_it_is:
            kinds = torch.full_like(kinds, UPRIGHT)
        names = self.photos.names
        tensors = {
            "sizes": self.sizes, "kinds": kinds, "names": names.text, "name_ends": names.ends,
            "train_places": self.train.places, "train_labels": self.train.labels,
            "test_places": self.test.places, "test_labels": self.test.labels,
            "which": torch.cat([torch.full_like(some, n) for n, some in enumerate(lengths)]),
            "offsets": torch.cat([some.cumsum(0) - some for some in lengths]),
            "lengths": torch.cat(lengths),
            "checksums": torch.tensor([crc for note in notes for crc in note["checksums"]]),
        }  # fmt: skip
        beside, facts = kept_beside(self.source)
        tensors |= beside
        hashes = [note["hash"] for note in notes]
        content, levels = self.source.content, (self.source.mean, self.source.std)
        meta = {
            "pack_format": 1, "store": self.form.store, "short_side": self.form.short_side,
            "classes": self.source.classes, "skipped": self.source.skipped,
            "decoder": "" if self.form.store == "jpeg" else self.decoder,
            "encoder": "" if self.form.as_it_is or self.form.store == "raw" else encoder(),
            "image_size": self.image_size, "command": self.command,
            "files": [_name(number) for number in range(len(self.shards))],
            "bytes": [note["bytes"] for note in notes], "hashes": hashes,
            "damaged": {place: why for note in notes for place, why in note["damaged"].items()},
        }  # fmt: skip
        if self.form.short_side:
            rows = [tensors[f"{split}_labels"].tolist() for split in ("train", "test")]
            content = digest(json.dumps([self.source.classes, rows, hashes]))
            levels = _mean_and_std(tensors, meta | {"pack": str(self.out)}, self.image_size)
        meta |= {"content": content, "mean": levels[0], "std": levels[1], **facts}
        if not write_entry(self.out / INDEX, tensors, meta):
            raise OSError(errno.EIO, "the index cannot be written")
        shutil.copymode(self.out / BEGUN, self.out / INDEX)  # whoever may read one may read both


def _runs(lengths: Tensor, most: int, pieces: int) -> list[range]:
    """Positions in runs of at most so many bytes (a single one may have more), and pieces."""
    runs, start, total = [], 0, 0
    for place, length in enumerate(lengths.tolist()):
        if place > start and (total + length > most or place - start >= pieces):
            runs.append(range(start, place))
            start, total = place, 0
        total += length
    return [*runs, range(start, len(lengths))]


def _states(store: Store, rows: range) -> Tensor:
    """Length in bytes, and time of the last change, of pictures where they lie; int64 (n, 2)."""
    if isinstance(store, PackStore):
        lengths = store.lengths[rows.start : rows.stop].long()
        return torch.stack([lengths, torch.zeros_like(lengths)], dim=1)

    def state(row: int) -> tuple[int, int]:
        if not isinstance(store, FileStore):
            return len(store.encoded(row)), 0
        try:
            found = (store.root / store.names[row]).stat()
        except OSError:
            return -1, 0
        return found.st_size, found.st_mtime_ns

    chunks = [rows[i : i + STATES] for i in range(0, len(rows), STATES)]
    found: list[tuple[int, int]] = []
    with (
        progress("looking at the files", "pictures", after=1.0) as count,
        pool_of(4 * cpus()) as pool,  # on a network disk most of it is waiting
    ):
        for some in pool.map(lambda chunk: list(map(state, chunk)), chunks):
            found += some
            count(len(found), len(rows))
    return torch.tensor(found, dtype=torch.int64).view(-1, 2)


def _is_there(store: FileStore, row: int) -> bool:
    path = store.root / store.names[row]
    return path.is_file() and os.access(path, os.R_OK)


def _name(number: int) -> str:
    return f"shard-{number:05}.bin"


def _note_of(file: Path) -> Path:
    """What is known of a file of a pack; written once the file is whole."""
    return file.with_suffix(".json")


def encoder() -> str:
    """What encodes JPEGs here, with its version and settings."""
    try:
        from importlib.metadata import version

        import simplejpeg  # noqa: F401 - whether it can be had
    except ImportError:
        from PIL import Image

        return f"Pillow {Image.__version__}, quality {QUALITY}, 4:2:0"
    return f"simplejpeg {version('simplejpeg')}, quality {QUALITY}, 4:2:0"


def encode(pixels: np.ndarray) -> bytes:
    """RGB (H, W, 3) uint8, contiguous, as a JPEG."""
    try:
        from simplejpeg import encode_jpeg
    except ImportError:
        import io

        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
        return file.getvalue()
    return encode_jpeg(pixels, QUALITY, "RGB", "420")
