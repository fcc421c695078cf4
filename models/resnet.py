"""ResNet-18 for small images: He et al., "Deep residual learning for image recognition", 2015.

torchvision's parameter names. The first layer is a 3x3 convolution of stride 1 without max
pooling, so that 32x32 images keep their size until layer2.
"""

import torch
from torch import nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (N, in_channels, H, W) -> (N, channels, H/s, W/s).

    In training an image takes the shortcut alone with the chance `drop_path`.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.drop_path = 0.0
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        residual = F.relu(self.bn1(self.conv1(maps)))
        residual = self.bn2(self.conv2(residual))
        if self.training and self.drop_path:
            residual = stochastic_depth(residual, self.drop_path)
        return F.relu(residual + self.downsample(maps))


class ResNet(nn.Module):
    """(N, in_channels, S, S) -> (N, num_classes), S at least 8.

    `drop_path` is the last block's; the first one has 0, and it grows evenly between them.
    """

    def __init__(
        self, num_blocks: list[int], num_classes: int = 10, drop_path: float = 0.0,
        in_channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stage(64, 64, num_blocks[0], stride=1)
        self.layer2 = stage(64, 128, num_blocks[1], stride=2)
        self.layer3 = stage(128, 256, num_blocks[2], stride=2)
        self.layer4 = stage(256, 512, num_blocks[3], stride=2)
        self.fc = nn.Linear(512, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        blocks = [layer for layer in self.modules() if isinstance(layer, BasicBlock)]
        for number, block in enumerate(blocks):
            block.drop_path = drop_path * number / (len(blocks) - 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = F.relu(self.bn1(self.conv1(images)))  # (N, 64, S, S)
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))  # (N, 512, S/8, S/8)
        return self.fc(maps.mean(dim=(2, 3)))


def stage(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    """Residual blocks of one width; the first one halves the maps where stride is 2."""
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(num_blocks - 1)))


def stochastic_depth(residual: torch.Tensor, rate: float) -> torch.Tensor:
    """Zero for each image with the chance `rate`, else larger, so that the mean stays.

    Huang et al., "Deep networks with stochastic depth", 2016, each image for itself as in timm.
    """
    stays = torch.rand(len(residual), 1, 1, 1, device=residual.device) >= rate
    return residual * stays / (1 - rate)


def resnet18(num_classes: int = 10, drop_path: float = 0.0, in_channels: int = 3) -> ResNet:
    """The 18-layer network: two basic blocks in each of four stages."""
    return ResNet([2, 2, 2, 2], num_classes, drop_path, in_channels)
