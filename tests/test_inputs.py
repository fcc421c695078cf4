"""Laws of what goes in: every file counted, splits that stay, labels from lists, the cache."""

import csv
import os
import re
import shutil
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from launches import Done, rows, train
from PIL import Image
from refusals import refused

from data import cache, files
from data.__main__ import main
from data.image_set import Source
from data.photographs import FileStore, PhotoSet
from data.sources import load_source
from data.sources.folder import read_class_folders
from data.splits import (
    Wanted,
    divided,
    keyed_split,
    names_of,
    read_split,
    rows_of,
    split_validation,
)
from training.data import excluded

ODD = unicodedata.normalize("NFC", "éclair 日本")


@pytest.fixture(autouse=True)
def own_caches_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LOCKSTEP_CACHE_SIZE", raising=False)


def draw(folder: Path, count: int, first: int = 0, suffix: str = ".png") -> Path:
    """So many different pictures in a folder: 000.png, 001.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([len(str(folder)), first, *os.fsencode(folder.name)])
    for number in range(first, first + count):
        pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}{suffix}")
    return folder


@pytest.fixture
def pets(tmp_path):
    """Two classes of twenty pictures, without splits."""
    for name in ("cat", "dog"):
        draw(tmp_path / "pets" / name, 20)
    return tmp_path / "pets"


def load(folder: Path, **options) -> Source:
    return load_source(str(folder), image_size=8, **options)


def reasons(source: Source) -> dict[str, tuple[int, str]]:
    assert source.tally is not None
    return source.tally.left_out


def notes(source: Source) -> str:
    return "\n".join(source.notes)


# --- every file in or out ------------------------------------------------------------------------


def test_every_file_is_used_or_left_out_for_a_reason_with_an_example(pets, capsys):
    assert str(load(pets).tally) == "40 pictures found, all used"
    (pets / "cat" / "._000.png").write_bytes(b"x")
    draw(pets / "dog" / ".thumbs", 3)
    (pets / "cat" / "notes.txt").write_text("x")
    (pets / "cat" / "gone.png").symlink_to(pets / "nowhere.png")
    (pets / "cat" / "itself.png").symlink_to(pets / "cat" / "itself.png")
    draw(pets, 2)
    (pets / "dog" / "bad.png").write_bytes(b"no picture")
    (pets / "cat" / ".DS_Store").write_bytes(b"nobody counts it")
    source = load(pets, skip_bad_images=True)
    found = reasons(source)
    assert {reason: count for reason, (count, _) in found.items()} == {
        "hidden": 4, "of another suffix": 1, "dead links": 2, "in no class folder": 2, "damaged": 1,
    }  # fmt: skip
    assert source.tally.used == len(source.train) + len(source.test) == 40
    assert found["damaged"][1] == "dog/bad.png" and found["of another suffix"][1] == "cat/notes.txt"
    (pets / "cat" / "notes.txt").unlink()  # the pictures come from the cache, the count does not
    assert "of another suffix" not in reasons(load(pets, skip_bad_images=True))
    assert main(["stats", "--dataset", str(pets), "--skip-bad-images"]) == 0
    out = capsys.readouterr().out
    assert "files 49 found, 40 used; left out: " in out and "1 damaged (dog/bad.png)" in out


def test_links_are_followed_also_out_of_the_folder_each_file_once_and_cycles_end(pets, tmp_path):
    store = draw(tmp_path / "store" / "eel", 5)
    (pets / "eel").symlink_to(store)
    draw(tmp_path / "store" / "far", 1, 900)
    (pets / "cat" / "far.png").symlink_to(tmp_path / "store" / "far" / "900.png")
    (pets / "cat" / "again.png").symlink_to(pets / "cat" / "000.png")
    (pets / "dog" / "more").symlink_to(draw(tmp_path / "store" / "more", 3))
    (pets / "dog" / "up").symlink_to(pets)
    (pets / "dog" / "here").symlink_to(pets / "dog")
    source = load(pets)
    assert source.classes == ("cat", "dog", "eel")
    assert source.tally.used == 40 + 5 + 3 + 1
    assert (
        reasons(source)
        == {
            "folders that were there already": (2, "dog/up/"),
            "links to pictures that were there already": (1, "cat/again.png"),
        }
        or reasons(source)["folders that were there already"][1] == "dog/here/"
    )


def test_a_link_to_where_the_classes_lie_is_no_class_and_leads_no_hint_astray(pets):
    (pets / "all").symlink_to(pets)
    source = load(pets)
    assert source.classes == ("cat", "dog")
    assert reasons(source) == {"folders that were there already": (1, "all/")}
    shutil.rmtree(pets / "dog")
    draw(pets.parent / "one" / "a", 1)
    draw(pets.parent / "two", 1)
    for number, place in enumerate((pets, pets, pets.parent)):
        (pets / "cat" / f"up {number}").symlink_to(place)
    with refused("too-few-classes", match="has 1 class folder.*one subfolder of images per class"):
        load(pets)


def test_a_split_of_links_into_one_store_is_a_data_set(tmp_path):
    root = tmp_path / "set"
    for name in ("cat", "dog"):
        store = draw(root / "all" / name, 6)
        for split, numbers in (("train", range(4)), ("test", range(4, 6))):
            (root / split / name).mkdir(parents=True)
            for number in numbers:
                (root / split / name / f"{number:03d}.png").symlink_to(store / f"{number:03d}.png")
    source = load(root)
    assert (len(source.train), len(source.test)) == (8, 4)
    assert reasons(source) == {"in no split that is used": (12, "all/cat/000.png")}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="takes root")
@pytest.mark.parametrize("what", ["dog", "dog/deep", "dog/000.png", ""])
def test_what_may_not_be_read_is_told_as_that(pets, what, capsys, monkeypatch):
    draw(pets / "dog" / "deep", 2, 50)
    with tempfile.TemporaryDirectory() as open_to_all:  # pytest's folders are not
        Path(open_to_all).chmod(0o777)
        monkeypatch.setenv("LOCKSTEP_CACHE", f"{open_to_all}/cache")
        pets = Path(shutil.copytree(pets, f"{open_to_all}/pets"))
        for path in (pets, *pets.rglob("*")):
            os.chown(path, 1000, 1000)
        (pets / what).chmod(0)
        _told_as_not_permitted(pets, what, capsys)


def _told_as_not_permitted(pets: Path, what: str, capsys: pytest.CaptureFixture) -> None:
    for words in ([], ["--skip-bad-images"]):
        os.seteuid(1000)  # another user, in this process
        try:
            status = main(["stats", "--dataset", str(pets), *words])
        finally:
            os.seteuid(0)
        told = capsys.readouterr()
        if what == "dog/000.png" and words:
            assert status == 0 and "1 may not be read (dog/000.png)" in told.out
        else:
            assert status == 2 and told.err.count("\n") == 1
            assert "ermission" in told.err and str(pets / what) in told.err


def test_formats_and_suffixes_in_any_case(tmp_path):
    for name in ("cat", ODD):
        folder = tmp_path / "set" / name
        for number, suffix in enumerate((".PNG", ".Jpg", ".tif", ".TIFF", ".bmp")):
            draw(folder, 1, number, suffix)
    source = load(tmp_path / "set")
    assert source.tally.used == 10 and not reasons(source)
    assert source.classes == ("cat", ODD)
    assert {name.rpartition("/")[0] for name in source.names["train"]} == {"cat", ODD}


@pytest.mark.skipif("AVIF" not in files.FORMATS, reason="this Pillow has no AVIF")
def test_avif_is_read(pets):
    draw(pets / "cat", 1, 99, ".avif")
    assert load(pets).tally.used == 41


def test_heic_without_its_package_is_named_and_with_it_is_opened(pets, monkeypatch):
    monkeypatch.setattr(files, "FORMATS", tuple(f for f in files.FORMATS if f != "HEIF"))
    (pets / "cat" / "phone.HEIC").write_bytes(b"x")
    with refused("no-heic", match=r"phone.HEIC .*pip install pillow-heif"):
        load(pets)
    assert reasons(load(pets, skip_bad_images=True)) == {"damaged": (1, "cat/phone.HEIC")}
    opened = []
    module = type(sys)("pillow_heif")
    module.register_heif_opener = lambda: opened.append(1)
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    monkeypatch.setattr(files, "FORMATS", ("PNG", "HEIF"))
    (pets / "cat" / "phone.HEIC").write_bytes((pets / "cat" / "000.png").read_bytes())
    load(pets)
    assert opened == [1]


# --- which folder is what ------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "validation"), ("TRAIN", "Dev")])
def test_split_folders_by_any_of_their_names(tmp_path, names):
    for split, count in zip(names, (6, 2), strict=True):
        for name in ("cat", "dog"):
            draw(tmp_path / "set" / split / name, count, 10 * count)
    source = load(tmp_path / "set")
    assert (len(source.train), len(source.test)) == (12, 4)
    assert source.held_out is None and source.classes == ("cat", "dog")


def test_val_beside_test_validates_and_is_part_of_the_fingerprint(tmp_path):
    root = tmp_path / "set"
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        for name in ("cat", "dog"):
            draw(root / split / name, count, 10 * count)
    source = load(root)
    places = divided(source, 0, 0.0, seed=0)
    assert {split: len(chosen) for split, chosen in places.items()} == {
        "train": 12, "val": 6, "test": 4,
    }  # fmt: skip
    rows = rows_of(source, places)
    assert all(name.split("/")[0] == split for name, split, _ in rows) and len(rows) == 22
    with refused("contradiction", match="validation split of 6"):
        divided(source, 0, 0.1, seed=0)
    (root / "val").rename(root / "more")
    (root / "more").rename(root / "VALID")
    assert load(root).fingerprint == source.fingerprint
    for name in ("cat", "dog"):
        for path in (root / "VALID" / name).iterdir():
            path.rename(root / "train" / name / path.name)
    (root / "VALID" / "cat").rmdir()
    (root / "VALID" / "dog").rmdir()
    assert load(root).fingerprint != source.fingerprint


def test_a_class_may_be_called_train_and_one_folder_beside_it_is_a_question(tmp_path):
    root = tmp_path / "vehicles"
    for name in ("bus", "car", "train/day", "train/night"):
        draw(root / name, 8)
    source = load(root)
    assert source.classes == ("bus", "car", "train")
    assert "train is taken for a class, like bus, car" in notes(source)
    shutil.rmtree(root / "car")
    with refused("train-or-class", match=r"--dataset .*vehicles/train"):
        load(root)
    shutil.rmtree(root / "bus")
    (root / "docs").mkdir()  # without a picture it is no class
    assert load(root).classes == ("day", "night")


def test_flat_folders_without_labels_are_told_and_no_class(tmp_path):
    root = tmp_path / "kaggle"
    for name in ("cat", "dog"):
        draw(root / "train" / name, 20)
    draw(root / "test", 7)
    source = load(root)
    assert len(source.train) + len(source.test) == 40
    assert "test has no labels" in notes(source) and "a fifth of the training" in notes(source)
    assert reasons(source) == {"without a label": (7, "test/000.png")}
    (root / "test").rename(root / "x")
    (root / "test").mkdir()
    (root / "x").rename(root / "test" / "unknown")
    assert reasons(load(root)) == {"without a label": (7, "test/unknown/000.png")}
    shutil.rmtree(root / "train" / "cat")
    shutil.rmtree(root / "train" / "dog")
    draw(root / "train", 4)
    with refused("flat-folders", match="metadata.csv"):
        load(root)


def test_one_level_too_high_or_too_deep_says_which_path_to_type(pets, tmp_path):
    with refused("too-few-classes", match=rf"deeper: type --dataset {pets}\.$"):
        load(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    pets = pets.rename(tmp_path / "a" / "b" / "pets")
    with refused("too-few-classes", match=rf"deeper: type --dataset {pets}\.$"):
        load(tmp_path)
    (tmp_path / "a" / "notes").mkdir()
    (tmp_path / "a" / "notes" / "todo.txt").write_text("")
    (tmp_path / "a" / "b" / "pets").rename(tmp_path / "a" / "pets")
    shutil.rmtree(tmp_path / "a" / "b")
    pets = tmp_path / "a" / "pets"
    with refused("empty-class", match=rf"Or do the classes lie in {pets}\?"):
        load(tmp_path / "a")
    with refused("too-few-classes", match=rf"holds cat, dog: type --dataset {pets}\.$"):
        load(pets / "cat")
    splits = tmp_path / "splits"
    splits.mkdir()
    pets.rename(splits / "train")
    shutil.copytree(splits / "train", splits / "test")
    assert f"--dataset {splits} tests on that" in notes(load(splits / "train"))
    (splits / "train").rename(splits / "seg_train")
    (splits / "test").rename(splits / "seg_test")
    with refused("several-data-sets", match="call them train and test"):
        load(splits)


def test_a_class_without_a_picture_to_learn_from_or_to_test_is_named(tmp_path):
    for split, names in (("train", ("ant", "bee", "cow")), ("test", ("ant", "bee"))):
        for name in names:
            draw(tmp_path / "set" / split / name, 3, 10 * len(names))
    assert "no test picture that can be read is of class cow" in notes(load(tmp_path / "set"))
    draw(tmp_path / "set" / "test" / "cow", 1, 70)
    for path in (tmp_path / "set" / "train" / "cow").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    told = notes(load(tmp_path / "set", skip_bad_images=True))
    assert "no training picture that can be read is of class cow" in told


def test_the_same_picture_on_both_sides_or_in_two_classes_is_told_with_an_example(tmp_path):
    root = tmp_path / "set"
    for name in ("ant", "bee"):
        draw(root / "train" / name, 8)
        draw(root / "test" / name, 4, 100)
    assert not load(root).notes
    for number in range(3):
        shutil.copy(root / f"train/ant/00{number}.png", root / f"test/ant/copy-{number}.png")
    shutil.copy(root / "train/ant/005.png", root / "train/bee/same.png")
    told = notes(load(root))
    assert "3 test pictures stand also in training" in told
    assert "(test/ant/copy-0.png is train/ant/000.png)" in told
    assert "1 picture stands in two classes" in told and "train/bee/same.png" in told
    draw(root / "val" / "ant", 2, 200)
    shutil.copytree(root / "val" / "ant", root / "val" / "bee")
    for path in (root / "val" / "bee").iterdir():
        path.write_bytes((root / "test" / "bee" / "100.png").read_bytes() + path.name.encode())
    shutil.copy(root / "test/bee/101.png", root / "val/bee/same.png")
    assert "1 test picture stands also in validation" in notes(load(root))
    shutil.rmtree(root / "val")
    # A size that they share is no proof, nor is the middle.
    for side, level in (("train", 0), ("test", 255)):
        pixels = np.full((8, 8, 3), 77, dtype=np.uint8)
        pixels[-1] = level  # what a BMP has first
        Image.fromarray(pixels).save(root / side / "ant" / "twin.bmp")
    assert "3 test pictures stand also" in notes(load(root))


# --- lists of labels -----------------------------------------------------------------------------


def write_list(path: Path, *rows: str) -> None:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "head", "row"),
    [
        ("metadata.csv", "file_name,label", "images/{0:03d}.png,{1}"),
        ("labels.csv", "id,category", "{0:03d},{1}"),
        ("train.csv", "Image;Class", "images/{0:03d}.png;{1}"),
        ("labels.csv", "path,label", "images\\{0:03d}.png,{1}"),
        ("anything.tsv", "other\tfilename\ttarget", "x\t{0:03d}.png\t{1}"),
        ("metadata.jsonl", "", '{{"file_name": "images/{0:03d}.png", "label": "{1}"}}'),
    ],
)
def test_a_list_beside_the_pictures_gives_them_their_labels(tmp_path, name, head, row):
    root = tmp_path / "set"
    draw(root / "images", 22)
    rows = [row.format(number, ("cow", ODD)[number % 2]) for number in range(20)]
    write_list(root / name, *filter(None, [head, *rows]))
    source = load(root)
    assert source.classes == ("cow", ODD) and source.tally.used == 20
    assert reasons(source) == {"without a label": (2, "images/020.png")}
    listed = dict(zip(source.names["train"], source.train.labels.tolist(), strict=True))
    assert all(label == int(name[7:10]) % 2 for name, label in listed.items())
    by_file = load(root / name)
    assert by_file.fingerprint == source.fingerprint


def test_lists_in_split_folders_a_split_column_and_numbers_as_classes(tmp_path):
    root = tmp_path / "set"
    for split, count in (("train", 12), ("test", 12)):
        draw(root / split, count, 0)
        rows = [f"{number:03d}.png,{number}" for number in range(12)]
        write_list(root / split / "metadata.csv", "file_name,label", *rows)
    source = load(root)
    assert source.classes == tuple(map(str, range(12)))
    assert (len(source.train), len(source.test)) == (12, 12)
    for split in ("train", "test"):
        (root / split / "metadata.csv").unlink()
    rows = [f"train/{n:03d}.png,{n % 2},{('train', 'test', 'val')[n % 3]}" for n in range(12)]
    write_list(root / "labels.csv", "path,label,split", *rows)
    source = load(root)
    assert (len(source.train), len(source.test), len(source.held_out)) == (8, 4, 4)
    # Kaggle's form: a list for train/, none for test/.
    (root / "labels.csv").unlink()
    write_list(root / "train.csv", "id,label", *(f"{n:03d},{n % 2}" for n in range(12)))
    write_list(root / "test.csv", "id", *(f"{n:03d}" for n in range(12)))
    source = load(root)
    assert source.tally.used == 12
    assert reasons(source)["without a label"] == (12, "test/000.png")


def test_a_list_may_name_paths_from_its_split_or_from_the_top(tmp_path):
    root = tmp_path / "set"
    for part in ("a", "b"):
        draw(root / "train" / part, 8)
    names = [f"{part}/{number:03d}.png" for part in ("a", "b") for number in range(8)]
    rows = [f"{name},{number % 2}" for number, name in enumerate(names)]
    write_list(root / "train.csv", "file_name,label", *rows)
    assert load(root).classes == ("0", "1") and load(root).tally.used == 16
    (root / "train.csv").unlink()
    write_list(root / "train" / "metadata.csv", "file_name,label", *(f"train/{r}" for r in rows))
    assert load(root).classes == ("0", "1") and load(root).tally.used == 16


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"a,b\n1,2\n", "no-such-column", "has the columns a, b"),
        (b"", "bad-list", "is empty"),
        (b"id,label,set\n0,cat,train\n1,dog,tset\n", "bad-split-file", "has tset in its column"),
        (b"file_name,label\nnowhere.png,cat\n", "no-image", "the first: nowhere.png"),
        (b"file_name,label\n000.png,cat\n000.png,dog\n", "two-labels", "cat and dog"),
        (b"\xff\xfe\x00\x01", "bad-list", "save it as UTF-8"),
        (b"file_name,label\n000.png,cat\n001.png,cat\n", "too-few-classes", "takes two"),
    ],
)
def test_a_list_that_cannot_be_used_is_one_sentence(tmp_path, content, code, says):
    draw(tmp_path / "set", 4)
    (tmp_path / "set" / "labels.csv").write_bytes(content)
    with refused(code, match=says):
        load(tmp_path / "set")


def test_a_column_of_splits_that_names_none_and_lists_of_unknown_names_are_told(tmp_path):
    root = draw(tmp_path / "set", 10)
    rows = [f"{n:03d}.png,{n % 2},{'AB'[n // 5]}" for n in range(10)]
    write_list(root / "some.csv", "file_name,label,set", *rows)
    assert "the column 'set' of some.csv names no split that is known (A, B)" in notes(load(root))
    shutil.copy(root / "some.csv", root / "other.csv")
    with refused("too-few-classes", match=r"if other\.csv, some\.csv names the pictures"):
        load(root)


def test_the_numbers_of_rows_that_a_table_program_wrote_are_no_column_of_splits(tmp_path):
    root = draw(tmp_path / "set", 10)
    rows = [f"{n},{n:03d}.png,{n % 2}" for n in range(10)]
    write_list(root / "labels.csv", ",file_name,label", *rows)
    assert "names no split" not in notes(load(root))


def test_a_list_of_something_else_does_not_hide_class_folders(pets):
    write_list(pets / "labels.csv", "name,weight", "cat,4")
    assert load(pets).tally.used == 40
    write_list(pets / "labels.csv", "id,label", "1,4")
    assert load(pets).classes == ("cat", "dog")


def test_rows_without_their_picture_are_counted(tmp_path):
    draw(tmp_path / "set", 10)
    rows = [f"{number:03d}.png,{number % 2}" for number in range(12)]
    write_list(tmp_path / "set" / "metadata.csv", "file_name,label", *rows)
    found = reasons(load(tmp_path / "set"))
    assert found == {"rows without their picture": (2, "metadata.csv: 010.png")}


# --- splits that stay ----------------------------------------------------------------------------


def test_the_hash_is_mended_only_where_a_class_would_get_none_or_is_far_from_its_fifth():
    keys = [f"{n}".encode() for n in range(3000)]
    labels = [0] * 2900 + [1] * 80 + [2] * 10 + [3] * 3 + [4] * 2 + [5] * 4 + [6]
    plain = keyed_split(keys, [0] * len(keys))
    mended = keyed_split(keys, labels)
    assert mended[:2980] == plain[:2980] and 500 < sum(plain) < 700
    for label in range(7):
        members = [n for n, of in enumerate(labels) if of == label]
        tests = sum(mended[n] for n in members)
        low, high = (0, 0) if len(members) == 1 else (1, max(1, round(0.3 * len(members))))
        assert low <= tests <= high and tests < len(members), label
    grown = keyed_split([*keys, *(f"new {n}".encode() for n in range(3000))], labels + [0] * 3000)
    assert grown[:2900] == mended[:2900]


def test_a_group_stays_on_one_side_in_testing_and_in_validation(tmp_path):
    root = tmp_path / "scans"
    for name in ("ill", "well"):
        for patient in range(15):
            folder = draw(root / name, 4, 4 * patient)
            for number in range(4 * patient, 4 * patient + 4):
                old = folder / f"{number:03d}.png"
                old.rename(folder / f"p{patient:02d}-{number:03d}.png")
    source = load(root, group_by=r"/(p\d+)-")
    sides = {side: {n.split("/")[1][:3] for n in source.names[side]} for side in source.names}
    assert not sides["train"] & sides["test"] and 1 <= len(sides["test"]) <= 6
    for seed in range(3):
        places = divided(source, 0, 0.2, seed)
        parts = [{source.names["train"][i].split("/")[1][:3] for i in places[split].tolist()}
                 for split in ("train", "val")]  # fmt: skip
        assert not parts[0] & parts[1] and all(parts)
        assert 10 <= len(places["val"]) <= 30
    assert load(root).fingerprint != source.fingerprint
    with refused("bad-group", match="finds nothing in ill/"):
        load(root, group_by="/(q)")
    with refused("bad-group", match=r"makes 2 groups \(ill, well\).*none can test"):
        load(root, group_by="^[a-z]+")
    with refused("bad-group", match="no regular expression"):
        load(root, group_by="(")
    rows = [f"ill/p{n // 4:02d}-{n:03d}.png,{n % 2},{n // 8}" for n in range(56)]
    shutil.rmtree(root / "well")
    write_list(root / "metadata.csv", "file_name,label,hospital", *rows)
    source = load(root, group_by="hospital")
    number = {n: int(n[-7:-4]) // 8 for side in source.names.values() for n in side}
    sides = [{number[n] for n in source.names[side]} for side in ("train", "test")]
    assert not sides[0] & sides[1] and sides[1]
    write_list(root / "metadata.csv", "file_name,label,hospital", *rows[:-2], rows[-1][:-1])
    with refused("bad-group", match=r"1 of 55 pictures have no hospital \(the first: ill/p13-055"):
        load(root, group_by="hospital")


def test_groups_that_the_data_sets_own_splits_cut_are_told(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            draw(tmp_path / "set" / split / name, 3, 3 if split == "test" else 0)
    told = notes(load(tmp_path / "set", group_by=r"/(cat|dog)/"))
    assert "2 of 2 groups stand in training and in test" in told


def test_a_validation_part_is_stratified_sorted_disjoint_whole_and_keyed_by_the_seed():
    labels = torch.tensor([0] * 60 + [1] * 60 + [2] * 3 + [3])
    for seed in range(8):
        training, validation = split_validation(labels, 0.5, seed)
        for part in (training, validation):
            assert torch.equal(part, part.sort().values)
            assert {0, 1, 2} <= set(labels[part].tolist())
        assert 3 in labels[training] and abs(len(validation) - 62) <= 1
        assert torch.equal(torch.cat([training, validation]).sort().values, torch.arange(124))
    for fraction in (0.1, 0.9):  # of three, one stays and one goes
        parts = split_validation(labels, fraction, seed=0)
        assert all((labels[part] == 2).any() for part in parts)
    many = torch.arange(1000) % 10
    held = split_validation(many, 0.1, seed=0)[1]
    assert torch.bincount(many[held]).tolist() == [10] * 10
    assert torch.equal(split_validation(many, 0.1, seed=0)[1], held)
    assert not torch.equal(split_validation(many, 0.1, seed=1)[1], held)
    points = split_validation(torch.rand(30, 1), 0.2, 0)
    assert [len(part) for part in points] == [24, 6]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 0.01])
def test_a_validation_part_that_leaves_one_side_empty_is_refused(fraction):
    with refused("bad-split", match="leaves samples on both sides"):
        split_validation(torch.zeros(10, dtype=torch.int64), fraction, seed=0)


def test_a_list_of_the_split_gives_the_same_split_after_pictures_came_and_went(pets, tmp_path):
    out = tmp_path / "split.csv"
    assert main(["list", "--dataset", str(pets), "--out", str(out)]) == 0
    before = load(pets)
    assert load(pets, split=str(out)).fingerprint == before.fingerprint
    draw(pets / "cat", 30, 500)
    again = load(pets, split=str(out))
    assert again.fingerprint == before.fingerprint
    assert reasons(again) == {"not in split.csv": (30, "cat/500.png")}
    (pets / "dog" / "000.png").unlink()
    assert "1 pictures of --split" in notes(load(pets, split=str(out)))
    rows = [row for row in out.read_text().splitlines()[1:] if not row.startswith("dog/000")]
    turned = [row.replace(",test,", ",VAL,").replace(",train,", ",Test,") for row in rows[:-1]]
    write_list(out, "name,split,class", *turned, rows[-1])
    source = load(pets, split=str(out))
    assert len(source.train) + len(source.test) == 39 and len(source.held_out) > 0
    for content, code in (("a,b\nc,d\n", "bad-split-file"),
                          ("name,split\nx,maybe\n", "bad-split-file"),
                          ("name,split\nx,test\nx,train\n", "bad-split-file"),
                          ("name,split\nx,test\n", "other-split")):  # fmt: skip
        out.write_text(content)
        with refused(code):
            load(pets, split=str(out))
    with refused("no-split-file"):
        load(pets, split=str(tmp_path / "nowhere"))
    with refused("no-names", match="--split"):
        load_source("digits", split=str(out))


def test_the_list_is_a_csv_of_every_picture_on_stdout(pets, capfdbinary):
    odd = pets / "cat" / 'a "b", c.png'
    (pets / "cat" / "000.png").rename(odd)
    assert main(["list", "--dataset", str(pets)]) == 0
    out = capfdbinary.readouterr().out.decode()
    head, *rows = csv.reader(out.splitlines())
    assert head == ["name", "split", "class"] and len(rows) == 40
    assert ["cat/" + odd.name, "cat"] in [[name, of] for name, _, of in rows]
    is_test = {name: test for name, test in zip(*_sides(pets), strict=True)}
    assert all(is_test[name] == (split == "test") for name, split, _ in rows)
    assert main(["list", "--dataset", "synthetic"]) == 2


def _sides(folder: Path) -> tuple[list[str], list[bool]]:
    records = read_class_folders(folder, Wanted())
    return records.ids, records.is_test


# --- noticing and forgetting ---------------------------------------------------------------------


def test_pictures_that_change_places_at_equal_size_and_time_are_noticed(tmp_path):
    root = tmp_path / "set"
    for name in ("a", "b"):
        for path in draw(root / name, 10, suffix=".bmp").iterdir():
            os.utime(path, (1e9, 1e9))
    before = load(root)
    shutil.copytree(root, tmp_path / "copy")
    assert load(tmp_path / "copy").fingerprint == before.fingerprint
    (root / "a" / "003.bmp").rename(root / "x")
    (root / "b" / "003.bmp").rename(root / "a" / "003.bmp")
    (root / "x").rename(root / "b" / "003.bmp")
    assert load(root).fingerprint != before.fingerprint


@pytest.mark.parametrize("form", ["struct", "text", "arrow"])
def test_files_that_a_table_points_to_are_watched(tmp_path, form):
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw(tmp_path / "set" / "pics", 12)
    names = [f"pics/{number:03d}.png" for number in range(12)]
    labels = [number % 2 for number in range(12)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": None, "path": str(tmp_path / "set" / name)} for name in names]
    images = pa.array(names) if form == "text" else pa.array(cells, kind)
    table = pa.table({"image": images, "label": labels})
    if form == "arrow":
        with pa.OSFile(str(tmp_path / "set" / "data.arrow"), "wb") as sink, \
                pa.ipc.new_stream(sink, table.schema) as writer:  # fmt: skip
            writer.write_table(table)
    else:
        pq.write_table(table, tmp_path / "set" / "data.parquet")
    before = load(tmp_path / "set")
    assert any(name.endswith("pics/003.png") for side in before.names.values() for name in side)
    draw(tmp_path / "set" / "pics", 1, 3)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "set" / "pics" / "003.png")
    assert load(tmp_path / "set").fingerprint != before.fingerprint


def test_a_table_with_train_validation_and_test_validates_on_validation(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    blobs = [path.read_bytes() for path in sorted(draw(tmp_path / "pics", 30).iterdir())]
    for split, part in (
        ("train", slice(20)),
        ("validation", slice(20, 26)),
        ("test", slice(26, 30)),
    ):
        labels = [number % 2 for number in range(len(blobs[part]))]
        pq.write_table(
            pa.table({"image": blobs[part], "label": labels}), tmp_path / f"{split}.parquet"
        )
    shutil.rmtree(tmp_path / "pics")
    source = load(tmp_path)
    assert (len(source.train), len(source.test), len(source.held_out)) == (26, 4, 6)
    assert source.held_out.tolist() == list(range(20, 26))
    secret = pa.table({"image": blobs[26:], "label": [-1] * 4})
    pq.write_table(secret, tmp_path / "test.parquet")
    source = load(tmp_path)
    assert (len(source.train), len(source.test), source.held_out) == (20, 6, None)
    assert reasons(source) == {"without a label": (4, "row 0 of test")}


def entry(name: str, age: float, size: int = 1000) -> Path:
    path = cache.entry_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    cache.write_entry(path, {"x": torch.zeros(size, dtype=torch.uint8)}, {"at": name})
    os.utime(path, (1e9 - age, path.stat().st_mtime))
    return path


def test_the_cache_forgets_what_was_used_longest_ago_but_nothing_in_use(monkeypatch, capsys):
    old, used, new = entry("old", 300), entry("used", 200), entry("new", 100)
    foreign = cache.cache_dir() / "mine.safetensors"
    foreign.write_bytes(bytes(5000))
    half = cache.cache_dir() / f"{'0' * 32}.safetensors.7-7.partial"
    half.write_bytes(bytes(10))
    one = old.stat().st_size
    monkeypatch.setenv("LOCKSTEP_CACHE_SIZE", f"{3 * one}")
    cache.trim()
    assert old.exists() and used.exists() and new.exists()
    cache.cached("used", lambda: pytest.fail("it is there"))  # held by this process from now on
    monkeypatch.setenv("LOCKSTEP_CACHE_SIZE", f"{2 * one}B")
    cache.trim()
    assert not old.exists() and used.exists() and new.exists()
    assert main(["cache"]) == 0
    assert "used 2001" in (out := capsys.readouterr().out) and "  new" in out
    assert main(["cache", "--empty"]) == 0
    assert used.exists() and not new.exists() and foreign.exists() and half.exists()
    assert "in use stay" in capsys.readouterr().out
    os.utime(half, (1e9, 1e9))
    cache.trim()
    assert not half.exists()
    monkeypatch.setenv("LOCKSTEP_CACHE_SIZE", "much")
    assert main(["cache"]) == 2 and "write 20GB" in capsys.readouterr().err


def test_a_new_entry_makes_room_for_itself(monkeypatch, pets):
    old = entry("old", 300, 500_000)
    monkeypatch.setenv("LOCKSTEP_CACHE_SIZE", "400KB")
    load(pets)
    assert not old.exists() and len(cache.kept()) == 1


def test_a_gigabyte_in_the_home_folder_is_told(monkeypatch, pets, tmp_path):
    monkeypatch.setattr(cache, "LARGE", 100)
    assert "home folder" not in notes(load(pets))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "GB of the home folder" in notes(load(pets))
    monkeypatch.setattr(cache, "STARTED", 4e9)  # not in a later life
    assert "home folder" not in notes(load(pets))


def test_a_run_folder_keeps_its_split(pets, tmp_path):
    text = "name,split,class\ncat/000.png,train,cat\n"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "split.csv").write_text(text)
    assert read_split(str(tmp_path / "run")) == {"cat/000.png": "train"}


# --- photographs, packs and archives -------------------------------------------------------------


def enlarge(folder: Path) -> Path:
    """The same pictures as photographs, 80 pixels a side."""
    for path in folder.rglob("[0-9]*.png"):
        Image.open(path).resize((80, 80), Image.Resampling.NEAREST).save(path)
    return folder


def beside(source: Source) -> dict[str, object]:
    """What is known of the pictures beside their pixels."""
    held = None if source.held_out is None else source.held_out.tolist()
    groups = None if source.groups is None else source.groups.tolist()
    return {
        "names": [list(names_of(source, side)) for side in ("train", "test")],
        "labels": [source.train.labels.tolist(), source.test.labels.tolist()],
        "held_out": held, "groups": groups, "tally": str(source.tally), "notes": source.notes,
        "rows": rows_of(source, divided(source, 0, 0.0, 0)),
    }  # fmt: skip


def table(folder: Path) -> None:
    """The pictures of split folders as rows of parquet tables, of which some know no path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in ("train", "val", "test"):
        files = sorted((folder / split).rglob("[0-9]*.png"))
        cells = [{"bytes": path.read_bytes(), "path": None} for path in files]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {"image": pa.array(cells, kind), "label": [path.parent.name for path in files]}
        columns["place"] = [int(path.stem) // 4 for path in files]
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    for split in ("train", "val", "test"):
        shutil.rmtree(folder / split)


@pytest.mark.parametrize("form", ["folder", "listed", "table"])
def test_photographs_and_packs_keep_what_small_pictures_keep(tmp_path, form):
    root = tmp_path / "set"
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for name in ("cat", "dog"):
            draw(root / split / name, count, {"train": 0, "val": 20, "test": 40}[split])
    shutil.copy(root / "train" / "cat" / "000.png", root / "test" / "cat" / "040.png")
    (root / "train" / "cat" / ".hidden.png").write_bytes(b"x")
    group_by = {"folder": r"(\w+/\w+/\d\d)", "listed": "place", "table": "place"}[form]

    def formed(folder: Path) -> Path:
        if form == "table":
            table(folder)
        if form == "listed":
            names = [p.relative_to(folder).as_posix() for p in folder.rglob("[0-9]*.png")]
            cells = [f"{n},{n.split('/')[1]},{int(n[-7:-4]) // 4}" for n in sorted(names)]
            write_list(folder / "metadata.csv", "file_name,label,place", *cells)
        return folder

    small, large = shutil.copytree(root, tmp_path / "small"), shutil.copytree(root, tmp_path / "xl")
    formed(enlarge(large))
    expected = beside(load(formed(small), group_by=group_by))
    assert expected["held_out"] and expected["groups"] and "also in training" in str(expected)
    options = {"image_size": 32, "group_by": group_by}
    files = load_source(str(large), **options)
    assert isinstance(files.train, PhotoSet) and beside(files) == expected
    assert beside(load_source(str(large), **options, keep_decoded=True)) == expected
    words = ["--dataset", str(large), "--image-size", "32", "--group-by", group_by]
    for store in ("jpeg", "raw"):
        out = str(tmp_path / store)
        assert main(["prepare", *words, "--out", out, "--store", store, "--short-side", "40"]) == 0
        shutil.move(out, f"{out} moved")
        assert beside(load_source(f"{out} moved")) == expected
    plain = load_source(str(large), image_size=32)
    assert plain.groups is None and plain.fingerprint == files.fingerprint
    with refused("no-names", match="--group-by .*python -m data prepare"):
        load_source(f"{out} moved", group_by="x")


def test_which_photographs_validate_is_part_of_the_fingerprint(tmp_path):
    root = tmp_path / "set"
    for name in ("cat", "dog"):
        enlarge(draw(root / name, 10))
    out = tmp_path / "split.csv"
    assert main(["list", "--dataset", str(root), "--out", str(out)]) == 0
    plain = load_source(str(root), split=str(out))
    assert plain.fingerprint == load_source(str(root)).fingerprint
    lines = out.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if ",train," in line)
    write_list(out, *lines[:place], lines[place].replace(",train,", ",val,"), *lines[place + 1 :])
    source = load_source(str(root), split=str(out))
    assert len(source.held_out) == 1 and source.fingerprint != plain.fingerprint
    for keep in (False, True):  # the pixels of another split are those of this one
        again = load_source(str(root), split=str(out), keep_decoded=keep)
        assert beside(again) == beside(source) and again.fingerprint == source.fingerprint


