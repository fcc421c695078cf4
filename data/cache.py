"""Data sets on disk: one checksummed file for each, built by one process of a node; and packs.

The folder keeps to a size: the entries that were used longest ago go first, never one that a
process uses.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from filelock import FileLock, Timeout

from common.disk import Json, digest, read_json, whole, write_json
from common.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, which removes no file that is open
    fcntl = None

Entry = tuple[dict[str, torch.Tensor], dict]  # tensors, and what is known about them (JSON)

FORMAT = 1  # raise it when the meaning of an entry changes: older files are then rebuilt
LIMIT = "20GB"  # what the folder may take; LOCKSTEP_CACHE_SIZE says otherwise
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
LARGE = 10**9  # bytes of one entry that are told where they land in the home folder
STALE = 86400.0  # seconds after which a half-written file is nobody's any more
STARTED = time.time()
ENTRY = re.compile(r"[0-9a-f]{32}\.\w+")  # of the names in the folder, what is ours to remove
T = TypeVar("T")
LOOK = ".look"  # the end of a file of what was found at one start
PATIENCE = 1800.0  # seconds to wait for another process's build before building for oneself


def cache_dir() -> Path:
    """LOCKSTEP_CACHE, else `lockstep` in the user's cache folder of this platform."""
    if chosen := os.environ.get("LOCKSTEP_CACHE"):
        return Path(chosen).expanduser()
    try:
        home = Path.home()
    except RuntimeError:  # a container's user without a home
        home = Path(tempfile.gettempdir())
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData/Local")
    elif sys.platform == "darwin":
        base = home / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "lockstep"


def entry_path(key: Json) -> Path:
    """The file of a key: anything JSON can write, and that changes whenever the data do."""
    return cache_dir() / f"{digest(json.dumps([FORMAT, key]), 16)}.safetensors"


def cached(key: Json, build: Callable[[], Entry]) -> Entry:
    """The entry of `key`; built by the first process of this node to ask, others poll for it.

    A damaged or older file is built anew. Where nothing can be written or locked, every process
    builds for itself. Errors of `build` pass through.
    """
    path = entry_path(key)

    def read() -> Entry | None:
        if (entry := read_entry(path)) is not None:
            use(path)
        return entry

    def make() -> Entry:
        tensors, meta = build()
        if write_entry(path, tensors, meta):
            use(path)
            trim()
        return tensors, meta

    return _by_one(path, read, make)


def _by_one(path: Path, read: Callable[[], T | None], make: Callable[[], T]) -> T:
    """What a file holds; None: it is made, by the first process of this node to ask."""
    while True:
        seen = _signature(path)
        if (found := read()) is not None:
            return found
        with _node_lock(path, seen) as mine:
            if mine and _signature(path) == seen:
                return make()


def _look_path(start: str, key: Json) -> Path:
    return cache_dir() / f"{start}-{digest(json.dumps([FORMAT, key, _node_name()]), 16)}{LOOK}"


def looked_once(start: str, key: Json, look: Callable[[], dict]) -> dict:
    """What look() found, JSON: the first process of this node to ask looks, others wait for it.

    It holds for one start of a run, until `forget_looks`. Where nothing can be written or locked,
    every process looks for itself.
    """
    path = _look_path(start, key)

    def make() -> dict:
        found = look()
        with contextlib.suppress(OSError):
            write_json(path, found)
        return found

    return _by_one(path, lambda: read_json(path), make)


def forget_looks(start: str) -> None:
    """Nobody will ask any more for what was found at this start."""
    if start:
        with contextlib.suppress(OSError):
            for path in cache_dir().glob(f"{start}-*"):
                path.unlink(missing_ok=True)


def read_entry(path: Path) -> Entry | None:
    """What the file holds, or None when it is absent, damaged or of another format."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sealed = json.loads(header["lockstep"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    if header.get("seal") != digest(header["lockstep"], 16) or sealed["format"] != FORMAT:
        return None
    if {name: digest_of(tensor) for name, tensor in tensors.items()} != sealed["checksums"]:
        return None
    return tensors, sealed["meta"]


def write_entry(path: Path, tensors: dict[str, torch.Tensor], meta: dict) -> bool:
    """Write the entry whole or not at all; False when the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    checksums = {name: digest_of(tensor) for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, "checksums": checksums, "meta": meta})
    try:
        with whole(path) as partial:
            save_file(tensors, partial, metadata={"lockstep": text, "seal": digest(text, 16)})
    except (OSError, SafetensorError):
        return False
    return True


# --- how much it takes ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """An entry of the cache: a file, or a folder of several."""

    path: Path
    size: int
    used: float  # seconds since 1970

    @property
    def about(self) -> str:
        """Which data set it is of, as far as it says so."""
        from safetensors import SafetensorError, safe_open

        path = next(self.path.glob("*.safetensors"), self.path)  # of a folder
        try:
            with safe_open(path, framework="pt") as file:
                return json.loads((file.metadata() or {})["lockstep"])["meta"].get("at", "")
        except (OSError, SafetensorError, KeyError, ValueError, AttributeError):
            return ""


