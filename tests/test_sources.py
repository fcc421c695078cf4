"""Laws of the data sources: same tensors from any layout, nothing trusted, decoded once."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from launches import Command, finish, start
from PIL import Image, ImageFile

from common.errors import UserError
from config import HINTS, build_parser
from data import cache, files, sources
from data.__main__ import main
from data.photographs import PhotoSet
from data.sources import choose_dataset, cifar_batches, folder, hub, load_source
from data.sources.cifar10 import CIFAR10
from data.sources.published import Published

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_caches_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("CIFAR10_DIR", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pictures(tmp_path):
    """Two classes of twenty 8x8 PNGs each."""
    root = tmp_path / "pictures"
    noise = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(20):
            pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def small_cifar() -> tuple[np.ndarray, np.ndarray]:
    """Sixty 32x32 images (the last ten test) and their labels."""
    images = np.random.default_rng(1).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    return images, np.arange(60) % 10


def write_parquet(folder: Path, images, labels, num_train: int, classes=CIFAR10.classes) -> Path:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    features = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": classes}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    rows = [{"bytes": png(pixels), "path": None} for pixels in images]
    for split, part in (("train", slice(num_train)), ("test", slice(num_train, None))):
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        columns = {
            "img": pyarrow.array(rows[part], kind),
            "label": pyarrow.array([int(label) for label in labels[part]]),
        }
        table = pyarrow.table(columns).replace_schema_metadata(metadata)
        if len(table):
            pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_batches(folder: Path, images, labels) -> Path:
    folder.mkdir(parents=True)
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    for number, name in enumerate(cifar_batches.BATCH_NAMES):
        part = slice(10 * number, 10 * number + 10)
        batch = {b"data": rows[part], b"labels": labels[part].tolist()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def same(one, other) -> bool:
    return one.fingerprint == other.fingerprint and all(
        torch.equal(getattr(getattr(one, split), field), getattr(getattr(other, split), field))
        for split in ("train", "test")
        for field in ("images", "labels")
    )


# CIFAR-10


def test_all_layouts_of_cifar10_give_the_same_tensors(tmp_path):
    import datasets

    images, labels = small_cifar()
    write_parquet(tmp_path / "parquet" / "plain_text", images, labels, 50)
    write_batches(tmp_path / "python" / "cifar-10-batches-py", images, labels)
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "python" / "cifar-10-batches-py", "cifar-10-batches-py")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CIFAR10.classes))}
    )
    splits = {
        name: datasets.Dataset.from_dict(
            {"img": [{"bytes": png(i), "path": None} for i in images[part]], "label": labels[part]},
            features=features,
        )
        for name, part in (("train", slice(50)), ("test", slice(50, None)))
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")

    first = load_source("cifar10", data_dir=str(tmp_path / "parquet"))
    assert first.train.images.dtype == torch.uint8 and len(first.test) == 10
    assert torch.equal(first.train.images, torch.from_numpy(images[:50]).permute(0, 3, 1, 2))
    assert first.train.labels.tolist() == labels[:50].tolist()
    assert first.classes == CIFAR10.classes
    expected = images[:50].reshape(-1, 3) / 255
    assert np.allclose(first.mean, expected.mean(0)) and np.allclose(first.std, expected.std(0))
    for other in ("python", "tar", "saved"):
        assert same(first, load_source("cifar10", data_dir=str(tmp_path / other))), other

    carried = tmp_path / "cifar10.safetensors"
    words = ["prepare", "--dataset", "cifar10", "--data-dir", str(tmp_path / "tar")]
    assert main([*words, "--out", str(carried)]) == 0
    assert same(first, load_source("cifar10", data_dir=str(carried)))
    assert same(first, load_source(str(carried)))
    whole = carried.read_bytes()
    carried.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(UserError, match="damaged"):
        load_source("cifar10", data_dir=str(carried))


def test_a_carried_folder_is_that_folder_at_the_size_it_was_decoded_for(pictures, tmp_path):
    carried = str(tmp_path / "pictures.safetensors")
    for size, wrong in (("8", None), ("48", 32)):
        for file in pictures.rglob("*.png") if size == "48" else ():
            Image.open(file).resize((60, 50)).save(file)
        words = ["prepare", "--dataset", str(pictures), "--image-size", size]
        assert main([*words, "--out", carried]) == 0
        assert same(
            load_source(str(pictures), image_size=int(size)),
            load_source(carried, image_size=int(size)),
        )
        if wrong:
            with pytest.raises(UserError, match="decoded for --image-size 48"):
                load_source(carried, image_size=wrong)
    with pytest.raises(UserError, match="not CIFAR-10; type --dataset"):
        load_source("cifar10", data_dir=carried)


def test_the_environment_names_the_local_copy_of_cifar10(tmp_path, monkeypatch):
    images, labels = small_cifar()
    monkeypatch.setenv("CIFAR10_DIR", str(write_parquet(tmp_path / "here", images, labels, 50)))
    assert choose_dataset("auto", None)[0] == "cifar10"
    assert len(load_source("cifar10").train) == 50
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"CIFAR10_DIR.*gone"):
        choose_dataset("auto", None)


def test_a_copy_in_the_hub_cache_is_used_only_when_it_is_whole(tmp_path):
    images, labels = small_cifar()
    snapshot = tmp_path / "hub/hub/datasets--uoft-cs--cifar10/snapshots/abc/plain_text"
    write_parquet(snapshot, images, labels, 50)
    assert choose_dataset("cifar10", None)[0] == "cifar10"
    test = snapshot / "test-00000-of-00001.parquet"
    part = test.rename(snapshot / "test-00000-of-00002.parquet")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        choose_dataset("cifar10", None)
    part.rename(test)
    assert len(load_source("cifar10").test) == 10
    test.unlink()  # decoded already: the tensor cache is enough
    assert choose_dataset("auto", None)[0] == "cifar10"


class Malice:
    """Unpickled carelessly, it leaves a file behind."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_batch_that_asks_to_run_code_is_refused_and_runs_nothing(tmp_path):
    images, labels = small_cifar()
    folder = write_batches(tmp_path / "cifar", images, labels)
    evil = {b"data": Malice(tmp_path / "owned"), b"labels": []}
    (folder / "data_batch_3").write_bytes(pickle.dumps(evil))
    with pytest.raises(UserError, match=r"data_batch_3.*refused"):
        load_source("cifar10", data_dir=str(folder))
    assert not (tmp_path / "owned").exists()


