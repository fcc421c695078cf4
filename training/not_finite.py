"""What is said where a loss or a gradient is no finite number any more."""

from pathlib import Path

from common.disk import write_json
from common.errors import NumbersGoneBad
from training.data import Data
from training.learner import Learner
from training.schedule import Schedule


def refuse_not_finite(
    learner: Learner, data: Data, schedule: Schedule, folder: Path | None
) -> None:
    """Raise NumbersGoneBad where an update could not be made; one host wait, on all processes.

    The images of that update are named in `folder`, which the main process has.
    """
    found = learner.not_finite()
    if found is None:
        return
    indices = data.indices(*schedule.place(found.step))
    rate = schedule.lr(found.step)
    if schedule.shape == "plateau":  # how often it fell nobody told us: the rate of the last update
        rate = learner.optimizer.param_groups[0]["lr"]
    half = ", or --mixed-precision bf16" * (learner.config.mixed_precision == "fp16")
    where = f"in the loss on rank {found.ranks}" if found.ranks else "in the gradient"
    if folder is not None:
        (folder / "crash").mkdir(exist_ok=True)
        facts = {"step": found.step, "ranks": found.ranks, "indices": indices}
        write_json(folder / "crash" / "nonfinite.json", facts)
    raise NumbersGoneBad(
        f"{learner.shards.bad_number} appeared {where} at step {found.step} "
        f"(learning rate {rate:.3g}, samples {indices[:8]}...); the weights "
        f"before it are kept. Try a lower --lr or --grad-clip 1{half}"
    )
