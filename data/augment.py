"""Crop, flip, resize, normalise on whole batches, on the device the images are on.

What happens to an image depends on (seed, epoch, its index) alone, never on its batch, its position
or the number of processes. Each image has draws of its own, which torchvision's transforms do not
give on a batch: they draw once per call.

What is random is chosen apart from what is done to pixels (`Augment.choices`, `Augment.mixtures`:
a row of numbers for each image), so that on a GPU, where each small operation costs the host more
than the device, an epoch's rows are made at once and a step only looks them up.
"""

import functools
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from data import operators
from data.grey import grey, mean_colour
from data.keyed_random import AUGMENT, FLIP, MIX, POLICY, uniforms
from data.operators import constant, inside, pixels
from data.policy import parse_policy

CROP_TRIES = 10  # as torchvision's RandomResizedCrop
CROP_AREA = (0.08, 1.0)  # of the image's area, uniform
CROP_RATIO = (3 / 4, 4 / 3)  # width / height, log-uniform
TRANSLATE_PIXELS = 2
CHUNK = 2**18  # images whose choices are made at once: some 100 MB of whole numbers meanwhile


class Augment:
    """What training and evaluation do to a batch of images between the data set and the model.

    `policy` is what --augment says (policy.py). It begins with a kind: "none" only resizes. "flip"
    mirrors every second image. "crop" is the CIFAR recipe: pad by an eighth of the image (4 of 32
    pixels, black), cut at a random place, flip. "translate" shifts by up to 2 pixels, the border
    reflected, and flips. "resized_crop" is ImageNet's: cut 8 to 100 % of the area at a ratio of 3/4
    to 4/3, scale to image_size, flip. Further steps change pixels of image_size (operators.py).

    mean and std are per channel, of pixels in 0..1; where they are of one, the model sees
    brightness. cutout is the side of a square in output pixels; mixup and cutmix are the alpha of
    Beta(alpha, alpha), 0 means off. alternating_flip mirrors each image in every second epoch
    instead of by chance (Jordan, 2024, arXiv:2404.00498). no_flip leaves all flips out: mirrored
    digits are other things. tta is the level of `vote`.
    From the epoch `until` on images are only cut and mirrored.

    cut: the images are photographs, cut, scaled and mirrored already (cuts.py).

    samples, where it is not 0, is the number of training images: the choices of an epoch are made
    for all of them when its first batch comes, and are the same bits as those made batch by batch.

    Two-dimensional inputs are features of a regression and pass through unchanged.
    """

    def __init__(
        self,
        policy: str,
        image_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int,
        cutout: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        alternating_flip: bool = False,
        no_flip: bool = False,
        tta: int = 0,
        samples: int = 0,
        cut: bool = False,
        until: float = math.inf,
    ) -> None:
        parsed = parse_policy(policy)
        self.kind, self.flip, self.steps = parsed.kind, parsed.flip, parsed.steps
        self.image_size, self.seed, self.cut, self.until = image_size, seed, cut, until
        if no_flip:
            self.steps = tuple(step for step in self.steps if step.name != "vflip")
        self.mean, self.std = tuple(mean), tuple(std)
        self.empty = mean_colour(mean)  # of what is blanked
        self.cutout, self.mixup, self.cutmix = cutout, mixup, cutmix
        self.alternating_flip, self.no_flip = alternating_flip, no_flip
        self.tta, self.samples = tta, samples
        self._tables: dict[str, tuple[tuple, Tensor]] = {}  # what an epoch's rows are for; the rows

    def train(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor:  # (n, C, S, S)
        """Augmented, normalised float32 images of image_size from uint8 (n, C, H, W)."""
        if images.ndim == 2:
            return images
        indices = indices.to(images.device, non_blocking=True)
        cutout, steps = (0, ()) if epoch >= self.until else (self.cutout, self.steps)
        still = self.kind == "none" or self.cut  # what is cut already needs no place
        if still and not cutout:
            if steps:
                images = self._changed(resize(images.float(), self.image_size), indices, epoch)
            return self.evaluate(images)
        chosen = self._rows(self.choices, indices, epoch, images)
        flips, corner, place = chosen[:, :1] > 0, chosen[:, 1:3], chosen[:, 3:]
        if steps:
            images = self._changed(self._cut(images, place, flips), indices, epoch)
            images = self._normalise(images)
        elif self.kind == "resized_crop" and not self.cut:
            images = resized_crop(self._normalise(images), place, flips, self.image_size)
        else:
            images = self.evaluate(images if self.cut else self._move(images, place, flips))
        return cut_out(images, corner, cutout) if cutout else images

    def evaluate(self, images: Tensor) -> Tensor:  # (n, C, S, S)
        """Normalised float32 images of image_size from uint8 (n, C, H, W); no randomness."""
        if images.ndim == 2:
            return images
        images = self._normalise(images)
        return images if self.cut else resize(images, self.image_size)

    def vote(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """The model's logits (n, classes), averaged over views of each image at test time (tta).

        Level 1 adds the mirror image; level 2 also both shifted by a pixel towards two opposite
        corners (border reflected), which together weigh as much as the unshifted ones.
        """
        if not self.tta or images.ndim == 2:
            return model(images)
        views = [(1.0, images)]
        if self.tta == 2:
            height, width = images.shape[2:]
            wider = F.pad(images, (1, 1, 1, 1), mode="reflect")
            views = [(0.5, images), (0.25, wider[:, :, :height, :width])]
            views.append((0.25, wider[:, :, 2:, 2:]))
        if not self.no_flip:
            views = [(w / 2, x) for w, view in views for x in (view, view.flip(3))]
        # In float32: what the views' logits differ by would be lost in the precision of a model.
        votes = (weight * model(view).float() for weight, view in views)
        return sum(votes)  # pyright: ignore[reportReturnType] - there is always a view

    def mix(
        self, images: Tensor, labels: Tensor, indices: Tensor, epoch: int, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """Images blended with those of the reversed batch, and soft targets (n, num_classes).

        Both as they are where neither mixup nor cutmix is on.

        mixup (Zhang et al., ICLR 2018) blends whole images, cutmix (Yun et al., ICCV 2019) pastes a
        box; with both on, a coin decides. The whole tensor is treated alike, keyed by its first
        index, so give it one shard at a time.
        """
        if not (self.mixup or self.cutmix) or epoch >= self.until:
            return images, labels
        if labels.ndim == 1:
            labels = labels[:, None] == pixels(num_classes, labels.device)
        targets = labels.float()
        first = indices[:1].to(images.device, non_blocking=True)
        mixture = self._rows(self.mixtures, first, epoch, images)  # (1, 7)
        share = part = mixture[:, 6:]  # (1, 1) or (H, W): the part of its own image in each pixel
        if self.cutmix:
            height, width = images.shape[2:]
            rows, columns = inside(mixture[0, :2], mixture[0, 2:4], max(height, width))
            box = rows[:height, None] & columns[:width]
            part = torch.where(box, mixture[:, 4], mixture[:, 5])
        images = images.flip(0).lerp(images, part)
        return images, targets.flip(0).lerp(targets, share)

    def _cut(self, images: Tensor, place: Tensor, mirrored: Tensor) -> Tensor:
        """Float images of image_size, cut and mirrored as the kind says."""
        if self.cut:
            return images.float()
        if self.kind == "resized_crop":
            return resized_crop(images.float(), place, mirrored, self.image_size)
        return resize(self._move(images, place, mirrored).float(), self.image_size)

    def _changed(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Float images of image_size, 0..255, after the steps of the policy."""
        columns = self._rows(self.changes, indices, epoch, images)
        return operators.change(images.round(), columns, self.steps, self.empty)

    def changes(self, indices: Tensor, epoch: int, height: int, width: int) -> Tensor:
        """What the steps of the policy do to images of these indices, a row for each."""
        counts = [operators.draws_of(step) for step in self.steps]
        draws = uniforms(self.seed, epoch, indices, sum(counts), POLICY).split(counts, dim=1)
        chosen = [
            operators.choose(step, part, self.image_size)
            for step, part in zip(self.steps, draws, strict=True)
        ]
        return torch.cat(chosen, dim=1)

    def _rows(
        self, choose: Callable[..., Tensor], indices: Tensor, epoch: int, images: Tensor
    ) -> Tensor:
        """choose(indices, epoch, height, width); with `samples`, rows of a table of the epoch."""
        height, width = images.shape[2:]
        if not self.samples:
            return choose(indices, epoch, height, width)
        key = (epoch, height, width, images.device)
        made, table = self._tables.get(choose.__name__, (None, None))
        if made != key:
            chunks = torch.arange(self.samples, device=images.device).split(CHUNK)
            table = torch.cat([choose(chunk, epoch, height, width) for chunk in chunks])
            self._tables[choose.__name__] = key, table
        assert table is not None  # as it was made for a key
        return table[indices]

    def choices(self, indices: Tensor, epoch: int, height: int, width: int) -> Tensor:
        """What happens to images (height, width) of these indices, whole numbers, a row for each.

        Columns: 1 if mirrored; top and left of the square cut out; then top, left, height, width
        of the box (float32), or for moves (int64) the row and the column that come first.
        """
        boxes = self.kind == "resized_crop" and not self.cut
        draws = uniforms(self.seed, epoch, indices, 5 + 2 * CROP_TRIES * boxes, AUGMENT)
        flips = mirrored(self, draws[:, 0], indices, epoch).float()
        corner = _start(draws[:, 3:5], self.cutout, self.image_size)
        if boxes:
            place = random_boxes(height, width, draws[:, 1:3], draws[:, 5:])
            return torch.column_stack([flips, corner, *place])
        reach = {"crop": (height // 8, width // 8), "translate": (TRANSLATE_PIXELS,) * 2}
        reach = reach.get(self.kind, (0, 0))
        place = [(draws[:, i + 1] * (2 * reach[i] + 1)).long() for i in (0, 1)]
        if self.kind == "translate":  # a crop begins in the border that it pads with
            place = [first - TRANSLATE_PIXELS for first in place]
        return torch.column_stack([flips.long(), corner.long(), *place])

    def mixtures(self, indices: Tensor, epoch: int, height: int, width: int) -> Tensor:
        """How a shard of images (height, width) that begins with each of these indices is mixed.

        float32 columns: top, left, bottom, right of a box; how much of its own image a pixel keeps
        inside and outside of it; the mean of that over all pixels.
        """
        coin, chance, row, column = uniforms(self.seed, epoch, indices, 4, MIX).unbind(1)
        top = left = bottom = right = torch.zeros_like(coin)
        inside = outside = share = beta_quantile(chance, self.mixup) if self.mixup else top
        if self.cutmix:
            pastes = coin >= 0.5 if self.mixup else torch.ones_like(coin, dtype=torch.bool)
            side = (1 - beta_quantile(chance, self.cutmix)).sqrt()
            rows, columns = (side * height).floor(), (side * width).floor()
            top, left = _start(row, rows, height), _start(column, columns, width)
            bottom, right = top + rows, left + columns
            area = (bottom.clamp(max=height) - top.clamp(min=0)) * (
                right.clamp(max=width) - left.clamp(min=0)
            )
            inside, outside, share = (
                torch.where(pastes, pasted, blended)
                for pasted, blended in (
                    (0.0, inside),
                    (1.0, outside),
                    ((height * width - area) / (height * width), share),
                )
            )
        return torch.stack([top, left, bottom, right, inside, outside, share], dim=1)

    def _normalise(self, images: Tensor) -> Tensor:
        """(images / 255 - mean) / std as one multiplication and addition."""
        scale = tuple(1 / (255 * std) for std in self.std)
        shift = tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))
        scale, shift = constant(scale, images.device), constant(shift, images.device)
        images = images.to(torch.float32, copy=True)  # fresh memory costs more than the numbers
        if len(self.mean) == 1:
            images = grey(images)
        return torch.addcmul(shift[:, None, None], images, scale[:, None, None], out=images)

    def _move(self, images: Tensor, first: Tensor, mirrored: Tensor) -> Tensor:
        """The same uint8 images, shifted by whole pixels and mirrored as the kind says.

        `first` (n, 2) is the row and the column that come first, `mirrored` is bool (n, 1).
        """
        if self.kind == "none" or (self.kind == "flip" and self.no_flip):
            return images
        channels, height, width = images.shape[1:]
        across = pixels(width, images.device)
        rows = pixels(height, images.device) + first[:, :1]
        columns = torch.where(mirrored, across.flip(0), across) + first[:, 1:]
        if self.kind == "crop":
            reach_rows, reach_columns = height // 8, width // 8
            images = F.pad(images, (reach_columns, reach_columns, reach_rows, reach_rows))
        elif self.kind == "translate":
            rows, columns = _reflected(rows, height), _reflected(columns, width)
        places = torch.add(columns[:, None], rows[:, :, None], alpha=images.shape[3])
        moved = images.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, channels, -1))
        return moved.unflatten(2, (height, width))


class Mirrors(Protocol):
    """What decides whether an image is mirrored."""

    @property
    def kind(self) -> str: ...
    @property
    def flip(self) -> float: ...
    @property
    def no_flip(self) -> bool: ...
    @property
    def alternating_flip(self) -> bool: ...
    @property
    def seed(self) -> int: ...


def mirrored(rule: Mirrors, draw: Tensor, indices: Tensor, epoch: int) -> Tensor:  # bool (n,)
    """Which images are mirrored in an epoch; `draw` (n,) is a uniform of each."""
    if rule.no_flip or rule.kind == "none":
        return torch.zeros_like(draw, dtype=torch.bool)
    if rule.alternating_flip:  # the coin is that of epoch 0 and turns over each epoch
        return (uniforms(rule.seed, 0, indices, 1, FLIP)[:, 0] < 0.5) ^ bool(epoch % 2)
    return draw < rule.flip


def resize(images: Tensor, size: int) -> Tensor:
    """Float images (n, C, H, W) as (n, C, size, size), antialiased bilinear as Pillow does it."""
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    rows = _resize_weights(height, size, images.device)
    return _resample(images, rows, _resize_weights(width, size, images.device))


def resized_crop(images: Tensor, boxes: Tensor, mirrored: Tensor, size: int) -> Tensor:
    """Each image's own box (n, 4) at `size`, left and right exchanged where `mirrored` (n, 1).

    A box is top, left, height and width in whole pixels, as floats.
    """
    height, width = images.shape[2:]
    upright = torch.cat([torch.zeros_like(mirrored), mirrored], dim=1)
    weights = _interpolation(boxes[:, :2], boxes[:, 2:], max(height, width), size, upright)
    return _resample(images, weights[:, 0, :, :height], weights[:, 1, :, :width])


def random_boxes(
    height: int | Tensor, width: int | Tensor, place: Tensor, shape: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height, width, float (n,) each, distributed as torchvision's RandomResizedCrop.

    height and width are those of all images, or float (n, 1). `place` (n, 2) and `shape`
    (n, 2 * tries) are uniforms. The first of the tries that fits into the image counts; where none
    does, the largest box of an allowed ratio, for a square all of it.
    """
    area = height * width * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * shape[:, ::2])
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    ratio = torch.exp(low + (high - low) * shape[:, 1::2])
    widths, heights = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    if isinstance(height, Tensor) and isinstance(width, Tensor):
        widest = torch.minimum(width, (height * CROP_RATIO[1]).round())[:, 0]
        highest = torch.minimum(height, (width / CROP_RATIO[0]).round())[:, 0]
        height, width = height[:, 0], width[:, 0]
    else:
        widest = min(int(width), round(int(height) * CROP_RATIO[1]))
        highest = min(int(height), round(int(width) / CROP_RATIO[0]))
    box_width = torch.where(found, widths.gather(1, first)[:, 0], widest)
    box_height = torch.where(found, heights.gather(1, first)[:, 0], highest)
    top = (place[:, 0] * (height - box_height + 1)).floor()
    left = (place[:, 1] * (width - box_width + 1)).floor()
    return top, left, box_height, box_width


def cut_out(images: Tensor, corner: Tensor, side: int) -> Tensor:
    """Normalised images with a square of the mean colour (DeVries and Taylor, arXiv:1708.04552).

    `corner` (n, 2) is its top and left; a part of it may lie outside the image.
    """
    height, width = images.shape[2:]
    rows, columns = inside(corner, corner + side, max(height, width)).unbind(1)
    hole = rows[:, :height, None] & columns[:, None, :width]
    return images.masked_fill(hole[:, None], 0.0)


def beta_quantile(chance: Tensor, alpha: float) -> Tensor:
    """The numbers below which Beta(alpha, alpha) falls with probability `chance`, as its draws."""
    table = constant(beta_table(alpha), chance.device)
    position = torch.minimum(chance, 1 - chance) * 2 * (len(table) - 1)
    below = position.long().clamp(max=len(table) - 2)
    lower_half = torch.lerp(table[below], table[below + 1], position - below) ** (1 / alpha)
    return torch.where(chance < 0.5, lower_half, 1 - lower_half)


@functools.cache
def beta_table(alpha: float, size: int = 2048) -> tuple[float, ...]:
    """quantile ** alpha of Beta(alpha, alpha) at `size` even chances from 0 to 1/2.

    The density x**(alpha-1) (1-x)**(alpha-1) has a pole at 0 for alpha < 1; over z = x**alpha it is
    bounded, so that sums over even steps will do. The power alpha is almost linear in the chance.
    """
    power = min(alpha, 1.0)
    z = torch.linspace(0, 0.5**power, 16 * size, dtype=torch.float64)
    density = z ** (alpha / power - 1) * (1 - z ** (1 / power)) ** (alpha - 1)
    mass = torch.cat([z[:1], torch.cumulative_trapezoid(density, z)])
    wanted = torch.linspace(0, float(mass[-1]), size, dtype=torch.float64)
    after = torch.searchsorted(mass, wanted).clamp(1, len(mass) - 1)
    part = (wanted - mass[after - 1]) / (mass[after] - mass[after - 1])
    return tuple((torch.lerp(z[after - 1], z[after], part) ** (alpha / power)).tolist())


@functools.cache
def _centres(side: int, device: torch.device) -> Tensor:
    return pixels(side, device) + 0.5


@functools.cache
def _resize_weights(side: int, size: int, device: torch.device) -> Tensor:  # (1, size, side)
    whole = torch.tensor([0.0, side], device=device)
    return _interpolation(whole[:1], whole[1:], side, size)


def _interpolation(
    start: Tensor, length: Tensor, side: int, size: int, mirrored: Tensor | None = None
) -> Tensor:
    """Matrices (..., size, side) that scale pixels start..start+length of an axis to `size` pixels.

    Each row is a triangle around the output pixel's centre, two output pixels wide when shrinking
    (antialias) and two input pixels wide when enlarging (bilinear); pixels outside do not count.
    """
    scale, start = (length / size)[..., None], start[..., None]
    output, pixel = _centres(size, start.device), _centres(side, start.device)
    if mirrored is not None:
        output = torch.where(mirrored[..., None], output.flip(0), output)
    centre = start + output * scale
    weights = (1 - (pixel - centre[..., None]).abs() / scale.clamp(min=1)[..., None]).clamp(min=0)
    inside = (pixel > start) & (pixel < start + length[..., None])
    weights = weights * inside[..., None, :]
    return weights / weights.sum(-1, keepdim=True)


def _resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ image @ columns.T for each image and channel; n or 1 matrices (n, size, side)."""
    images = (images.flatten(1, 2) @ columns.mT).unflatten(1, images.shape[1:3])
    return rows[:, None] @ images


def _reflected(places: Tensor, side: int) -> Tensor:
    """Places beyond the border as their mirror images inside; the border itself is not doubled."""
    return (side - 1) - ((side - 1) - places.abs()).abs()


def _start(draw: Tensor, length: Tensor | int, side: int) -> Tensor:
    """Where an interval of `length` pixels begins that lies around a random pixel of an axis."""
    return (draw * side).floor() - length // 2
