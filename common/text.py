"""Words for a screen, a page or a file name: cleaned, shortened, read and written."""

import difflib
import os
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.errors import UserError


def printable(text: object) -> str:
    r"""Text from outside (class names, paths) with control characters escaped, as \x1b.

    Nothing that is left can move a cursor, turn the direction of writing or break a line.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def file_name(text: str) -> str:
    """The last part of a path, a hub name or FILE.py:Class as a plain file name."""
    stem = Path(text.replace(":", "/")).name or "data"
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in stem)


def class_name(text: str | int | float) -> str:
    r"""The name of a class in one Unicode form (NFC): macOS stores é as e and an accent.

    A folder's bytes that are no UTF-8 (of an old archive), or that the locale does not know, came
    as halves of characters, which nothing can write: they are read again, or stand as \xe9.
    """
    name = str(text)
    if any("\ud800" <= character <= "\udfff" for character in name):
        try:
            raw = name.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # half a character that JSON wrote
            raw = name.encode("utf-8", "backslashreplace")
        name = raw.decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", name)


def places(names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """Where each class stands among known ones, by its name; None: nowhere, or there twice."""
    if list(names) == list(known):
        return list(range(len(known)))
    once = {name: place for place, name in enumerate(known)}
    twice = {name for name, count in (Counter(names) + Counter(known)).items() if count > 2}
    return [None if name in twice else once.get(name) for name in names]


def some(names: Sequence[str], most: int = 10) -> str:
    """Names in a row for a sentence; of many the first ones and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more


def counted(count: int, thing: str) -> str:
    """`1 epoch`, `2,000 images`, `3 classes`: a count and what is counted."""
    several = thing + ("es" if thing.endswith("s") else "s")
    return f"{count:,} {thing if count == 1 else several}"


def both_sides(one: str, names: Sequence[str], other: str, others: Sequence[str]) -> str:
    """Two lists of classes that do not match, and what only one of them has."""
    only = [name for name in names if name not in set(others)]
    missing = [name for name in others if name not in set(names)]
    both = f"{one} {some(names)}; {other} {some(others)}"
    parts = [f"only the former: {some(only)}"] * bool(only)
    parts += [f"only the latter: {some(missing)}"] * bool(missing)
    return f"{both} ({'; '.join(parts) or 'some of them twice'})"


def found_from_here(script: str) -> str:
    """A file of this program as it is typed in the present folder."""
    path = str(Path(__file__).resolve().parent.parent / script)
    try:
        return min(os.path.relpath(path), path, key=len)
    except (ValueError, OSError):  # another drive; the present folder was deleted
        return path


def pasted(script: str, *words: object) -> str:
    """`python SCRIPT WORDS` as it works where this program was started, every word quoted."""
    return shlex.join(["python", found_from_here(script), *map(str, words)])


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is most like this one; "" when none is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), "")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean alexnet?)', or '' when nothing known is near."""
    near = nearest(word, known)
    return f" (did you mean {near}?)" if near else ""


def not_permitted(path: Path | str) -> UserError:
    """The sentence for a folder that this user may not look into."""
    where = printable(path)
    return UserError(
        f"the folder {where} may not be read (permission): ask its owner, or type chmod -R u+rX "
        f"{where} if it is yours.",
        code="not-permitted",
    )


def in_bytes(count: int) -> str:
    """`1.3 GB`, `20.0 MB`, `7 kB`."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.0f} kB"


def percent(fraction: float) -> str:
    """0.4567 as `45.67 %`."""
    return f"{100 * fraction:.2f} %"


def duration(seconds: float) -> str:
    """12s, 4m10s, 3h05m."""
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"


def seconds(text: str) -> float:
    """`3h50m`, `90s`, `1d` or `1:30:00` as seconds."""
    if re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text) and text:
        units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
        total = sum(int(n) * units[u] for n, u in re.findall(r"(\d+)([dhms])", text))
    elif re.fullmatch(r"\d+(:\d\d){1,2}", text):
        total = 0
        for part in text.split(":"):
            total = total * 60 + int(part)
    else:
        total = 0
    if total <= 0:
        raise UserError(
            f"{text}: not a length of time; write 3h50m, 90s or 1:30:00", code="bad-duration"
        )
    return float(total)
