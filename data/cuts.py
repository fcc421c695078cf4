"""Which part of a photograph a model sees: boxes for a whole batch, from sizes and keyed draws.

A photograph is cut, scaled and mirrored where it is decoded (`photographs.cut`), so what is drawn
here are whole numbers: a part of the picture, what it is scaled to, and where it lies in the
output.
"""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.augment import CROP_TRIES, TRANSLATE_PIXELS, mirrored, random_boxes
from data.keyed_random import AUGMENT, uniforms

MARGIN = 0.875  # of the scaled side is seen: 224 of 256 pixels, as ImageNet is evaluated


def default_resize(eval_size: int) -> int:
    """What the shorter side is scaled to where nobody says it: 256 for 224 pixels."""
    return round(eval_size / MARGIN)


@dataclass
class Boxes:
    """For each of n photographs what is taken of it, and where it lies in the output.

    They are drawn when they are first asked for, by a thread that decodes: it computes alone. In a
    process whose torch has several threads, exp and sqrt of a few hundred numbers start them all,
    and those spin on the cores that decode.
    """

    draw: Callable[[], Tensor]
    size: int
    interpolation: str = "bilinear"
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _rows: list[list[int]] | None = None

    @property
    def rows(self) -> list[list[int]]:
        """Nine whole numbers for each photograph.

        Left, top, right, bottom of the part that is taken, in pixels of the upright picture; height
        and width that this part is scaled to; then the row and the column of the output
        (size, size) at which its first pixel lies, negative where its beginning is cut off; then 1
        if the output is mirrored. What no pixel covers has the fill colour.
        """
        with self._lock:
            if self._rows is None:
                self._rows = self.draw().tolist()
            return self._rows


@dataclass(frozen=True)
class Cuts:
    """What training and evaluation see of photographs, int (n, 2) of height and width.

    "resized_crop" cuts 8 to 100 % of the whole photograph (torchvision's RandomResizedCrop). All
    else scales it first: `resize` "crop" so that the shorter side is `eval_resize` (in training
    image_size / 0.875), "squash" to a square whatever its shape, "pad" so that the longer side fits
    and the rest is filled. Then a window of the output's size is seen: the middle one, at random
    for "crop", up to two pixels off the middle for "translate". All but "none" mirror with the
    probability `flip`, see Augment. `interpolation` is how they are scaled.
    """

    kind: str
    image_size: int
    eval_size: int
    eval_resize: int
    resize: str
    seed: int
    flip: float = 0.5
    no_flip: bool = False
    alternating_flip: bool = False
    interpolation: str = "bilinear"

    def training(self, sizes: Tensor, indices: Tensor, epoch: int) -> Boxes:
        """The boxes of these training images in an epoch."""
        draw = functools.partial(self._drawn, sizes, indices, epoch)
        return Boxes(draw, self.image_size, self.interpolation)

    def _drawn(self, sizes: Tensor, indices: Tensor, epoch: int) -> Tensor:
        boxes = self.kind == "resized_crop"
        draws = uniforms(self.seed, epoch, indices, 5 + 2 * CROP_TRIES * boxes, AUGMENT)
        flips = mirrored(self, draws[:, 0], indices, epoch).long()[:, None]
        if boxes:
            high, wide = sizes[:, :1].float(), sizes[:, 1:].float()
            place = random_boxes(high, wide, draws[:, 1:3], draws[:, 5:])
            top, left, height, width = (side.long() for side in place)
            part = torch.stack([left, top, left + width, top + height], dim=1)
            scaled, first = torch.full_like(part[:, :2], self.image_size), part.new_zeros(1, 2)
            return torch.cat([part, scaled, first.expand(len(part), 2), flips], dim=1)
        moves = self.kind in ("crop", "translate")
        fitted = self.resize != "crop" and not moves
        side = self.image_size if fitted else default_resize(self.image_size)
        return self._window(sizes, side, self.image_size, flips, draws[:, 1:3] if moves else None)

    def evaluation(self, sizes: Tensor) -> Boxes:
        """The boxes that evaluation and prediction see."""
        side = self.eval_resize if self.resize == "crop" else self.eval_size
        flips = sizes.new_zeros(len(sizes), 1).long()
        draw = functools.partial(self._window, sizes, side, self.eval_size, flips)
        return Boxes(draw, self.eval_size, self.interpolation)

    def _window(
        self, sizes: Tensor, side: int, size: int, flips: Tensor, draws: Tensor | None = None
    ) -> Tensor:
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
        slack = canvas - size
        first = torch.round(slack / 2).long()  # half to even, as torchvision's center_crop
        if draws is not None and self.kind == "crop":
            first = (draws * (slack + 1)).long()
        elif draws is not None:
            shift = (draws * (2 * TRANSLATE_PIXELS + 1)).long() - TRANSLATE_PIXELS
            first = torch.minimum((first + shift).clamp(min=0), slack)
        start = (canvas - scaled) // 2 - first  # of the picture in the window
        part = torch.cat([torch.zeros_like(shape), shape.flip(1)], dim=1)
        return torch.cat([part, scaled, start, flips], dim=1)


def lost(sizes: Tensor, cuts: Cuts) -> float:
    """The part of a photograph's more cut side, in the mean, that evaluation never sees."""
    rows = torch.tensor(cuts.evaluation(sizes).rows)
    return float((1 - cuts.eval_size / rows[:, 4:6].max(dim=1).values).clamp(min=0).mean())
