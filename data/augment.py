"""Crop, flip, resize, normalise on whole batches, on the device the images are on.

What happens to an image depends on (seed, epoch, its index) alone, never on its batch, its position
or the number of processes. Each image has draws of its own, which torchvision's transforms do not
give on a batch: they draw once per call.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from data.keyed_random import AUGMENT, FLIP, MIX, uniforms
from errors import UserError

KINDS = ("none", "flip", "crop", "resized_crop", "translate")

CROP_TRIES = 10  # as torchvision's RandomResizedCrop
CROP_AREA = (0.08, 1.0)  # of the image's area, uniform
CROP_RATIO = (3 / 4, 4 / 3)  # width / height, log-uniform
TRANSLATE_PIXELS = 2


class Augment:
    """What training and evaluation do to a batch of images between the data set and the model.

    Kinds: "none" only resizes. "flip" mirrors every second image. "crop" is the CIFAR recipe: pad
    by an eighth of the image (4 of 32 pixels, black), cut at a random place, flip. "translate"
    shifts by up to 2 pixels, the border reflected, and flips. "resized_crop" is ImageNet's: cut
    8 to 100 % of the area at a ratio of 3/4 to 4/3, scale to image_size, flip.

    mean and std are per channel, of pixels in 0..1. cutout is the side of a square in output
    pixels; mixup and cutmix are the alpha of Beta(alpha, alpha), 0 means off. alternating_flip
    mirrors each image in every second epoch instead of by chance (Jordan, 2024, arXiv:2404.00498).
    no_flip leaves all flips out: mirrored digits are other things. tta is the level of `vote`.

    Two-dimensional inputs are features of a regression and pass through unchanged.
    """

    def __init__(
        self,
        kind: str,
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
    ) -> None:
        if kind not in KINDS:
            raise UserError(f"{kind!r} is not a kind of augmentation; known: {', '.join(KINDS)}")
        self.kind, self.image_size, self.seed = kind, image_size, seed
        self.mean, self.std = tuple(mean), tuple(std)
        self.cutout, self.mixup, self.cutmix = cutout, mixup, cutmix
        self.alternating_flip, self.no_flip = alternating_flip, no_flip
        self.tta = tta

    def train(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor:  # (n, C, S, S)
        """Augmented, normalised float32 images of image_size from uint8 (n, C, H, W)."""
        if images.ndim == 2:
            return images
        indices = indices.to(images.device, non_blocking=True)
        if self.kind == "none" and not self.cutout:
            return self.evaluate(images)
        num_draws = 5 + 2 * CROP_TRIES if self.kind == "resized_crop" else 5
        draws = uniforms(self.seed, epoch, indices, num_draws, AUGMENT)
        flip = self._flip(draws[:, 0], indices, epoch)
        if self.kind == "resized_crop":
            top, left, height, width = random_boxes(*images.shape[2:], draws[:, 1:3], draws[:, 5:])
            images = resized_crop(
                self._normalise(images), top, left, height, width, flip, self.image_size
            )
        else:
            images = self.evaluate(self._move(images, draws[:, 1:3], flip))
        if self.cutout:
            images = cut_out(images, draws[:, 3], draws[:, 4], self.cutout)
        return images

    def evaluate(self, images: Tensor) -> Tensor:  # (n, C, S, S)
        """Normalised float32 images of image_size from uint8 (n, C, H, W); no randomness."""
        if images.ndim == 2:
            return images
        return resize(self._normalise(images), self.image_size)

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
        return sum(weight * model(view) for weight, view in views)

    def mix(
        self, images: Tensor, labels: Tensor, indices: Tensor, epoch: int, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """Images blended with those of the reversed batch, and soft targets (n, num_classes).

        Both as they are where neither mixup nor cutmix is on.

        mixup (Zhang et al., ICLR 2018) blends whole images, cutmix (Yun et al., ICCV 2019) pastes a
        box; with both on (from code; the command line takes one), a coin
        decides. The whole tensor is treated alike, keyed by its first
        index, so give it one shard at a time.
        """
        if not (self.mixup or self.cutmix):
            return images, labels
        targets = F.one_hot(labels, num_classes).float()
        first = indices[:1].to(images.device, non_blocking=True)
        coin, chance, row, column = uniforms(self.seed, epoch, first, 4, MIX).T  # (1,) each
        keep = None  # (1, 1) or (H, W): the part of its own image in each pixel
        if self.mixup:
            keep = beta_quantile(chance, self.mixup)[:, None]
        if self.cutmix:
            side = (1 - beta_quantile(chance, self.cutmix)).sqrt()
            height, width = images.shape[2:]
            rows = _span(row, (side * height).floor(), height)
            columns = _span(column, (side * width).floor(), width)
            outside = (~(rows.T & columns)).float()
            keep = outside if keep is None else torch.where(coin[:, None] < 0.5, keep, outside)
        images = images.flip(0).lerp(images, keep)
        return images, targets.flip(0).lerp(targets, keep.mean())

    def _normalise(self, images: Tensor) -> Tensor:
        """(images / 255 - mean) / std as one multiplication and addition."""
        scale = tuple(1 / (255 * std) for std in self.std)
        shift = tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))
        scale, shift = _constant(scale, images.device), _constant(shift, images.device)
        return torch.addcmul(shift[:, None, None], images.float(), scale[:, None, None])

    def _flip(self, draw: Tensor, indices: Tensor, epoch: int) -> Tensor:  # bool (n,)
        if self.no_flip or self.kind == "none":
            return torch.zeros_like(draw, dtype=torch.bool)
        if self.alternating_flip:  # the coin is that of epoch 0 and turns over each epoch
            return (uniforms(self.seed, 0, indices, 1, FLIP)[:, 0] < 0.5) ^ bool(epoch % 2)
        return draw < 0.5

    def _move(self, images: Tensor, draws: Tensor, flip: Tensor) -> Tensor:
        """The same uint8 images, shifted by whole pixels and mirrored as the kind says."""
        if self.kind == "none" or (self.kind == "flip" and self.no_flip):
            return images
        channels, height, width = images.shape[1:]
        reach = {"crop": (height // 8, width // 8), "translate": (TRANSLATE_PIXELS,) * 2}
        reach_rows, reach_columns = reach.get(self.kind, (0, 0))
        rows = _shifted(height, reach_rows, draws[:, 0])
        columns = _shifted(width, reach_columns, draws[:, 1])
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        if self.kind == "crop":
            images = F.pad(images, (reach_columns, reach_columns, reach_rows, reach_rows))
            rows, columns = rows + reach_rows, columns + reach_columns
        else:
            rows, columns = _reflected(rows, height), _reflected(columns, width)
        places = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).flatten(1)[:, None]
        moved = images.flatten(2).gather(2, places.expand(-1, channels, -1))
        return moved.unflatten(2, (height, width))


def resize(images: Tensor, size: int) -> Tensor:
    """Float images (n, C, H, W) as (n, C, size, size), antialiased bilinear as Pillow does it."""
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    rows = _resize_weights(height, size, images.device)
    return _resample(images, rows, _resize_weights(width, size, images.device))


def resized_crop(
    images: Tensor,
    top: Tensor,
    left: Tensor,
    height: Tensor,
    width: Tensor,
    flip: Tensor,
    size: int,
) -> Tensor:
    """Each image's own box (whole pixels, float (n,) each), mirrored where `flip`, at `size`."""
    rows = _interpolation(top, height, images.shape[2], size)
    columns = _interpolation(left, width, images.shape[3], size)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return _resample(images, rows, columns)


