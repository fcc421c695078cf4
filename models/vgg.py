"""VGG: Simonyan & Zisserman, "Very deep convolutional networks for large-scale image recognition".

With torchvision's parameter names, initialisation and, from its weights, its logits.
"""

import torch
from torch import nn

from models.pooling import AdaptivePool, pooled_linear

# Table 1 of the paper: channels of the 3x3 convolutions, blocks separated by 2x2 max pooling.
COLUMN_A = [[64], [128], [256, 256], [512, 512], [512, 512]]
COLUMN_D = [[64, 64], [128, 128], [256, 256, 256], [512, 512, 512], [512, 512, 512]]


class VGG(nn.Module):
    """(N, in_channels, S, S) -> (N, num_classes), S at least 32."""

    def __init__(
        self, blocks: list[list[int]], num_classes: int = 1000, in_channels: int = 3
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for block in blocks:
            for channels in block:
                layers.append(nn.Conv2d(in_channels, channels, kernel_size=3, padding=1))
                layers.append(nn.ReLU(inplace=True))
                in_channels = channels
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        self.features = nn.Sequential(*layers)
        self.pool = AdaptivePool(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )
        self.apply(initialise)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.features(images)  # (N, 512, S/32, S/32)
        linear: nn.Linear = self.classifier[0]  # pyright: ignore[reportAssignmentType]
        hidden = pooled_linear(maps, self.pool, linear)  # (N, 4096)
        return self.classifier[1:](hidden)


def initialise(layer: nn.Module) -> None:
    """Kaiming for convolutions: with torch's default a plain deep net passes no signal."""
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)


def vgg11(num_classes: int = 1000, in_channels: int = 3) -> VGG:
    """Column A: eight convolutions."""
    return VGG(COLUMN_A, num_classes, in_channels)


def vgg16(num_classes: int = 1000, in_channels: int = 3) -> VGG:
    """Column D: thirteen convolutions."""
    return VGG(COLUMN_D, num_classes, in_channels)