def size_limit() -> int:
    """LOCKSTEP_CACHE_SIZE in bytes (20GB, 500M; 0 keeps nothing that no process uses)."""
    text = os.environ.get("LOCKSTEP_CACHE_SIZE") or LIMIT
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    if not found:
        raise UserError(
            f"LOCKSTEP_CACHE_SIZE={text}: no size; write 20GB or 500MB.", code="bad-cache-size"
        )
    return round(float(found[1]) * UNITS[found[2]])


def kept() -> list[Kept]:
    """The entries of the cache, the one that was used longest ago first."""
    found = []
    with contextlib.suppress(OSError):
        for path in cache_dir().iterdir():
            if ENTRY.fullmatch(path.name) and path.suffix != ".lock":
                with contextlib.suppress(OSError):
                    found.append(Kept(path, _size(path), path.stat().st_atime))
    return sorted(found, key=lambda one: one.used)


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())
    return path.stat().st_size


_in_use: dict[Path, int] = {}  # entries this process uses -> the descriptor that says so


def use(path: Path) -> None:
    """Note that an entry is used now, and keep it from being removed while this process lives."""
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # atime alone: see _signature
        if fcntl and _held_file(_in_use.get(path)) != path.stat().st_ino:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if (old := _in_use.pop(path, None)) is not None:
                os.close(old)
            _in_use[path] = descriptor


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Entries that are first used within may be removed afterwards, though this process lives."""
    before = set(_in_use)
    try:
        yield
    finally:
        for path in _in_use.keys() - before:
            os.close(_in_use.pop(path))


def _held_file(descriptor: int | None) -> int | None:
    return None if descriptor is None else os.fstat(descriptor).st_ino


def trim(most: int | None = None) -> int:
    """Remove what was used longest ago until the folder keeps to `most` bytes; how many went.

    Entries in use stay. What a killed process left half-written goes after a day.
    """
    most = size_limit() if most is None else most
    entries = kept()
    total, freed = sum(one.size for one in entries), 0
    for one in entries:
        if total - freed <= most:
            break
        if _remove(one.path):
            freed += one.size
    with contextlib.suppress(OSError):
        left = (cache_dir().glob(f"*{ends}") for ends in (".partial", LOOK, "-*.lock"))
        for path in itertools.chain(*left):
            with contextlib.suppress(OSError):
                status = path.stat()
                if time.time() - status.st_mtime > STALE:
                    path.unlink()
                    freed += status.st_size
    return freed


def _remove(path: Path) -> bool:
    """Remove an entry unless some process uses it."""
    descriptor = None
    try:
        if fcntl:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError:  # in use, or not ours to remove
        return False
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return True


def landed(key: Json, entry: Entry) -> list[str]:
    """A sentence where an entry of this life took more than a gigabyte of the home folder.

    Or where it could not be written at all, so that all is looked at again at each start.
    """
    path = Path(entry[1].get("pack") or entry[1].get("copied") or entry_path(key))
    try:
        size, made = _size(path), path.stat().st_mtime
        inside = path.resolve().is_relative_to(Path.home().resolve())
    except (FileNotFoundError, NotADirectoryError):
        message = f"the cache {cache_dir()} cannot be written: all pictures are looked at again at "
        message += "each start; LOCKSTEP_CACHE=FOLDER puts it elsewhere"
        return [message] if size_limit() else []
    except (OSError, RuntimeError):  # no home
        return []
    if size < LARGE or made < STARTED or not inside:
        return []
    return [
        f"the images took {size / 1e9:.1f} GB of the home folder ({cache_dir()}): "
        "LOCKSTEP_CACHE=FOLDER puts them elsewhere, python -m data cache --empty frees it"
    ]


def digest_of(tensor: torch.Tensor) -> str:
    """blake2b over a tensor's type, shape and bytes."""
    state = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    state.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _node_lock(path: Path, seen: tuple[int, int, int] | None) -> Iterator[bool]:
    """Yield True to the one process of this node that shall build, False when the file has changed.

    The operating system frees the lock when its holder dies. The lock carries the node's name:
    nodes that share a cache folder build side by side, and the last rename wins. Where nothing can
    be locked, or after PATIENCE, a process builds for itself.
    """
    lock = FileLock(_lock_of(path))
    deadline = time.monotonic() + PATIENCE
    with contextlib.ExitStack() as held:
        while time.monotonic() < deadline:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock.acquire(timeout=0.1))
                break
            except Timeout:
                if _signature(path) != seen:
                    yield False
                    return
            except (OSError, NotImplementedError):  # nothing to write to, or no locks there
                break
        yield True


def _lock_of(path: Path) -> Path:
    return path.with_suffix(f".{digest(_node_name(), 4)}.lock")


def _node_name() -> str:
    import platform

    return platform.node()
