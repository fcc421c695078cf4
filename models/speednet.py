"""SpeedNet: the small network of the CIFAR-10 speed records (Jordan, arXiv:2404.00498, 2024).

A fixed convolution that whitens 2x2 patches (from the covariance of the training images), three
groups of two 3x3 convolutions, and a linear layer whose answer is scaled down.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (64, 256, 256)
PATCH = 2  # pixels a side of what the first layer whitens
SMALLEST_VARIANCE = 5e-4  # added to each eigenvalue: noise is not blown up to full size
LOGIT_SCALE = 1 / 9

# Learning rates of the public recipe for batches of 2,000, as multiples of muon's 0.24: 0.053 and
# 0.67 there, for gradients summed over the batch (ours are means) and a head scaled by 1/256.
BIAS_RATE = 0.053 * 2000 / 0.24
HEAD_RATE = 0.67 * 2000 / 0.24 / (256 * LOGIT_SCALE) ** 2
SGD_MOMENTUM = 0.85


class Norm(nn.BatchNorm2d):
    """Batch norm with a bias and no scale, whose running statistics follow within a few steps."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad_(False)


class Group(nn.Module):
    """Two convolutions, the map halved between them: (N, C, H, W) -> (N, channels, H/2, W/2)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm1 = Norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = Norm(channels)
        for conv in (self.conv1, self.conv2):  # at first, pass on what came in
            nn.init.dirac_(conv.weight.data[: conv.in_channels])

    def forward(self, maps: Tensor) -> Tensor:
        maps = F.gelu(self.norm1(F.max_pool2d(self.conv1(maps), 2)))
        return F.gelu(self.norm2(self.conv2(maps)))


class SpeedNet(nn.Module):
    """(N, in_channels, S, S) -> (N, num_classes), S at least 9."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        whitened = 2 * in_channels * PATCH**2  # each direction and its opposite
        self.whiten = nn.Conv2d(in_channels, whitened, PATCH)
        self.whiten.weight.requires_grad_(False)
        assert self.whiten.bias is not None
        nn.init.zeros_(self.whiten.bias)
        widths = (whitened, *WIDTHS)
        self.groups = nn.Sequential(*map(Group, widths, WIDTHS))
        self.head = nn.Linear(WIDTHS[-1], num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.groups(F.gelu(self.whiten(images)))  # (N, 256, 3, 3) at S = 32
        return self.head(maps.amax(dim=(2, 3))) * LOGIT_SCALE

    @torch.no_grad()
    def start_from_data(self, images: Tensor) -> None:
        """Set the whitening filters from normalised float images (n, C, S, S)."""
        patches = images.unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # (n, C, rows, columns, 2, 2)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
        variances, directions = torch.linalg.eigh(torch.cov(patches.T))
        filters = (directions / (variances + SMALLEST_VARIANCE).sqrt()).T  # one direction a row
        largest = filters.gather(1, filters.abs().argmax(1, keepdim=True))
        filters = filters * largest.sign()  # an eigenvector's sign is the library's whim
        filters = filters.unflatten(1, (images.shape[1], PATCH, PATCH))
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def muon_groups(self) -> list[dict]:
        """Parameter groups for the optimizer muon: filters, biases, head."""
        parameters = dict(self.named_parameters())
        filters = [p for name, p in parameters.items() if ".conv" in name]
        biases = [p for name, p in parameters.items() if name.endswith(".bias")]
        sgd = {"orthogonal": False, "momentum": SGD_MOMENTUM}
        return [
            # A norm follows each filter, so its length means nothing and can be held.
            {"params": filters, "orthogonal": True, "hold_length": True},
            {"params": biases, "lr_scale": BIAS_RATE, **sgd},
            {"params": [self.head.weight], "lr_scale": HEAD_RATE, **sgd},
        ]
