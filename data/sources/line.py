"""Thirty points of y = 2x + 3 with a little noise, for linear regression."""

import torch

from data.cache import digest_of
from data.image_set import ImageSet, Source
from data.sources.describe import fingerprint_of


def make(origin: str, seed: int) -> Source:
    """The points train and test; their noise belongs to the seed."""
    generator = torch.Generator().manual_seed(seed)
    x = -10 + 20 * torch.arange(30, dtype=torch.float32)[:, None] / 30
    y = 2 * x + 3 + torch.randint(0, 3, (30, 1), generator=generator)
    points = ImageSet(x, y)
    return Source(
        name="line",
        task="regression",
        train=points,
        test=points,
        classes=(),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        fingerprint=fingerprint_of((), {"x": digest_of(x), "y": digest_of(y)}),
        origin=origin,
    )