def test_photographs_that_a_table_points_to_go_by_the_names_that_it_has(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path / "set"
    names = [f"pics/{number:03d}.png" for number in range(12)]
    enlarge(draw(root / "pics", 12))
    pq.write_table(pa.table({"image": names, "label": [0, 1] * 6}), root / "data.parquet")
    source = load_source(str(root))
    assert sorted(names_of(source, "train") + names_of(source, "test")) == names
    photos = source.train.photos
    assert photos.damage.found == {} and photos.pixels(0).shape == (80, 80, 3)
    assert excluded(photos, "pics/003.png") == {names.index("pics/003.png")}


def test_tars_of_three_splits_validate_on_one_and_count_what_they_do_not_use(tmp_path):
    import io
    import tarfile

    content = {}
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        with tarfile.open(tmp_path / f"{split}-000.tar", "w") as tar:
            for path in enlarge(draw(tmp_path / "pics" / split, count)).iterdir():
                label = str(int(path.stem) % 2).encode()
                content = {".png": path.read_bytes(), ".cls": label, ".txt": b"a caption"}
                for suffix, data in content.items():
                    member = tarfile.TarInfo(path.stem + suffix)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    shutil.rmtree(tmp_path / "pics")
    source = load_source(str(tmp_path), group_by="tar/(.*)")
    assert (len(source.train), len(source.test), len(source.held_out)) == (9, 2, 3)
    assert len(source.groups.unique()) == 6
    count, example = reasons(source)["of another suffix"]
    assert count == 11 and example.endswith(".txt")
    listed = rows_of(source, divided(source, 0, 0.0, 0))
    assert ("val-000.tar/002", "val", "0") in listed


def test_a_small_cache_holds_no_decoded_photographs_and_a_larger_one_keeps_to_its_limit(
    pets, monkeypatch, capsys
):
    said = []
    enlarge(pets)
    monkeypatch.setenv("LOCKSTEP_CACHE_SIZE", "700KB")  # 40 pictures take 768
    source = load_source(str(pets), keep_decoded=True, say=said.append)
    assert isinstance(source.train.photos.store, FileStore) and len(said) == 1  # of the scan
    monkeypatch.setenv("LOCKSTEP_CACHE_SIZE", "1GB")
    source = load_source(str(pets), keep_decoded=True, say=said.append)
    (pack,) = cache.cache_dir().glob("*.pack")
    assert source.train.photos.store.root == pack and "decoded once" in said[1]
    assert main(["cache", "--empty"]) == 0  # in use by this process
    assert (pack / "pack.safetensors").is_file()
    assert main(["cache"]) == 0 and str(pack) not in (out := capsys.readouterr().out)
    assert re.search(r" 7\d\d kB  used .*\.pack", out), out
    os.close(cache._in_use.pop(pack))
    load_source(str(pets), keep_decoded=True)  # as another process that finds it there
    os.close(cache._in_use.pop(pack))
    old = time.time() - 1000
    os.utime(pack, (old, pack.stat().st_mtime))
    monkeypatch.setenv("LOCKSTEP_CACHE_SIZE", "500KB")
    cache.trim()
    assert not pack.exists()


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_validates_tells_and_keeps_its_split_and_another_takes_it_over(nets, tmp_path):
    root = tmp_path / "set"
    for split, count in (("train", 24), ("val", 6), ("test", 4)):
        for name in ("cat", "dog"):
            for path in draw(root / split / name, count, 10 * count).iterdir():
                Image.open(path).resize((16, 16)).save(path)
    (root / "train" / "cat" / ".hidden.png").write_bytes(b"x")
    flags = ["--model", f"{nets / 'plain.py'}:Net", "--dataset", root, "--image-size", "16",
             "--batch-size", "16", "--epochs", "1", "--threads", "1", "--no-plots"]  # fmt: skip
    done = train([*flags, "--run-dir", "one"], tmp_path, LOCKSTEP_CACHE=str(tmp_path / "cache"))
    assert done.status == 0, done.out
    assert "48 training, 12 validation, 8 test images" in told(done)
    assert "69 found, 68 used" in told(done) and "best epoch chosen on the validation" in told(done)
    last = rows(tmp_path / "one")[-1]
    assert {"val/accuracy", "test/accuracy"} <= last.keys()
    split = read_split(str(tmp_path / "one"))
    assert len(split) == 68 and split["val/dog/065.png"] == "val"
    assert "1 hidden" in (tmp_path / "one" / "skipped_images.txt").read_text()
    (root / "val" / "dog" / "065.png").rename(root / "train" / "dog" / "065.png")
    more = train([*flags, "--run-dir", "two", "--split", "one"], tmp_path)
    assert more.status == 0, more.out
    assert "48 training, 11 validation, 8 test images" in told(more)
    assert "1 pictures of --split one are not there (val/dog/065.png)" in told(more)


def told(done: Done) -> str:
    """What the screen said, as if it were as wide as it takes."""
    return " ".join(done.out.replace("│", " ").split())
