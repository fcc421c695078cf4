"""What predict.py found, as a table, JSON or CSV, or in a file that is gone on with."""

import argparse
import csv
import io
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from common.disk import csv_text, digest, read_json, write_json
from common.errors import UserError
from common.text import printable

if TYPE_CHECKING:
    from report.screen import Report

BLOCK = 500  # pictures in a table
HEAD = ["path", "rank", "class", "index", "confidence"]


class Answer(NamedTuple):
    """A class, its number among the run's (from 0), and how sure the model is of it."""

    name: str
    index: int
    confidence: float


class Answers:
    """Writes each answer as it comes, to stdout or a file; a table in blocks, for its columns."""

    def __init__(self, arguments: argparse.Namespace, total: int, made_by: dict) -> None:
        self.json, self.total, self.count = arguments.json, total, 0
        self.table: dict[str, list[Answer]] = {}
        self.rows = None
        self.file = Kept(arguments.out, made_by) if arguments.out else None
        self.bar: Report | None = None
        typed = bool(arguments.json or arguments.csv)
        if sys.stderr.isatty() and total > 1 and not (typed and sys.stdout.isatty()):
            from report.screen import on_stderr

            self.bar = on_stderr()
            self.bar.open_bar(total, 0, "pictures")
        if self.json:
            print("[", end="", flush=True)
        elif arguments.csv:
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
            self.rows = csv.writer(sys.stdout, lineterminator="\n")
            self.rows.writerow(HEAD)
            sys.stdout.flush()

    def lacks(self, path: str) -> bool:
        """Whether a picture is still to be predicted."""
        there = self.file is not None and self.file.has(path)
        self.count += there
        return not there

    def add(self, path: str, found: list[Answer]) -> None:
        """What was found for one picture, the likeliest class first."""
        self.count += 1
        if self.bar is not None:
            self.bar.advance(self.count)
        if self.file is not None:
            self.file.add(path, found)
        elif self.json:
            text = textwrap.indent(json.dumps(as_json(path, found), indent=2), "  ")
            print(",\n" if self.count > 1 else "\n", text, sep="", end="", flush=True)
        elif self.rows is not None:
            self.rows.writerows(as_rows(path, found))
            sys.stdout.flush()
        else:
            self.table[path] = found
            if len(self.table) == BLOCK:
                self._show()

    def _show(self) -> None:
        from report.screen import Report

        Report().predictions(self.table)
        self.table = {}

    def close(self) -> None:
        """The answers are complete, or all that there will be."""
        if self.bar is not None:
            self.bar.close_bar()
        if self.file is not None:
            self.file.close()
            there = f", {self.file.there:,} of them from before" if self.file.there else ""
            words = f"{self.count:,} of {self.total:,} pictures{there}"
            print(f"{printable(self.file.path)}: {words}")
        elif self.json:
            print("\n]" if self.count else "]", flush=True)
        elif self.rows is None and (self.table or not self.count):
            self._show()


def as_json(path: str, found: list[Answer]) -> dict:
    """A picture's answers as JSON has them."""
    each = [{"class": a.name, "index": a.index, "confidence": a.confidence} for a in found]
    return {"path": path, "predictions": each}


def as_rows(path: str, found: list[Answer]) -> list[list]:
    """A picture's answers as CSV has them."""
    rows = [[path, rank, *answer] for rank, answer in enumerate(found, 1)]
    return rows or [[path, "", "", "", ""]]  # many labels, of which it has none


class Kept:
    """A file of answers that outlives a kill: whole pictures only, and none of them twice.

    What made it stands beside it, in NAME.made-by.json: rows of other weights do not get into it.
    Raises UserError where the file is another's.
    """

    def __init__(self, path: Path, made_by: dict) -> None:
        self.path, self.csv = path, path.suffix == ".csv"
        self.classes = made_by["classes"]
        self.known: set[str] = set()  # short digests: a million names would be 100 MB
        beside = path.with_name(path.name + ".made-by.json")
        there = path.exists() and path.stat().st_size > 0
        if there and read_json(beside) != made_by:
            raise UserError(
                f"--out {path}: it was not made by these weights with these --top, --tta and "
                "--threshold; name another file, or delete it",
                code="answers-of-another",
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(beside, made_by)
            end = self._whole() if there else 0
            self.file: BinaryIO = path.open("r+b" if there else "wb", buffering=0)
            self.file.truncate(end)
            self.file.seek(0, os.SEEK_END)
            if self.csv and not self.file.tell():
                self._write(csv_text([HEAD]))
        except OSError as error:
            raise UserError(
                f"--out {path}: cannot be written ({error.strerror}); name another file",
                code="output-unwritable",
            ) from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--out {path}: holds lines that are no answers of this program; name another "
                "file, or delete it",
                code="answers-of-another",
            ) from None
        self.there = len(self.known)

    def _whole(self) -> int:
        """Where the last picture that is whole ends; those before it are known."""
        end, place, group = 0, 0, 0
        for record in records(self.path, quoted=self.csv):
            place += len(record)
            if not self.csv:
                name = json.loads(record)["path"]
            elif place == len(record):  # the head
                end = place
                continue
            else:
                group += 1
                if group < self.classes:
                    continue
                (row,) = csv.reader(io.StringIO(record.decode("utf-8"), newline=""))
                name, group = row[0], 0
            end = place
            self.known.add(digest(name.encode("utf-8", "backslashreplace")))
        return end

    def has(self, path: str) -> bool:
        """Whether the answers for a picture are in the file."""
        name = path if not self.csv else path.encode("utf-8", "backslashreplace").decode()
        return digest(name.encode("utf-8", "backslashreplace")) in self.known

    def add(self, path: str, found: list[Answer]) -> None:
        """A picture's lines, in one write."""
        one = json.dumps(as_json(path, found)) + "\n"
        self._write(csv_text(as_rows(path, found)) if self.csv else one)

    def _write(self, text: str) -> None:
        data = memoryview(text.encode("utf-8", "backslashreplace"))
        while data:
            data = data[self.file.write(data) :]

    def close(self) -> None:
        self.file.close()


def records(path: Path, quoted: bool) -> Iterator[bytes]:
    """The whole lines of a file; where fields are quoted, a line may go on in the next one."""
    with path.open("rb") as file:
        record = b""
        for line in file:
            record += line
            if not line.endswith(b"\n"):
                return
            if not quoted or record.count(b'"') % 2 == 0:
                yield record
                record = b""
