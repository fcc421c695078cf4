"""Pictures of what a model was given and what it was most wrongly sure of."""

import textwrap
from pathlib import Path

import torch
from torch import Tensor

from common.confusion import dense
from common.text import printable
from data.image_set import labels_in_words
from distributed.checkpoint import Progress
from report import pictures
from tasks import Task
from training.data import Data

MOST_SAMPLES = 32
WIDTH = 24  # characters above a picture


def draw_pictures(
    rows: list[dict], task: Task, data: Data, progress: Progress, folder: Path
) -> None:
    """curves.png, confusion.png, mistakes.png and samples.png, or line.png for a regression.

    The main process alone is here, and asks no model: what the best weights answered is in the
    results of their evaluation. A run whose best is of an older program has no such examples.
    """
    if not rows:
        return
    pictures.curves(rows, task.metrics, folder / "curves.png")
    best = progress.best_metrics
    examples = best.get("examples", [])
    places = torch.tensor([example["index"] for example in examples], dtype=torch.int64)
    if data.source.task == "regression":
        if examples:
            inputs = data.test.seen(places).cpu().flatten()
            targets = data.test.labels.cpu()[places].flatten()
            answers = torch.tensor([example["answer"] for example in examples])
            pictures.line_fit(inputs, targets, answers, folder / "line.png")
        return
    classes = [printable(name) for name in data.classes]
    if "confusion" in best:
        pictures.confusion(dense(best["confusion"]), classes, folder / "confusion.png")
    draw_samples(data, classes, folder / "samples.png")
    if examples:
        images = data.test.seen(places).cpu()
        labels = in_lines(data.test.labels.cpu()[places], classes)
        words = [
            task.caption(example, label, classes)
            for example, label in zip(examples, labels, strict=True)
        ]
        pictures.sheet(images, words, folder / "mistakes.png")


def draw_samples(data: Data, classes: list[str], path: Path) -> None:
    """Training images of each class as the model sees them."""
    labels = data.train.labels.cpu()
    chosen = of_each_class(labels if labels.ndim == 1 else labels.argmax(1), MOST_SAMPLES)
    images = data.train.shown(chosen)
    images = data.augment.train(images, chosen.to(images.device), 0).float().cpu()
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.source.mean, data.source.std))
    shown = ((images * std + mean) * 255).clamp(0, 255).byte()
    shown = shown.expand(-1, 3, -1, -1) if shown.ndim == 4 else shown
    pictures.sheet(shown, in_lines(labels[chosen], classes), path)


def in_lines(labels: Tensor, classes: list[str]) -> list[str]:
    """What pictures are, in lines that fit above them."""
    if labels.ndim == 1:
        return labels_in_words(labels, classes)
    return [textwrap.fill(words, WIDTH) for words in labels_in_words(labels, classes, ", ")]


def of_each_class(labels: Tensor, most: int) -> Tensor:
    """Indices of so many samples: the first of every class before the second of any."""
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    turns = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    return order[turns.argsort(stable=True)[:most]]
