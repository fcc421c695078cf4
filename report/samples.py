"""Pictures of what a model was given and what it was most wrongly sure of."""

from pathlib import Path

import torch
from torch import nn

from common.text import percent, printable
from data.loaders import EVALUATION_BATCH
from distributed.checkpoint import Progress
from report import pictures
from tasks import dense
from training.data import Data
from training.learner import Learner


@torch.no_grad()
def draw_pictures(
    rows: list[dict], learner: Learner, data: Data, progress: Progress, folder: Path
) -> None:
    """curves.png, confusion.png, mistakes.png and samples.png, or line.png for a regression.

    The main process alone is here: no call in which it would wait for the others.
    """
    if not rows:
        return
    pictures.curves(rows, folder / "curves.png")
    model = learner.kept_model.eval()
    if data.source.task == "regression":
        inputs = data.test.images.to(learner.device)
        labels, answers = data.test.labels.flatten().cpu(), model(inputs).flatten().cpu()
        pictures.line_fit(inputs.flatten().cpu(), labels, answers, folder / "line.png")
        return
    classes = [printable(name) for name in data.classes]
    if "confusion" in progress.best_metrics:
        matrix = dense(progress.best_metrics["confusion"])
        pictures.confusion(matrix, classes, folder / "confusion.png")
    first = torch.arange(min(32, len(data.train)))
    images = data.augment.train(data.train.images[first], first, 0).float().cpu()
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.source.mean, data.source.std))
    shown = ((images * std + mean) * 255).clamp(0, 255).byte()
    names = [classes[label] for label in data.train.labels[first].tolist()]
    pictures.sheet(shown, names, folder / "samples.png")
    draw_mistakes(learner, model, data, classes, folder / "mistakes.png")


def draw_mistakes(
    learner: Learner, model: nn.Module, data: Data, classes: list[str], path: Path
) -> None:
    """The test images (of the first thousand) that the model is most wrongly sure of."""
    test, wrong = data.test, []
    for indices in torch.arange(min(1000, len(test))).split(EVALUATION_BATCH):
        batch = test.__getitems__(indices)
        images = learner.inputs(data.augment.evaluate(batch["images"]))
        with learner.accelerator.autocast():
            logits = model(images)
        sure, guess = logits.float().softmax(1).cpu().max(1)
        labels = batch["labels"].cpu()
        for place in (guess != labels).nonzero().flatten().tolist():
            words = f"{classes[labels[place]]}\nas {classes[guess[place]]} {percent(sure[place])}"
            wrong.append((float(sure[place]), int(indices[place]), words))
    worst = sorted(wrong, reverse=True)[:32]
    if worst:
        images = test.images[torch.tensor([index for _, index, _ in worst])].cpu()
        pictures.sheet(images, [words for _, _, words in worst], path)
