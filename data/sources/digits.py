"""scikit-learn's handwritten digits, grey, eight pixels a side; they come with the package."""

from typing import Any

import torch

from data.image_set import Source
from data.sources.describe import describe, source_of


def make(origin: str, seed: int) -> Source:
    """1,797 images of ten classes; every fifth of each digit tests, whatever the seed."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()  # a Bunch, which its stub takes for a tuple too
    grey = torch.from_numpy((digits.images * (255 / 16)).round()).to(torch.uint8)
    images = grey[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).to(torch.int64)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):  # every fifth of each digit
        is_test[(labels == digit).nonzero().flatten()[4::5]] = True
    classes = tuple(map(str, range(10)))
    train, test = (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])
    return source_of("digits", describe(train, test, classes), origin, no_flip=True)
