"""What the steps of a policy do to pixels: whole batches, each image by numbers of its own.

Images are float32 (n, 3, S, S) of whole numbers 0..255 and stay so. For given numbers the results
are those of torchvision.transforms.v2.functional on uint8. What is chosen for an image are columns
made of its uniform draws; where a step leaves an image alone, its columns say so, and all images
take the same way: a device neither waits nor is handed an operation for each of them.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data.policy import Step

BINS = 31  # strengths of RandAugment and TrivialAugment, as in torchvision
ANGLES = 1024  # of a rotation: their sines are made once, with the same bits on every device
ABOVE = 1e-3  # what is whole but for rounding is not rounded down to the number below
GREY = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class Operator:
    """How a step draws and what it does.

    choose(step, draws, on, size): columns (n, columns) from uniforms (n, draws); they leave those
    images alone for which `on` (n,) is False. change(images, columns, step, empty): the images;
    `empty` is the colour of what is blanked. `draws` and `columns` are those of a round.
    """

    draws: int
    columns: int
    choose: Callable[[Step, Tensor, Tensor, int], Tensor]
    change: Callable[[Tensor, Tensor, Step, tuple[float, ...]], Tensor]


def draws_of(step: Step) -> int:
    """How many uniforms an image needs; the first decides whether it gets the step at all."""
    return 1 + OPERATORS[step.name].draws * _rounds(step)


def choose(step: Step, draws: Tensor, size: int) -> Tensor:
    """Columns (n, k) from uniforms (n, draws_of(step)), for images of this size."""
    return OPERATORS[step.name].choose(step, draws[:, 1:], draws[:, 0] < step["p"], size)


def change(
    images: Tensor, columns: Tensor, steps: tuple[Step, ...], empty: tuple[float, ...]
) -> Tensor:
    """The images after all steps; `columns` are those of the steps beside each other.

    `empty` is the colour of what is blanked, 0..255.
    """
    widths = [OPERATORS[step.name].columns * _rounds(step) for step in steps]
    for step, part in zip(steps, columns.split(widths, dim=1), strict=True):
        images = OPERATORS[step.name].change(images, part, step, empty)
    return images


def _rounds(step: Step) -> int:
    return int(step["n"]) if step.name == "randaugment" else 1


# --- pixels ---------------------------------------------------------------------------------------


def affine(images: Tensor, matrices: Tensor, mode: str = "nearest") -> Tensor:
    """Each image seen through its own map from places in the output to places in the image.

    `matrices` (n, 6): what (x, y) there grow by along x here, along y here, and where the middle
    lies; in half sides, x to the right, y down. What lies outside is black.
    """
    centres = _centres(images.shape[3], images.device)
    along_x, along_y, middle = matrices[..., None, None].split(2, dim=1)
    grid = torch.addcmul(middle, centres, along_x) + centres[:, None] * along_y  # (n, 2, S, S)
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), mode=mode, align_corners=False)


def turn(images: Tensor, matrices: Tensor) -> Tensor:
    """The same between pixels, as whole numbers."""
    return affine(images, matrices, "bilinear").round_()


def grey(images: Tensor) -> Tensor:  # (n, 1, S, S)
    """Their brightness, rounded down."""
    red, green, blue = images.split(1, dim=1)
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2]).floor_()


def colour(
    images: Tensor, scale: Tensor, of_grey: Tensor, of_mean: Tensor, low: Tensor | None = None
) -> Tensor:
    """scale * image + of_grey * its grey + of_mean * its mean grey, cut to 0..255; not yet whole.

    All factors are (n, 1). `low`, where given, is 0 for images whose channels are each stretched
    to 0..255 as well (autocontrast), else infinite.
    """
    greys = grey(images)
    offset = torch.addcmul(_above(images.device), greys.mean((2, 3)), of_mean)  # (n, 1)
    if low is not None:
        darkest = images.amin((2, 3))
        span = images.amax((2, 3)) - darkest
        stretched = span > low
        scale = scale * (255 / torch.where(stretched, span, 255.0))
        offset = torch.addcmul(offset, darkest * stretched, scale, value=-1)
    scale, offset, of_grey = (x[..., None, None] for x in (scale, offset, of_grey))
    return (images * scale).add_(offset).addcmul_(greys, of_grey).clamp_(0, 255)


def levelled(images: Tensor, levels: Tensor, threshold: Tensor) -> Tensor:
    """Rounded down, times `levels` (n, 1), inverted from `threshold` (n, 1) on. In place."""
    images = images.floor_().mul_(levels[..., None, None])
    bright = torch.ge(images, threshold[..., None, None], out=torch.empty_like(images))
    return images.sub_(bright, alpha=255).abs_()


def sharpen(images: Tensor, strength: Tensor) -> Tensor:
    """Blended with what a smoothing kernel makes of them, `strength` (n, 1) = (1 - factor) / 13.

    In place and no longer whole; the border stays.
    """
    rows = images[..., :-2] + images[..., 1:-1]
    rows += images[..., 2:]
    sums = rows[..., :-2, :] + rows[..., 1:-1, :]
    sums += rows[..., 2:, :]
    middle = images[..., 1:-1, 1:-1]  # its weight in the kernel is 5 / 13, the others' 1 / 13
    middle += sums.sub_(middle, alpha=9).mul_(strength[..., None, None])
    return images


def equalise(images: Tensor, chosen: Tensor) -> Tensor:
    """Each channel with a histogram as flat as it can be, for images with `chosen` (n, 1) = 1."""
    places, device = images.flatten(2).long(), images.device
    total = places.shape[2]
    counts = places.new_zeros(*places.shape[:2], 256, dtype=torch.int32)
    counts.scatter_add_(2, places, _one(device).expand_as(places))  # whole: in any order the same
    darker = torch.empty(counts.shape, device=device)  # pixels below each value
    torch.sub(counts.cumsum(2, dtype=torch.int32), counts, out=darker)
    most = (darker * (darker < total)).amax(2, keepdim=True)  # of those that have a brighter one
    step = torch.div(most, 255, rounding_mode="trunc") * chosen[..., None]
    table = darker.add_(torch.div(step, 2, rounding_mode="trunc"))
    table = torch.div(table, step.clamp(min=1), rounding_mode="trunc").clamp_(max=255)
    return torch.where(step > 0, table, _values(device)).gather(2, places).view_as(images)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """The colours turned by `shift` (n, 1) of a circle."""
    value, place = images.max(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    behind = (images.roll(-1, 1) - images.roll(-2, 1)).gather(1, place)
    sixth = (behind / chroma.clamp(min=1)).add_(place, alpha=2).add_(6 * shift[..., None, None])
    corner = (sixth + _corners(images.device)).remainder_(6)
    part = torch.minimum(corner, 4 - corner).clamp_(0, 1)
    return torch.addcmul(value, chroma, part, value=-1).round_()


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Smoothed by a Gaussian of standard deviation `sigma` (n, 1), the border reflected."""
    count, channels, size = images.shape[:3]
    reach = min(blur_reach(size), size - 1)
    distance = pixels(2 * reach + 1, images.device) - reach
    weights = torch.softmax(-0.5 * (distance / sigma) ** 2, dim=1)
    weights = weights.repeat_interleave(channels, dim=0)[:, None, :, None]
    wider = F.pad(images, (reach,) * 4, mode="reflect").flatten(0, 1)[None]
    for kernel in (weights, weights.mT):
        wider = F.conv2d(wider, kernel, groups=count * channels)
    return wider[0].view_as(images).round_()


