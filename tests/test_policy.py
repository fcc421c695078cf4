"""Augmentation policies: what --augment says, operators as torchvision's, each image by its key."""

import pytest
import torch
from launches import SMALL, losses, rows, same_weights, train
from PIL import Image
from refusals import refused
from torch.nn.functional import interpolate

from data import operators
from data.augment import Augment
from data.keyed_random import permutation, uniforms
from data.operators import CHANGES, OPERATORS, affine, colour, equalise, grey, hue, row, sharpen
from data.policy import KINDS, STEPS, parse_policy
from training.recorder import read

CHANCES = [f"{name}(p=0.5)" for name in OPERATORS]
POLICIES = [*CHANCES, "rotate(30)|jitter|randaugment(3,10,2)|grey|erase(0.5)"]


def random_images(n: int, size: int = 32) -> torch.Tensor:
    """Whole numbers, of which some images are dark, some of few values, one of one colour."""
    drawn = uniforms(0, 0, torch.arange(n), 3 * size * size).reshape(n, 3, size, size)
    smooth = interpolate(drawn[..., ::8, ::8], size=(size, size), mode="bilinear")
    images = (drawn * 60 + smooth * 196).floor()
    images[1::4] = (images[1::4] / 3).floor()
    images[2:3] = (images[2:3] / 128).floor() * 90
    images[3:4] = 77
    return images


def augment(policy: str, size: int = 32, **more) -> Augment:
    return Augment(policy, size, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), seed=3, **more)


# --- the language ---------------------------------------------------------------------------------


def test_a_policy_is_read_with_its_numbers_by_place_or_by_name():
    policy = parse_policy(" resized_crop | flip|randaugment(2, 10, p=0.5)|erase(.25)|rotate")
    assert (policy.kind, policy.flip) == ("resized_crop", 0.5)
    first, second, third = policy.steps
    assert (first.name, dict(first.numbers)) == (
        "randaugment", {"n": 2, "m": 10, "noise": 0, "p": 0.5},
    )  # fmt: skip
    assert (second["p"], second["high"], third["degrees"]) == (0.25, 0.33, 15)
    assert parse_policy("crop|flip(0.2)").flip == 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_alone_means_what_it_meant_before_there_were_policies(kind):
    policy = parse_policy(kind)
    assert (policy.kind, policy.flip, policy.steps) == (kind, 0.5, ())


@pytest.mark.parametrize(
    ("text", "mark", "words"),
    [
        ("crop|randaugmnt(2,10)", 5, "did you mean randaugment"),
        ("crop||flip", 5, "a step is missing"),
        ("flip|crop", 5, "crop must come first"),
        ("crop|resized_crop", 5, "resized_crop must come first"),
        ("flip|flip", 5, "flip stands there twice"),
        ("none|flip", 0, "none stands alone"),
        ("crop|erase(0.25", 15, "a . is missing here; write erase.p=0.25"),
        ("crop|erase(0.25)x", 17, "a . is missing here"),
        ("crop| erase(1.5)", 12, "p of erase must be a number from 0 to 1"),
        ("randaugment(2.5)", 12, "n of randaugment must be a whole number from 1 to 8"),
        ("randaugment(2,ten)", 14, "m of randaugment must be a number from 0 to 30"),
        ("randaugment(2,10,0,1,7)", 21, "has no such number"),
        ("crop(4)", 5, "crop has no such number; write crop"),
        ("grey(q=1)", 5, "grey has no such number; write grey.p=0.2"),
        ("rotate(5,degrees=6)", 9, "rotate has degrees twice"),
        ("flip|blur(1,2,1)", 5, "low of blur must not be above high"),
        ("rotate(nan)", 7, "must be a number"),
        ("rotate(-5)", 7, "must be a number"),
    ],
)
def test_what_is_wrong_is_said_with_a_mark_under_it(text, mark, words):
    code = "unknown-augmentation" if "did you mean" in words else "bad-augmentation"
    with refused(code, match=words) as caught:
        parse_policy(text)
    sentence, shown, below = str(caught.value).splitlines()
    assert sentence.startswith("--augment: ")
    assert (shown, below) == ("  " + text, "  " + " " * mark + "^")


def test_every_step_but_cuts_and_flip_is_an_operator():
    assert set(STEPS) - set(KINDS) == set(OPERATORS)


# --- operators, against torchvision's on uint8 ----------------------------------------------------


