"""What a batch means: loss and metrics of classification and of regression."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Losses are counted in units of 2**-20, so that their sum is an integer: the same total in every
# order of addition, hence on every number of processes.
LOSS_UNIT = 2**-20
LARGEST_LOSS = 2.0**20

# What is kept of an evaluation grows with the mistakes that were made, not with the square of the
# classes: of more than WHOLE classes only cells that are not zero, of more than MOST no cells.
WHOLE, MOST = 100, 2000


def dense(confusion: list[list[int]] | dict) -> list[list[int]]:
    """A confusion matrix, rows: the true class, from the form in which `metrics` has it."""
    if isinstance(confusion, list):
        return confusion
    matrix = torch.zeros(confusion["classes"] ** 2, dtype=torch.int64)
    cells = torch.tensor(confusion["cells"], dtype=torch.int64)
    matrix[cells] = torch.tensor(confusion["counts"], dtype=torch.int64)
    return matrix.view(confusion["classes"], -1).tolist()


def split_outputs(outputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A model's answer as (logits, auxiliary logits): some models have extra heads in training."""
    if isinstance(outputs, tuple | list):
        return outputs[0], tuple(o for o in outputs[1:] if o is not None)
    return outputs, ()


class Classification:
    """Cross entropy; top-1, top-5 and a confusion matrix as integer counts."""

    name = "classification"
    best_is = "accuracy"

    def __init__(self, num_classes: int, label_smoothing: float = 0.0, auxiliary: float = 0.3):
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.auxiliary = auxiliary

    def loss(self, outputs, labels: Tensor) -> Tensor:
        """The training loss summed over the images; labels (n,) int64 or soft (n, classes)."""
        logits, extra = split_outputs(outputs)
        loss = F.cross_entropy(
            logits.float(), labels, reduction="sum", label_smoothing=self.label_smoothing
        )
        for head in extra:
            loss = loss + self.auxiliary * F.cross_entropy(
                head.float(), labels, reduction="sum", label_smoothing=self.label_smoothing
            )
        return loss

    def new_counts(self, device) -> Tensor:
        """Integer counters: [loss units, top-1, top-5, images, confusion...], see `count`.

        Of more than MOST classes images and answers of each, instead of the confusion matrix.
        """
        cells = self.num_classes if self.num_classes <= MOST else 2
        return torch.zeros(4 + self.num_classes * cells, dtype=torch.int64, device=device)

    def count(self, counts: Tensor, outputs, labels: Tensor, weights: Tensor) -> None:
        """Add a batch to the counters; weights (n,) int64 is 1, or 0 for padding."""
        logits = split_outputs(outputs)[0].float()
        loss = F.cross_entropy(logits, labels, reduction="none").clamp(max=LARGEST_LOSS)
        loss = loss.nan_to_num(nan=LARGEST_LOSS)
        # The rank of the true class, ties by class number; the same for every batch shape.
        true = logits.gather(1, labels[:, None])
        tied_before = (logits == true) & (self._classes(logits) < labels[:, None])
        before = ((logits > true) | tied_before).sum(1)
        broken = logits.isnan().any(1)  # an answer that is no number is wrong everywhere
        rank = torch.where(broken, self.num_classes, before)
        predicted = torch.where(broken, (labels + 1) % self.num_classes, logits.argmax(1))
        units = (loss / LOSS_UNIT).round().long()
        found = torch.stack([units, rank == 0, rank < 5, weights]) * weights
        counts[:4].add_(found.sum(1))
        if self.num_classes > MOST:
            counts[4:].scatter_add_(0, labels, weights)
            counts[4 + self.num_classes :].scatter_add_(0, predicted, weights)
            return
        cells = torch.add(predicted, labels, alpha=self.num_classes)
        counts[4:].scatter_add_(0, cells, weights)

    def _classes(self, logits: Tensor) -> Tensor:
        return torch.arange(logits.shape[1], device=logits.device)[None]

    def metrics(self, counts: Tensor) -> dict:
        """Counters of all processes together -> metrics, per-class accuracy and the matrix."""
        loss, top1, top5, images = counts[:4].tolist()
        found: dict = {}
        if self.num_classes > MOST:
            there, answers = counts[4:].view(2, self.num_classes).tolist()
            found["per_class"] = {"images": there, "answers": answers}
        elif self.num_classes > WHOLE:
            cells = counts[4:].nonzero().flatten()
            found["confusion"] = {
                "classes": self.num_classes, "cells": cells.tolist(),
                "counts": counts[4:][cells].tolist(),
            }  # fmt: skip
        else:  # rows: true class
            found["confusion"] = counts[4:].view(self.num_classes, self.num_classes).tolist()
        return {
            "loss": loss * LOSS_UNIT / images,
            "accuracy": top1 / images,
            "top5": top5 / images,
            "images": images,
            **found,
        }

    def better(self, new: float, old: float | None) -> bool:
        return old is None or new > old

    def doubts(self, metrics: dict, classes: list[str]) -> dict[str, str]:
        """What looks wrong in an evaluation: a word for each doubt -> a sentence with a way out."""
        there, answered = _totals(metrics)
        shares, answers = there / there.sum(), answered / there.sum()
        guessing = float(-(shares * shares.clamp(min=1e-12).log()).sum())  # ln(10) for ten alike
        loss, most, found = metrics["loss"], int(answers.argmax()), {}
        if guessing < 0.1:  # hardly more than one class: nothing can be told
            return found
        if loss > 10 * guessing:
            found["explodes"] = (
                f"the test loss is {loss:.4g}, where guessing costs {guessing:.2f}: the steps are "
                "too large (try a tenth of the --lr), or batch norm has seen too few batches; see "
                "question 13 in docs/lessons.md"
            )
        elif loss > 0.95 * guessing and metrics["accuracy"] < float(shares.max()) + 0.05:
            found["guesses"] = (
                f"the test loss {loss:.4f} is what guessing costs ({guessing:.4f}), and "
                f"{metrics['accuracy']:.1%} right is hardly more than {float(shares.max()):.1%}, "
                f"which always answering {classes[int(shares.argmax())]} gives: the model knows "
                "nothing of the test images; see question 14 in docs/lessons.md"
            )
        if answers[most] > 0.9 and answers[most] - shares[most] > 0.1:
            found["one class"] = (
                f"{answers[most]:.0%} of the answers are class {classes[most]}, the label of "
                f"{shares[most]:.0%} of the test images; see question 3 in docs/lessons.md"
            )
        if pair := _taken_for_each_other(metrics):
            one, other = (classes[index] for index in pair)
            found["mirror"] = (
                f"{one} and {other} are taken for each other, and for no other class: if one is "
                "the mirror image of the other (left and right), type --augment none, for "
                "--augment mirrors training images"
            )
        return found


