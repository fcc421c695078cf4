"""Class folders: one subfolder of images per class, with or without a test folder beside train."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from common.text import class_name, printable, some
from data.files import SUFFIXES, Made, Records
from data.image_set import LeftOut
from data.sources.layout import Layout
from data.sources.walk import entries, identity, is_folder, once, walk
from data.splits import AS_IT_IS, Wanted, arranged, split_word, test_and_val

MOST_ASKED = 64  # folders of a level that a hint looks into
NO_CLASS = {"unknown", "unlabeled", "unlabelled", "images", "all", "test"}  # what holds no labels


@dataclass
class Splits:
    """The folders that hold class folders, by split: {"": root} where there are none."""

    bases: dict[str, Path]
    unused: list[Path] = field(default_factory=list)  # other folders beside them
    unlabelled: list[Path] = field(default_factory=list)  # splits without class folders
    notes: list[str] = field(default_factory=list)


def read_class_folders(root: Path, wanted: Wanted = AS_IT_IS) -> Records:
    """root/<class>/**.png, or root/train/<class>/... beside root/test or root/val.

    Without a test folder a fifth of the files becomes the test set, chosen by a hash of their
    names: adding files moves no other. Links are followed, each file is taken once.
    """
    root, left = root.resolve(), LeftOut()
    splits = find_splits(root)
    train = splits.bases.get("train", root)
    above = (*root.parents, root, *splits.bases.values())
    below = {base: _below(base, above, root, left) for base in splits.bases.values()}
    classes = tuple(dict.fromkeys(class_name(folder.name) for folder in below[train]))
    if len(classes) < 2:
        raise _too_few(train, classes)
    found, names = [], []
    for split, base in splits.bases.items():
        for folder in below[base]:
            name = class_name(folder.name)
            if name not in classes:
                raise UserError(
                    f"the class folder {printable(folder)} has no partner in {printable(train)}: "
                    "training would never see that class; add training images or remove it.",
                    code="class-without-partner",
                )
            prefix = f"{folder.relative_to(root).as_posix()}/"
            inside = walk(folder, prefix, left, (root, base))
            if not inside and base == train:
                raise _empty(folder)
            names += inside
            found += [(classes.index(name), split)] * len(inside)
    _refuse_two_levels(train, root, names)
    for base in {root, *splits.bases.values()}:
        _loose(base, root, left)
    for folder in splits.unlabelled:
        _count(folder, root, left, "without a label")
    for folder in splits.unused:
        _count(folder, root, left, "in no split that is used")
    kept = once(root, names, left)
    labels, sides = zip(
        *(pair for pair, keep in zip(found, kept, strict=True) if keep), strict=True
    )
    names = [name for name, keep in zip(names, kept, strict=True) if keep]
    records = Records(
        Made(names, lambda name: root / name), Made(names, lambda name: printable(root / name)),
        list(labels),
        [side == "test" for side in sides], classes, names, [side == "val" for side in sides],
        left_out=left.reasons, notes=(*splits.notes, *_one_too_deep(root)), root=root,
    )  # fmt: skip
    return arranged(records, wanted)


def _below(base: Path, above: Sequence[Path], root: Path, left: LeftOut) -> list[Path]:
    """The class folders in a folder: a link to where all of them lie is none, and is counted."""
    there, found = {identity(path) for path in above}, []
    for folder in subfolders(base):
        if not folder.is_symlink() or identity(folder) not in there:
            found.append(folder)
        else:
            left.add("folders that were there already", f"{folder.relative_to(root).as_posix()}/")
    return found


def subfolders(path: Path) -> list[Path]:
    """The folders in a folder, by their names as classes; hidden ones are none."""
    if not is_folder(path):
        return []
    return sorted(filter(is_folder, entries(path)), key=lambda folder: class_name(folder.name))


def find_splits(root: Path) -> Splits:
    """Which folders of a data set are its splits; a class may be called train, too."""
    named, others = defaultdict(list), []
    for folder in subfolders(root):
        word = split_word(folder.name)
        (named[word] if word else others).append(folder)
    if "train" not in named:
        return Splits({"": root})
    train, *more = named.pop("train")
    beside = [folder for folders in named.values() for folder in folders]
    if not subfolders(train):
        if beside and not others:
            raise UserError(
                f"{printable(train)} holds no class folders: give each class a folder in it (as "
                f"{printable(train / 'cat')}), or put a metadata.csv with the columns file_name "
                "and label beside the pictures.",
                code="flat-folders",
            )
        return Splits({"": root})
    if others and not beside:
        others = [folder for folder in others if _some_picture(folder)]
    if others and not beside:
        inside = some([folder.name for folder in subfolders(train)], 3)
        names = some([folder.name for folder in others], 3)
        if len(others) == 1:
            raise UserError(
                f"is {printable(train)} (with {inside}) a class, like {names} beside it, or what "
                f"to train on? To train on it type --dataset {printable(train)}; if it is a class, "
                "move its pictures out of their subfolders.",
                code="train-or-class",
            )
        note = (
            f"{printable(train.name)} is taken for a class, like {names}: no test or validation "
            f"folder stands beside it; --dataset {printable(train)} trains on its {inside}"
        )
        return Splits({"": root}, notes=[note])
    splits = Splits({"train": train}, unused=[*others, *more])
    there, flat = {}, {}
    for word, folders in named.items():
        usable = [folder for folder in folders if _has_classes(folder, train)]
        splits.unlabelled += [folder for folder in folders if folder not in usable]
        if usable:
            there[word] = usable[0]
            splits.unused += usable[1:]
        else:
            flat[word] = folders[0]
    which = test_and_val(there)
    for word, folder in there.items():
        splits.bases[which[word]] = folder
    tester = "a fifth of the training images"
    if base := splits.bases.get("test"):
        tester = f"{printable(base.name)}/"
    splits.notes += [
        f"{printable(folder)} has no labels (no class folders as in {printable(train.name)}/) and "
        f"is left out; {tester} tests"
        for folder in flat.values()
    ]
    return splits


def _has_classes(folder: Path, train: Path) -> bool:
    names = [class_name(inner.name) for inner in subfolders(folder)]
    known = {class_name(inner.name) for inner in subfolders(train)}
    all_in_one = len(names) == 1 and names[0] not in known and names[0].casefold() in NO_CLASS
    return bool(names) and not all_in_one


def _some_picture(folder: Path) -> bool:
    return any(
        Path(name).suffix.lower() in SUFFIXES for _, _, files in os.walk(folder) for name in files
    )


def _loose(base: Path, root: Path, left: LeftOut) -> None:
    """Count the files that lie between the class folders."""
    for path in entries(base):
        if not is_folder(path):
            picture = path.suffix.lower() in SUFFIXES
            reason = "in no class folder" if picture else "of another suffix"
            left.add(reason, path.relative_to(root).as_posix())


def _count(folder: Path, root: Path, left: LeftOut, reason: str) -> None:
    for name in walk(folder, f"{folder.relative_to(root).as_posix()}/", left, (root,), False):
        left.add(reason, name)


# --- sentences -----------------------------------------------------------------------------------


def _too_few(base: Path, classes: tuple[str, ...]) -> UserError:
    where = printable(base)
    lists = [path.name for path in entries(base) if path.suffix.lower() in (".csv", ".tsv")]
    if deeper := _deeper(base):
        hint = f"the class folders lie deeper: type --dataset {printable(deeper)}."
    elif (lists and not classes) or len(lists) > 1:
        hint = (
            f"if {some(sorted(lists), 3)} names the pictures and their classes, call it "
            "metadata.csv; else give the folder that holds one subfolder of images per class."
        )
    elif not classes and len(subfolders(base.parent)) > 1:
        names = some([folder.name for folder in subfolders(base.parent)], 3)
        hint = f"the folder above holds {names}: type --dataset {printable(base.parent)}."
    else:
        hint = "give the folder that holds one subfolder of images per class."
    return UserError(
        f"{where} has {len(classes)} class folder(s), and telling classes apart takes two: {hint}",
        code="too-few-classes",
    )


def _deeper(base: Path, levels: int = 4) -> Path | None:
    """The first folder below that holds several folders, the nearest one; links lead nowhere."""
    near = [base]
    for _ in range(levels):
        near = [f for folder in near for f in subfolders(folder) if not f.is_symlink()][:MOST_ASKED]
        for folder in near:
            if sum(not inner.is_symlink() for inner in subfolders(folder)) > 1:
                return folder
    return None


def _empty(folder: Path) -> UserError:
    suffixes = ", ".join(sorted(SUFFIXES))
    beside = next((f for f in subfolders(folder.parent) if f != folder and not _loose_in(f)), None)
    hint = "add some or remove the folder."
    if beside and len(subfolders(beside)) > 1:
        hint += f" Or do the classes lie in {printable(beside)}? Then type --dataset with that."
    return UserError(
        f"the class folder {printable(folder)} holds no images ({suffixes}): {hint}",
        code="empty-class",
    )


def _loose_in(folder: Path) -> bool:
    return any(path.suffix.lower() in SUFFIXES for path in entries(folder))


def _refuse_two_levels(train: Path, root: Path, names: list[str]) -> None:
    """UserError where every class folder holds the same folders, and those hold the pictures."""
    depth, inside = len(train.relative_to(root).parts), defaultdict(set)
    for name in names:
        parts = name.split("/")
        if parts[:depth] == list(train.relative_to(root).parts):
            inside[parts[depth]].add(parts[depth + 1] if len(parts) > depth + 2 else "")
    folders, (first, *others) = list(inside), inside.values()
    if "" in first or len(first) < 2 or any(one != first for one in others):
        return
    raise UserError(
        f"the folders {some(folders, 3)} in {printable(train)} all hold {some(sorted(first), 3)}: "
        "if they are splits call them train and test, if they are data sets of their own type "
        f"--dataset {printable(train / folders[0])}.",
        code="several-data-sets",
    )


def _one_too_deep(root: Path) -> list[str]:
    """A sentence where the folder is the training part of a data set that has another one."""
    if split_word(root.name) != "train":
        return []
    try:
        others = [f for f in subfolders(root.parent) if split_word(f.name) in ("test", "val")]
    except UserError:  # of no concern here
        return []
    beside = [folder for folder in others if _has_classes(folder, root)]
    if not beside:
        return []
    return [
        f"a fifth of {printable(root)} tests; {printable(beside[0].name)} stands beside it: "
        f"--dataset {printable(root.parent)} tests on that"
    ]


def _holds(path: Path) -> bool:
    return is_folder(path) and (bool(subfolders(path)) or _loose_in(path))


FOLDER = Layout("class folders", _holds, listing=read_class_folders)
