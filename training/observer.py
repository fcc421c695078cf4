"""Where a measurement may look at a run: nothing in the loop is replaced."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from distributed.checkpoint import Progress
from training.data import Batch, Data
from training.learner import Learner
from training.schedule import Schedule


class Observer:
    """Looks on without a word; what records, times or plants faults is derived from it."""

    def started(self, learner: Learner, data: Data, schedule: Schedule, progress: Progress) -> None:
        """All is built and restored; the first step comes next."""

    def batches(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """The batches of what is left of an epoch: one update of the weights for each."""
        return batches

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around each "row", "save" and "evaluate"."""
        return nullcontext()
