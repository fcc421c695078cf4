"""Classes are matched by name wherever their numbers cross a border, never by number."""

import csv
import io
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from launches import SMALL, rows, same_weights, train
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from common.errors import UserError
from common.text import class_name, places
from data.sources import load_source
from data.sources.folder import read_class_folders
from data.sources.listed import read_listed
from models.weights import load_weights
from training.data import excluded_names

COLOURS = {"ant": 20, "bee": 90, "cow": 160, "dog": 230}
DECOMPOSED = unicodedata.normalize("NFD", "éclair")


def table(path: Path, names: list[str], rows: list[str], listed: bool = True) -> None:
    """A parquet file of one grey picture a row, whose label column numbers `names`, or is text."""
    generator, pictures = np.random.default_rng(len(rows)), []
    for name in rows:
        level = COLOURS.get(name, 50)
        pixels = generator.normal(level, 12, (16, 16, 3)).clip(0, 255).astype("uint8")
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        pictures.append(file.getvalue())
    labels = [names.index(name) for name in rows] if listed else rows
    found = pa.table({"image": pictures, "label": labels})
    if listed:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        about = {"huggingface": json.dumps({"info": {"features": features}})}
        found = found.replace_schema_metadata(about)
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(found, path)


def test_each_table_numbers_its_classes_as_it_likes_and_a_name_stays_that_class(tmp_path):
    table(tmp_path / "d/train-0.parquet", ["ant", "bee", "cow"], ["ant", "bee", "cow"])
    table(tmp_path / "d/train-1.parquet", ["cow", "ant", "bee"], ["bee", "cow", "cow"])
    table(tmp_path / "d/test.parquet", ["ant", "cow"], ["cow", "ant"])
    source = load_source(str(tmp_path / "d"), image_size=16)
    assert source.classes == ("ant", "bee", "cow")
    assert [source.classes[n] for n in source.train.labels] == [
        "ant",
        "bee",
        "cow",
        "bee",
        "cow",
        "cow",
    ]
    assert [source.classes[n] for n in source.test.labels] == ["cow", "ant"]
    table(tmp_path / "d/test.parquet", [], ["cow", "bee"], listed=False)  # text beside numbers
    source = load_source(str(tmp_path / "d"), image_size=16)
    assert [source.classes[n] for n in source.test.labels] == ["cow", "bee"]


def test_a_class_that_training_does_not_name_is_refused_with_both_lists(tmp_path):
    table(tmp_path / "d/train.parquet", ["ant", "bee"], ["ant", "bee"])
    table(tmp_path / "d/test.parquet", ["ant", "dog"], ["ant", "dog"])
    with pytest.raises(UserError, match="it names ant, dog; the first table names ant, bee") as e:
        load_source(str(tmp_path / "d"), image_size=16)
    assert e.value.code == "other-classes" and "row 1 of test" in str(e.value)


@pytest.mark.parametrize("odd", [[1, 2], float("nan"), float("inf"), None])
def test_a_label_that_is_a_list_or_no_number_names_its_row(tmp_path, odd):
    table(tmp_path / "d/train.parquet", [], ["0", "1", "0"], listed=False)
    whole = pq.read_table(tmp_path / "d/train.parquet")
    good = [0] if isinstance(odd, list) else 0.0
    column = pa.array([good, odd, good])
    pq.write_table(whole.set_column(1, "label", column), tmp_path / "d/train.parquet")
    with pytest.raises(UserError, match=r"^row [01] of train in .* in column 'label'"):
        load_source(str(tmp_path / "d"), image_size=16)


def listed(folder, **labels):
    """A list per split, of pictures that lie beside it."""
    folder.mkdir(exist_ok=True)
    for split, those in labels.items():
        rows = ["file_name,label"]
        for number, label in enumerate(those):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{split}{number}.png")
            rows.append(f"{split}{number}.png,{label}")
        (folder / f"{split}.csv").write_text("\n".join(rows))


