"""Classification: a picture has one class."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from common.confusion import MOST, WHOLE, precisions, totals
from common.metric import METRICS
from common.text import percent, some
from tasks import scores
from tasks.losses import Criterion
from tasks.task import (
    LARGEST_LOSS,
    LOSS_UNIT,
    MOST_EXAMPLES,
    SURE,
    Answers,
    Outputs,
    Task,
    not_found,
    split_outputs,
)  # fmt: skip

TOP = 5  # classes told of a picture


def balanced_accuracy(results: dict) -> float:
    """The mean over the classes of the share that is found; classes without images do not count."""
    images, _, right = totals(results)
    shares = [found / count for found, count in zip(right, images, strict=True) if count]
    return sum(shares) / max(1, len(shares))


def never_found(results: dict, classes: Sequence[str]) -> str:
    """The classes of which no image is recognised, in a sentence; "" where there are none."""
    if not (missed := not_found(results, classes)):
        return ""
    there = [count for count in totals(results)[0] if count]
    way = "; --select balanced_accuracy chooses weights by the mean over the classes"
    # Where all are alike that mean is the accuracy.
    return f"the best weights find none of class {some(missed, 5)}{way * (len({*there}) > 1)}"


class Classification(Task):
    """Cross entropy; top-1, top-5 and a confusion matrix as integer counts."""

    name = "classification"
    metrics = METRICS["classification"]
    best_is = right_is = "accuracy"

    def __init__(
        self, num_classes: int = 1, label_smoothing: float = 0.0, auxiliary: float = 0.3,
        criterion: Criterion | None = None, threshold: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(num_classes, label_smoothing, auxiliary, criterion, threshold)
        said = {"top5": num_classes >= 5, "auroc": scores.ranks(num_classes)}
        self._numbers = torch.empty(0)
        self.metrics = tuple(m for m in type(self).metrics if said.get(m.key, True))

    @property
    def _places(self) -> slice:
        """Those of the counters that tell of each class."""
        cells = self.num_classes if self.num_classes <= MOST else 3
        return slice(4, 4 + self.num_classes * cells)

    def weight(self, labels: Tensor) -> Tensor | None:
        return self.criterion.total(labels)

    def right(self, outputs: Outputs, labels: Tensor) -> Tensor | int:
        """Of a mixture of two images the class that it holds more of is the right answer."""
        logits = split_outputs(outputs)[0].detach()
        labels = labels.argmax(1) if labels.ndim == 2 else labels
        return (logits.argmax(1) == labels).sum()

    def new_counts(self, device: torch.device) -> Tensor:
        """Integer counters: [loss units, top-1, top-5, images, confusion..., those of scores.py].

        Of more than MOST classes the images, answers and right answers of each, instead of the
        confusion matrix.
        """
        size = self._places.stop + scores.new_counts(self.num_classes)
        return torch.zeros(size, dtype=torch.int64, device=device)

    def count(self, counts: Tensor, outputs: Outputs, labels: Tensor, weights: Tensor) -> Answers:
        logits = split_outputs(outputs)[0].float()
        chances = logits.log_softmax(1)  # most of the work where there are many classes
        loss = F.nll_loss(chances, labels, reduction="none").clamp(max=LARGEST_LOSS)
        loss = loss.nan_to_num(nan=LARGEST_LOSS)
        # The rank of the true class, ties by class number; the same for every batch shape.
        true = logits.gather(1, labels[:, None])
        tied_before = (logits == true) & (self._classes(logits.device) < labels[:, None])
        before = ((logits > true) | tied_before).sum(1)
        broken = logits.isnan().any(1)  # an answer that is no number is wrong everywhere
        rank = before.masked_fill(broken, self.num_classes)
        predicted = torch.where(broken, (labels + 1) % self.num_classes, logits.argmax(1))
        units = (loss / LOSS_UNIT).round().long()
        first = rank == 0
        found = torch.stack([units, first, rank < 5, weights]) * weights
        counts[:4].add_(found.sum(1))
        sure = chances.gather(1, predicted[:, None])[:, 0].exp().nan_to_num(0.0)
        answers = Answers(predicted, (sure * SURE).long())
        scores.count(counts[self._places.stop :], chances, labels, first, weights)
        if self.num_classes > MOST:
            images, given, right = counts[self._places].view(3, self.num_classes)
            images.scatter_add_(0, labels, weights)
            given.scatter_add_(0, predicted, weights)
            right.scatter_add_(0, labels, weights * (predicted == labels))
            return answers
        cells = torch.add(predicted, labels, alpha=self.num_classes)
        counts[4:].scatter_add_(0, cells, weights)
        return answers

    def _classes(self, device: torch.device) -> Tensor:
        """The numbers of the classes (1, classes), made once."""
        if self._numbers.device != device or not len(self._numbers):
            self._numbers = torch.arange(self.num_classes, device=device)[None]
        return self._numbers

    def results(self, counts: Tensor) -> dict:
        """The metrics, and what is known of each class: see MOST."""
        loss, top1, top5, images = counts[:4].tolist()
        found, size, places = {}, self.num_classes, counts[self._places]
        if size > MOST:
            there, answers, right = places.view(3, size).tolist()
            found["per_class"] = {"images": there, "answers": answers, "right": right}
        elif size > WHOLE:
            cells = places.nonzero().flatten()
            numbers = places[cells].tolist()
            found["confusion"] = {"classes": size, "cells": cells.tolist(), "counts": numbers}
        else:
            found["confusion"] = places.view(size, size).tolist()
        found |= scores.results(counts[self._places.stop :], size)
        precision, f1 = precisions(found)
        return {
            "loss": loss * LOSS_UNIT / images,
            "accuracy": top1 / images,
            "top5": top5 / images,
            "balanced_accuracy": balanced_accuracy(found),
            "macro_precision": sum(precision) / max(1, len(precision)),
            "macro_f1": sum(f1) / max(1, len(f1)),
            "images": images,
            **found,
        }

    def new_examples(self, device: torch.device) -> Tensor:
        """The surest mistakes, int64 (2, rows, places), see `keep_examples`; 0: none.

        A row for each class, of more than WHOLE classes one row for all: it is no larger for more.
        """
        if self.num_classes > WHOLE:
            return torch.zeros(2, 1, 8 * MOST_EXAMPLES, dtype=torch.int64, device=device)
        places = max(MOST_EXAMPLES // 4, MOST_EXAMPLES // self.num_classes)
        return torch.zeros(2, self.num_classes, places, dtype=torch.int64, device=device)

    def keep_examples(
        self, kept: Tensor, answers: Answers, labels: Tensor, indices: Tensor
    ) -> None:
        """Of a mistake its key, label and answer; neither batches nor processes decide which.

        The key is how sure it is in parts of SURE, times 2**32, less its index: no two are equal.
        """
        keys = answers.sure * 2**32 - indices
        keys = keys * ((answers.given != labels) & (indices >= 0))
        each = kept.shape[1] == self.num_classes  # else one row is for all
        mine = labels == self._classes(labels.device).T if each else labels[None] >= 0
        keys = torch.cat([kept[0], keys * mine], 1)
        cells = torch.add(answers.given, labels, alpha=self.num_classes)
        cells = torch.cat([kept[1], cells.expand(kept.shape[1], -1)], 1)
        best, places = keys.topk(kept.shape[2])
        torch.stack([best, cells.gather(1, places)], out=kept)

    def as_integers(self, answers: Answers) -> Tensor:
        return torch.stack([answers.given + 1, answers.sure], 1)

    def answered(self, answers: Tensor, classes: list[str]) -> list[tuple[str, str]]:
        return [
            (classes[given - 1], f"{sure / SURE:.6f}") if given else ("", "")
            for given, sure in answers.tolist()
        ]

    def examples(self, kept: Tensor) -> list[dict]:
        """The surest mistakes: the first of every class, surest first, before the second of any."""
        keys, cells = kept.permute(1, 2, 0, 3).flatten(2)
        keys, places = keys.topk(kept.shape[3])
        cells = cells.gather(1, places)
        mistakes = sorted(zip(keys.flatten().tolist(), cells.flatten().tolist(), strict=True))
        turns, found = Counter(), []
        for key, cell in reversed(mistakes):
            if key <= 0:
                break
            label, answer = divmod(cell, self.num_classes)
            found.append((turns[label], -key, label, answer))
            turns[label] += 1
        return [
            {
                "index": less % 2**32, "label": label, "answer": answer,
                "confidence": -(less >> 32) / 2**20,
            }
            for _, less, label, answer in sorted(found)[:MOST_EXAMPLES]
        ]  # fmt: skip

    def caption(self, example: dict, label: str, classes: list[str]) -> str:
        return f"{label}\nas {classes[example['answer']]}, {percent(example['confidence'])}"

    def surest(self, logits: Tensor, top: int | None) -> list[tuple[int, float]]:
        best = logits.softmax(0).topk(min(top or TOP, len(logits)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def never_found(self, results: dict, classes: list[str]) -> str:
        return never_found(results, classes)

    def doubts(self, results: dict, classes: list[str]) -> dict[str, str]:
        there, answered, _ = (torch.tensor(t, dtype=torch.float64) for t in totals(results))
        shares, answers = there / there.sum(), answered / there.sum()
        guessing = float(-(shares * shares.clamp(min=1e-12).log()).sum())  # ln(10) for ten alike
        loss, most, found = results["loss"], int(answers.argmax()), {}
        if guessing < 0.1:  # hardly more than one class: nothing can be told
            return found
        if loss > 10 * guessing:
            found["explodes"] = (
                f"the test loss is {loss:.4g}, where guessing costs {guessing:.2f}: the steps are "
                "too large (try a tenth of the --lr), or batch norm has seen too few batches; see "
                "question 13 in docs/lessons.md"
            )
        elif loss > 0.95 * guessing and results["accuracy"] < float(shares.max()) + 0.05:
            below = results["accuracy"] < float(shares.max())
            found["guesses"] = (
                f"the test loss {loss:.4f} is what guessing costs ({guessing:.4f}), and "
                f"{results['accuracy']:.1%} right is {'less' if below else 'hardly more'} than "
                f"{float(shares.max()):.1%}, "
                f"which always answering {classes[int(shares.argmax())]} gives: the model knows "
                "nothing of the test images; see question 14 in docs/lessons.md"
            )
        if answers[most] > 0.9 and answers[most] - shares[most] > 0.1:
            found["one class"] = (
                f"{answers[most]:.0%} of the answers are class {classes[most]}, the label of "
                f"{shares[most]:.0%} of the test images; see question 3 in docs/lessons.md"
            )
        if pair := _taken_for_each_other(results):
            one, other = (classes[index] for index in pair)
            found["mirror"] = (
                f"{one} and {other} are taken for each other, and for no other class: if one is "
                "the mirror image of the other (left and right), type --no-flip, for "
                "--augment mirrors training images"
            )
        return found


def _taken_for_each_other(results: dict) -> tuple[int, int] | None:
    """Two classes that a model tells from all others, but not from each other."""
    matrix = results.get("confusion")
    if not isinstance(matrix, list):
        return None
    images = totals(results)[0]
    for one, mine in enumerate(matrix):
        for other in range(one):
            theirs, both = matrix[other], images[one] + images[other]
            swapped, right = mine[other] + theirs[one], mine[one] + theirs[other]
            each = min(mine[other] / max(1, images[one]), theirs[one] / max(1, images[other]))
            if both >= 20 and each > 0.3 and swapped + right > 0.8 * both:
                return other, one
    return None