def _taken_for_each_other(metrics: dict) -> tuple[int, int] | None:
    """Two classes that a model tells from all others, but not from each other."""
    matrix = metrics.get("confusion")
    if not isinstance(matrix, list):
        return None
    for one, row in enumerate(matrix):
        for other in range(one):
            mine, theirs = row, matrix[other]
            both = sum(mine) + sum(theirs)
            swapped, right = mine[other] + theirs[one], mine[one] + theirs[other]
            each = min(mine[other] / max(1, sum(mine)), theirs[one] / max(1, sum(theirs)))
            if both >= 20 and each > 0.3 and swapped + right > 0.8 * both:
                return other, one
    return None


def _totals(metrics: dict) -> tuple[Tensor, Tensor]:
    """How many images there are of each class, and how many were taken for it."""
    if "per_class" in metrics:
        totals = metrics["per_class"]
        there, answered = (torch.tensor(totals[key]).double() for key in ("images", "answers"))
        return there, answered
    confusion = metrics["confusion"]
    if isinstance(confusion, list):
        matrix = torch.tensor(confusion, dtype=torch.float64)
        return matrix.sum(1), matrix.sum(0)
    size = confusion["classes"]
    cells, counts = torch.tensor(confusion["cells"]), torch.tensor(confusion["counts"]).double()
    there = torch.bincount(cells // size, counts, size)
    return there, torch.bincount(cells % size, counts, size)


class Regression:
    """Mean squared error and R2, from exact sums in units of 2**-20."""

    name = "regression"
    best_is = "loss"
    num_classes = 1

    def loss(self, outputs, targets: Tensor) -> Tensor:
        """Squared error summed over the samples; a shape that would broadcast is an error."""
        predictions = split_outputs(outputs)[0]
        if predictions.shape != targets.shape:
            raise ValueError(
                f"the model answers {tuple(predictions.shape)} where the targets are "
                f"{tuple(targets.shape)}; a difference of the two would broadcast to something else"
            )
        return F.mse_loss(predictions.float(), targets, reduction="sum")

    def new_counts(self, device) -> Tensor:
        return torch.zeros(4, dtype=torch.int64, device=device)

    def count(self, counts: Tensor, outputs, targets: Tensor, weights: Tensor) -> None:
        predictions = split_outputs(outputs)[0].float()
        if predictions.shape != targets.shape:
            self.loss(outputs, targets)
        squares = ((predictions - targets) ** 2).sum(1).clamp(max=LARGEST_LOSS)
        values = (squares.nan_to_num(nan=LARGEST_LOSS), targets.sum(1), (targets**2).sum(1))
        units = (torch.stack(values) / LOSS_UNIT).round().long() * weights
        counts[:3].add_(units.sum(1))
        counts[3].add_(weights.sum())

    def metrics(self, counts: Tensor) -> dict:
        squares, total, total_squares = (x * LOSS_UNIT for x in counts[:3].tolist())
        images = int(counts[3])
        spread = total_squares - total**2 / images
        return {
            "loss": squares / images,
            "r2": 1 - squares / spread if spread > 0 else 0.0,
            "images": images,
        }

    def better(self, new: float, old: float | None) -> bool:
        return old is None or new < old

    def doubts(self, metrics: dict, classes: list[str]) -> dict[str, str]:
        return {}


def build_task(name: str, num_classes: int, label_smoothing: float, model: nn.Module):
    if name == "regression":
        return Regression()
    return Classification(num_classes, label_smoothing, getattr(model, "auxiliary_weight", 0.3))
