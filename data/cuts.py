"""Which part of a photograph a model sees: boxes for a whole batch, from sizes and keyed draws.

A photograph is scaled and cut in one go where it is decoded (`photographs.cut`), so what is drawn
here are boxes: the part of the picture, and the part of the output that it fills.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.augment import CROP_TRIES, TRANSLATE_PIXELS, random_boxes
from data.keyed_random import AUGMENT, uniforms

MARGIN = 0.875  # of the scaled side is seen: 224 of 256 pixels, as ImageNet is evaluated
RESIZES = ("crop", "pad", "squash")


def default_resize(eval_size: int) -> int:
    """What the shorter side is scaled to where nobody says it: 256 for 224 pixels."""
    return round(eval_size / MARGIN)


@dataclass(frozen=True)
class Boxes:
    """For each of n photographs the part that is seen, and where in the output it lies.

    source: float64 (n, 4), left, top, right, bottom in pixels of the upright picture. output: int64
    (n, 4), the same in pixels of the (size, size) output; outside of it lies the fill colour.
    closed: pixels beyond the box count for nothing, as if it had been cut out before it was scaled.
    """

    source: np.ndarray
    output: np.ndarray
    size: int
    closed: bool


@dataclass(frozen=True)
class Cuts:
    """What training and evaluation see of photographs (n, 2) of height and width.

    "resized_crop" cuts 8 to 100 % of the whole photograph (torchvision's RandomResizedCrop). All
    else scales it first: `resize` "crop" so that the shorter side is `eval_resize` (in training
    image_size / 0.875), "squash" to a square whatever its shape, "pad" so that the longer side fits
    and the rest is filled. Then a window of the output's size is seen: the middle one, at random
    for "crop", up to two pixels off the middle for "translate".
    """

    kind: str
    image_size: int
    eval_size: int
    eval_resize: int
    resize: str
    seed: int

    def training(self, sizes: Tensor, indices: Tensor, epoch: int) -> Boxes:
        """The boxes of these training images in an epoch."""
        if self.kind == "resized_crop":
            draws = uniforms(self.seed, epoch, indices, 5 + 2 * CROP_TRIES, AUGMENT)
            height, width = sizes[:, :1].float(), sizes[:, 1:].float()
            box = random_boxes(height, width, draws[:, 1:3], draws[:, 5:])
            top, left, high, wide = (side.double().numpy() for side in box)
            source = np.stack([left, top, left + wide, top + high], axis=1)
            whole = np.tile([0, 0, self.image_size, self.image_size], (len(source), 1))
            return Boxes(source, whole, self.image_size, closed=True)
        moves = self.kind in ("crop", "translate")
        fitted = self.resize != "crop" and not moves
        short = self.image_size if fitted else default_resize(self.image_size)
        if not moves:
            return self._window(sizes, short, self.image_size)
        draws = uniforms(self.seed, epoch, indices, 5, AUGMENT)[:, 1:3]
        return self._window(sizes, short, self.image_size, draws)

    def evaluation(self, sizes: Tensor) -> Boxes:
        """The boxes that evaluation and prediction see."""
        short = self.eval_resize if self.resize == "crop" else self.eval_size
        return self._window(sizes, short, self.eval_size)

    def _window(self, sizes: Tensor, side: int, size: int, draws: Tensor | None = None) -> Boxes:
        """The window of `size` in photographs that are scaled to `side`."""
        shape = sizes.long()
        shorter, longer = (f(dim=1, keepdim=True).values for f in (shape.min, shape.max))
        if self.resize == "squash":
            scaled = torch.full_like(shape, side)
        elif self.resize == "pad":
            scaled = (shape * side // longer).clamp(min=1)
        else:
            scaled = torch.where(shape == shorter, side, side * longer // shorter)
        canvas = scaled if self.resize == "crop" else torch.full_like(shape, side)
        offset = (canvas - scaled) // 2  # of the picture on its canvas
        slack = canvas - size
        first = torch.round(slack / 2).long()  # half to even, as torchvision's center_crop
        if draws is not None and self.kind == "crop":
            first = (draws * (slack + 1)).long()
        elif draws is not None:
            shift = (draws * (2 * TRANSLATE_PIXELS + 1)).long() - TRANSLATE_PIXELS
            first = torch.minimum((first + shift).clamp(min=0), slack)
        start = (offset - first).clamp(min=0)  # of the picture in the window
        end = torch.minimum(offset - first + scaled, torch.full_like(shape, size))
        ratio = shape.double() / scaled
        low, high = ((place + first - offset) * ratio for place in (start, end))
        source = torch.stack([low[:, 1], low[:, 0], high[:, 1], high[:, 0]], dim=1).numpy()
        output = torch.stack([start[:, 1], start[:, 0], end[:, 1], end[:, 0]], dim=1).numpy()
        return Boxes(source, output, size, closed=False)


def lost(sizes: Tensor, cuts: Cuts) -> float:
    """The largest part of a photograph's side, in the mean, that evaluation never sees."""
    boxes = cuts.evaluation(sizes).source
    seen = torch.from_numpy(boxes[:, 2:] - boxes[:, :2]).flip(1) / sizes
    return float(1 - seen.clamp(max=1).min(dim=1).values.mean())
