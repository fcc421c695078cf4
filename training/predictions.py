"""predictions.csv: what the best weights answer to each picture that they were evaluated on."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from common.disk import write_csv
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
    table: list[tuple[str, ...]] = [HEAD]
    for split, given in answers.items():
        rows = _known(data, split, len(given))
        told = task.answered(given, data.classes)
        table += [(*row, *answer) for row, answer in zip(rows, told, strict=True)]
    write_csv(path, table)


def keep_predictions(
    folder: Path, answers: dict[str, Tensor], task: Task, data: Data, warn: Callable[[str], None]
) -> None:
    """predictions.csv beside the best weights; a disk that does not take it is told."""
    try:
        write_predictions(folder / PREDICTIONS, answers, task, data)
    except OSError as error:
        warn(f"{PREDICTIONS} cannot be written ({error})")


def _known(data: Data, split: str, count: int) -> list[tuple[str, str, str]]:
    """(name, split, class) of the first so many pictures of a split, or of numbers their target."""
    places = data.places[split][:count]
    if rows := rows_of(data.source, {split: places}):
        return rows
    labels = (data.source.test if split == "test" else data.source.train).labels[places]
    words = [f"{value:.6g}" for value in labels.flatten().tolist()]
    if data.classes:
        words = labels_in_words(labels, data.classes)
    return [(str(n), split, word) for n, word in zip(places.tolist(), words, strict=True)]
