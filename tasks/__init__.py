"""What a batch means: one file per task, and one table of them."""

from torch import nn

from models.hooks import WeighsAuxiliaryHeads
from tasks.classification import Classification, balanced_accuracy, never_found
from tasks.losses import Criterion
from tasks.multilabel import Multilabel
from tasks.regression import Regression
from tasks.task import LARGEST_LOSS, LOSS_UNIT, Outputs, Task, split_outputs

__all__ = [
    "LARGEST_LOSS", "LOSS_UNIT", "TASKS", "Classification", "Multilabel", "Outputs",
    "Regression", "Task", "balanced_accuracy", "build_task", "never_found",
    "split_outputs",
]  # fmt: skip

TASKS: dict[str, type[Task]] = {t.name: t for t in (Classification, Multilabel, Regression)}


def build_task(
    name: str, num_classes: int, label_smoothing: float, model: nn.Module,
    criterion: Criterion | None = None, threshold: float = 0.5,
) -> Task:  # fmt: skip
    """The task of this name; the model may weigh its auxiliary heads itself."""
    auxiliary = model.auxiliary_weight if isinstance(model, WeighsAuxiliaryHeads) else 0.3
    return TASKS[name](num_classes, label_smoothing, auxiliary, criterion, threshold)
