"""Augmentation: a function of (seed, epoch, index), and the operations the papers describe."""

import pytest
import torch
from refusals import refused
from torch.nn.functional import interpolate

from data.augment import (
    CROP_AREA,
    CROP_RATIO,
    CROP_TRIES,
    Augment,
    beta_quantile,
    cut_out,
    random_boxes,
    resize,
    resized_crop,
)
from data.keyed_random import uniforms
from data.policy import KINDS

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
RAW = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # so that outputs are pixel values 0..255


def random_images(n: int, size: int = 32) -> torch.Tensor:
    drawn = uniforms(0, 0, torch.arange(n), 3 * size * size)
    return (drawn * 256).to(torch.uint8).reshape(n, 3, size, size)


def pixels(augmented: torch.Tensor) -> torch.Tensor:
    """Whole pixel values, where no interpolation took place."""
    assert (augmented - augmented.round()).abs().max() < 1e-3
    return augmented.round().to(torch.uint8)


ALL_OPTIONS = [{"policy": kind, "cutout": 8} for kind in KINDS] + [
    {"policy": "crop", "alternating_flip": True},
    {"policy": "crop", "image_size": 48},
]


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_an_augmented_image_depends_neither_on_its_batch_nor_on_its_place(options):
    augment = Augment(**{"image_size": 32, "mean": MEAN, "std": STD, "seed": 3, **options})
    images, indices = random_images(16), torch.arange(100, 116)
    together = augment.train(images, indices, epoch=4)
    torch.manual_seed(0)  # a generator of torch must play no part
    some = torch.tensor([9, 2, 15])
    apart = augment.train(images[some], indices[some], epoch=4)
    torch.testing.assert_close(apart, together[some], rtol=0, atol=1e-5)
    if options["policy"] != "none":
        assert not torch.allclose(together, augment.train(images, indices, epoch=5))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_neighbours_in_a_batch_are_augmented_differently(kind):
    same = random_images(1).expand(64, -1, -1, -1)
    augmented = Augment(kind, 32, MEAN, STD, seed=0).train(same, torch.arange(64), 0)
    distinct = len(augmented.flatten(1).unique(dim=0))
    assert distinct == 2 if kind == "flip" else distinct > 20


