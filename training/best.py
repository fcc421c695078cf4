"""The best so far belongs to what it was measured on: other terms, and it is measured again."""

from collections.abc import Callable
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.disk import digest
from common.errors import UserError
from distributed.checkpoint import Progress, card_of, copy_state
from distributed.world import World
from tasks import Task
from training.checkpoints import Checkpoints
from training.data import Data
from training.learner import Learner
from training.predictions import keep_predictions, take_answers

Found = TypeVar("Found")
# What decides the pixels that an evaluation sees; no resumed run changes them unasked.
VIEW = (
    "image_size", "eval_size", "eval_resize", "resize", "interpolation", "normalize", "decode",
)  # fmt: skip
Evaluate = Callable[[Learner, Data, World, Progress], dict[str, dict] | None]


def terms(checkpoints: Checkpoints, data: Data, task: Task) -> dict:
    """What two values of a metric must share to be compared."""
    config = checkpoints.plan.config
    held_out = f" {config.val_fraction} {config.seed}" if data.chosen_on == "val" else ""
    return {
        "data": checkpoints.facts["data"],
        "set of pictures": digest("\n".join(data.excluded_from_evaluation())),
        "classes": digest("\n".join(data.classes)),
        "split": data.chosen_on + held_out,
        "limit": config.limit,
        "tta": config.tta,
        "metric": task.chosen_by,
        "threshold": config.threshold,
        "view": " ".join(str(getattr(config, name)) for name in VIEW),
    }


def keep_best_comparable(
    checkpoints: Checkpoints, learner: Learner, data: Data, world: World, progress: Progress,
    evaluate: Evaluate, warn: Callable[[str], None],
) -> None:  # fmt: skip
    """Evaluate the best weights again where data, split, limit, TTA or metric are others now.

    So too where the file of the best weights is not of the best step, which a full disk did not
    take. The best is dropped where there are no weights to evaluate or their classes are others.
    """
    now = terms(checkpoints, data, learner.task)
    before = progress.best_of or now
    progress.best_of = now
    other_part = before.get("split", now["split"]) != now["split"]
    if progress.step and other_part and data.chosen_on == "val":
        warn(
            "validation images were trained on before this life: what they measure flatters, and "
            "chooses by it; a new run with the same --val-fraction measures what it has not seen"
        )
    if progress.best is None:
        return
    assert checkpoints.folder is not None  # a run that has a best keeps it
    path = checkpoints.folder / "model.safetensors"
    card = world.main_decides(lambda: card_of(path))
    other = [name for name, value in now.items() if before.get(name, value) != value]
    step = card.get("step", 0)
    # A later step's are those of a life that was killed before it could save: they come again.
    if not other and (step == progress.best_step or step > progress.step):
        return
    old, why = f"the best so far ({progress.best:.4f}, step {progress.best_step})", ""
    if "classes" in other and card.get("classes") != data.classes:
        why = "its classes are others"
    elif not step:
        why = "its weights are gone"
    else:
        try:
            weights = load_file(path)
            results = with_weights(weights, learner, data, world, progress, evaluate)
        except (UserError, OSError, SafetensorError) as error:
            why = str(error)
        else:
            if results is None:  # told to stop: the next life does it
                progress.best_of = before
                return
            answers = take_answers(results)
            progress.best = results[data.chosen_on][learner.task.best_is]
            progress.best_step, progress.best_metrics = step, results["test"]
            epoch = (step + progress.ahead) / progress.steps_per_epoch
            progress.best_epoch = int(epoch) if epoch.is_integer() else round(epoch, 3)
            if world.is_main:
                keep_predictions(checkpoints.folder, answers, learner.task, data, warn)
                # What predicts with them sees what they were measured on, and draws the same line.
                if problem := checkpoints.write_weights(path.name, weights, {"step": step}):
                    warn(problem)
    if why:
        progress.best, progress.best_metrics, progress.best_step = None, {}, 0
        progress.best_epoch = 0
        warn(f"{old} is dropped: {why}")
    elif other:
        warn(f"{old} was measured on another {', '.join(other)}: now it is {progress.best:.4f}")
    else:
        warn(f"{old} is not on the disk; the best there is of step {step}: {progress.best:.4f}")


def with_weights(
    tensors: dict[str, torch.Tensor], learner: Learner, data: Data, world: World,
    progress: Progress, evaluate: Callable[[Learner, Data, World, Progress], Found],
) -> Found:  # fmt: skip
    """What other weights come to; the learner has its own, and its average, again afterwards."""
    average, learner.average = learner.average, None
    own = {k: v.clone() for k, v in learner.bare.state_dict().items()}
    try:
        copy_state(learner.bare, tensors, "model")
        return evaluate(learner, data, world, progress)
    finally:
        copy_state(learner.bare, own, "model")
        learner.average = average
