"""Pictures that were scaled as a whole, in a file of this process: each epoch has them alike."""

import os
import shutil
import tempfile
import threading
from typing import IO

import numpy as np

from data.cache import cache_dir, size_limit

ROOM = 2**29  # bytes of the file, at most
PART = 20  # at most 1 / PART of what its disk has free: checkpoints need it more
MOST = 50_000  # pictures, at most: where each lies takes memory
WORTH = 4  # times as many bytes, at least, has the picture that one was scaled from

Key = tuple[int, int, int, str]  # place, height, width, and how it was scaled


class Kept:
    """Decoded pictures (height, width, 3) uint8 by what they are; for any thread of one process.

    Nothing is kept where there is no room, or no such file: all of it can be made again.
    """

    def __init__(self) -> None:
        self._starts: dict[Key, int] = {}
        self._file: IO[bytes] | None = None
        self._end, self._room, self._process = 0, size_limit(), os.getpid()
        self._full = not hasattr(os, "pread")
        self._lock = threading.Lock()

    def get(self, key: Key) -> np.ndarray | None:
        """That picture, if it is there."""
        start = self._starts.get(key)
        if start is None or self._file is None or self._process != os.getpid():
            return None
        _, height, width, _ = key
        try:
            found = os.pread(self._file.fileno(), height * width * 3, start)
            return np.frombuffer(found, np.uint8).reshape(height, width, 3)
        except (OSError, ValueError):
            return None

    def put(self, key: Key, pixels: np.ndarray) -> None:
        """Keep it, if there is room."""
        with self._lock:
            start, end = self._end, self._end + pixels.size
            if self._full or self._process != os.getpid() or len(self._starts) >= MOST:
                return
            try:
                if self._file is None:
                    free = shutil.disk_usage(cache_dir()).free
                    self._room = min(self._room, ROOM, free // PART)
                    self._file = tempfile.TemporaryFile(dir=cache_dir())  # noqa: SIM115 - it stays
                if end > self._room:
                    return
                if os.pwrite(self._file.fileno(), pixels.data, start) < pixels.size:
                    raise OSError
            except OSError:
                self._full = True
                return
            self._end, self._starts[key] = end, start