def test_uint8_pixels_come_out_as_normalised_floats():
    images = random_images(4)
    for kind in ("none", "flip"):
        for out in (
            Augment(kind, 32, MEAN, STD, 0).evaluate(images),
            Augment(kind, 32, MEAN, STD, 0, no_flip=True).train(images, torch.arange(4), 0),
        ):
            mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
            torch.testing.assert_close(out, (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_the_features_of_a_regression_pass_through_unchanged():
    features = torch.tensor([[1.5, -2.0]])
    augment = Augment("crop", 32, MEAN, STD, 0)
    assert torch.equal(augment.train(features, torch.tensor([0]), 0), features)
    assert torch.equal(augment.evaluate(features), features)


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with refused("unknown-augmentation", match="known: none, crop, resized_crop"):
        Augment("blurr", 32, MEAN, STD, 0)


def test_flip_mirrors_about_half_of_the_images_and_changes_nothing_else():
    images = random_images(400, size=8)
    out = pixels(Augment("flip", 8, seed=0, **RAW).train(images, torch.arange(400), 0))
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    untouched = (out == images).flatten(1).all(1)
    assert (mirrored ^ untouched).all()
    assert 150 < mirrored.sum() < 250


def test_mirroring_the_same_images_twice_gives_them_back():
    images, indices = random_images(50, size=8), torch.arange(50)
    augment = Augment("flip", 8, seed=0, **RAW)
    once = pixels(augment.train(images, indices, 0))
    assert not torch.equal(once, images)
    assert torch.equal(pixels(augment.train(once, indices, 0)), images)


def test_alternating_flip_turns_over_each_epoch():
    images, indices = random_images(100, size=8), torch.arange(100)
    augment = Augment("flip", 8, seed=0, alternating_flip=True, **RAW)
    even, odd, later = (pixels(augment.train(images, indices, epoch)) for epoch in (0, 1, 2))
    assert torch.equal(odd, even.flip(3))
    assert torch.equal(later, even)
    assert 25 < (even == images).flatten(1).all(1).sum() < 75


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_flip_leaves_all_mirroring_out(kind, alternating):
    # brightness rises from left to right in each row, which only mirroring can turn round
    images = (torch.arange(32) * 7 + 10).to(torch.uint8).expand(64, 3, 32, 32)
    falls = {}
    for no_flip in (False, True):
        augment = Augment(kind, 32, seed=0, alternating_flip=alternating, no_flip=no_flip, **RAW)
        out = augment.train(images, torch.arange(64), 0)[:, 0, 16]
        falls[no_flip] = (out[:, 10] > out[:, 22]).sum()
    assert falls[True] == 0
    assert falls[False] == 0 if kind == "none" else 15 < falls[False] < 50


@pytest.mark.parametrize(("kind", "reach", "border"), [("crop", 4, "black"), ("translate", 2, "")])
def test_crop_and_translate_only_move_pixels(kind, reach, border):
    n = 300
    images = random_images(1).expand(n, -1, -1, -1)
    out = pixels(Augment(kind, 32, seed=0, **RAW).train(images, torch.arange(n), 0))
    mode = {"mode": "constant"} if border == "black" else {"mode": "reflect"}
    padded = torch.nn.functional.pad(images[:1].float(), (reach,) * 4, **mode).to(torch.uint8)[0]
    shifts = range(2 * reach + 1)
    possible = {}
    for flip in (False, True):
        for top in shifts:
            for left in shifts:
                window = padded[:, top : top + 32, left : left + 32]
                window = window.flip(2) if flip else window
                possible[window.numpy().tobytes()] = (flip, top, left)
    found = [possible[image.numpy().tobytes()] for image in out]  # a KeyError is a made-up image
    for part, values in enumerate([(False, True), shifts, shifts]):
        assert {place[part] for place in found} == set(values)


def test_crop_of_a_small_image_pads_an_eighth_of_it_before_it_is_enlarged():
    images = torch.full((200, 3, 16, 16), 255, dtype=torch.uint8)
    out = Augment("crop", 64, seed=0, **RAW).train(images, torch.arange(200), 0)
    assert out.shape == (200, 3, 64, 64)
    black = (out[:, 0, :, 32] < 128).sum(1)  # output pixels, 4 per source pixel
    assert set(black.tolist()) == {0, 4, 8}


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 224), (40, 64, 32), (8, 8, 64)])
def test_resize_equals_torchs_antialiased_bilinear(height, width, size):
    images = random_images(3, size=64)[:, :, :height, :width].float()
    expected = interpolate(images, (size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(resize(images, size), expected, rtol=0, atol=1e-3)
    evaluated = Augment("none", size, MEAN, STD, 0).evaluate(images.to(torch.uint8))
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(evaluated, (expected / 255 - mean) / std, rtol=0, atol=1e-4)


def test_resize_to_the_same_size_is_the_identity():
    images = random_images(2).float()
    assert resize(images, 32) is images


def test_a_resized_crop_of_a_given_box_equals_torchvisions():
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    boxes = torch.tensor([[0, 0, 48, 48], [5, 9, 11, 30], [20, 1, 28, 17], [47, 47, 1, 1]])
    images = random_images(4, size=48).float()
    flip = torch.tensor([[False], [True], [False], [True]])
    for size in (24, 96):
        ours = resized_crop(images, boxes.float(), flip, size)
        for image, box, mirrored, out in zip(images, boxes, flip, ours, strict=True):
            expected = functional.resized_crop(image, *box.tolist(), [size, size])
            expected = expected.flip(2) if mirrored else expected
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 128)])
def test_random_boxes_lie_inside_with_areas_and_ratios_in_range(height, width):
    drawn = uniforms(0, 0, torch.arange(4000), 2 + 2 * CROP_TRIES)
    top, left, box_height, box_width = random_boxes(height, width, drawn[:, :2], drawn[:, 2:])
    assert top.min() == 0 and left.min() == 0
    assert (top + box_height).max() == height and (left + box_width).max() == width
    assert all(torch.equal(side, side.round()) for side in (top, left, box_height, box_width))
    ratio, area = box_width / box_height, box_width * box_height / (height * width)
    assert ratio.min() > CROP_RATIO[0] * 0.85 and ratio.max() < CROP_RATIO[1] * 1.15  # rounding
    assert area.min() > CROP_AREA[0] * 0.8 and area.max() <= 1
    if height == width:  # elsewhere the border prefers boxes of the image's own orientation
        assert abs(ratio.log().mean()) < 0.02


def test_random_boxes_are_distributed_as_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms.v2")
    drawn = uniforms(0, 0, torch.arange(4000), 2 + 2 * CROP_TRIES)
    ours = torch.stack(random_boxes(32, 32, drawn[:, :2], drawn[:, 2:]), dim=1)
    torch.manual_seed(0)
    image = torch.zeros(3, 32, 32)
    crop = transforms.RandomResizedCrop(224)
    theirs = [crop.make_params([image]) for _ in range(4000)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in theirs]).float()
    for quantile in (0.1, 0.5, 0.9):
        difference = ours.quantile(quantile, dim=0) - theirs.quantile(quantile, dim=0)
        assert difference.abs().max() <= 1


def test_boxes_that_never_fit_fall_back_to_the_largest_of_an_allowed_ratio():
    everything = torch.ones(1, 2 * CROP_TRIES) - 2**-24  # area 1 at ratio 4/3 does not fit
    place = torch.full((1, 2), 0.5)
    assert [int(x) for x in random_boxes(32, 32, place, everything)] == [0, 0, 32, 32]
    assert [int(x) for x in random_boxes(30, 90, place, everything)] == [0, 25, 30, 40]


