"""A folder of pictures with some of its labels changed: the old one stays as it was.

What is to change stands in a list as report/suspects.py writes it. Files are shared (hard links),
so the new folder takes no room, where the disk can do that.
"""

import csv
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.errors import UserError, all_of
from common.text import counted, nearest, printable, some

MOST_TOLD = 10  # mistakes


@dataclass(frozen=True)
class Change:
    """A picture that is labelled wrongly; suggested: its class, or "" to leave it out."""

    name: str
    given: str
    suggested: str


def read_changes(path: Path, rows: str | None = None) -> list[Change]:
    """The rows of a list with the columns name, given, suggested, by number from 1; all by default.

    Raises UserError.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", code="no-list") from None
    columns = ("name", "given", "suggested")
    if lines and (lacks := [name for name in columns if lines[0].get(name) is None]):
        raise UserError(
            f"{path} has no column {some(lacks)}; a list as report compare writes it begins with "
            "name,given,suggested",
            code="bad-list",
        )
    chosen = dict.fromkeys(range(1, len(lines) + 1)) if rows is None else numbers_of(rows)
    if not chosen or max(chosen) > len(lines):
        raise UserError(f"{path} has {counted(len(lines), 'row')}, not {rows}", code="bad-rows")
    changes = []
    for number, other in chosen.items():
        name, given, suggested = (lines[number - 1][column] or "" for column in columns)
        changes.append(Change(name, given, suggested if other is None else other))
    return changes


def numbers_of(text: str) -> dict[int, str | None]:
    """`3,12-15,7=bird,9=` as numbers from 1, each with the class that is typed for it. UserError.

    None: the one that is suggested; "": it is left out.
    """
    found: dict[int, str | None] = {}
    for word in text.split(","):
        place, equals, name = word.partition("=")
        first, dash, last = place.strip().partition("-")
        last = last if dash else first
        plain = all(part.isascii() and part.isdecimal() for part in (first, last))
        if not plain or not 1 <= int(first) <= int(last) < 10**7:
            raise UserError(
                f"--rows {text}: write numbers from 1, as 3,12-15 or, of another class, 7=bird, or "
                "9= to leave it out",
                code="bad-rows",
            )
        numbers = range(int(first), int(last) + 1)
        found |= dict.fromkeys(numbers, name.strip() if equals else None)
    return found


def write_corrected(folder: Path, changes: list[Change], out: Path) -> str:
    """The folder with these changes as another one, whole or not at all; what was done, in words.

    Raises UserError, before anything is written, where a change does not fit the folder.
    """
    if not folder.is_dir():
        raise UserError(f"--dataset {folder}: name a folder of folders of pictures", code="no-data")
    if os.path.lexists(out):
        raise UserError(f"--out {out} is there already: name a new folder", code="output-exists")
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out} lies in --dataset {folder}: name another", code="bad-out")
    to = targets(folder, changes)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    linked, copied = 0, 0
    try:
        for name in files_of(folder):
            if not (target := to.get(name, name)):
                continue
            (partial / target).parent.mkdir(parents=True, exist_ok=True)
            try:
                (partial / target).hardlink_to((folder / name).resolve())
                linked += 1
            except OSError:  # another disk, or one without links
                shutil.copy2(folder / name, partial / target)
                copied += 1
        partial.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}", code="output-unwritable") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    moved = sum(bool(target) for target in to.values())
    how = f"{copied:,} copied" if not linked else f"{linked:,} shared with it, which take no room"
    return (
        f"{printable(out)}: {counted(linked + copied, 'file')}, {how}; {moved:,} in another class, "
        f"{len(to) - moved:,} left out; {printable(folder)} is as it was"
    )


def files_of(folder: Path) -> Iterator[str]:
    """All files below a folder, by their names from it on."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            yield (Path(place) / name).relative_to(folder).as_posix()


def targets(folder: Path, changes: list[Change]) -> dict[str, str]:
    """Where each picture goes, by the name that it has; "" for one that is left out."""
    found: dict[str, str] = {}
    problems: list[UserError] = []

    def wrong(message: str) -> None:
        problems.append(UserError(message, code="other-list"))

    for change in changes:
        path = PurePosixPath(change.name)
        name = printable(change.name)
        parts = list(path.parts[:-1])
        if change.given not in parts or path.is_absolute() or ".." in parts:
            wrong(f"{name} does not lie in a folder {printable(change.given)}: labels that stand "
                  "in a table are changed there")  # fmt: skip
            continue
        place = len(parts) - 1 - parts[::-1].index(change.given)
        beside = folder.joinpath(*parts[:place])
        classes = sorted(one.name for one in beside.iterdir()) if beside.is_dir() else []
        if not (folder / change.name).is_file():
            wrong(f"{name} is not in {printable(folder)}")
        elif change.suggested and change.suggested not in classes:
            near = nearest(change.suggested, classes)
            hint = f" (did you mean {printable(near)}?)" if near else ""
            wrong(f"{name}: there is no class {printable(change.suggested)}{hint}")
        elif change.name in found:
            wrong(f"{name} stands there twice")
        else:
            parts[place] = change.suggested
            target = PurePosixPath(*parts, path.name)
            if change.suggested != change.given and (folder / target).exists():
                target = target.with_name(f"{change.given}-{path.name}")
            found[change.name] = str(target) if change.suggested else ""
    if problems:
        raise all_of(problems[:MOST_TOLD])
    return found