def random_boxes(
    height: int, width: int, place: Tensor, shape: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height, width, float (n,) each, distributed as torchvision's RandomResizedCrop.

    `place` (n, 2) and `shape` (n, 2 * tries) are uniforms. The first of the tries that fits into
    the image counts; where none does, the largest box of an allowed ratio, for a square all of it.
    """
    area = height * width * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * shape[:, ::2])
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    ratio = torch.exp(low + (high - low) * shape[:, 1::2])
    widths, heights = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    widest = min(width, round(height * CROP_RATIO[1]))
    highest = min(height, round(width / CROP_RATIO[0]))
    box_width = torch.where(found, widths.gather(1, first)[:, 0], widest)
    box_height = torch.where(found, heights.gather(1, first)[:, 0], highest)
    top = (place[:, 0] * (height - box_height + 1)).floor()
    left = (place[:, 1] * (width - box_width + 1)).floor()
    return top, left, box_height, box_width


def cut_out(images: Tensor, row: Tensor, column: Tensor, side: int) -> Tensor:
    """Normalised images with a square of the mean colour (DeVries and Taylor, arXiv:1708.04552).

    Its centre may be any pixel (uniforms row, column (n,)), so a part may lie outside the image.
    """
    height, width = images.shape[2:]
    rows, columns = _span(row, side, height), _span(column, side, width)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def beta_quantile(chance: Tensor, alpha: float) -> Tensor:
    """The numbers below which Beta(alpha, alpha) falls with probability `chance`, as its draws."""
    table = _constant(_beta_table(alpha), chance.device)
    position = torch.minimum(chance, 1 - chance) * 2 * (len(table) - 1)
    below = position.long().clamp(max=len(table) - 2)
    lower_half = torch.lerp(table[below], table[below + 1], position - below) ** (1 / alpha)
    return torch.where(chance < 0.5, lower_half, 1 - lower_half)


@functools.cache
def _beta_table(alpha: float, size: int = 2048) -> tuple[float, ...]:
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
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Plain numbers as a float32 tensor, copied once: each copy would make the host wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.cache
def _resize_weights(side: int, size: int, device: torch.device) -> Tensor:  # (1, size, side)
    whole = torch.tensor([0.0, side], device=device)
    return _interpolation(whole[:1], whole[1:], side, size)


def _interpolation(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """Matrices (n, size, side) that scale pixels start..start+length of an axis to `size` pixels.

    Each row is a triangle around the output pixel's centre, two output pixels wide when shrinking
    (antialias) and two input pixels wide when enlarging (bilinear); pixels outside do not count.
    """
    scale = length / size
    output = torch.arange(size, device=start.device) + 0.5
    centre = start[:, None] + output * scale[:, None]
    pixel = torch.arange(side, device=start.device) + 0.5
    reach = scale.clamp(min=1)[:, None, None]
    weights = (1 - (pixel - centre[:, :, None]).abs() / reach).clamp(min=0)
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])
    weights = weights * inside[:, None]
    return weights / weights.sum(2, keepdim=True)


def _resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ image @ columns.T for each image and channel; n or 1 matrices (n, size, side)."""
    images = (images.flatten(1, 2) @ columns.mT).unflatten(1, images.shape[1:3])
    return rows[:, None] @ images


def _shifted(side: int, reach: int, draw: Tensor) -> Tensor:  # int64 (n, side)
    """Where the pixels of an axis come from after a random shift by -reach..reach."""
    shift = (draw * (2 * reach + 1)).long() - reach
    return torch.arange(side, device=draw.device) + shift[:, None]


def _reflected(places: Tensor, side: int) -> Tensor:
    """Places beyond the border as their mirror images inside; the border itself is not doubled."""
    return (side - 1) - ((side - 1) - places.abs()).abs()


def _span(draw: Tensor, length: Tensor | int, side: int) -> Tensor:  # bool (n, side)
    """Which pixels of an axis lie in an interval of `length` pixels around a random pixel."""
    start = (draw * side).floor() - length // 2
    pixel = torch.arange(side, device=draw.device)
    return (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
