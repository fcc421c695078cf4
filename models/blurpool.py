"""Anti-aliased downsampling: Zhang, "Making convolutional networks shift-invariant again", 2019.

What skips every second pixel first blurs what it skips, by the binomial filter 1 2 1 of each axis.
The layers that it takes the place of keep the names of their parameters.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST_CHANNELS = 16  # fewer, and it is the layer that sees the pictures: FFCV leaves that alone


class BlurConv2d(nn.Conv2d):
    """A strided convolution of blurred maps, as FFCV's ImageNet recipes have it."""

    blur: Tensor

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(F.conv2d(maps, self.blur, padding=1, groups=self.in_channels))


class BlurMaxPool2d(nn.MaxPool2d):
    """The maximum at every place, blurred, of which every `stride`-th is taken."""

    blur: Tensor

    def forward(self, maps: Tensor) -> Tensor:
        maps = F.max_pool2d(maps, self.kernel_size, 1, self.padding)
        channels = maps.shape[1]
        blur = self.blur.expand(channels, -1, -1, -1)
        return F.conv2d(maps, blur, stride=self.stride, padding=1, groups=channels)


def add_blur(model: nn.Module, pools: bool) -> int:
    """Blur in front of the strided convolutions of a model, and in its max pools; how many."""
    count = 0
    for parent, name, layer in list(_strided(model, pools)):
        filters = torch.tensor([1.0, 2.0, 1.0])
        blur = (filters[:, None] * filters / 16)[None, None]
        if isinstance(layer, nn.MaxPool2d):
            made = BlurMaxPool2d(layer.kernel_size, layer.stride, layer.padding)
        else:
            made = _blurred(layer)
            blur = blur.repeat(layer.in_channels, 1, 1, 1)
        made.register_buffer("blur", blur, persistent=False)  # no file needs what never changes
        setattr(parent, name, made)
        count += 1
    return count


def _strided(
    model: nn.Module, pools: bool
) -> Iterator[tuple[nn.Module, str, nn.Conv2d | nn.MaxPool2d]]:
    """The layers that skip pixels: who holds them, under which name, and they themselves."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d:
                if max(child.stride) > 1 and child.in_channels >= LEAST_CHANNELS:
                    yield parent, name, child
            elif pools and type(child) is nn.MaxPool2d:
                strides = child.stride if isinstance(child.stride, tuple) else (child.stride,)
                if max(strides) > 1 and not child.ceil_mode:  # which counts places otherwise
                    yield parent, name, child


def _blurred(layer: nn.Conv2d) -> BlurConv2d:
    known = inspect.signature(nn.Conv2d).parameters.keys() - {"bias"}
    given: dict[str, Any] = {name: vars(layer)[name] for name in known & vars(layer).keys()}
    made = BlurConv2d(**given, bias=False, device="meta")
    made.weight, made.bias = layer.weight, layer.bias
    return made