def test_an_archive_cannot_write_outside(tmp_path):
    images, labels = small_cifar()
    folder = write_batches(tmp_path / "cifar", images, labels)
    archive = tmp_path / "a" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for batch in folder.iterdir():
            tar.add(batch, f"../../{batch.name}")
    before = sorted(tmp_path.rglob("*"))
    assert len(cifar_batches.read(archive).images) == 60 and sorted(tmp_path.rglob("*")) == before


def test_missing_batches_and_labels_out_of_range_are_errors(tmp_path):
    images, labels = small_cifar()
    folder = write_batches(tmp_path / "cifar", images, labels + 1)
    with pytest.raises(UserError, match=r"labels from 1 to 10.*10 classes"):
        load_source("cifar10", data_dir=str(folder))
    (folder / "data_batch_2").unlink()
    with pytest.raises(UserError, match="lacks data_batch_2"):
        load_source("cifar10", data_dir=str(folder))


# The table


@pytest.mark.parametrize("name", sources.SOURCES)
def test_a_row_of_the_table_is_all_that_a_data_set_needs(name, tmp_path):
    """Named in the help, chosen and loaded by its row alone; its recipe names real settings."""
    entry = sources.SOURCES[name]
    assert name in build_parser().format_help() and name in sources.NAMES
    assert entry.recipe.keys() <= HINTS.keys()
    if not entry.made:
        of = sources.find(entry.target)
        assert of.title in entry.summary
        with pytest.raises(UserError) as caught:
            choose_dataset(name)
        assert caught.value.code == "data-unreachable" and of.variable in str(caught.value)
        return
    assert choose_dataset(name) == (name, f"Data: {entry.summary}.")
    source = load_source(name)
    assert source.name == name and source.origin == f"Data: {entry.summary}."
    with pytest.raises(UserError) as caught:
        sources.save_source(source, tmp_path / "x.safetensors", None)
    assert caught.value.code == "needs-no-file"


