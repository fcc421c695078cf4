"""What a batch means: loss and metrics of classification and of regression."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scores
from common.confusion import MOST, WHOLE, precisions, totals
from common.metric import Metric
from common.text import counted
from losses import Criterion
from models.hooks import WeighsAuxiliaryHeads

# Losses are counted in units of 2**-20, so that their sum is an integer: the same total in every
# order of addition, hence on every number of processes.
LOSS_UNIT = 2**-20
LARGEST_LOSS = 2.0**20

Outputs = Tensor | tuple | list | dict  # what a model answers, with its auxiliary heads if any
MOST_EXAMPLES = 32  # mistakes in all; of a class not so many, where there are several
MOST_POINTS = 200  # answers of a regression that are kept


class Answers(NamedTuple):
    """What a model answers to a batch, (n,): classes or numbers, and how sure it is, 0 to 1."""

    given: Tensor
    sure: Tensor


def split_outputs(outputs: Outputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A model's answer as (logits, auxiliary logits): some models have extra heads in training.

    A dict or an object may hold the logits under that name, as Hugging Face's classifiers answer.
    """
    if isinstance(outputs, dict):
        outputs = outputs.get("logits", outputs)
    outputs = getattr(outputs, "logits", outputs)
    if isinstance(outputs, tuple | list):
        return outputs[0], tuple(o for o in outputs[1:] if o is not None)
    return cast(Tensor, outputs), ()


def balanced_accuracy(results: dict) -> float:
    """The mean over the classes of the share that is found; classes without images do not count."""
    images, _, right = totals(results)
    shares = [found / count for found, count in zip(right, images, strict=True) if count]
    return sum(shares) / max(1, len(shares))


def never_found(results: dict, classes: Sequence[str]) -> str:
    """The classes of which no image is recognised, in a sentence; "" where there are none."""
    images, _, right = totals(results)
    each = zip(classes, images, right, strict=False)  # nothing is known after a damage
    missed = [f"{name} ({counted(n, 'image')})" for name, n, found in each if n and not found]
    if not missed:
        return ""
    more = f" and {len(missed) - 5} more" if len(missed) > 5 else ""
    return (
        f"the best weights find none of class {', '.join(missed[:5])}{more}; --select "
        "balanced_accuracy chooses weights by the mean over the classes"
    )


class Task:
    """What is trained for: a loss, counters that an evaluation fills, and what they come to.

    `metrics` declares each number of an evaluation, and nothing else need know it: rows, screen,
    page, plots and the best weights follow. The loss is always among them, as "loss". `best_is` is
    the key of the one that decides which weights are the best, `right_is` that of the one whose
    name the share of right answers has in training, if answers can be right.
    """

    name: str
    metrics: tuple[Metric, ...]
    best_is: str
    right_is = ""

    def __init__(
        self, num_classes: int = 1, label_smoothing: float = 0.0, auxiliary: float = 0.3,
        criterion: Criterion | None = None,
    ) -> None:  # fmt: skip
        self.num_classes = num_classes
        self.criterion = criterion or Criterion(smoothing=label_smoothing)
        self.auxiliary = auxiliary

    @property
    def best(self) -> Metric:
        """The metric that decides."""
        return next(metric for metric in self.metrics if metric.key == self.best_is)

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """The training loss summed over the batch."""
        raise NotImplementedError

    def weight(self, labels: Tensor) -> Tensor | None:
        """What samples weigh together in the loss, in units of WEIGHT_UNIT; None: 1 each."""
        return None

    def right(self, outputs: Outputs, labels: Tensor) -> Tensor | int:
        """How many answers of a training batch are right; on the device, read with a row."""
        return 0

    def new_counts(self, device: torch.device) -> Tensor:
        """Integer counters, all zero, which processes may add up in any order."""
        raise NotImplementedError

    def count(self, counts: Tensor, outputs: Outputs, labels: Tensor, weights: Tensor) -> Answers:
        """Add a batch to the counters; weights (n,) int64 is 1, or 0 for padding."""
        raise NotImplementedError

    def results(self, counts: Tensor) -> dict:
        """Counters of all processes together -> a float for each metric, "images", and more."""
        raise NotImplementedError

    def new_examples(self, device: torch.device) -> Tensor:
        """What an evaluation keeps to be shown, int64, all zero: no larger for more images."""
        raise NotImplementedError

    def keep(self, kept: Tensor, answers: Answers, labels: Tensor, indices: Tensor) -> None:
        """Keep what is worth showing of a batch that was counted, without a wait of the host.

        indices (n,) int64 are the samples' numbers, -1 for padding.
        """
        raise NotImplementedError

    def examples(self, kept: Tensor) -> list[dict]:
        """What to show of what all processes kept (processes, ...): the same however many."""
        raise NotImplementedError

    def doubts(self, results: dict, classes: list[str]) -> dict[str, str]:
        """What looks wrong in an evaluation: a word for each doubt -> a sentence with a way out."""
        return {}


