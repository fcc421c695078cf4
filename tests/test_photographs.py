"""Photographs: what is cut of them, on any number of processes and threads, and what is damaged."""

import csv
import io
import json
import shutil
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from launches import rows, train
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from common.errors import UserError
from data import ahead as ahead_module
from data import files
from data import photographs as module
from data.ahead import Ahead, Threads
from data.augment import random_boxes
from data.cuts import Cuts, default_resize
from data.keyed_random import AUGMENT, uniforms
from data.photographs import PLAIN, Names, Photos, cut, decoded, header, reduction
from data.scan import scan
from data.sources import load_source
from data.splits import read_split
from training.recorder import read

SIZES = [(375, 500), (500, 333), (64, 700), (230, 231), (90, 40), (1200, 900)]
GREY = (128, 128, 128)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, kind: str = "jpeg", **options) -> bytes:
    buffer = io.BytesIO()
    mode = "CMYK" if pixels.shape[-1] == 4 else None
    Image.fromarray(pixels, mode).save(buffer, kind, **options)
    return buffer.getvalue()


def cut_all(boxes, pictures) -> np.ndarray:
    out = np.empty((len(pictures), boxes.size, boxes.size, 3), np.uint8)
    for row, pixels in enumerate(pictures):
        cut(pixels, boxes.rows[row], out[row], GREY)
    return out


# What is cut


def test_a_random_box_has_the_pixels_that_torchvision_cuts_and_scales():
    sizes, indices = torch.tensor(SIZES), torch.arange(len(SIZES))
    pictures = [noise(*size) for size in SIZES]
    cuts, flips = Cuts("resized_crop", 96, 96, 110, "crop", seed=3), set()
    for epoch in range(4):
        boxes = cuts.training(sizes, indices, epoch)
        for row, (pixels, ours) in enumerate(zip(pictures, cut_all(boxes, pictures), strict=True)):
            left, top, right, bottom, *_, flipped = boxes.rows[row]
            box = (top, left, bottom - top, right - left)
            flips.add(flipped)
            for whole, most, mean in (
                (torch.from_numpy(pixels.copy()).permute(2, 0, 1), 0, 0),
                (Image.fromarray(pixels), 3, 0.2),  # Pillow rounds between its two passes
            ):
                theirs = tv.resized_crop(whole, *box, [96, 96], InterpolationMode.BILINEAR)
                theirs = tv.pil_to_tensor(theirs) if isinstance(theirs, Image.Image) else theirs
                theirs = theirs.flip(2) if flipped else theirs
                apart = (theirs.permute(1, 2, 0).int() - torch.from_numpy(ours).int()).abs()
                assert int(apart.max()) <= most and float(apart.float().mean()) <= mean
    assert flips == {0, 1}


def test_boxes_of_many_sizes_are_those_of_each_size_alone():
    sizes, indices = torch.tensor(SIZES), torch.arange(len(SIZES))
    draws = uniforms(5, 1, indices, 25, AUGMENT)
    together = random_boxes(sizes[:, :1].float(), sizes[:, 1:].float(), draws[:, 1:3], draws[:, 5:])
    for row, (height, width) in enumerate(SIZES):
        one = slice(row, row + 1)
        alone = random_boxes(height, width, draws[one, 1:3], draws[one, 5:])
        assert [float(x[row]) for x in together] == [float(x) for x in alone]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("flips", [0, 1])
@pytest.mark.parametrize("side", [16, 24])
def test_a_picture_that_may_not_be_written_to_is_cut_without_a_word(side, flips):
    """A page of a pack: torch warns where it is given such memory."""
    pixels = np.arange(side * side * 3, dtype=np.int64).astype(np.uint8).reshape(side, side, 3)
    page, out, other = (
        pixels.copy(),
        np.empty((16, 16, 3), np.uint8),
        np.empty((16, 16, 3), np.uint8),
    )
    page.flags.writeable = False
    for picture, into in ((page, out), (pixels, other)):
        cut(picture, [0, 0, side, side, 16, 16, 0, 0, flips], into, GREY)
    assert (out == other).all()
    if side == 16:
        assert (out == (pixels[:, ::-1] if flips else pixels)).all()