def test_a_new_data_set_is_a_file_and_a_row(monkeypatch, tmp_path):
    """What a contributor adds: pictures that are published in a layout that is known already."""
    images, labels = small_cifar()
    of = Published("Pets", "someone/pets", "PETS_DIR", (3, 32, 32), tuple("abcdefghij"))
    row = sources.SourceEntry("pets:PETS", "Pets: sixty photographs", made=False)
    module = types.ModuleType("data.sources.pets")
    module.PETS = of
    monkeypatch.setitem(sys.modules, "data.sources.pets", module)
    monkeypatch.setitem(sources.SOURCES, "pets", row)
    tables = write_parquet(tmp_path / "t", images, labels, 50, classes=list("0123456789"))
    monkeypatch.setenv("PETS_DIR", str(tables))
    name, sentence = choose_dataset("pets")
    assert (name, sentence) == ("pets", f"Data: Pets from tables at {tables}.")
    source = load_source("pets")
    assert source.classes == of.classes and len(source.test) == 10
    assert load_source("cifar10", data_dir=str(tables)).classes == CIFAR10.classes
    with pytest.raises(UserError, match="is not Pets: 10 classes"):
        module.PETS = dataclasses.replace(of, shape=(3, 8, 8), title="Pets")
        load_source("pets", data_dir=str(write_parquet(tmp_path / "u", images, labels, 50)))


# Made on the spot


def test_digits_are_1797_grey_images_of_ten_classes_for_any_seed():
    one, other = load_source("digits", seed=1), load_source("digits", seed=2)
    assert same(one, other) and one.no_flip and one.classes == tuple("0123456789")
    assert len(one.train) + len(one.test) == 1797
    assert one.train.images.shape[1:] == (3, 8, 8) and int(one.train.images.max()) == 255
    share = torch.bincount(one.test.labels) / torch.bincount(one.train.labels)
    assert ((share > 0.22) & (share < 0.26)).all()


def test_synthetic_images_can_be_told_apart_and_do_not_touch_the_global_generator():
    before = torch.get_rng_state()
    source = load_source("synthetic")
    assert torch.equal(before, torch.get_rng_state())
    assert (len(source.train), len(source.test)) == (2048, 512)
    train, test = source.train.images.float(), source.test.images.float()
    centres = torch.stack([train[source.train.labels == k].mean(0) for k in range(10)])
    nearest = torch.cdist(test.flatten(1), centres.flatten(1)).argmin(1)
    assert (nearest == source.test.labels).float().mean() > 0.99


def test_the_line_is_thirty_points_and_its_noise_belongs_to_the_seed():
    line = load_source("line", seed=3)
    x, y = line.train.images, line.train.labels
    assert line.task == "regression" and x.shape == y.shape == (30, 1)
    assert x[0].item() == -10 and x[-1].item() == pytest.approx(-10 + 20 * 29 / 30)
    assert set((y - 2 * x - 3).round(decimals=3).flatten().tolist()) <= {0.0, 1.0, 2.0}
    assert same(line, load_source("line", seed=3))
    assert not same(line, load_source("line", seed=4))


# Folders


def decoded(image: Image.Image, kind: str, **options) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return files.decode(buffer.getvalue(), None)


def test_every_mode_becomes_rgb():
    grey = np.array([[0, 128], [255, 64]], dtype=np.uint8)
    three = np.repeat(grey[..., None], 3, 2)
    assert (decoded(Image.fromarray(grey), "png") == three).all()
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert (decoded(wide, "png") == three).all()
    for kind in ("bmp", "gif", "webp"):
        options = {"lossless": True} if kind == "webp" else {}
        assert (decoded(Image.fromarray(three), kind, **options) == three).all(), kind
    clear = np.dstack([three, np.array([[255, 0], [255, 0]], dtype=np.uint8)])
    on_white = np.where(clear[..., 3:] == 0, 255, three)
    assert (decoded(Image.fromarray(clear), "png") == on_white).all()
    palette = Image.fromarray(three).quantize(4)
    assert (decoded(palette, "png") == three).all()
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(decoded(red, "jpeg")[8, 8].astype(int) - [255, 0, 0]).max() < 12


def test_a_picture_taken_sideways_stands_upright():
    top_red = np.zeros((4, 6, 3), dtype=np.uint8)
    top_red[0] = (255, 0, 0)
    lying = Image.fromarray(np.rot90(top_red).copy())  # turned left; EXIF 6: turn right to view
    exif = Image.Exif()
    exif[0x0112] = 6
    assert (decoded(lying, "png", exif=exif) == top_red).all()