def test_a_whole_number_that_one_list_writes_as_a_float_is_that_class_and_told(tmp_path):
    listed(tmp_path / "d", train=["2", "10", "1"], test=["10.0", "2.00", "1"])
    source = load_source(str(tmp_path / "d"), image_size=16)
    assert source.classes == ("1", "2", "10")
    assert [source.classes[n] for n in source.test.labels] == ["10", "2", "1"]
    assert any("label 10.0 is taken for the class 10" in note for note in source.notes)
    listed(tmp_path / "e", train=["0.5", "1.0", "a.0"], test=["1.0", "0.5", "a.0"])
    source = load_source(str(tmp_path / "e"), image_size=16)  # nothing is written in two ways
    assert source.classes == ("0.5", "1.0", "a.0") and not any("taken" in n for n in source.notes)


def test_no_class_in_common_to_training_and_test_is_refused_with_both_lists(tmp_path):
    listed(tmp_path / "d", train=["ant", "bee"], test=["Ant", "Bee"])
    with pytest.raises(UserError, match="training has ant, bee; the test part has Ant, Bee") as e:
        load_source(str(tmp_path / "d"), image_size=16)
    assert e.value.code == "no-common-class"


def test_a_folder_whose_bytes_are_no_utf8_is_a_class_that_can_be_written(tmp_path):
    for split in ("train", "test"):
        for number, name in enumerate(("caf\udce9", "thé", "zoo")):
            folder = tmp_path / "d" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "a.png")
    source = load_source(str(tmp_path / "d"), image_size=16)
    assert source.classes == ("caf\\xe9", "thé", "zoo") and "".join(source.classes).encode()
    assert source.test.labels.tolist() == source.train.labels.tolist() == [0, 1, 2]
    assert class_name(os.fsencode("🐱").decode("ascii", "surrogateescape")) == "🐱"  # locale C
    assert class_name("a\ud83d") == "a\\ud83d"


