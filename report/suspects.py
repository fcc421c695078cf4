"""Probably wrong labels, by what models answer to pictures that they never saw: suspects.csv.

Confident learning (Northcutt, Jiang, Chuang, 2021): a picture counts for a class where its
probability reaches the mean that the pictures of that label have. One that counts for another class
than it is labelled with is a suspect, the more so the less its own label has.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
from markupsafe import Markup
from safetensors import SafetensorError
from safetensors.numpy import load_file

from common.disk import read_json, write_csv
from common.text import counted, percent, printable
from data.splits import names_of, read_split
from report import pictures
from report.page import PARTS, picture
from training.out_of_fold import FILE

CSV, SHEET = "suspects.csv", "suspects.png"  # in the folder of all folds
HEAD = ("name", "given", "suggested", "score")
TITLE = "Labels to look at"
ROWS = "3,12-15,7=CLASS"  # as an example
MOST_SHOWN, MOST_LISTED = 96, 200  # on the sheet; on the page


@dataclass(frozen=True)
class Suspect:
    """A picture that is probably labelled wrongly; score: 0 surely wrong, 1 surely right."""

    name: str
    given: str
    suggested: str
    score: float


def confident(
    probabilities: numpy.ndarray, labels: numpy.ndarray
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """(places, suggested classes, scores) of suspects, the surest first.

    probabilities (n, classes) of models that did not train on the picture, labels (n,). The score
    is how far the given label's probability is above the highest other one, from -1..1 to 0..1.
    """
    n, classes = probabilities.shape
    own = probabilities[numpy.arange(n), labels]
    sums = numpy.bincount(labels, weights=own, minlength=classes)
    counts = numpy.bincount(labels, minlength=classes)
    thresholds = numpy.where(counts > 0, sums / numpy.maximum(counts, 1), numpy.inf)
    reached = numpy.where(probabilities >= thresholds - 1e-6, probabilities, -1.0)
    best = reached.argmax(axis=1)
    others = probabilities.copy()
    others[numpy.arange(n), labels] = -1.0
    scores = (own - others.max(axis=1) + 1) / 2
    places = ((reached.max(axis=1) >= 0) & (best != labels)).nonzero()[0]
    places = places[scores[places].argsort(kind="stable")]
    return places, best[places], scores[places]


def answers_of(runs: Sequence[Path]) -> tuple[list[str], numpy.ndarray, numpy.ndarray]:
    """(names, probabilities, labels) of all pictures that some fold's run did not train on.

    What several runs answer to a picture is averaged.
    """
    sums: dict[str, numpy.ndarray] = {}
    times: dict[str, int] = {}
    labels: dict[str, int] = {}
    for run in runs:
        found = load_file(run / FILE)
        tests = [name for name, split in read_split(str(run)).items() if split == "test"]
        rows = zip(tests, found["probabilities"], found["labels"].tolist(), strict=True)
        for name, row, label in rows:
            if not numpy.isnan(row).any():  # one that could not be decoded
                sums[name] = sums.get(name, 0) + row.astype(numpy.float64)
                times[name], labels[name] = times.get(name, 0) + 1, label
    names = list(sums)
    table = numpy.array([sums[name] / times[name] for name in names])
    return names, table, numpy.array([labels[name] for name in names], dtype=numpy.int64)


def suspects_of(runs: Sequence[Path]) -> tuple[int, float, list[Suspect]]:
    """(Pictures that these folds tested, part of them answered as labelled, suspects).

    The surest suspect is the first.
    """
    names, table, labels = answers_of(runs)
    agreed = float((table.argmax(axis=1) == labels).mean())
    classes = [str(name) for name in read_json(runs[0] / "classes.json", {})["classes"]]
    return (
        len(names),
        agreed,
        [
            Suspect(
                names[place], classes[labels[place]], classes[suggested], round(float(score), 6)
            )
            for place, suggested, score in zip(*confident(table, labels), strict=True)
        ],
    )


def write_suspects(folder: Path, found: Sequence[Suspect]) -> None:
    """suspects.csv, whole or not at all."""
    rows = ((one.name, one.given, one.suggested, one.score) for one in found)
    write_csv(folder / CSV, [HEAD, *rows])


def draw(folder: Path, run: Path, found: Sequence[Suspect]) -> None:
    """The sheet of the first suspects; `run` tells which data set they are of."""
    import torch

    from config import parse
    from training.data import build_data, pictures_of, source_named

    settings = parse(["--resume", str(run)])
    config = settings.config
    source = source_named(config, None, None, stage=config.stage)
    data = build_data(settings, source, torch.device("cpu"), 1, 0)
    there = {
        name: (split, place)
        for split, part in data.places.items()
        for names in [names_of(source, "test" if split == "test" else "train")]
        for place, index in enumerate(part.tolist())
        for name in [names[index]]
    }
    images = []
    shown = [one for one in found if one.name in there][:MOST_SHOWN]
    for one in shown:
        split, place = there[one.name]
        part = data.train if split == "train" else pictures_of(data.test_loaders[split])
        images.append(part.seen(torch.tensor([place])).cpu()[0])
    titles = [
        f"{found.index(one) + 1}: {printable(one.given)}\n{printable(one.suggested)}?"
        for one in shown
    ]
    if images:
        pictures.sheet(torch.stack(images), titles, folder / SHEET)


def section(folder: Path, runs: Sequence[Path]) -> tuple[str, Markup] | None:
    """Write what there is to say of the labels into the folder of all folds; its part of a page.

    None where no run was a fold. What cannot be drawn costs its sheet, not the list; what cannot be
    read costs the list, not the page.
    """
    runs = [run for run in runs if (run / FILE).is_file()]
    if not runs:
        return None
    configs = [read_json(run / "config.json", {}).get("config", {}) for run in runs]
    if len({(config.get("dataset"), config.get("data_dir")) for config in configs}) > 1:
        words = "These folds are of several data sets: compare those of one for its labels"
        return TITLE, PARTS.note(words)
    try:
        names, agreed, found = suspects_of(runs)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        words = "What the folds answered cannot be read, so nothing is told"
        return TITLE, PARTS.note(f"{words}: {type(error).__name__}: {error}")
    write_suspects(folder, found)
    (folder / SHEET).unlink(missing_ok=True)
    note = (
        f"{counted(len(found), 'picture')} of {names:,} may be labelled wrongly, by confident "
        f"learning over {counted(len(runs), 'run')} that did not train on them and answer as "
        f"labelled for {percent(agreed)}: the weaker the models, the more of these are mistakes of "
        f"theirs. All are in {CSV}, the likeliest first; look at each before you change it."
    )
    made = PARTS.note(note)
    dataset = str(configs[0].get("dataset"))
    if found and Path(dataset).is_dir():
        listed = shlex.join(map(str, (folder / CSV, "--rows", ROWS, "--dataset", dataset)))
        made += PARTS.note(
            "With the numbers of those that are wrong (=CLASS where it is another one than is "
            "suggested, = alone to leave it out) this writes a corrected folder:"
        )
        made += PARTS.command(f"python -m data correct {listed} --out NEW_FOLDER")
    if found:
        try:
            draw(folder, runs[0], found)
            message = "What it is labelled, and what it may be: the surest first"
            made += picture(folder / SHEET, message, "sheet")
        except Exception as error:  # a data set that has moved, say
            made += PARTS.note(f"They cannot be shown: {type(error).__name__}: {error}")
        rows = [
            [str(number), one.name, one.given, one.suggested, f"{one.score:.3f}"]
            for number, one in enumerate(found, 1)
        ]
        head = ["row", "picture", "given", "suggested", "#score"]
        listed = PARTS.table(head, rows[:MOST_LISTED], "sorted")
        made += PARTS.folded(f"the first {min(len(rows), MOST_LISTED)} by name", listed)
    return TITLE, made