class Classification(Task):
    """Cross entropy; top-1, top-5 and a confusion matrix as integer counts."""

    name = "classification"
    metrics = (
        Metric(key="loss", title="loss"),
        Metric(
            key="accuracy", title="accuracy", format=".2%", higher_is_better=True,
            shown=("line", "best", "chart"),
        ),
        Metric(
            key="top5", title="top 5", format=".2%", higher_is_better=True, shown=("best", "end")
        ),
        Metric(
            key="balanced_accuracy", title="balanced accuracy", format=".2%",
            higher_is_better=True, shown=("best", "end"),
        ),
        Metric(
            key="macro_precision", title="macro precision", higher_is_better=True, shown=("end",)
        ),
        Metric(key="macro_f1", title="macro F1", higher_is_better=True, shown=("best", "end")),
        Metric(key="auroc", title="AUROC", higher_is_better=True, shown=("best", "end")),
        Metric(key="ece", title="calibration error", shown=("best", "end")),
    )  # fmt: skip
    best_is = right_is = "accuracy"

    def __init__(
        self, num_classes: int = 1, label_smoothing: float = 0.0, auxiliary: float = 0.3,
        criterion: Criterion | None = None,
    ) -> None:  # fmt: skip
        super().__init__(num_classes, label_smoothing, auxiliary, criterion)
        said = {"top5": num_classes >= 5, "auroc": scores.ranks(num_classes)}
        self.metrics = tuple(m for m in type(self).metrics if said.get(m.key, True))

    @property
    def _places(self) -> slice:
        """Those of the counters that tell of each class."""
        cells = self.num_classes if self.num_classes <= MOST else 3
        return slice(4, 4 + self.num_classes * cells)

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """The training loss summed over the images; labels (n,) int64 or soft (n, classes)."""
        logits, extra = split_outputs(outputs)
        loss = self.criterion(logits.float(), labels)
        for head in extra:
            loss = loss + self.auxiliary * self.criterion(head.float(), labels)
        return loss

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
        tied_before = (logits == true) & (self._classes(logits) < labels[:, None])
        before = ((logits > true) | tied_before).sum(1)
        broken = logits.isnan().any(1)  # an answer that is no number is wrong everywhere
        rank = before.masked_fill(broken, self.num_classes)
        predicted = torch.where(broken, (labels + 1) % self.num_classes, logits.argmax(1))
        units = (loss / LOSS_UNIT).round().long()
        found = torch.stack([units, rank == 0, rank < 5, weights]) * weights
        counts[:4].add_(found.sum(1))
        answers = Answers(predicted, chances.gather(1, predicted[:, None])[:, 0].exp())
        scores.count(counts[self._places.stop :], chances, labels, rank == 0, weights)
        if self.num_classes > MOST:
            images, given, right = counts[self._places].view(3, self.num_classes)
            images.scatter_add_(0, labels, weights)
            given.scatter_add_(0, predicted, weights)
            right.scatter_add_(0, labels, weights * (predicted == labels))
            return answers
        cells = torch.add(predicted, labels, alpha=self.num_classes)
        counts[4:].scatter_add_(0, cells, weights)
        return answers

    def _classes(self, logits: Tensor) -> Tensor:
        return torch.arange(logits.shape[1], device=logits.device)[None]

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
        """The surest mistakes, int64 (2, rows, places), see `keep`; 0: none.

        A row for each class, of more than WHOLE classes one row for all: it is no larger for more.
        """
        if self.num_classes > WHOLE:
            return torch.zeros(2, 1, 8 * MOST_EXAMPLES, dtype=torch.int64, device=device)
        places = max(MOST_EXAMPLES // 4, MOST_EXAMPLES // self.num_classes)
        return torch.zeros(2, self.num_classes, places, dtype=torch.int64, device=device)

    def keep(self, kept: Tensor, answers: Answers, labels: Tensor, indices: Tensor) -> None:
        """Of a mistake its key, label and answer; neither batches nor processes decide which.

        The key is how sure it is in units of 2**-20, times 2**32, less its index: no two are equal.
        """
        keys = (answers.sure.nan_to_num(0.0) * 2**20).long() * 2**32 - indices
        keys = keys * ((answers.given != labels) & (indices >= 0))
        rows = torch.arange(kept.shape[1], device=labels.device)[:, None]
        mine = labels == rows if len(rows) == self.num_classes else labels >= rows
        keys = torch.cat([kept[0], keys * mine], 1)
        cells = torch.add(answers.given, labels, alpha=self.num_classes)
        cells = torch.cat([kept[1], cells.expand(kept.shape[1], -1)], 1)
        best, places = keys.topk(kept.shape[2])
        torch.stack([best, cells.gather(1, places)], out=kept)

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
            found["guesses"] = (
                f"the test loss {loss:.4f} is what guessing costs ({guessing:.4f}), and "
                f"{results['accuracy']:.1%} right is hardly more than {float(shares.max()):.1%}, "
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
                "the mirror image of the other (left and right), type --augment none, for "
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


class Regression(Task):
    """Mean squared error and R2, from exact sums in units of 2**-20."""

    name = "regression"
    metrics = (
        Metric(key="loss", title="loss"),
        Metric(key="r2", title="R2", higher_is_better=True),
    )
    best_is = "loss"

    def loss(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Squared error summed over the samples; a shape that would broadcast is an error."""
        predictions = split_outputs(outputs)[0]
        if predictions.shape != targets.shape:
            raise ValueError(
                f"the model answers {tuple(predictions.shape)} where the targets are "
                f"{tuple(targets.shape)}; a difference of the two would broadcast to something else"
            )
        return F.mse_loss(predictions.float(), targets, reduction="sum")

    def new_counts(self, device: torch.device) -> Tensor:
        return torch.zeros(4, dtype=torch.int64, device=device)

    def count(self, counts: Tensor, outputs: Outputs, targets: Tensor, weights: Tensor) -> Answers:
        predictions = split_outputs(outputs)[0].float()
        if predictions.shape != targets.shape:
            self.loss(outputs, targets)
        squares = ((predictions - targets) ** 2).sum(1).clamp(max=LARGEST_LOSS)
        values = (squares.nan_to_num(nan=LARGEST_LOSS), targets.sum(1), (targets**2).sum(1))
        units = (torch.stack(values) / LOSS_UNIT).round().long() * weights
        counts[:3].add_(units.sum(1))
        counts[3].add_(weights.sum())
        return Answers(predictions[:, 0], torch.ones_like(predictions[:, 0]))

    def results(self, counts: Tensor) -> dict:
        squares, total, total_squares = (x * LOSS_UNIT for x in counts[:3].tolist())
        images = int(counts[3])
        spread = total_squares - total**2 / images
        return {
            "loss": squares / images,
            "r2": 1 - squares / spread if spread > 0 else 0.0,
            "images": images,
        }

    def new_examples(self, device: torch.device) -> Tensor:
        """By the sample's index, int64 (MOST_POINTS + 1, 2): its answer's bits, 1 where it is."""
        return torch.zeros(MOST_POINTS + 1, 2, dtype=torch.int64, device=device)

    def keep(self, kept: Tensor, answers: Answers, labels: Tensor, indices: Tensor) -> None:
        shown = (indices >= 0) & (indices < MOST_POINTS)
        places = torch.where(shown, indices, MOST_POINTS)  # the last is for all others
        bits = answers.given.view(torch.int32).long()
        kept.index_copy_(0, places, torch.stack([bits, torch.ones_like(bits)], 1))

    def examples(self, kept: Tensor) -> list[dict]:
        """The answers to the first samples."""
        bits, there = kept.sum(0)[:MOST_POINTS].T  # each is one process's
        answers = bits.int().view(torch.float32)
        return [{"index": int(i), "answer": float(answers[i])} for i in there.nonzero().flatten()]


TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Regression)}


def build_task(
    name: str, num_classes: int, label_smoothing: float, model: nn.Module,
    criterion: Criterion | None = None,
) -> Task:  # fmt: skip
    """The task of this name; the model may weigh its auxiliary heads itself."""
    auxiliary = model.auxiliary_weight if isinstance(model, WeighsAuxiliaryHeads) else 0.3
    return TASKS[name](num_classes, label_smoothing, auxiliary, criterion)
