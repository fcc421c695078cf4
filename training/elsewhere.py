"""Evaluating a run on another labelled data set than its own."""

from dataclasses import replace
from pathlib import Path

import torch

from common.disk import Json, digest, read_json, write_json
from common.errors import UserError
from common.text import both_sides, file_name, places
from data.image_set import Source, renumbered
from data.splits import names_of, together
from distributed.checkpoint import card_of
from training.plan import Plan

EVALUATIONS = "evaluations"  # in a run folder


def card_of_run(plan: Plan) -> dict:
    """What the weights of a run say of themselves that is evaluated on other data; {} if it is not.

    Raises UserError where they say too little.
    """
    config = plan.config
    if not (plan.actions.eval_only and config.run_dir):
        return {}
    folder = Path(config.run_dir)
    own = read_json(folder / "config.json", {}).get("config", {})
    if all(own.get(name) == getattr(config, name) for name in ("dataset", "data_dir")):
        return {}
    return card_of(folder / "model.safetensors")  # what is missing is told where it is loaded


def as_the_run_sees(source: Source, card: dict) -> Source:
    """A data set with the run's numbers of the classes, its mean and std.

    All of it tests where it has no test pictures of its own. Raises UserError on a class that the
    run does not know.
    """
    known = tuple(card["classes"])
    there = places(source.classes, known)
    if None in there:
        sides = both_sides("the run knows", known, "the data have", source.classes)
        raise UserError(
            f"the run cannot be evaluated on classes that it does not know: {sides}; leave them "
            "out, or call them as the run does",
            code="other-classes",
        )
    numbers = torch.tensor(there)
    train, test = (
        replace(part, labels=renumbered(part.labels, numbers, len(known)))
        for part in (source.train, source.test)
    )
    names = {side: names_of(source, side) for side in ("train", "test")}
    if source.hashed:
        test, names["test"] = together(train, test), (*names["train"], *names["test"])
    names = {side: those for side, those in names.items() if those}
    return replace(
        source, train=train, test=test, classes=known, names=names, mean=tuple(card["mean"]),
        std=tuple(card["std"]),
    )  # fmt: skip


def write_evaluation(plan: Plan, source: Source, results: dict[str, dict]) -> Path:
    """evaluations/NAME.json in the run's folder: what each split of the data set gave.

    Another data set of that name gets a file beside it. Raises OSError.
    """
    config = plan.config
    asked = config.data_dir or config.dataset
    where = str(Path(asked).absolute()) if Path(asked).exists() else asked
    folder = Path(str(config.run_dir)) / EVALUATIONS
    folder.mkdir(exist_ok=True)
    path = folder / f"{file_name(asked)}.json"
    if read_json(path, {}).get("dataset", where) != where:
        path = folder / f"{file_name(asked)}-{digest(where)[:6]}.json"
    found: dict[str, Json] = {"dataset": where, "data": source.fingerprint}
    found["classes"] = list(source.classes)
    for split, numbers in results.items():
        found[split] = {key: value for key, value in numbers.items() if key != "examples"}
    write_json(path, found)
    return path