def test_a_name_is_one_name_in_both_forms_of_unicode(tmp_path):
    whole = unicodedata.normalize("NFC", DECOMPOSED)
    for split, name in (("train", whole), ("train", "zoo"), ("test", DECOMPOSED), ("test", "zoo")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / name / "a.png")
    found = read_class_folders(tmp_path)
    assert found.classes == ("zoo", whole) and found.labels == [0, 1, 0, 1]
    table(tmp_path / "d/train.parquet", [DECOMPOSED, "zoo"], [DECOMPOSED, "zoo"])
    table(tmp_path / "d/test.parquet", [], ["zoo", whole], listed=False)
    source = load_source(str(tmp_path / "d"), image_size=16)
    assert source.classes == (whole, "zoo") and source.test.labels.tolist() == [1, 0]
    assert class_name(DECOMPOSED) == whole != DECOMPOSED


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_what_ends_a_line_for_unicode_ends_no_name_in_a_list(tmp_path, kind):
    files = {"a.png": "x\u2028y", "b\x85.png": "z"}
    for name in files:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    with (tmp_path / f"metadata.{kind}").open("w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            csv.writer(file).writerows([("file_name", "label"), *files.items()])
        for name, label in files.items() if kind == "jsonl" else ():
            file.write(json.dumps({"file_name": name, "label": label}, ensure_ascii=False) + "\n")
    found = read_listed(tmp_path)
    assert dict(zip(found.ids, map(found.classes.__getitem__, found.labels), strict=True)) == files
    (tmp_path / "damaged.txt").write_text("\n".join(files), encoding="utf-8")
    assert excluded_names(str(tmp_path / "damaged.txt")) == files.keys()


def test_names_that_stand_twice_are_nobodys_unless_the_lists_are_the_same():
    assert places(["a", "b", "a"], ["a", "b", "a"]) == [0, 1, 2]
    assert places(["b", "a"], ["a", "b", "a"]) == [1, None]
    assert places(["b", "a", "c"], ["a", "b"]) == [1, 0, None]


class Net(nn.Module):
    def __init__(self, classes: int):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, classes)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Weights of three named classes, and a loader of them into a fresh model of other classes."""
    monkeypatch.setattr("models.weights.lookup", lambda name: type("Entry", (), {"pretrained": ""}))
    told = {"model": "net", "image_size": 8, "classes": ["ant", "bee", "cow"]}
    theirs, path = Net(3), str(tmp_path / "w.safetensors")
    save_file(theirs.state_dict(), path, {"lockstep": json.dumps(told)})

    def load(*classes: str, as_they_are: bool = False):
        torch.manual_seed(1)
        mine = Net(len(classes))
        before = mine.head.weight.detach().clone()
        said = load_weights(mine, "net", path, len(classes), classes, as_they_are)
        assert torch.equal(mine.body.weight, theirs.body.weight)
        return said, mine.head, theirs.head, before

    return load


def test_the_same_names_in_another_order_permute_the_rows_of_the_head(weights):
    said, mine, theirs, _ = weights("cow", "ant", "bee", as_they_are=True)
    assert torch.equal(mine.weight, theirs.weight[[2, 0, 1]]) and "order of the data" in said
    assert torch.equal(mine.bias, theirs.bias[[2, 0, 1]])


def test_partly_other_names_keep_the_known_rows_and_the_rest_is_new_and_told(weights):
    said, mine, theirs, before = weights("dog", "cow", "bee")
    assert torch.equal(mine.weight[1:], theirs.weight[[2, 1]])
    assert torch.equal(mine.weight[0], before[0])
    assert "2 of 3 classes kept, the head's rows of dog are new, those of ant are left out" in said
    said, mine, theirs, before = weights("dog", "cow", "bee", "eel")
    assert "2 of 4 classes kept" in said and torch.equal(mine.weight[[0, 3]], before[[0, 3]])
    said, mine, _, before = weights("dog", "eel", "fox")
    assert torch.equal(mine.weight, before) and "3 other classes (ant, bee, cow)" in said


def test_weights_for_other_names_are_not_evaluated_and_both_lists_are_told(weights):
    for classes in (("bee", "cow", "dog"), ("bee", "cow"), ("dog", "eel", "fox")):
        with pytest.raises(UserError, match="the weights know ant, bee, cow; the data have") as e:
            weights(*classes, as_they_are=True)
        assert e.value.code == "other-classes" and ", ".join(classes) in str(e.value)


@pytest.mark.slow
def test_a_run_goes_on_where_the_data_name_its_classes_in_another_order(nets, tmp_path):
    pictures = [name for name in ("ant", "bee", "cow") for _ in range(16)]
    for folder, names in (("one", ["ant", "bee", "cow"]), ("two", ["cow", "ant", "bee"])):
        table(tmp_path / folder / "train.parquet", names, pictures)
        table(tmp_path / folder / "test.parquet", names, pictures[::4])
    flags = ["--model", "plain.py:Net", *SMALL, "--batch-size", "16", "--checkpoint-every", "2"]
    start = ["--dataset", str(tmp_path / "one"), "--stop-after", "3", "--epochs", "2"]
    for name, data in (("same", "one"), ("other", "two")):
        assert train([*flags, *start, "--run-dir", name], nets).status == 0
        more = ["--dataset", str(tmp_path / data), "--allow-change", "dataset"]
        done = train(["--resume", name, *more], nets)
        assert done.status == 0, done.out
        assert ("another order" in done.out) == (data == "two")
    assert same_weights(nets / "same", nets / "other") == []
    assert rows(nets / "same") == rows(nets / "other")
    table(tmp_path / "three/train.parquet", ["bee", "cow", "dog"], ["bee", "cow", "dog"] * 6)
    more = ["--dataset", str(tmp_path / "three"), "--allow-change", "dataset"]
    for action in (["--eval-only"], ["--epochs", "3"]):
        done = train(["--resume", "same", *action, *more], nets)
        assert done.status == 2 and "the run knows ant, bee, cow; the data have bee" in done.out
