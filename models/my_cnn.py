"""MyCNN, the homework: one convolution, one linear layer."""

import torch
from torch import nn


class MyCNN(nn.Module):
    """(N, in_channels, image_size, image_size) -> (N, num_classes); built for one image size."""

    def __init__(self, num_classes: int = 10, image_size: int = 224, in_channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, kernel_size=3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(16 * image_size * image_size, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.relu(self.conv(images))  # (N, 16, S, S)
        return self.fc(maps.flatten(1))