def test_cutout_blanks_a_square_of_its_side_that_only_the_border_may_clip():
    n, side = 500, 6
    drawn = uniforms(0, 0, torch.arange(n), 2)
    corner = (drawn * 16).floor() - side // 2
    blank = cut_out(torch.ones(n, 3, 16, 16), corner, side) == 0
    assert torch.equal(blank.all(1), blank.any(1))  # the same in all channels
    rows, columns = blank[:, 0].any(2), blank[:, 0].any(1)
    assert torch.equal(blank[:, 0], rows[:, :, None] & columns[:, None, :])
    for span in (rows, columns):
        at_border = span[:, 0] | span[:, -1]
        assert (span.sum(1)[~at_border] == side).all()
        assert (span.sum(1) >= side // 2).all()
        assert 0 < at_border.sum() < n
    corner = torch.tensor([[5, 5]])
    assert (cut_out(torch.ones(1, 1, 16, 16), corner, side) == 0).sum() == side**2


def test_training_cuts_out_after_the_geometry_and_evaluation_does_not():
    images = torch.full((50, 3, 16, 16), 255, dtype=torch.uint8)
    augment = Augment("none", 32, MEAN, STD, seed=0, cutout=8)
    blank = (augment.train(images, torch.arange(50), 0) == 0).all(1).sum((1, 2))
    assert blank.max() == 64 and blank.min() >= 16
    assert (augment.evaluate(images) != 0).all()


MIXES = [{"mixup": 0.2}, {"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}]


@pytest.mark.parametrize("options", MIXES, ids=str)
def test_mixed_targets_sum_to_one_and_say_how_much_of_each_image_is_there(options):
    n, size = 6, 20
    augment = Augment("none", size, MEAN, STD, seed=1, **options)
    # pixel values are the labels, so that the mean pixel is the share of the two labels
    labels = torch.arange(n)
    images = labels.float()[:, None, None, None].expand(n, 3, size, size)
    shares, boxes = [], 0
    for epoch in range(40):
        mixed, targets = augment.mix(images, labels, torch.arange(50, 50 + n), epoch, n)
        torch.testing.assert_close(targets.sum(1), torch.ones(n))
        torch.testing.assert_close(targets @ labels.float(), mixed.mean((1, 2, 3)))
        own = targets[0, 0]
        torch.testing.assert_close(targets[:, labels], torch.eye(n).flip(0).lerp(torch.eye(n), own))
        shares.append(float(own))
        boxes += len(mixed[0].unique()) == 2
    assert len(set(shares)) > 20 and min(shares) < 0.4 and max(shares) > 0.6
    if len(options) == 2:
        assert 10 < boxes < 30
    else:  # a box may cover nothing or everything
        assert boxes == 0 if "mixup" in options else boxes > 30


def test_a_cutmix_box_that_is_not_clipped_has_the_area_beta_gives():
    augment = Augment("none", 20, MEAN, STD, seed=1, cutmix=30.0)  # close to one half
    images, labels = torch.zeros(2, 3, 20, 20), torch.arange(2)
    mixes = [augment.mix(images, labels, torch.arange(2), epoch, 2)[1] for epoch in range(100)]
    assert 0.3 < min(float(targets[0, 0]) for targets in mixes) < 0.5


def test_a_mix_depends_on_the_indices_and_the_epoch_but_not_on_torchs_generator():
    augment = Augment("none", 32, MEAN, STD, seed=1, mixup=1.0)
    images, labels = random_images(4).float(), torch.arange(4)
    shares = set()
    for epoch, first in [(0, 0), (1, 0), (0, 10)]:
        for generator_seed in (0, 1):
            torch.manual_seed(generator_seed)
            _, targets = augment.mix(images, labels, torch.arange(first, first + 4), epoch, 4)
            shares.add(float(targets[0, 0]))
    assert len(shares) == 3


def test_without_mixup_images_and_labels_stay_as_they_are():
    images = random_images(3).float()
    labels = torch.tensor([2, 0, 1])
    mixed, targets = Augment("none", 32, MEAN, STD, 0).mix(images, labels, torch.arange(3), 0, 3)
    assert mixed is images and targets is labels


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 2.0, 8.0])
def test_beta_quantiles_invert_the_incomplete_beta_function(alpha):
    special = pytest.importorskip("scipy.special")
    chances = torch.linspace(0.001, 0.999, 999)
    expected = torch.from_numpy(special.betaincinv(alpha, alpha, chances.double().numpy())).float()
    torch.testing.assert_close(beta_quantile(chances, alpha), expected, rtol=1e-3, atol=1e-4)
    assert beta_quantile(torch.tensor([0.0]), alpha) == 0
