"""Two models in a file as learners write it: a tiny one to rehearse with, and a broken one."""

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """A convolution, batch norm and dropout, on images of any size."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(16, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Broken(nn.Module):
    """Reads beyond a table: on a GPU a device-side assert."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.table = nn.Embedding(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(torch.full((len(x),), 10**6, device=x.device))
