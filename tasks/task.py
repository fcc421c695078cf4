"""What every task is: a loss, counters that an evaluation fills, and what they come to."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from common.confusion import totals
from common.metric import Metric
from common.text import counted
from tasks.losses import Criterion

# Losses are counted in units of 2**-20, so that their sum is an integer: the same total in every
# order of addition, hence on every number of processes.
LOSS_UNIT = 2**-20
LARGEST_LOSS = 2.0**20
SURE = 2**20  # how sure a class is, where that is a whole number of parts

Outputs = Tensor | tuple | list | dict  # what a model answers, with its auxiliary heads if any
MOST_EXAMPLES = 32  # mistakes in all; of a class not so many, where there are several


class Answers(NamedTuple):
    """What a model answers to a batch, (n,): classes and how sure it is of them, 0 to SURE.

    Numbers, and nothing; where a picture has any number of classes (n, classes): whether it has
    each, and how sure, 0 to 1.
    """

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


def not_found(results: dict, classes: Sequence[str]) -> list[str]:
    """`ant (3 images)` for each class of which nothing is found."""
    images, _, right = totals(results)
    each = zip(classes, images, right, strict=False)  # nothing is known after a damage
    return [f"{name} ({counted(n, 'image')})" for name, n, found in each if n and not found]


class Task:
    """What is trained for: a loss, counters that an evaluation fills, and what they come to.

    `metrics` declares each number of an evaluation, and nothing else need know it: rows, screen,
    page, plots and the best weights follow. The loss is always among them, as "loss". `best_is` is
    the key of the one that decides which weights are the best, `right_is` that of the one whose
    name the share of right answers has in training, if answers can be right. `class_metrics`
    declares what is told of each class in a table, where a confusion matrix does not: results have
    it as "by_class", a list for each key.
    """

    name: str
    metrics: tuple[Metric, ...]
    best_is: str
    right_is = ""
    class_metrics: tuple[Metric, ...] = ()
    criterion_kind: ClassVar[type[Criterion]] = Criterion

    def __init__(
        self, num_classes: int = 1, label_smoothing: float = 0.0, auxiliary: float = 0.3,
        criterion: Criterion | None = None, threshold: float = 0.5,
    ) -> None:  # fmt: skip
        self.num_classes = num_classes
        self.criterion = criterion or self.criterion_kind(smoothing=label_smoothing)
        self.auxiliary, self.threshold = auxiliary, threshold

    @property
    def best(self) -> Metric:
        """The metric that decides."""
        return next(metric for metric in self.metrics if metric.key == self.best_is)

    @property
    def chosen_by(self) -> str:
        """What two values that decide must share to be compared: see training/best.py."""
        return self.best_is

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """The training loss summed over the images, its auxiliary heads included."""
        logits, extra = split_outputs(outputs)
        loss = self.criterion(logits.float(), labels)
        for head in extra:
            loss = loss + self.auxiliary * self.criterion(head.float(), labels)
        return loss

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

    def keep_examples(
        self, kept: Tensor, answers: Answers, labels: Tensor, indices: Tensor
    ) -> None:
        """Keep what is worth showing of a batch that was counted, without a wait of the host.

        indices (n,) int64 are the samples' numbers, -1 for padding.
        """
        raise NotImplementedError

    def new_answers(self, images: int, device: torch.device) -> Tensor:
        """Room for the answer to each image and one for padding, int64, all zero: none."""
        return torch.zeros(images + 1, 2, dtype=torch.int64, device=device)

    def as_integers(self, answers: Answers) -> Tensor:
        """A batch's answers as rows of `new_answers`, no row all zero."""
        raise NotImplementedError

    def answered(self, answers: Tensor, classes: list[str]) -> list[tuple[str, str]]:
        """Of each row what was answered and how sure it is, as text; "" for an image without."""
        raise NotImplementedError

    def examples(self, kept: Tensor) -> list[dict]:
        """What to show of what all processes kept (processes, ...): the same however many."""
        raise NotImplementedError

    def caption(self, example: dict, label: str, classes: list[str]) -> str:
        """What stands above a picture that is such an example; `label` says what it is."""
        raise NotImplementedError

    def surest(self, logits: Tensor, top: int | None) -> list[tuple[int, float]]:
        """What the logits (classes,) of one picture say: classes and confidences, surest first.

        top: at most so many; None: as many as the task takes for right.
        """
        raise NotImplementedError

    def never_found(self, results: dict, classes: list[str]) -> str:
        """The classes of which nothing is recognised, in a sentence; "" where there are none."""
        return ""

    def doubts(self, results: dict, classes: list[str]) -> dict[str, str]:
        """What looks wrong in an evaluation: a word for each doubt -> a sentence with a way out."""
        return {}