def blur_reach(size: int) -> int:
    """How far a blur sees: its kernel is about a tenth of the side, at least 3 pixels (SimCLR)."""
    return max(3, size // 10 | 1) // 2


# --- RandAugment and TrivialAugment ---------------------------------------------------------------

SAME = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)  # a map that leaves all where it is
# Of a change that a row describes: the map; then what is left alone by these numbers.
ROW = {"sharpen": 0.0, "scale": 1.0, "grey": 0.0, "mean": 0.0, "low": math.inf}
ROW |= {"levels": 1.0, "threshold": 256.0, "equalise": 0.0}
GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
CHANGES = (
    "identity", *GEOMETRY, "brightness", "saturation", "contrast", "sharpness", "posterize",
    "solarize", "autocontrast", "equalize",
)  # fmt: skip


def row(change: str, strength: float, size: int) -> list[float]:
    """One change as numbers: those of `affine`, then those of ROW.

    Strength: how much of the side is sheared in, pixels, degrees against the clock, a factor, bits
    that are kept, the brightness from which an image is inverted.
    """
    matrix, rest, x = list(SAME), dict(ROW), strength
    if change == "shear_x":
        matrix[2] = matrix[4] = x
    elif change == "shear_y":
        matrix[1] = matrix[5] = x
    elif change in ("translate_x", "translate_y"):
        matrix[4 + (change == "translate_y")] = -2 * x / size
    elif change == "rotate":
        cos, sin = math.cos(math.radians(x)), math.sin(math.radians(x))
        matrix[:4] = cos, sin, -sin, cos
    elif change in ("brightness", "saturation", "contrast"):
        rest["scale"] = x
        rest |= {"saturation": {"grey": 1 - x}, "contrast": {"mean": 1 - x}}.get(change, {})
    elif change == "sharpness":
        rest["sharpen"] = (1 - x) / 13
    elif change == "posterize":
        rest["levels"] = 2.0 ** (8 - x)
        rest["scale"] = 1 / rest["levels"]
    elif change == "solarize":
        rest["threshold"] = x
    elif change == "autocontrast":
        rest["low"] = 0.0
    elif change == "equalize":
        rest["equalise"] = 1.0
    return [*matrix, *rest.values()]