def test_small_equal_pictures_stay_others_become_squares_and_one_large_makes_all_photographs(
    pictures,
):
    assert load_source(str(pictures), image_size=32).train.images.shape[1:] == (3, 8, 8)
    Image.new("RGB", (60, 40), "blue").save(pictures / "cat" / "big.jpg")
    with pytest.raises(UserError, match=r"differ in size.*--image-size"):
        load_source(str(pictures))
    source = load_source(str(pictures), image_size=32)
    assert source.train.images.shape[1:] == source.test.images.shape[1:] == (3, 32, 32)
    Image.new("RGB", (300, 200), "blue").save(pictures / "cat" / "big.jpg")
    photographs = load_source(str(pictures), image_size=32)
    assert isinstance(photographs.train, PhotoSet) and isinstance(photographs.test, PhotoSet)
    assert len(photographs.train) + len(photographs.test) == len(source.train) + len(source.test)
    sizes = photographs.train.photos.sizes.tolist()
    assert sorted(map(tuple, sizes))[-1] == (200, 300) and (8, 8) in map(tuple, sizes)


def test_a_truncated_jpeg_stops_the_run_or_is_left_out_and_listed(pictures):
    bad = pictures / "cat" / "cut.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(bad)
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    with pytest.raises(UserError, match=r"cut\.jpg.*--skip-bad-images"):
        load_source(str(pictures))
    for _ in range(2):  # decoded, then from the cache
        source = load_source(str(pictures), skip_bad_images=True)
        assert len(source.skipped) == 1 and "cut.jpg" in source.skipped[0]
        assert len(source.train) + len(source.test) == 40