@pytest.mark.parametrize(("size", "side"), [(224, 256), (96, 96), (64, 73)])
def test_evaluation_sees_what_resize_and_center_crop_show(size, side):
    pictures = [noise(*shape) for shape in SIZES]
    cuts = Cuts("none", size, size, side, "crop", seed=0)
    ours = cut_all(cuts.evaluation(torch.tensor(SIZES)), pictures)
    for pixels, seen in zip(pictures, ours, strict=True):
        whole = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        whole = tv.resize(whole, [side], InterpolationMode.BILINEAR)
        theirs = tv.center_crop(whole, [size, size]).permute(1, 2, 0)
        assert (theirs.numpy() == seen).all()


@pytest.mark.parametrize("kind", ["none", "flip", "crop", "translate"])
@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_nothing_is_cut_off_by_squash_and_pad_but_by_the_window_of_crop(kind, resize):
    sizes, indices = torch.tensor(SIZES), torch.arange(len(SIZES))
    cuts = Cuts(kind, 64, 64, 73, resize, seed=0)
    training, evaluation = cuts.training(sizes, indices, 0), cuts.evaluation(sizes)
    pictures = [np.full((h, w, 3), 250, np.uint8) for h, w in SIZES]
    for boxes in (evaluation, training):
        for (high, wide), row, image in zip(
            SIZES, boxes.rows, cut_all(boxes, pictures), strict=True
        ):
            assert row[:4] == [0, 0, wide, high]
            whole = boxes is evaluation or kind in ("none", "flip")
            height, width, y, x = row[4:8]
            if whole:
                assert min(y, x) >= 0 and max(y + height, x + width) <= 64
            filled = int((image == GREY).all(axis=2).sum())
            assert filled == (0 if resize == "squash" else filled)
            if whole and resize == "pad":
                assert filled == 64 * 64 - height * width
                assert max(height, width) == 64 and abs(height / width - high / wide) < 0.2


def test_windows_of_crop_move_everywhere_those_of_translate_by_two_pixels():
    sizes, indices = torch.tensor([[300, 400]]).expand(500, 2), torch.arange(500)
    middle = Cuts("none", 224, 224, 256, "crop", 0).training(sizes, indices, 0).rows[0]
    assert middle == [0, 0, 400, 300, 256, 341, -16, -58, 0]
    for kind, reach in (("crop", (32, 117)), ("translate", (4, 4))):
        boxes = Cuts(kind, 224, 224, 256, "crop", 0).training(sizes, indices, 0)
        places = torch.tensor(boxes.rows)[:, 6:8]
        assert (places <= 0).all() and (places >= 224 - torch.tensor([256, 341])).all()
        spread = places.max(dim=0).values - places.min(dim=0).values
        assert spread.tolist() == list(reach)
    assert default_resize(224) == 256


def test_every_kind_of_picture_is_decoded_as_pillow_decodes_it():
    pixels = noise(90, 140)
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"quality": 40}):
        jpeg = encoded(pixels, **options)
        assert header(jpeg)[:2] == (90, 140)
        assert (decoded(jpeg, header(jpeg)[2]) == files.decode(jpeg)).all()
    grey = encoded(np.ascontiguousarray(pixels[..., 0]))
    cmyk = encoded(np.dstack([pixels, pixels[..., :1]]))
    for other in (grey, cmyk, encoded(pixels, "png"), encoded(pixels, "webp")):
        assert (decoded(other, header(other)[2]) == files.decode(other)).all()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = encoded(pixels, exif=exif)
        height, width, kind = header(turned)
        upright = decoded(turned, kind)
        assert upright.shape == (height, width, 3)
        assert (upright == files.decode(turned)).all(), orientation


@pytest.mark.parametrize("kind", ["resized_crop", "none"])
def test_a_smaller_jpeg_still_has_twice_the_pixels_that_are_wanted(kind):
    shapes = [(height, width) for height in (64, 300, 450, 1200, 5000) for width in (64, 449, 3000)]
    cuts, met = Cuts(kind, 96, 96, 110, "crop", seed=0), set()
    for row in cuts.training(torch.tensor(shapes * 9), torch.arange(9 * len(shapes)), 0).rows:
        left, top, right, bottom, height, width, *_ = row
        times = reduction(row)
        met.add(times)
        room = min((bottom - top) / height, (right - left) / width)
        assert times == 1 or room / times >= 2
        assert times == 8 or room / (2 * times) < 2  # and no more than that
    assert met == {1, 2, 4, 8}