def strength(change: str, part: float, sign: int, size: int, wide: bool) -> float:
    """How strong a change is at a part of 0..1 of RandAugment's range, or of TrivialAugment's."""
    if change == "posterize":
        return round(8 - (6 if wide else 4) * part)
    if change == "solarize":
        return 255 * (1 - part)
    if change.startswith("translate"):
        return sign * int(part * (32 if wide else 150 / 331 * size))
    if change.startswith("shear"):
        return sign * part * (0.99 if wide else 0.3)
    if change == "rotate":
        return sign * part * (135 if wide else 30)
    return 1 + sign * part * (0.99 if wide else 0.9)


@functools.cache
def _space(size: int, wide: bool, device: torch.device) -> Tensor:
    """Rows of all changes: each change, each strength, both signs."""
    rows = [
        row(name, strength(name, k / (BINS - 1), sign, size, wide), size)
        for name in CHANGES for k in range(BINS) for sign in (1, -1)
    ]  # fmt: skip
    return torch.tensor(rows, device=device)


def _limits(step: Step) -> tuple[float, ...]:
    """For each strength but the last the chance that it is at most that."""
    if step.name == "trivialaugment":
        return tuple((k + 1) / BINS for k in range(BINS - 1))
    noise = max(step["noise"], 1e-6)
    return tuple(
        0.5 + 0.5 * math.erf((k + 0.5 - step["m"]) / noise / math.sqrt(2)) for k in range(BINS - 1)
    )


def _choose_changes(step: Step, draws: Tensor, on: Tensor, size: int) -> Tensor:
    """For each round the row of what is done, a number in `_space`."""
    which, how, sign = draws.unflatten(1, (-1, 3)).unbind(2)
    strengths = torch.bucketize(how.contiguous(), constant(_limits(step), draws.device), right=True)
    rows = ((which * len(CHANGES)).long() * BINS + strengths) * 2 + (sign < 0.5)
    return rows * on[:, None]


def _apply_changes(images: Tensor, columns: Tensor, step: Step, empty: tuple[float, ...]) -> Tensor:
    """RandAugment (Cubuk et al., CVPR 2020) or TrivialAugment (Müller and Hutter, ICCV 2021).

    A histogram is made flat after the other changes of its round. One of the last round is made so
    in the round before: there is no other change in between, and twice is once.
    """  # fmt: skip
    rows = _space(images.shape[3], step.name == "trivialaugment", images.device)[columns.long()]
    flat = rows[:, :, -1]
    rounds = rows.shape[1]
    for i in range(rounds):
        matrices, *numbers = rows[:, i].split([len(SAME)] + [1] * len(ROW), dim=1)
        by, scale, of_grey, of_mean, low, levels, threshold, _ = numbers
        images = sharpen(affine(images, matrices), by)
        images = colour(images, scale, of_grey, of_mean, low)
        images = levelled(images, levels, threshold)
        if i == 0 or i < rounds - 1:
            now = flat[:, i:] if i >= rounds - 2 else flat[:, i : i + 1]
            images = equalise(images, now.amax(1, keepdim=True))
    return images


# --- the other steps ------------------------------------------------------------------------------


def _choose_jitter(step: Step, draws: Tensor, on: Tensor, size: int) -> Tensor:
    """The turn of the hue; three factors, of brightness, contrast, saturation in an own order."""
    names = ("brightness", "contrast", "saturation")
    reach = constant(tuple(step[name] for name in names), draws.device)
    factors = torch.where(on[:, None], 1 + (2 * draws[:, :3] - 1) * reach, 1.0)
    orders = _orders(draws.device)
    order = orders[(draws[:, 3] * len(orders)).long()]
    factors = factors.gather(1, order)
    of_grey, of_mean = ((1 - factors) * (order == which) for which in (2, 1))
    turn = torch.where(on, (2 * draws[:, 4] - 1) * step["hue"], 0.0)[:, None]
    return torch.cat([turn, factors, of_grey, of_mean], dim=1)


def _jitter(images: Tensor, columns: Tensor, step: Step, empty: tuple[float, ...]) -> Tensor:
    turn, *numbers = columns.split(1, dim=1)
    if step["brightness"] or step["contrast"] or step["saturation"]:
        for scale, of_grey, of_mean in zip(numbers[:3], numbers[3:6], numbers[6:], strict=True):
            images = colour(images, scale, of_grey, of_mean).floor_()
    return hue(images, turn) if step["hue"] else images