@pytest.mark.parametrize("side", [13_000, 20_000])
def test_an_absurdly_large_picture_is_refused_from_its_header(pictures, side, monkeypatch):
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)  # one bit per pixel: a small file
    pixels = zlib.compress(bytes(side * (1 + (side + 7) // 8)))
    body = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    (pictures / "dog" / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    loaded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: loaded.append(self.size) or load(self)
    )
    source = load_source(str(pictures), skip_bad_images=True)
    assert "bomb.png" in source.skipped[0] and len(source.skipped) == 1
    assert set(loaded) == {(8, 8)}
    with pytest.raises(UserError, match=r"bomb\.png"):
        load_source(str(pictures))


def test_empty_single_and_unknown_classes_are_errors(pictures, tmp_path):
    (pictures / "emu").mkdir()
    with pytest.raises(UserError, match=r"emu.*holds no images"):
        load_source(str(pictures))
    (pictures / "emu").rmdir()
    (tmp_path / "one" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="1 class folder"):
        load_source(str(tmp_path / "one"))
    with pytest.raises(
        UserError, match=rf"0 class folder.*holds cat, dog: type --dataset {pictures}"
    ):
        load_source(str(pictures / "cat"))
    split = tmp_path / "split"
    split.mkdir()
    pictures.rename(split / "train")
    (split / "test" / "ox").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(split / "test" / "ox" / "a.png")
    with pytest.raises(UserError, match=r"ox.*no partner"):
        load_source(str(split))
    (split / "test" / "ox").rename(split / "test" / "cat")
    source = load_source("folder", data_dir=str(split))
    assert (len(source.train), len(source.test)) == (40, 1)
    assert source.classes == ("cat", "dog")


def test_adding_a_picture_moves_no_other_between_train_and_test(pictures):
    def test_names():
        records = folder.read_class_folders(pictures)
        pairs = zip(records.items, records.is_test, strict=True)
        return {path.name + path.parent.name for path, chosen in pairs if chosen}

    before = test_names()
    assert 0 < len(before) < 20
    for number in range(100, 120):
        Image.new("RGB", (8, 8)).save(pictures / "cat" / f"{number}.png")
    after = test_names()
    assert before <= after
    assert all(int(name.partition(".")[0]) >= 100 for name in after - before)


def test_odd_class_names_are_kept_and_never_printed_raw(pictures, capsys):
    odd = "[red]\x1b[31m\nx\udcff"
    try:
        (pictures / "dog").rename(pictures / odd)
    except (OSError, ValueError):
        pytest.skip("this file system refuses such names")
    for _ in range(2):  # what is no UTF-8 is read as what can be written
        assert "[red]\x1b[31m\nx\\xff" in load_source(str(pictures)).classes
    assert main(["stats", "--dataset", str(pictures)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[red]\\x1b[31m\\nx\\xff" in out


# Tables


@pytest.mark.parametrize("label", [-1, 0.5])
def test_a_label_that_is_none_is_named_with_its_row(tmp_path, label):
    import pyarrow.parquet

    rows = [{"bytes": b"x", "path": None}] * 4
    table = pyarrow.table({"image": rows, "label": [0, 1, label, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match=rf"row 2 of train .* has the label {label} .*from 0"):
        load_source(str(tmp_path / "t.parquet"))


def test_a_table_without_a_test_split_gives_a_keyed_fifth(tmp_path):
    images, labels = small_cifar()
    folder = write_parquet(tmp_path / "table", images, labels, 60)
    source = load_source(str(folder))
    assert len(source.train) + len(source.test) == 60 and 3 < len(source.test) < 22
    assert same(source, load_source(str(folder / "train-00000-of-00001.parquet")))
    wrong = write_parquet(tmp_path / "wrong", images, labels, 50, classes=["a", "b", "c"])
    with pytest.raises(UserError, match=r"labels from 0 to 9.*3 classes"):
        load_source(str(wrong))


def test_a_damaged_table_is_named(tmp_path):
    images, labels = small_cifar()
    file = write_parquet(tmp_path / "table", images, labels, 50) / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"test-00000-of-00001.*damaged"):
        load_source(str(file.parent))


# Cache


def test_a_second_load_decodes_nothing_and_a_damaged_cache_is_rebuilt(pictures, monkeypatch):
    builds = []
    build = sources.build
    monkeypatch.setattr(sources, "build", lambda *given: builds.append(1) or build(*given))
    first = load_source(str(pictures))
    assert same(first, load_source(str(pictures))) and len(builds) == 1
    (entry,) = cache.cache_dir().glob("*.safetensors")
    content = entry.read_bytes()
    for position in (20, len(content) // 2, len(content) - 1):  # header, images, labels
        damaged = bytearray(content)
        damaged[position] ^= 1
        entry.unlink()  # a new file: the tensors above may still be mapped from the old one
        entry.write_bytes(damaged)
        for _ in range(2):  # rebuilt, then read
            assert same(first, load_source(str(pictures)))
    entry.unlink()
    entry.write_bytes(content[:-100])
    assert same(first, load_source(str(pictures))) and len(builds) == 5
    (pictures / "cat" / "0.png").unlink()
    assert not same(first, load_source(str(pictures))) and len(builds) == 6
    assert not list(cache.cache_dir().glob("*.partial"))


def test_a_cache_that_cannot_be_written_costs_only_time(pictures, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "file" / "cache"))
    one, other = load_source(str(pictures)), load_source(str(pictures))
    assert same(one, other)
    assert "cannot be written: all pictures are looked at again" in "".join(other.notes)


def test_processes_that_start_together_decode_once(pictures, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HOME")  # read when `datasets` is imported: with another one, all is cold
    script = (
        "import time; from data import sources\n"
        "build = sources.build\n"
        "def slow(*given): print('built'); time.sleep(1); return build(*given)\n"
        "sources.build = slow\n"
        "print(sources.load_source(sys.argv[1]).fingerprint)"
    )
    (tmp_path / "decode.py").write_text(f"import sys; sys.path[0] = {str(ROOT)!r}\n{script}")
    running = [start(Command([tmp_path / "decode.py", pictures]), tmp_path) for _ in range(3)]
    words = [finish(*one).out.split() for one in running]
    assert sum(said.count("built") for said in words) == 1
    assert len({said[-1] for said in words}) == 1


def test_processes_of_one_start_look_at_the_files_once_a_node(pictures, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HOME")
    script = (
        "import time; from data import sources\n"
        "from data.sources import folder\n"
        "names = ('locate', '_marks_of')\n"
        "for name in names:\n"
        "    def told(*given, name=name, work=vars(sources)[name]):\n"
        "        print(name); time.sleep(0.3); return work(*given)\n"
        "    setattr(sources, name, told)\n"
        "found = sources.load_source(sys.argv[1], start=sys.argv[2])\n"
        "print(found.fingerprint, str(found.tally).replace(' ', '_'))"
    )
    (pictures / "cat" / "note.txt").write_text("no picture")
    (tmp_path / "look.py").write_text(f"import sys; sys.path[0] = {str(ROOT)!r}\n{script}")

    def said_at(start_word: str) -> list[list[str]]:
        words = [tmp_path / "look.py", pictures, start_word]
        running = [start(Command(words), tmp_path) for _ in range(3)]
        return [finish(*one).out.split() for one in running]

    for word in ("one", "two"):  # nothing cached, and cached
        words = said_at(word)
        for name in ("locate", "_marks_of"):
            assert sum(said.count(name) for said in words) == 1, words
        assert len({tuple(said[-2:]) for said in words}) == 1 and "note.txt" in words[0][-1]
        cache.forget_looks(word)
    first = words[0][-2]
    (pictures / "cat" / "0.png").unlink()  # another start looks anew
    assert {said[-2] for said in said_at("three")} != {first}
    cache.forget_looks("three")
    assert not [path for path in cache.cache_dir().iterdir() if "-" in path.name]


def test_a_mistake_that_one_process_finds_is_that_of_all_and_without_a_cache_each_looks(
    pictures, tmp_path, monkeypatch
):
    shutil.rmtree(pictures / "cat")
    (pictures / "cat").mkdir()
    looks = []
    locate = sources.locate
    monkeypatch.setattr(sources, "locate", lambda *given: looks.append(1) or locate(*given))
    found = []
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            load_source(str(pictures), start="one")
        found.append((caught.value.code, str(caught.value)))
    assert found[0] == found[1] and len(looks) == 1
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        with pytest.raises(UserError):
            load_source(str(pictures), start="one")
    assert len(looks) == 3


# Choosing


def test_automatic_choice_without_network_takes_digits_and_says_what_to_type():
    name, sentence = choose_dataset("auto", None)
    assert name == "digits"
    for word in ("HF_HUB_OFFLINE", "--dataset cifar10 --data-dir", "CIFAR10_DIR", "digits"):
        assert word in sentence
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE.*--data-dir"):
        choose_dataset("cifar10", None)


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "PATIENCE", 0.01)  # less than Python takes to start
    name, sentence = choose_dataset("auto", None)
    assert name == "digits"
    assert all(word in sentence for word in ("no answer", "HF_ENDPOINT", "HTTPS_PROXY"))


def test_automatic_choice_with_a_folder_takes_the_folder(pictures):
    assert choose_dataset("auto", str(pictures))[0] == str(pictures)


@pytest.mark.parametrize(("typed", "meant"), [("cifra10", "cifar10"), ("Digit", "digits")])
def test_a_typo_is_answered_with_the_name_that_was_meant(typed, meant):
    with pytest.raises(UserError, match=f"did you mean {meant}"):
        choose_dataset(typed, None)


def test_the_program_prints_one_sentence_and_exits_with_2(capsys, tmp_path):
    assert main(["stats", "--dataset", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_show_writes_a_sheet_of_eight_by_eight_large_enough_to_see(tmp_path):
    out = tmp_path / "sheet.png"
    assert main(["show", "--dataset", "digits", "--image-size", "16", "--out", str(out)]) == 0
    with Image.open(out) as sheet:
        assert sheet.size == (512, 512) and len(sheet.getcolors(2**24)) > 50


def test_show_draws_pictures_of_all_classes_though_folders_lie_one_after_the_other(tmp_path):
    for shade, name in enumerate("abcd"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(10):
            picture = Image.new("RGB", (16, 16), (50 * shade, 0, 0))
            picture.save(tmp_path / "set" / name / f"{number}.png")
    words = ["show", "--dataset", str(tmp_path / "set"), "--augment", "none"]
    assert main([*words, "--out", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        column = [sheet.getpixel((1, y))[0] for y in range(1, sheet.height, sheet.height // 8)]
    assert set(column) == {0, 50, 100, 150}


def test_a_wrong_policy_is_shown_with_a_mark(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["show", "--dataset", "digits", "--augment", "crop|blurr"]) == 2
    assert "did you mean blur?" in (told := capsys.readouterr().err)
    assert told.endswith("  crop|blurr\n       ^\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("show --dataset digits --image-size 0", "--image-size: 0: must be a whole number from 1"),
        ("show --dataset digits --image-size -3", "-3: must be a whole number from 1"),
        ("stats --dataset digits --seed x", "--seed: x: must be a whole number from 0"),
        ("stats --datset digits", "--datset digits; see python -m data --help"),
        ("sats", "choose from"),
        ("stats --dataset digits --group-by -(x)", "with - is typed --group-by=VALUE"),
        ("", "show|stats|list|correct|prepare|check|cache"),
        ("show --dataset digits --out nowhere/x.png", "try --out sheet.png"),
        ("show --dataset line", "try --dataset digits"),
        ("prepare --dataset digits --out nowhere/x.safetensors", "try --out data.safetensors"),
        ("prepare --dataset digits --out x.pt", "try --out data.safetensors"),
        ("prepare --dataset digits --out x", "small pictures make one file, .safetensors"),
        ("check", "which pack? type python -m data check FOLDER"),
        ("prepare --dataset digits --out x.safetensors", "digits needs no file"),
    ],
)
def test_a_wrong_word_is_one_sentence(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
