"""AlexNet: Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014.

The one-column form, with torchvision's parameter names and, from its weights, its logits.
"""

import torch
from torch import nn

from models.pooling import AdaptivePool


class AlexNet(nn.Module):
    """(N, in_channels, S, S) -> (N, num_classes), S at least 63."""

    def __init__(self, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(  # sizes at S = 224
            nn.Conv2d(in_channels, 64, kernel_size=11, stride=4, padding=2),  # 55
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # 27
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # 13
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # 6
        )
        self.pool = AdaptivePool(6)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.pool(self.features(images))  # (N, 256, 6, 6)
        return self.classifier(maps.flatten(1))