def _choose_turn(step: Step, draws: Tensor, on: Tensor, size: int) -> Tensor:
    place = torch.where(on, (draws[:, 0] * ANGLES).long(), ANGLES)
    return _turns(step["degrees"], draws.device)[place]


def _choose_blur(step: Step, draws: Tensor, on: Tensor, size: int) -> Tensor:
    sigma = step["low"] + (step["high"] - step["low"]) * draws
    return torch.where(on[:, None], sigma, 1e-3)  # so narrow that a pixel sees itself alone


def _choose_erasing(step: Step, draws: Tensor, on: Tensor, size: int) -> Tensor:
    """Top, left, bottom, right of what is blanked: Random Erasing (Zhong et al., AAAI 2020)."""
    area = size**2 * (step["low"] + (step["high"] - step["low"]) * draws[:, 0])
    ratio = torch.exp((2 * draws[:, 1] - 1) * math.log(1 / 0.3))
    height, width = (
        torch.sqrt(x).round().clamp(max=size - 1) for x in (area * ratio, area / ratio)
    )
    height, width = height * on, width * on
    top, left = (
        (draws[:, 2 + i] * (size - side + 1)).floor() for i, side in enumerate((height, width))
    )
    return torch.stack([top, left, top + height, left + width], dim=1)


def _flag(step: Step, draws: Tensor, on: Tensor, size: int) -> Tensor:
    return on[:, None].float()


def _where(flags: Tensor, these: Tensor, those: Tensor) -> Tensor:
    return torch.where(flags[..., None, None] > 0, these, those)


def _erase(images: Tensor, boxes: Tensor, step: Step, empty: tuple[float, ...]) -> Tensor:
    rows, columns = inside(boxes[:, :2], boxes[:, 2:], images.shape[3]).unbind(1)
    hole = rows[:, None, :, None] & columns[:, None, None]
    return torch.where(hole, constant(empty, images.device)[:, None, None], images)


OPERATORS = {
    "vflip": Operator(0, 1, _flag, lambda x, on, *_: _where(on, x.flip(2), x)),
    "grey": Operator(0, 1, _flag, lambda x, on, *_: _where(on, grey(x), x)),
    "rotate": Operator(
        1, 6, _choose_turn, lambda x, maps, *_: affine(x, maps, "bilinear").round_()
    ),
    "blur": Operator(1, 1, _choose_blur, lambda x, sigma, *_: blur(x, sigma)),
    "jitter": Operator(5, 10, _choose_jitter, _jitter),
    "erase": Operator(4, 4, _choose_erasing, _erase),
    "randaugment": Operator(3, 1, _choose_changes, _apply_changes),
    "trivialaugment": Operator(3, 1, _choose_changes, _apply_changes),
}


# --- constants and places -------------------------------------------------------------------------


@functools.cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Plain numbers as a float32 tensor, copied once: each copy would make the host wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.cache
def pixels(side: int, device: torch.device) -> Tensor:
    """The whole numbers below `side`."""
    return torch.arange(side, device=device)


def inside(start: Tensor, end: Tensor, side: int) -> Tensor:  # bool (..., side)
    """Which pixels of an axis are at least `start` and before `end`."""
    pixel = pixels(side, start.device)
    return (pixel >= start[..., None]) & (pixel < end[..., None])


@functools.cache
def _centres(side: int, device: torch.device) -> Tensor:
    """Centres of pixels, in half sides from the middle."""
    return (2 * torch.arange(side, device=device) + 1) / side - 1


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones(1, 1, 1, dtype=torch.int32, device=device)


@functools.cache
def _above(device: torch.device) -> Tensor:
    return torch.tensor(ABOVE, device=device)


@functools.cache
def _values(device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.float32, device=device)


@functools.cache
def _corners(device: torch.device) -> Tensor:
    """Where on a circle of six red, green and blue begin to fall (the formula of HSV to RGB)."""
    return torch.tensor([5.0, 3.0, 1.0], device=device)[:, None, None]


@functools.cache
def _orders(device: torch.device) -> Tensor:  # (6, 3)
    return torch.tensor(list(itertools.permutations(range(3))), device=device)


@functools.cache
def _turns(degrees: float, device: torch.device) -> Tensor:  # (ANGLES + 1, 6)
    """Maps of even angles from -degrees to degrees, and the one that turns nothing."""
    angles = [(2 * k + 1 - ANGLES) / ANGLES * degrees for k in range(ANGLES)]
    maps = [row("rotate", angle, 1)[: len(SAME)] for angle in [*angles, 0.0]]
    return torch.tensor(maps, device=device)
