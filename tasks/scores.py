"""How far a classifier's scores can be trusted: calibration and ranking, as integer counts.

Scores are the softmax of the logits. All is counted in whole units, so that any order of addition,
hence any number of processes, comes to the same bits.
"""

import torch
from torch import Tensor

BINS = 15  # of the confidence, as Guo et al. (ICML 2017) have it
SURE_UNIT = 2**-20
STEPS = 2**16  # a score is rounded to one of these + 1 values before it is ranked
MOST_RANKED = 100  # classes; a histogram of a class is half a megabyte
OF_THE_CLASS = 2**32  # what an image of the class counts beside the 1 that any image does


def ranks(classes: int) -> bool:
    """Whether scores are ranked where there are so many classes."""
    return 1 < classes <= MOST_RANKED


def new_counts(classes: int) -> int:
    """How many integers `count` fills."""
    return 4 * BINS + (STEPS + 1) * classes * ranks(classes)


def count(counts: Tensor, chances: Tensor, labels: Tensor, right: Tensor, weights: Tensor) -> None:
    """Add a batch of logarithms of scores (n, classes).

    `right` (n,) says which answers are, weights (n,) int64 is 1, and 0 for padding.
    """
    sure = chances.amax(1).exp().nan_to_num_(0.0)
    bins = torch.add((sure * BINS).long().clamp_(max=BINS - 1), right, alpha=BINS)
    found = torch.stack([weights, (sure / SURE_UNIT).round_().long() * weights])
    counts[: 4 * BINS].view(2, 2 * BINS).scatter_add_(1, bins.expand(2, -1), found)
    classes = chances.shape[1]
    if ranks(classes):
        scores = chances.exp().nan_to_num_(0.0)
        cells = torch.arange(0, classes * (STEPS + 1), STEPS + 1, device=chances.device)
        cells = cells + (scores * STEPS).round_().long()
        worth = weights[:, None].repeat(1, classes)
        worth.scatter_add_(1, labels[:, None], weights[:, None] * OF_THE_CLASS)
        counts[4 * BINS :].scatter_add_(0, cells.flatten(), worth.flatten())


def results(counts: Tensor, classes: int) -> dict:
    """The calibration error and its bins; where scores are ranked, the area under the ROC curve.

    The error is the mean over the images of the distance between how sure a bin is and how often it
    is right. The area is the mean over the classes, each against all others; a class that all or
    none of the images are of does not count, and 0.5 is the answer where that leaves none.
    """
    (wrong, right), units = counts[: 4 * BINS].view(2, 2, BINS).tolist()
    images = [w + r for w, r in zip(wrong, right, strict=True)]
    sure = [sum(both) * SURE_UNIT for both in zip(*units, strict=True)]
    apart = sum(abs(r - s) for r, s in zip(right, sure, strict=True))
    bins = {"images": images, "right": right, "sure": sure}
    found = {"ece": apart / max(1, sum(images)), "calibration": bins}
    if ranks(classes):
        ranked = counts[4 * BINS :]
        places = ranked.nonzero()[:, 0]  # most scores are near 0 and 1: the rest of a row is empty
        of, values = places // (STEPS + 1), ranked[places]
        mine = values >> 32
        others = (values & (OF_THE_CLASS - 1)) - mine
        nobody = mine.new_zeros(classes)
        inside, outside = (nobody.scatter_add(0, of, part) for part in (mine, others))
        before = outside.cumsum(0) - outside  # those of the classes before
        below = others.cumsum(0) - others - before[of]
        wins = mine * (2 * below + others)  # twice: a tie is half a pair
        won = nobody.scatter_add(0, of, wins).tolist()
        pairs = (inside * outside).tolist()
        areas = [w / (2 * p) for w, p in zip(won, pairs, strict=True) if p]
        found["auroc"] = sum(areas) / len(areas) if areas else 0.5
    return found
