"""What a fold's best weights answer to the pictures that they never saw."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.disk import whole
from distributed.checkpoint import Progress
from distributed.world import World
from training.best import with_weights
from training.data import Data
from training.learner import Learner

BEST = "model.safetensors"
FILE = "out_of_fold.safetensors"  # of a run with --fold: rows in the order of split.csv's tests


def write_out_of_fold(
    folder: Path, learner: Learner, data: Data, world: World, progress: Progress
) -> bool:
    """Probabilities (n, classes) float32 and labels (n,) of the test pictures, into the run.

    A picture that could not be decoded has no numbers (NaN). All processes take part; nothing is
    written where there are no best weights, nor where the run was told to stop meanwhile: False
    then, and the next life does it.
    """
    if data.source.task != "classification" or not world.main_decides((folder / BEST).is_file):
        return True
    weights = world.all_or_none(lambda: load_file(folder / BEST))
    found = with_weights(weights, learner, data, world, progress, _probabilities)
    if found is not None and world.is_main:
        with whole(folder / FILE) as partial:
            save_file(found, partial)
    return found is not None


@torch.no_grad()
def _probabilities(
    learner: Learner, data: Data, world: World, progress: Progress
) -> dict[str, Tensor] | None:
    world.phase("evaluate", progress.step, new_beats=True)
    model, augment = learner.evaluated_model(data).eval(), data.augment
    mine = []
    for batch in learner.seeded(world.beating(data.evaluation("test"), progress, "fold")):
        images = augment.evaluate(batch["images"])
        with world.accelerator.autocast():
            logits = augment.vote(lambda view: learner.logits(model, view), images)
        counts = batch["weights"].bool().cpu()
        mine.append((batch["indices"].cpu()[counts], logits.float().softmax(1).cpu()[counts]))
    if world.stop.reason:
        return None
    found = torch.full((len(data.test), data.num_outputs), torch.nan)
    for part in world.everyones(mine):
        for indices, answers in part:
            found[indices] = answers
    return {"probabilities": found, "labels": data.test.labels.cpu().contiguous()}