def changed(name: str, strength: float, images: torch.Tensor) -> torch.Tensor:
    """One change of RandAugment's to all images, by the way it takes there."""
    size = images.shape[3]
    rows = torch.tensor([row(name, strength, size)] * len(images))
    matrices, *numbers = rows.split([6] + [1] * len(operators.ROW), dim=1)
    by, scale, of_grey, of_mean, low, levels, threshold, flat = numbers
    images = sharpen(affine(images, matrices), by)
    images = operators.levelled(colour(images, scale, of_grey, of_mean, low), levels, threshold)
    return equalise(images, flat)


def theirs(name: str, strength: float, images: torch.Tensor) -> torch.Tensor:
    """The same change by torchvision's RandAugment, on uint8."""
    transforms = pytest.importorskip("torchvision.transforms.v2")
    names = {
        "saturation": "Color", "autocontrast": "AutoContrast", "shear_x": "ShearX",
        "shear_y": "ShearY", "translate_x": "TranslateX", "translate_y": "TranslateY",
    }  # fmt: skip
    if name in ("brightness", "saturation", "contrast", "sharpness"):
        strength -= 1
    if name == "solarize":
        strength /= 255
    apply = transforms.RandAugment()._apply_image_or_video_transform
    kind = names.get(name, name.capitalize())
    nearest = transforms.InterpolationMode.NEAREST
    # one by one: torchvision's batches are its own affair
    done = [apply(image, kind, strength, nearest, {torch.Tensor: None}) for image in images.byte()]
    return torch.stack(done).float()


STRENGTHS = {
    "identity": (0,), "autocontrast": (0,), "equalize": (0,), "posterize": (2, 5, 8),
    "shear_x": (0.3, -0.17, 0.99), "shear_y": (0.3, -0.17, 0.99), "translate_x": (3, -9, 32),
    "translate_y": (3, -9, 32), "rotate": (10, -30, 135), "solarize": (0, 100, 110.5, 255),
    **dict.fromkeys(("brightness", "saturation", "contrast", "sharpness"), (0.01, 0.6, 1.3, 1.99)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("size", [32, 33])
def test_a_change_is_torchvisions(name, size):
    images = random_images(12, size)
    for strength in STRENGTHS[name]:
        ours, expected = changed(name, strength, images.clone()), theirs(name, strength, images)
        assert torch.equal(ours, ours.round()) and ours.min() >= 0 and ours.max() <= 255
        difference = (ours - expected).abs()
        if name in ("shear_x", "shear_y", "rotate"):
            # A place within a rounding error of halfway between two pixels may fall on either.
            assert (difference > 0).float().mean() < 0.02
        elif name == "sharpness":  # torchvision rounds what it smooths, and the blend down
            assert difference.max() <= 1
        else:  # torchvision rounds down also what is whole but for a rounding error
            assert difference.max() <= 1 and (difference > 0).float().mean() < 0.1


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.07, 0.5])
def test_hue_grey_rotation_blur_and_erasing_are_torchvisions(turn):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = random_images(8)
    as_bytes = images.byte()
    bilinear = functional.InterpolationMode.BILINEAR
    difference = hue(images, torch.full((8, 1), turn)) - functional.adjust_hue(as_bytes, turn)
    assert difference.abs().max() <= 1  # rounded up and down, to other sides
    assert torch.equal(
        grey(images).expand(-1, 3, -1, -1), functional.rgb_to_grayscale(as_bytes, 3).float()
    )
    angle = 90 * turn
    maps = torch.tensor([row("rotate", angle, 32)[:6]] * 8)
    expected = functional.rotate(as_bytes, angle, bilinear)
    assert (operators.turn(images, maps) - expected).abs().max() <= 1  # halves
    sigma = 1 + turn
    for size in (32, 64):
        images = random_images(4, size)
        side = 2 * operators.blur_reach(size) + 1
        blurred = operators.blur(images, torch.full((4, 1), sigma))
        expected = functional.gaussian_blur(images.byte(), [side, side], [sigma, sigma])
        assert (blurred - expected).abs().max() <= 1  # halves
    step = parse_policy("erase").steps[0]
    boxes = torch.tensor([[3.0, 5, 9, 30]] * 4)
    erased = OPERATORS["erase"].change(images, boxes, step, (9.0, 8.0, 7.0))
    colour_of = torch.tensor([9, 8, 7], dtype=torch.uint8)[:, None, None]
    assert torch.equal(erased.byte(), functional.erase(images.byte(), 3, 5, 6, 25, colour_of))


