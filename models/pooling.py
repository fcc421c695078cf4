"""Adaptive average pooling whose backward is deterministic on every device."""

import torch
from torch import nn
from torch.nn import functional as F


class AdaptivePool(nn.Module):
    """nn.AdaptiveAvgPool2d as two matrix products; nothing at all when the size already matches.

    The CUDA backward of nn.AdaptiveAvgPool2d adds with atomics, in an order that changes, and
    raises under torch.use_deterministic_algorithms.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        height, width = maps.shape[-2:]
        if (height, width) == (self.size, self.size):
            return maps
        rows = averaging_matrix(height, self.size, maps)
        columns = averaging_matrix(width, self.size, maps)
        return rows @ maps @ columns.T  # (N, C, size, size)

    def extra_repr(self) -> str:
        return str(self.size)


def without_deterministic_backward(model: nn.Module) -> list[str]:
    """`name (Kind)` of each layer whose backward on a GPU has no deterministic form in torch.

    Average pooling to 1 x 1 is a mean, which has one.
    """
    kinds = (
        nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d, nn.AvgPool3d,
        nn.MaxPool3d, nn.FractionalMaxPool2d, nn.MaxUnpool2d, nn.Upsample, nn.ReflectionPad1d,
        nn.ReflectionPad2d, nn.ReplicationPad2d,
    )  # fmt: skip
    found = []
    for name, layer in model.named_modules():
        size = getattr(layer, "output_size", None)
        if isinstance(layer, kinds) and not (
            isinstance(layer, nn.AdaptiveAvgPool2d) and size in (1, (1, 1), [1, 1])
        ):
            found.append(f"{name or 'the model'} ({type(layer).__name__})")
    return found


def pooled_linear(maps: torch.Tensor, pool: AdaptivePool, linear: nn.Linear) -> torch.Tensor:
    """linear(pool(maps).flatten(1)), (N, C, h, w) -> (N, F), in its cheaper order.

    Where pooling would enlarge the maps (VGG, 32 pixels: 49 copies of one number), the average
    over the weights that meet the same number comes first; both are sums, and sums may change
    places. A forward hook on `linear` is not called then.
    """
    height, width = maps.shape[-2:]
    if height * width >= pool.size**2:
        return linear(pool(maps).flatten(1))
    rows = averaging_matrix(height, pool.size, linear.weight)
    columns = averaging_matrix(width, pool.size, linear.weight)
    weight = linear.weight.view(-1, pool.size**2) @ torch.kron(rows, columns)  # (F*C, h*w)
    return F.linear(maps.flatten(1), weight.view(linear.out_features, -1), linear.bias)


def averaging_matrix(size: int, bins: int, like: torch.Tensor) -> torch.Tensor:
    """(bins, size): row i averages positions floor(i size/bins) to ceil((i+1) size/bins) - 1."""
    bin_index = torch.arange(bins, device=like.device)[:, None]
    position = torch.arange(size, device=like.device)
    start, stop = bin_index * size // bins, ((bin_index + 1) * size + bins - 1) // bins
    return ((position >= start) & (position < stop)).to(like.dtype) / (stop - start)
