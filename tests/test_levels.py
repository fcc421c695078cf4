"""Laws of pictures of 16 bits: scaled by what training pictures have, the rest counted and told."""

from pathlib import Path

import numpy as np
import pytest
import torch
from launches import train
from PIL import Image

from data.__main__ import main
from data.files import decode
from data.image_set import Source
from data.photographs import PhotoSet
from data.sources import load_source
from predict import prepare

LOW, HIGH = 1000, 1510  # of the training pictures: two levels become one


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))


def scans(root: Path, side: int) -> Path:
    """16-bit pictures of two classes; the first test picture has three values out of range."""
    noise = np.random.default_rng(side)
    for split, count in (("train", 8), ("test", 4)):
        for name in ("ill", "well"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(LOW, HIGH + 1, (side, side), dtype=np.uint16)
                pixels[0, :2] = LOW, HIGH
                if (split, name, number) == ("test", "ill", 0):
                    pixels[1, :3] = 0, LOW - 1, 65535
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def expected(path: Path) -> np.ndarray:
    values = (np.asarray(Image.open(path)).astype(np.float32) - LOW) / np.float32(
        (HIGH - LOW) / 255
    )
    return np.repeat(values.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def told(source: Source) -> str:
    return " ".join(source.notes)


def test_small_pictures_are_scaled_by_the_training_pictures_and_predicted_so(tmp_path):
    root = scans(tmp_path / "scans", 32)
    source = load_source(str(root), image_size=32)
    files = sorted((root / "test").rglob("*.png"))
    for image, path in zip(source.test.images, files, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected(path))
        card = {"image_size": 32, "mean": source.mean, "levels": list(source.levels)}
        assert torch.equal(prepare(path, card | {"picture_size": [32, 32]})[0], image)
    assert source.levels == (LOW, HIGH)
    assert "the values 1,000 to 1,510, as training images have them, become 0 to 255" in told(
        source
    )
    assert "(2 levels become one); 3 values of one image lie outside" in told(source)
    assert told(load_source(str(root), image_size=32)) == told(source)  # of the cache
    out = tmp_path / "carried.safetensors"
    words = ["prepare", "--dataset", str(root), "--image-size", "32", "--out", str(out)]
    assert main(words) == 0
    assert load_source(str(out)).levels == source.levels


def test_photographs_and_their_packs_are_scaled_alike(tmp_path):
    root = scans(tmp_path / "scans", 80)
    files = sorted(root.rglob("*.png"))
    kept = ("--short-side", "keep")
    for store in ("jpeg", "raw"):
        out = str(tmp_path / store)
        words = ["prepare", "--dataset", str(root), "--out", out, "--store", store]
        assert main([*words, *kept]) == 0
    sources = [load_source(str(root)), load_source(str(root), keep_decoded=True)]
    sources += [load_source(str(tmp_path / store)) for store in ("jpeg", "raw")]
    for source in sources:
        assert isinstance(source.train, PhotoSet)
        photos = source.train.photos
        for path in files:
            place = list(photos.names).index(path.relative_to(root).as_posix())
            assert np.array_equal(photos.pixels(place), expected(path))
        assert source.levels == (LOW, HIGH) and "(2 levels become one)" in told(source)
        assert source.mean == sources[0].mean and source.fingerprint == sources[0].fingerprint
    assert list(sources[0].train.photos.clipped.values()) == [3]


def test_a_picture_of_16_bits_where_none_trains_keeps_its_whole_range(tmp_path):
    root = scans(tmp_path / "scans", 16)
    for path in (root / "train").rglob("*.png"):
        Image.fromarray((np.asarray(Image.open(path)) // 8).astype(np.uint8)).save(path)
    source = load_source(str(root), image_size=16)
    assert source.levels is None and "16-bit" not in told(source)
    path = root / "test" / "ill" / "0.png"
    whole = (np.asarray(Image.open(path)).astype(np.float32) / 257).round().astype(np.uint8)
    assert np.array_equal(decode(path)[..., 0], whole)
    assert np.array_equal(source.test.images[0, 0].numpy(), whole)


def test_a_run_tells_what_becomes_of_16_bits_and_what_it_clipped(nets, tmp_path):
    root = scans(tmp_path / "scans", 80)
    done = train(
        ["--model", f"{nets / 'plain.py'}:Net", "--dataset", root, "--image-size", "16",
         "--batch-size", "8", "--epochs", "1", "--threads", "1", "--no-plots", "--run-dir", "run"],
        tmp_path, LOCKSTEP_CACHE=str(tmp_path / "cache"), LOCKSTEP_CACHE_SIZE="0",
    )  # fmt: skip
    assert done.status == 0, done.out
    out = " ".join(done.out.replace("│", " ").split())
    assert "become 0 to 255 (2 levels become one)" in out
    assert "16-bit images: 3 values of one image lie outside and are clipped" in out