@pytest.mark.parametrize("wide", [False, True])
def test_the_strengths_are_those_of_torchvisions_policies(wide):
    transforms = pytest.importorskip("torchvision.transforms.v2")
    policy = transforms.TrivialAugmentWide if wide else transforms.RandAugment
    for name, (magnitudes, signed) in policy._AUGMENTATION_SPACE.items():
        ours = CHANGES[list(policy._AUGMENTATION_SPACE).index(name)]
        values = magnitudes(31, 48, 48)
        if values is None:
            continue
        for k, value in enumerate(values.tolist()):
            found = [operators.strength(ours, k / 30, sign, 48, wide) for sign in (1, -1)]
            if ours.startswith("translate"):
                value = int(value + 1e-4)  # its 16 is 15.999999
            elif name == "Solarize":
                value *= 255
            offset = 1 if name in ("Brightness", "Color", "Contrast", "Sharpness") else 0
            expected = [offset + value, offset - value] if signed else [value] * 2
            assert found == pytest.approx(expected, abs=1e-4), (name, k)


# --- draws ----------------------------------------------------------------------------------------


def test_every_change_strength_and_sign_comes_as_often_as_it_should():
    step = parse_policy("trivialaugment").steps[0]
    draws = uniforms(0, 0, torch.arange(20000), operators.draws_of(step))
    rows = operators.choose(step, draws, 32)[:, 0]
    for part, count in ((rows // 62, 14), (rows // 2 % 31, 31), (rows % 2, 2)):
        share = torch.bincount(part.long(), minlength=count) / len(rows)
        assert len(share) == count and (share * count - 1).abs().max() < 0.15


@pytest.mark.parametrize(("noise", "spread"), [(0, 0), (2, 2), (30, 12)])
def test_the_noise_of_a_strength_spreads_it_around_m(noise, spread):
    step = parse_policy(f"randaugment(1,10,{noise})").steps[0]
    draws = uniforms(0, 0, torch.arange(5000), operators.draws_of(step))
    strengths = (operators.choose(step, draws, 32)[:, 0] // 2 % 31).float()
    assert strengths.std() == pytest.approx(spread, rel=0.1, abs=0.01)
    assert noise == 30 or strengths.mean() == pytest.approx(10, abs=0.2)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_step_of_probability_zero_changes_nothing_and_one_half_every_second_image(name):
    images, indices = random_images(1).byte().expand(400, -1, -1, -1), torch.arange(400)
    plain = augment("none").train(images, indices, 0)
    assert torch.equal(augment(f"{name}(p=0)").train(images, indices, 0), plain)
    more = ",n=1" if name == "randaugment" else ""
    half = augment(f"{name}(p=0.5{more})").train(images, indices, 0)
    share = (half != plain).flatten(1).any(1).float().mean()
    assert 0.35 < share < 0.6


def test_mirroring_has_its_probability_and_no_flip_leaves_all_of_it_out():
    images = random_images(1, 8).byte().expand(600, -1, -1, -1)
    indices = torch.arange(600)
    plain = augment("none", 8).train(images, indices, 0)
    for policy, axis in (("flip(0.2)", 3), ("vflip(0.2)", 2)):
        out = augment(policy, 8).train(images, indices, 0)
        there = (out == plain.flip(axis)).flatten(1).all(1).float().mean()
        assert 0.15 < there < 0.25
        assert torch.equal(augment(policy, 8, no_flip=True).train(images, indices, 0), plain)


def test_steps_come_in_the_order_they_are_written():
    images, indices = random_images(64).byte(), torch.arange(64)
    one = augment("rotate(45)|erase(1)").train(images, indices, 0)
    other = augment("erase(1)|rotate(45)").train(images, indices, 0)
    assert not torch.equal(one, other)


def test_the_last_epochs_are_only_cut_and_mirrored():
    images, indices = random_images(16).byte(), torch.arange(16)
    more = {"cutout": 6, "mixup": 0.5, "cutmix": 1.0}
    whole = augment("crop|randaugment|erase(1)", until=3, **more)
    plain = augment("crop")
    for epoch in range(5):
        same = torch.equal(whole.train(images, indices, epoch), plain.train(images, indices, epoch))
        _, targets = whole.mix(images.float(), indices, indices, epoch, 16)
        assert same == (epoch >= 3) == (targets is indices)


# --- one law over all of them ---------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["", "crop|flip|", "resized_crop|"])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_image_is_the_same_in_any_batch_and_from_a_table_of_the_epoch(policy, cut, monkeypatch):
    monkeypatch.setattr("data.augment.CHUNK", 64)
    images, order = random_images(48).byte(), permutation(0, 0, 200)[:48]
    alone, table = (augment(cut + policy, samples=samples) for samples in (0, 200))
    for epoch in (0, 1, 0):
        together = alone.train(images, order, epoch)
        assert torch.equal(together, table.train(images, order, epoch))
        torch.manual_seed(0)  # a generator of torch must play no part
        for part in (slice(0, 24), slice(24, 48), [17, 3, 40]):  # two processes; other neighbours
            apart = alone.train(images[part], order[part], epoch)
            if cut.startswith("resized"):  # products of another shape: rounded to another number
                assert ((apart - together[part]).abs() > 0.1).float().mean() < 0.01
            else:
                assert torch.equal(apart, together[part])
    assert not torch.equal(together, alone.train(images, order, 1))
    photographs = augment(policy, cut=True)
    expected = augment(policy).train(images, order, 2)
    assert torch.equal(photographs.train(images, order, 2), expected)


# --- runs -----------------------------------------------------------------------------------------

RUNS = {
    "randaugment": ["randaugment(2,10,1)|erase(0.5)", "--mixup", "0.2", "--cutmix", "1"],
    "trivialaugment": ["crop|trivialaugment|blur|vflip"],
    "colours": ["resized_crop|flip(0.3)|jitter|grey|rotate(30)", "--no-flip", "--cutmix", "1"],
    "photographs": [
        "resized_crop|flip|randaugment|jitter|erase",
        "--dataset",
        "pictures",
        "--batch-size",
        "8",
    ],
}


def pictures(folder) -> None:
    """Two classes of photographs, of more than 64 pixels a side."""
    shades = (random_images(48, 72).movedim(1, 3)).byte().numpy()
    for number, shade in enumerate(shades):
        place = folder / "pictures" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shade).save(place / f"{number}.png")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_policy_is_the_same_run_on_two_processes_and_after_a_kill(nets, name, tmp_path):
    pictures(tmp_path)
    (tmp_path / "plain.py").write_bytes((nets / "plain.py").read_bytes())
    words = ["--model", "plain.py:Net", *SMALL, "--limit", "640", "--batch-size", "32", "--bitwise"]
    words += ["--epochs", "3", "--max-steps", "24", "--shards", "4", "--checkpoint-every", "5"]
    words += ["--plain-epochs", "1", "--lr", "0.02", "--optimizer", "sgd", "--augment", *RUNS[name]]
    cache = {"LOCKSTEP_CACHE_SIZE": "0", "LOCKSTEP_CACHE": str(tmp_path / "cache")}
    for folder, processes in (("one", 1), ("two", 2)):
        done = train(
            [*words, "--run-dir", folder], tmp_path, processes,
            LOCKSTEP_RECORD=f"{folder}-record", **cache,
        )  # fmt: skip
        assert done.status == 0, done.out
    fault = "kill@step=7"
    done = train([*words, "--run-dir", "killed"], tmp_path, LOCKSTEP_FAULT=fault, **cache)
    assert done.status == -9, done.out
    done = train(["--resume", "killed"], tmp_path, 2, **cache)
    assert done.status == 0, done.out
    one, *others = (
        [row_of | {"data/wait": 0} for row_of in rows(tmp_path / folder)]
        for folder in ("one", "two", "killed")
    )
    assert all(other == one for other in others)
    for other in ("two", "killed"):
        assert same_weights(tmp_path / "one", tmp_path / other) == []
    shards = [read(tmp_path / f"{folder}-record")[0] for folder in ("one", "two")]
    one, two = ({k: (row["indices"], row["pixels"]) for k, row in s.items()} for s in shards)
    assert one == two and len(one) >= 20


def test_steps_of_a_policy_last_as_long_as_the_run_however_its_length_was_said(nets):
    """--max-steps may be more than --epochs, and what an epoch says of policies goes by both."""
    words = ["--model", "plain.py:Net", "--dataset", "digits", "--image-size", "16", "--limit"]
    words += ["64", "--batch-size", "64", "--threads", "1", "--no-plots", "--schedule", "constant"]
    words += ["--augment", "crop|erase(1)", "--log-every", "1", "--eval-every", "20"]
    found = {}
    for name, more in {
        "epochs": ["--epochs", "13"], "steps": ["--max-steps", "13"],
        "plain": ["--max-steps", "13", "--plain-epochs", "2"],
    }.items():  # fmt: skip
        done = train([*words, *more, "--run-dir", f"length-{name}"], nets)
        assert done.status == 0, done.out
        found[name] = losses(nets / f"length-{name}")
    assert len(found["steps"]) == 13 and found["steps"] == found["epochs"]
    assert found["plain"][:11] == found["steps"][:11] and found["plain"][11] != found["steps"][11]
