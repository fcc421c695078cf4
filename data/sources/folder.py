"""Class folders: one subfolder of images per class, with or without a test folder beside train."""

import os
from pathlib import Path

from common.text import class_name, printable
from data.files import SUFFIXES, TEST_NAMES, Records, decode_records, keyed_split
from data.image_set import Decoded
from data.scan import Scanned
from data.sources.layout import Layout
from errors import UserError


def read_class_folders(root: Path) -> Records:
    """root/<class>/**.png, or root/train/<class>/... beside root/test (or val).

    Without a test folder a fifth of the files becomes the test set, chosen by a hash of their
    names: adding files moves no other. Links that lead out of the folder are left out.
    """
    root = root.resolve()
    train, test = root, None
    if _subfolders(root / "train"):
        train = root / "train"
        test = next((root / name for name in TEST_NAMES if _subfolders(root / name)), None)
    classes = tuple(dict.fromkeys(class_name(folder.name) for folder in _subfolders(train)))
    if len(classes) < 2:
        raise UserError(
            f"{printable(train)} has {len(classes)} class folder(s), and telling classes apart "
            "takes two: give the folder that holds one subfolder of images per class.",
            code="too-few-classes",
        )
    paths, labels, is_test = [], [], []
    for base in filter(None, (train, test)):
        for folder in _subfolders(base):
            if class_name(folder.name) not in classes:
                raise UserError(
                    f"the class folder {printable(folder)} has no partner in {printable(train)}: "
                    "training would never see that class; add training images or remove it.",
                    code="class-without-partner",
                )
            found = _images_below(folder, root)
            if not found:
                raise UserError(
                    f"the class folder {printable(folder)} holds no images "
                    f"({', '.join(sorted(SUFFIXES))}; links that lead out of the data set do not "
                    "count): add some or remove the folder.",
                    code="empty-class",
                )
            paths += found
            labels += [classes.index(class_name(folder.name))] * len(found)
            is_test += [base == test] * len(found)
    if test is None:
        keys = [os.fsencode(path.relative_to(root).as_posix()) for path in paths]
        is_test = keyed_split(keys, labels)
    return Records(list(paths), [printable(path) for path in paths], labels, is_test, classes)


def _subfolders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    root = path.resolve()
    return sorted(
        (
            entry
            for entry in path.iterdir()
            if not entry.name.startswith(".") and entry.is_dir() and _inside(entry, root)
        ),
        key=lambda entry: class_name(entry.name),
    )


def _images_below(folder: Path, root: Path) -> list[Path]:
    found = (
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not path.name.startswith(".")  # macOS leaves ._picture.jpg beside picture.jpg
        and path.is_file()
        and _inside(path, root)
    )
    return sorted(found, key=lambda path: path.as_posix())


def _inside(path: Path, root: Path) -> bool:
    return not path.is_symlink() or path.resolve().is_relative_to(root)


def read(path: Path, image_size: int | None, skip_bad: bool) -> Decoded | Scanned:
    """The pictures of a folder, decoded; the folder's names are the classes."""
    return decode_records(read_class_folders(path), image_size, skip_bad)


FOLDER = Layout(
    "class folders",
    lambda path: bool(_subfolders(path)),
    lambda path: _images_below(path, path.resolve()),
    read,
)
