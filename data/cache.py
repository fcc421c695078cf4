"""Decoded tensors on disk: one checksummed file per data set, built by one process of a node."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from common.disk import Json, digest, whole

Entry = tuple[dict[str, torch.Tensor], dict]  # tensors, and what is known about them (JSON)

FORMAT = 1  # raise it when the meaning of an entry changes: older files are then rebuilt
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
    while True:
        seen = _signature(path)
        entry = read_entry(path)
        if entry is not None:
            return entry
        with _node_lock(path, seen) as mine:
            if mine and _signature(path) == seen:
                tensors, meta = build()
                write_entry(path, tensors, meta)
                return tensors, meta


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
    lock = FileLock(path.with_suffix(f".{digest(_node_name(), 4)}.lock"))
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


def _node_name() -> str:
    import platform

    return platform.node()
