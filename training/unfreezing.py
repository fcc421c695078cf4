"""At an epoch's start more of the model becomes trainable: --unfreeze."""

from collections.abc import Callable

from distributed.checkpoint import Progress
from training.data import Data
from training.learner import Learner
from training.schedule import Schedule
from training.start import settle_buckets


def unfreeze(
    learner: Learner, data: Data, schedule: Schedule, progress: Progress,
    tell: Callable[[str], None],
) -> None:  # fmt: skip
    """What --unfreeze lets train from this epoch on begins to, and is told. All take part."""
    epoch = schedule.place(progress.step)[0]
    if begin := learner.unfreeze(epoch):
        settle_buckets(learner, data)  # of a DDP that is as new as at a start
        what = next(s.what for s in reversed(learner.frozen.stages) if s.epoch <= epoch)
        tell(f"from epoch {epoch + 1} on {begin:,} more parameters train ({what})")
