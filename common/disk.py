"""Files that are whole or not there, JSON that may be damaged, and digests."""

import contextlib
import csv
import hashlib
import io
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

Json = (
    str | float | None | dict | list | tuple
)  # what json.dumps takes; int and bool are float here


@contextlib.contextmanager
def whole(path: Path, sync: bool = True) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends without an error.

    A reader (or a crash) sees the old file or the new one, never half; `sync` waits for the disk,
    so that this holds for a power cut too. An error leaves the old file and nothing beside it.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        yield partial
        if sync:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, sync: bool = True) -> None:
    """A text file in UTF-8, whole or not at all; names that are not UTF-8 keep their bytes."""
    with whole(path, sync) as partial:
        partial.write_bytes(text.encode("utf-8", "surrogateescape"))


def csv_text(rows: Iterable[Sequence]) -> str:
    """Rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: Iterable[Sequence]) -> None:
    """Rows as a CSV file, whole or not at all."""
    write_text(path, csv_text(rows))


def write_json(path: Path, content: Json) -> None:
    """An object as a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def parse_object(text: str) -> dict | None:
    """A JSON object; None where the text is none, as half a line that a crash left."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@overload
def read_json(path: Path, default: dict) -> dict: ...
@overload
def read_json(path: Path) -> dict | None: ...
def read_json(path: Path, default: dict | None = None) -> dict | None:
    """The object in a JSON file, or the default where it is missing or damaged."""
    try:
        found = parse_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    return default if found is None else found


def digest(content: str | bytes, size: int = 8) -> str:
    """blake2b of text or bytes, `size` bytes of it, in hexadecimal."""
    content = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(content, digest_size=size).hexdigest()
