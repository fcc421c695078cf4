"""predictions.csv: what the best weights answer to each picture that they were evaluated on."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from common.disk import csv_text, write_text
from data.image_set import labels_in_words
from data.splits import rows_of
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
    lines, fields = [csv_text([HEAD])], Fields()  # the heads of rows stay the same: made once
    for split, given in answers.items():
        if split not in data.row_heads:
            data.row_heads[split] = _known(data, split, len(given))
        found = task.answered(given, data.classes)
        rows = zip(data.row_heads[split], found, strict=True)
        lines += [f"{row}{fields[answer]},{sure}\n" for row, (answer, sure) in rows]
    write_text(path, "".join(lines))


class Fields(dict[str, str]):
    """Texts as fields of a CSV table: classes repeat."""

    def __missing__(self, text: str) -> str:
        self[text] = found = csv_text([["", text]])[1:-1]
        return found


def keep_predictions(
    folder: Path, answers: dict[str, Tensor], task: Task, data: Data, warn: Callable[[str], None]
) -> None:
    """predictions.csv beside the best weights; a disk that does not take it is told."""
    try:
        write_predictions(folder / PREDICTIONS, answers, task, data)
    except OSError as error:
        warn(f"{PREDICTIONS} cannot be written ({error})")


def _known(data: Data, split: str, count: int) -> list[str]:
    """Name, split and class, or target, of the first so many pictures, as a row begins in CSV."""
    places = data.places[split][:count]
    rows = rows_of(data.source, {split: places})
    if not rows:
        labels = (data.source.test if split == "test" else data.source.train).labels[places]
        words = [f"{value:.6g}" for value in labels.flatten().tolist()]
        if data.classes:
            words = labels_in_words(labels, data.classes)
        numbers = places.tolist()
        rows = [(str(n), split, word) for n, word in zip(numbers, words, strict=True)]
    return [csv_text([(*row, "")])[:-1] for row in rows]