def test_a_smaller_jpeg_is_the_same_whoever_decodes_it(monkeypatch):
    jpegs = [encoded(noise(391, 173, seed)) for seed in range(2)]
    jpegs.append(encoded(np.ascontiguousarray(noise(64, 90)[..., 0])))
    exif = Image.Exif()
    exif[0x0112] = 6
    jpegs.append(encoded(noise(120, 333), exif=exif, progressive=True))
    ways = []
    for found in (module._simplejpeg(), None):
        monkeypatch.setattr(module, "_simplejpeg", lambda found=found: found)
        ways.append([decoded(jpeg, header(jpeg)[2], times=k) for jpeg in jpegs for k in (2, 4, 8)])
    for jpeg, one in zip([jpeg for jpeg in jpegs for _ in range(3)], ways[0], strict=True):
        height, width, kind = header(jpeg)
        assert kind & PLAIN and one.shape[:2] in [
            (-(-height // k), -(-width // k)) for k in (2, 4, 8)
        ]
    for one, other in zip(*ways, strict=True):
        assert (one == other).all()


def test_names_come_back_as_they_were():
    names = ["a/ü.jpg", "", "b\udcff.png", "long " * 50]
    packed = Names.of(names)
    assert list(packed) == names and len(packed) == 4


# Work ahead


def test_batches_come_in_order_and_never_more_than_the_depth_are_begun():
    threads, begun, ahead = Threads(3), [], Ahead(2)

    def begin(item):
        begun.append(item)
        done = []
        return threads.do([lambda: done.append(item * 10)] * 2), lambda: done

    for place, result in enumerate(ahead.over(range(10), begin)):
        assert result == [place * 10] * 2
        assert len(begun) <= place + 3
    assert begun == list(range(10)) and 0 <= ahead.take_wait() <= 1
    threads.end()


def test_an_error_of_a_thread_is_raised_by_the_step_that_needs_the_batch_and_work_is_dropped():
    threads, done = Threads(1), []

    def begin(item):
        def piece():
            if item == 2:
                raise MemoryError("no room")
            time.sleep(0.01)
            done.append(item)

        return threads.do([piece]), lambda: item

    got = []
    with pytest.raises(MemoryError, match="no room"):
        for item in Ahead(3).over(range(50), begin):
            got.append(item)
    assert got == [0, 1]
    time.sleep(0.2)
    assert max(done) <= 5  # what was in flight is not begun any more
    assert all(thread.daemon for thread in threading.enumerate() if thread.name[:6] == "decode")
    threads.end()


# Runs


NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, num_classes),
        )
    def forward(self, x):
        return self.body(x)
