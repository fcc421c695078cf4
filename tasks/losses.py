"""What training minimises where images have classes: a loss of each, and what an image weighs."""

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from models.own_file import is_own_file, load_own_class

FOCUS = 2.0  # focal loss's gamma where nobody says another, as Lin et al. (ICCV 2017) chose it
# What an image weighs is a whole number of these: the sum over a batch is the same in any order of
# addition, hence on any number of processes.
WEIGHT_UNIT = 2**-20
MOST_NAMED = 12  # classes whose weights the start panel lists


class Criterion(nn.Module):
    """A training loss summed over images, each of which weighs what its class does.

    Labels are (n,) int64, -100 for an image that does not count, or soft (n, classes), as mixup
    makes them; a mixed image weighs the mixture of its classes' weights. Label smoothing is
    that of `torch.nn.functional.cross_entropy`, for every loss.
    """

    units: Tensor | None  # (classes,) int64, of WEIGHT_UNIT
    soft = False  # whether labels are a row of numbers for each image, whatever is mixed

    def __init__(
        self, name: str = "cross_entropy", smoothing: float = 0.0, own: nn.Module | None = None,
        weights: Tensor | None = None, focus: float = FOCUS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.focus = focus
        self.name, self.smoothing, self.own = name, smoothing, own
        units = None if weights is None else (weights / WEIGHT_UNIT).round().long().clamp(min=1)
        self.register_buffer("units", units)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The weighted sum, 0-dim."""
        if self.name == "cross_entropy" and self.units is None:
            smoothing = self.smoothing
            return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        each = self._each(logits, labels)
        if self.units is not None:
            each = each * self._weights(labels)
        return each.sum()

    def total(self, labels: Tensor) -> Tensor | None:
        """What images of these labels (n,) weigh together, in whole units; None: 1 each."""
        if self.units is None:
            return None
        labels = labels.to(self.units.device, non_blocking=True)
        return (self.units[labels.clamp(min=0)] * (labels >= 0)).sum()

    def _weights(self, labels: Tensor) -> Tensor:  # (n,)
        assert self.units is not None
        weights = self.units.float() * WEIGHT_UNIT
        if labels.ndim == 2:
            return (labels * weights).sum(1)
        return weights[labels.clamp(min=0)] * (labels >= 0)

    def _each(self, logits: Tensor, labels: Tensor) -> Tensor:  # (n,)
        if self.own is not None:
            return self._own(logits, labels)
        if self.name == "cross_entropy":
            smoothing = self.smoothing
            return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        targets, counts = self._targets(labels, logits.shape[1])
        if self.name == "focal":
            logs = logits.log_softmax(1)
            return -(targets * (1 - logs.exp()) ** self.focus * logs).sum(1) * counts
        each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return each.sum(1) * counts

    def _own(self, logits: Tensor, labels: Tensor) -> Tensor:  # (n,)
        assert self.own is not None
        each = self.own(logits, labels)
        if not isinstance(each, Tensor) or each.shape != (len(logits),):
            shape = tuple(getattr(each, "shape", ())) or type(each).__name__
            raise UserError(
                f"--loss {self.name}: answers {shape} to {len(logits)} images; it must be the "
                f"loss of each, ({len(logits)},), of which sums over shards can be made: "
                'without .mean(), or with reduction="none"',
                code="loss-not-per-image",
            )
        return each.float()

    def _targets(self, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Soft labels (n, classes), smoothed, and which images count (n,)."""
        if labels.ndim == 1:
            labels = (labels[:, None] == torch.arange(classes, device=labels.device)).float()
        counts = labels.sum(1) > 0
        if self.smoothing:
            labels = labels * (1 - self.smoothing) + self.smoothing / classes
        return labels, counts

    def in_words(self, classes: list[str]) -> list[tuple[str, str]]:
        """Rows of the start panel: the loss where it is not the usual one, and the weights."""
        rows = [("loss", self.name)] if self.name != "cross_entropy" else []
        if self.units is not None:
            weights = (self.units.double() * WEIGHT_UNIT).tolist()
            named = [f"{name} ({w:.3g})" for name, w in zip(classes, weights, strict=True)]
            low, high = (named[weights.index(of(weights))] for of in (min, max))
            shown = f"{', '.join(named)}; " if len(named) <= MOST_NAMED else ""
            rows.append(("class weights", f"{shown}smallest {low}, largest {high}"))
        return rows


class Binary(Criterion):
    """The same of pictures that have any number of classes: a yes or no for each, summed.

    Labels are multi-hot (n, classes), 0 or 1, between them where two pictures are mixed, below 0
    for a picture that does not count. A smoothed yes is 1 - smoothing / 2, a no smoothing / 2.
    """

    soft = True

    def __init__(
        self, name: str = "bce", smoothing: float = 0.0, own: nn.Module | None = None,
        weights: Tensor | None = None, focus: float = FOCUS,
    ) -> None:  # fmt: skip
        super().__init__("bce" if name == "cross_entropy" else name, smoothing, own, weights, focus)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over the pictures, 0-dim."""
        counts = (labels >= 0).all(1)
        targets = labels.clamp(min=0).float()
        if self.own is not None:
            return (self._own(logits, targets) * counts).sum()
        targets = targets * (1 - self.smoothing) + self.smoothing / 2
        each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        if self.name == "focal":
            chances = logits.sigmoid()
            focus = self.focus
            wrong = targets * (1 - chances) ** focus, (1 - targets) * chances**focus
            each = -(wrong[0] * F.logsigmoid(logits) + wrong[1] * F.logsigmoid(-logits))
        return (each.sum(1) * counts).sum()


def class_weights(asked: str, labels: Tensor, classes: list[str]) -> Tensor | None:
    """(classes,) float64, such that a training image weighs 1 on average; None: all weigh 1.

    `balanced` gives every class the same sum over the training images. The common factor changes
    no update, as a step's loss is divided by the weights of its images; it keeps the loss of a row
    comparable.
    """
    if asked == "none":
        return None
    counts = torch.bincount(labels.cpu(), minlength=len(classes)).double()
    if asked == "balanced":
        weights = 1 / counts.clamp(min=1)
    else:
        given = [float(word) for word in asked.split(",")]
        if len(given) != len(classes):
            few = ", ".join(classes[:MOST_NAMED]) + ", ..." * (len(classes) > MOST_NAMED)
            raise UserError(
                f"--class-weights {asked}: {len(given)} numbers for {len(classes)} classes; give "
                f"one for each, in this order: {few}; or balanced",
                code="class-weights",
            )
        weights = torch.tensor(given, dtype=torch.float64)
    return weights * counts.sum() / (weights * counts).sum()


def build_criterion(
    name: str, smoothing: float, num_classes: int, weights: Tensor | None, mixes: bool,
    kind: type[Criterion] = Criterion, focus: float = FOCUS,
) -> Criterion:  # fmt: skip
    """The training loss of this name; a FILE.py:Class is tried on labels as training has them."""
    if not is_own_file(name):
        return kind(name, smoothing, weights=weights, focus=focus)
    made = load_own_class(name, "--loss")
    known = {"num_classes": num_classes}
    takes = inspect.signature(made).parameters
    try:
        own = made(**{key: value for key, value in known.items() if key in takes})
        criterion = kind(name, own=own, weights=weights)
        labels = torch.arange(2) % num_classes
        soft = F.one_hot(labels, num_classes).float()
        for target in (labels, soft)[kind.soft : 1 + (mixes or kind.soft)]:
            criterion(torch.zeros(2, num_classes), target)
    except UserError:
        raise
    except Exception as error:  # whatever a learner's code may raise
        kinds = "labels (2,) and, for --mixup or --cutmix, (2, classes)" if mixes else "labels (2,)"
        kinds = "labels (2, classes), 0 or 1" if kind.soft else kinds
        raise UserError(
            f"--loss {name}: fails: {type(error).__name__}: {error}; it is made with num_classes "
            f"where it takes that, and called with logits (2, {num_classes}) and {kinds}",
            code="loss-fails",
        ) from error
    if any(True for _ in own.parameters()):
        raise UserError(
            f"--loss {name}: has parameters of its own, which nobody would train; make them part "
            "of the model",
            code="loss-has-parameters",
        )
    return criterion
