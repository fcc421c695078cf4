"""predictions.csv: what the best weights answer to each picture that they were evaluated on."""

import csv
import io
from pathlib import Path

from torch import Tensor

from common.disk import write_text
from common.text import printable
from data.image_set import labels_in_words
from data.splits import names_of
from tasks import Task
from training.data import Data

PREDICTIONS = "predictions.csv"  # in a run folder
HEAD = ("name", "split", "class", "predicted", "confidence")


def take_answers(results: dict[str, dict]) -> dict[str, Tensor]:
    """The answers of an evaluation to each image, by split, out of its results: these are kept."""
    return {split: found.pop("answers") for split, found in results.items()}


def write_predictions(path: Path, answers: dict[str, Tensor], task: Task, data: Data) -> None:
    """Write a row for each picture of each split, in the order of the data. Raises OSError.

    `answers` are those of an evaluation, by split: Evaluation.results. A picture without a name
    has its number; one that could not be decoded has no answer.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(HEAD)
    for split, given in answers.items():
        side = "test" if split == "test" else "train"
        names, places = names_of(data.source, side), data.places[split][: len(given)]
        labels = getattr(data.source, side).labels[places]
        if data.source.classes:
            words = labels_in_words(labels, data.source.classes)
        else:
            words = [f"{value:.6g}" for value in labels.flatten().tolist()]
        for place, word, answer in zip(
            places.tolist(), words, task.answered(given, data.classes), strict=True
        ):
            name = printable(names[place]) if names else str(place)
            table.writerow((name, split, word, *answer))
    write_text(path, text.getvalue())
