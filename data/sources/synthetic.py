"""Made-up images that can be learned: ten patterns of 4x4 blocks, and noise."""

import torch

from data.image_set import Source
from data.sources.describe import describe, source_of


def make(origin: str, seed: int) -> Source:
    """2,048 and 512 images, 32x32; the same pictures for every seed of a run."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(64, 192, (10, 3, 4, 4), generator=generator)
    patterns = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)
    labels = torch.arange(2048 + 512) % 10
    noise = torch.randint(-64, 64, (len(labels), 3, 32, 32), generator=generator)
    images = (patterns[labels] + noise).to(torch.uint8)
    classes = tuple(f"pattern {number}" for number in range(10))
    train, test = (images[:2048], labels[:2048]), (images[2048:], labels[2048:])
    return source_of("synthetic", describe(train, test, classes), origin)