"""
RUN = ["--model", "net.py:Net", "--dataset", "photos", "--image-size", "48", "--batch-size", "12"]
RUN += ["--epochs", "2", "--augment", "resized_crop", "--shards", "6", "--threads", "1"]
RUN += ["--log-every", "1", "--lr", "0.05", "--no-plots", "--bitwise"]


def photographs(folder, count: int = 16) -> None:
    """Three classes of photographs of many sizes, JPEG and PNG."""
    for label, name in enumerate(("ant", "bee", "cow")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            height, width = 70 + 13 * number % 90, 66 + 29 * number % 120
            pixels = noise(height, width, 100 * label + number).copy()
            pixels[..., label] = np.minimum(255, pixels[..., label].astype(int) + 70)
            kind = "png" if number % 5 == 4 else "jpeg"
            (folder / name / f"{number:03}.{kind}").write_bytes(encoded(pixels, kind))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "net.py").write_text(NET)
    photographs(folder / "photos")
    done = train(
        [*RUN, "--run-dir", "one"], folder, LOCKSTEP_RECORD="one-record",
        LOCKSTEP_CACHE_SIZE="0", LOCKSTEP_CACHE=str(folder / "cache"),
    )  # fmt: skip
    assert done.status == 0, done.out
    said = " ".join(done.out.replace("│", " ").split())
    assert "evaluated at 48 pixels of 55; decoded from their files by 1 thread" in said
    return folder


def numbers(run) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "data/wait"} for row in rows(run)]


def pixels_of(record) -> dict:
    shards, _ = read(record)
    return {key: (row["indices"], row["pixels"]) for key, row in shards.items()}


@pytest.mark.parametrize(
    ("name", "processes", "words"),
    [
        ("threads", 1, ["--decode-threads", "3"]),
        ("two", 2, []),
        pytest.param("four", 4, ["--decode-threads", "2"], marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_and_threads_makes_the_same_run(place, name, processes, words):
    done = train(
        [*RUN, *words, "--run-dir", name], place, processes,
        LOCKSTEP_RECORD=f"{name}-record", LOCKSTEP_CACHE_SIZE="0",
        LOCKSTEP_CACHE=str(place / "cache"),
    )  # fmt: skip
    assert done.status == 0, done.out
    assert numbers(place / name) == numbers(place / "one")
    assert pixels_of(place / f"{name}-record") == pixels_of(place / "one-record")
    assert all(0 <= row["data/wait"] <= 1 for row in rows(place / name) if "train/loss" in row)


def test_smaller_jpegs_are_a_setting_of_the_run(place):
    words = [*RUN, "--image-size", "12", "--decode", "scaled"]
    cache = {"LOCKSTEP_CACHE": str(place / "scaled-cache")}  # with room: no pixels are kept there
    numbers_of, pixels = [], []
    for name, processes, more in (
        ("smaller", 1, []), ("smaller-two", 2, ["--decode-threads", "3"]),
        ("not-smaller", 1, ["--decode", "full"]),
    ):  # fmt: skip
        record = {"LOCKSTEP_RECORD": f"{name}-record"}
        done = train([*words, *more, "--run-dir", name], place, processes, **record, **cache)
        assert done.status == 0, done.out
        said = " ".join(done.out.replace("│", " ").split())
        assert (", scaled)" in said) == (name != "not-smaller")
        numbers_of.append(numbers(place / name))
        pixels.append(pixels_of(place / f"{name}-record"))
    assert numbers_of[0] == numbers_of[1] and pixels[0] == pixels[1]
    assert numbers_of[0] != numbers_of[2] and pixels[0] != pixels[2]
    resumed = train(["--resume", "smaller", "--decode", "full", "--epochs", "3"], place, **cache)
    assert resumed.status == 2 and "--allow-change decode" in " ".join(resumed.out.split())
    resumed = train(["--resume", "smaller", "--epochs", "3"], place, **cache)
    assert resumed.status == 0 and ", scaled)" in " ".join(resumed.out.replace("│", " ").split())


def test_a_kill_and_a_move_of_the_folder_change_nothing(place):
    cache = {"LOCKSTEP_CACHE_SIZE": "0", "LOCKSTEP_CACHE": str(place / "other-cache")}
    killed = train([*RUN, "--run-dir", "killed", "--checkpoint-every", "2"], place,
                   LOCKSTEP_FAULT="kill@step=4", **cache)  # fmt: skip
    assert killed.status != 0
    shutil.copytree(place / "photos", place / "moved")
    words = ["--resume", "killed", "--dataset", "moved", "--decode-threads", "2"]
    done = train([*words, "--allow-change", "dataset"], place, 2, **cache)
    assert done.status == 0, done.out
    assert numbers(place / "killed") == numbers(place / "one")


def test_another_batch_goes_on_at_the_same_place_and_the_surest_mistakes_are_shown(place):
    cache = {"LOCKSTEP_CACHE_SIZE": "0", "LOCKSTEP_CACHE": str(place / "cache")}
    look = ["--run-dir", "looked", "--stop-after", "3", "--lr", "1e-6"]  # learns nothing
    train([*RUN, *look], place, **cache)
    words = ["--resume", "looked", "--batch-size", "6", "--allow-change", "batch_size", "--plots"]
    done = train(words, place, **cache)
    assert done.status == 0 and "could be drawn" not in done.out, done.out
    last = max((place / "looked/checkpoints").glob("step-*"))
    progress = json.loads((last / "progress.json").read_text())
    steps = len(load_source(str(place / "photos"), image_size=48).train) // 6
    assert (progress["step"], progress["images"]) == (3 + steps, 36 + 6 * steps)
    assert [row["epoch"] for row in rows(place / "looked") if "test/loss" in row][-1] == 2
    best = progress["best_metrics"]
    assert len(best["examples"]) == round((1 - best["accuracy"]) * best["images"]) > 0
    assert (place / "looked/mistakes.png").is_file()


def damage(path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def test_a_picture_damaged_in_the_middle_stops_the_run_with_its_name_and_excluding_it_goes_on(
    place,
):
    shutil.copytree(place / "photos", place / "broken")
    cache = {"LOCKSTEP_CACHE_SIZE": "0", "LOCKSTEP_CACHE": str(place / "cache")}
    words = [*RUN, "--dataset", "broken", "--epochs", "3"]
    for name in ("bee/003.jpeg", "cow/007.jpeg"):
        damage(place / "broken" / name)
    done = train([*words, "--run-dir", "stopped"], place, **cache)
    assert done.status == 1 and "Traceback" not in done.out, done.out
    assert "cannot decode" in done.out and "--exclude stopped/damaged.txt" in done.out
    named = (place / "stopped/damaged.txt").read_text().split()
    assert named and set(named) <= {"bee/003.jpeg", "cow/007.jpeg"}
    status = json.loads((place / "stopped/status.json").read_text())
    assert status["status"] == "failed" and "cannot decode" in status["reason"]
    (place / "both.txt").write_text("bee/003.jpeg\ncow/007.jpeg\n")
    done = train(["--resume", "stopped", "--exclude", "both.txt"], place, 2, **cache)
    assert done.status == 0, done.out
    for name, more, processes in (
        ("excluded", ["--exclude", "both.txt"], 1), ("skipped", ["--skip-bad-images"], 2),
    ):  # fmt: skip
        done = train([*words, *more, "--run-dir", name], place, processes, **cache)
        assert done.status == 0, done.out
        assert numbers(place / name) == numbers(place / "stopped"), name
        said = "as it cannot be decoded: 2 images, see skipped/damaged.txt" in done.out
        assert said == (name == "skipped"), done.out
    both = set((place / "both.txt").read_text().split())
    assert set((place / "skipped/damaged.txt").read_text().split()) == both
    for name, why in (("excluded", "excluded"), ("skipped", "cannot be decoded")):
        with (place / name / "split.csv").open(newline="") as file:
            listed = list(csv.DictReader(file))
        assert {row["name"]: row["left_out"] for row in listed if row["left_out"]} == dict.fromkeys(
            both, why
        )
        assert len(listed) == 48  # whoever takes the split over finds them all
        assert json.loads((place / name / "summary.json").read_text())["skipped_images"] == 2
    assert read_split(str(place / "skipped")) == read_split(str(place / "excluded"))


@pytest.mark.slow
def test_what_is_gone_or_another_file_in_a_later_life_can_be_excluded_and_nothing_else(place):
    shutil.copytree(place / "photos", place / "leaking")
    names = ["ant/002.jpeg", "bee/003.jpeg", "cow/007.jpeg"]
    (place / "gone.txt").write_text("\n".join(names))
    words = [*RUN, "--dataset", "leaking", "--epochs", "3", "--checkpoint-every", "2"]
    cache = {"LOCKSTEP_CACHE": str(place / "leaking-cache")}  # with decoded pixels
    killed = train([*words, "--run-dir", "leaked"], place, LOCKSTEP_FAULT="kill@step=5", **cache)
    assert killed.status != 0
    shutil.copytree(place / "leaked", place / "whole")
    whole = train(["--resume", "whole", "--exclude", "gone.txt"], place, **cache)
    assert whole.status == 0, whole.out
    (place / "leaking" / names[0]).unlink()
    damage(place / "leaking" / names[1])
    (place / "leaking" / names[2]).write_bytes(b"no picture")
    for out in ([], ["--exclude", names[0]]):
        refused = train(["--resume", "leaked", *out], place, **cache)
        assert refused.status == 2, refused.out
    done = train(["--resume", "leaked", "--exclude", "gone.txt"], place, 2, **cache)
    assert done.status == 0, done.out
    assert numbers(place / "leaked") == numbers(place / "whole")


@pytest.mark.slow
def test_a_damaged_test_picture_counts_for_nothing_on_any_number_of_processes(place):
    shutil.copytree(place / "photos", place / "broken-test")
    source = load_source(str(place / "broken-test"), image_size=48)
    names = [source.test.photos.names[p] for p in source.test.places.tolist()]
    name = next(name for name in names if name.endswith("jpeg"))
    damage(place / "broken-test" / name)
    words = [*RUN, "--dataset", "broken-test", "--epochs", "1", "--skip-bad-images", "--plots"]
    for processes in (1, 2, 3):
        run = f"test-{processes}"
        done = train([*words, "--run-dir", run], place, processes)
        assert done.status == 0 and "could be drawn" not in done.out, done.out
        assert numbers(place / run) == numbers(place / "test-1")
        summary = json.loads((place / run / "summary.json").read_text())
        assert summary["test/images"] == len(names) - 1
        assert (place / run / "damaged.txt").read_text() == f"{name}\n"


def test_settings_of_photographs_that_have_no_effect_are_told_and_impossible_ones_refused(place):
    words = ["--model", "net.py:Net", "--dataset", "digits", "--dry-run", "--resize", "pad"]
    done = train([*words, "--eval-size", "48"], place)
    assert done.status == 0 and "no effect: --resize, --eval-size; no picture" in done.out
    assert "355 test images (256 are tried)" in done.out  # it is the data set that is told
    done = train([*RUN, "--eval-resize", "40", "--run-dir", "never"], place)
    assert done.status == 2 and "--eval-resize 40: must be at least the 48 pixels" in done.out


@pytest.mark.parametrize(
    ("words", "code"),
    [("nowhere.jpg", "exclude-unknown"), ("no-such.txt", "exclude-unreadable")],
)
def test_what_is_excluded_must_be_there(place, words, code):
    done = train([*RUN, "--exclude", words, "--run-dir", "never"], place)
    assert done.status == 2 and f"--exclude {words}" in done.out, (code, done.out)


# The scan


def test_a_damaged_header_is_an_error_or_left_out(place, tmp_path):
    photographs(tmp_path / "p", 4)
    (tmp_path / "p/ant/zzz.jpeg").write_bytes(b"no picture")
    with pytest.raises(UserError) as caught:
        load_source(str(tmp_path / "p"), image_size=32)
    assert caught.value.code == "bad-image" and "zzz.jpeg" in str(caught.value)
    source = load_source(str(tmp_path / "p"), image_size=32, skip_bad_images=True)
    assert len(source.skipped) == 1 and len(source.train) + len(source.test) == 12


def test_mean_and_std_are_those_of_what_evaluation_sees(place):
    from data.loaders import Photographs, decoding_of

    source = load_source(str(place / "photos"), image_size=48)
    cuts = Cuts("none", 48, 48, default_resize(48), "crop", 0)
    decoding = decoding_of(cuts, source.mean, 2, torch.device("cpu"))
    seen = Photographs(source.train, decoding).seen(torch.arange(len(source.train)))
    every = seen.double().div(255).permute(1, 0, 2, 3).flatten(1)
    assert source.mean == pytest.approx(every.mean(1).tolist(), abs=1e-9)
    assert source.std == pytest.approx(every.std(1, correction=0).tolist(), abs=1e-9)


def test_the_fingerprint_is_that_of_names_labels_and_contents_not_of_the_place(place, tmp_path):
    first = load_source(str(place / "photos"), image_size=48)
    shutil.copytree(place / "photos", tmp_path / "p")
    assert load_source(str(tmp_path / "p"), image_size=48).fingerprint == first.fingerprint
    a, b = tmp_path / "p/ant/001.jpeg", tmp_path / "p/bee/001.jpeg"
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other), b.write_bytes(one)
    assert load_source(str(tmp_path / "p"), image_size=48).fingerprint != first.fingerprint


def test_the_scan_decodes_no_picture(place, monkeypatch):
    from data.sources.folder import read_class_folders

    monkeypatch.setattr(Image.Image, "resize", None)
    monkeypatch.setattr("data.photographs.decoded", None)
    found = scan(read_class_folders(place / "photos"), False)
    assert len(found.sizes) == 48 and int(found.sizes.min()) >= 66


# Disks that fail


@dataclass
class Failing:
    """A store whose reads of one picture go wrong so many times, and may take a while."""

    content: bytes
    error: BaseException | None = None
    times: int = 0
    pause: float = 0.0
    calls: int = 0
    words: str = "failing"

    def encoded(self, place: int) -> bytes:
        time.sleep(self.pause * (place == 1))
        if place == 1:
            self.calls += 1
            if self.error is not None and self.calls <= self.times:
                raise self.error
        return self.content

    def raw(self, place: int) -> None:
        return None

    def name_of(self, path) -> str:
        return str(path)


@pytest.mark.parametrize(
    ("failing", "calls", "why"),
    [
        ({"error": OSError(5, "Input/output error"), "times": 3}, 4, None),
        ({"error": OSError(5, "Input/output error"), "times": 99}, 4, "Input/output error"),
        ({"error": FileNotFoundError(2, "gone"), "times": 99}, 1, "it is no longer there"),
        ({"error": RuntimeError("the decoder says no"), "times": 1}, 1, "the decoder says no"),
        ({"pause": 0.3}, 1, None),
    ],
)
def test_a_disk_that_fails_is_asked_again_and_what_stays_unreadable_weighs_nothing(
    monkeypatch, failing, calls, why
):
    monkeypatch.setattr(module, "RETRIES", (0.0, 0.0, 0.0))
    content = encoded(noise(70, 90))
    store, names = Failing(content, **failing), Names.of(["a", "b", "c"])
    sizes, kinds = torch.tensor([[70, 90]] * 3).int(), torch.tensor([1 | PLAIN] * 3).byte()
    photos, threads = Photos(store, names, sizes, kinds), Threads(2)
    boxes = Cuts("none", 48, 48, 55, "crop", 0).evaluation(sizes)
    work, images, bad = photos.batch([0, 1, 2], boxes, GREY, threads)
    work.wait()
    assert (store.calls, bad) == (calls, [1] * bool(why))
    assert photos.damage.found == ({1: why} if why else {})
    right = images[0] if why is None else torch.full_like(images[0], GREY[0])
    assert torch.equal(images[1], right) and torch.equal(images[2], images[0])
    threads.end()


def test_who_waits_long_hears_which_picture_does_not_come(monkeypatch, capsys):
    monkeypatch.setattr(module, "SLOW", 0.4)
    monkeypatch.setattr(ahead_module, "SLOW", 0.4)
    store = Failing(encoded(noise(70, 90)), pause=1.2)
    sizes, kinds = torch.tensor([[70, 90]] * 3).int(), torch.tensor([1 | PLAIN] * 3).byte()
    photos, threads = Photos(store, Names.of(["a", "b", "c"]), sizes, kinds), Threads(2)
    boxes = Cuts("none", 48, 48, 55, "crop", 0).evaluation(sizes)

    def begin(places):
        work, images, _ = photos.batch(places, boxes, GREY, threads)
        return work, lambda: images

    list(Ahead(3, photos.tell_slow).over([[0, 1, 2]], begin))
    assert capsys.readouterr().err == "waiting for b: its disk has not answered for 0 s\n"
    assert not photos.under_way
    threads.end()


def test_memory_that_is_gone_is_no_damaged_picture():
    store = Failing(encoded(noise(70, 90)), MemoryError("no room"), 99)
    sizes, kinds = torch.tensor([[70, 90]] * 3).int(), torch.tensor([1 | PLAIN] * 3).byte()
    photos, threads = Photos(store, Names.of(["a", "b", "c"]), sizes, kinds), Threads(2)
    boxes = Cuts("none", 48, 48, 55, "crop", 0).evaluation(sizes)
    work, _, bad = photos.batch([0, 1, 2], boxes, GREY, threads)
    with pytest.raises(MemoryError, match="no room"):
        work.wait()
    assert not bad and not photos.damage.found
    threads.end()


def test_small_pictures_have_the_same_bits_in_memory_as_files_and_in_a_raw_pack(
    tmp_path, monkeypatch
):
    from data.sources.describe import at_hand, entry_of, source_of
    from data.sources.folder import read_class_folders

    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    for number in range(24):
        kind = "png" if number % 3 else "jpeg"
        path = tmp_path / "small" / "ab"[number % 2] / f"{number:02}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(60, 60, number), kind))
    records = read_class_folders(tmp_path / "small")
    memory = load_source(str(tmp_path / "small"))
    entry = entry_of(scan(records, False), "small", None, tmp_path / "unused")
    homes = [source_of("small", entry, ""), source_of("small", at_hand([], entry, print), "")]
    assert [home.train.photos.store.raw(0) is None for home in homes] == [True, False]
    for home in homes:
        for split in ("train", "test"):
            photos = getattr(home, split)
            pixels = [photos.photos.pixels(place) for place in photos.places.tolist()]
            found = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
            assert torch.equal(found, getattr(memory, split).images)
