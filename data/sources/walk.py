"""Every file below a folder, once: links followed, and what is no picture counted by reason."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from common.text import not_permitted
from data.files import SUFFIXES
from data.image_set import LeftOut

DROPPINGS = {".ds_store", "thumbs.db", "desktop.ini"}  # of file managers: nobody's pictures
HIDDEN = (".", "__MACOSX")  # macOS leaves ._picture.jpg beside picture.jpg, and in an archive

Identity = tuple[int, int]  # device and inode


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that people do not see."""
    return name.startswith(HIDDEN)


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, hidden things left out."""
    try:
        return [path for path in folder.iterdir() if not is_hidden(path.name)]
    except PermissionError:
        raise not_permitted(folder) from None


def is_folder(path: Path) -> bool:
    """Whether it is one, also by a link; what cannot be asked is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def walk(
    folder: Path, below: str, left: LeftOut, above: Sequence[Path] = (), strict: bool = True,
    known: Collection[str] = (),
) -> list[str]:  # fmt: skip
    """The pictures below a folder, sorted, named from `below` on ("" or a path that ends in /).

    Links are followed wherever they lead, into each folder once; `above` are folders that lead
    here, `known` files that serve another purpose. A folder that may not be read is an error, or
    counted where `strict` is False.
    """
    seen = {identity(path) for path in (folder, *above)}
    waiting, found = [(str(folder), below, False, folder.is_symlink())], []
    while waiting:
        place, name, hidden, behind = waiting.pop()
        try:
            with os.scandir(place) as listed:
                inside = list(listed)
        except PermissionError:
            if strict and not hidden:
                raise not_permitted(place) from None
            left.add("may not be read", name)
            continue
        for entry in inside:
            here, unseen = name + entry.name, hidden or is_hidden(entry.name)
            try:
                is_dir, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_dir = is_file = False
            if is_dir and identity(entry.path) in seen:
                left.add("folders that were there already", f"{here}/")
            elif is_dir:
                seen.add(identity(entry.path))
                waiting.append((entry.path, f"{here}/", unseen, behind or entry.is_symlink()))
            elif entry.name.lower() in DROPPINGS or here in known:
                continue
            elif not is_file:
                left.add("dead links" if entry.is_symlink() else "no plain files", here)
            elif unseen:
                left.add("hidden", here)
            elif suffix_of(entry.name) not in SUFFIXES:
                left.add("of another suffix", here)
            else:
                found.append(here)
                if behind or entry.is_symlink():
                    left.linked.add(here)
    return sorted(found)


def suffix_of(name: str) -> str:
    """The suffix of a file's name in small letters, as of Path, and faster."""
    stem, dot, suffix = name.rpartition(".")
    return f"{dot}{suffix}".lower() if stem else ""


def identity(path: str | Path) -> Identity:
    """What tells whether two paths lead to one file or folder."""
    status = Path(path).stat()
    return status.st_dev, status.st_ino


def once(root: Path, names: Sequence[str], left: LeftOut) -> list[bool]:
    """Which of these paths below a root to keep: not a link to a file that is there anyway."""
    if not left.linked:
        return [True] * len(names)
    status = [identity(root / name) for name in names]
    there = {one for name, one in zip(names, status, strict=True) if name not in left.linked}
    keep = []
    for name, one in zip(names, status, strict=True):
        again = name in left.linked and one in there
        keep.append(not again)
        if again:
            left.add("links to pictures that were there already", name)
        there.add(one)
    return keep
