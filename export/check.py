"""Whether an exported file answers what the trained model answers, on the run's test pictures."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.text import counted
from config import parse
from data.augment import Augment
from data.pack import levels_in
from export.forms import Ask, answer
from export.service import in_unit
from training.data import build_data, source_named, split_of

MOST_APART = 1e-3  # of a confidence: float32 in another order of additions is far nearer
AT_ONCE = 32  # pictures


@dataclass(frozen=True)
class Checked:
    """What a check found: pictures, equal answers, the largest differences."""

    images: int
    equal: int
    logits: float
    confidence: float

    @property
    def holds(self) -> bool:
        return self.confidence <= MOST_APART

    def __str__(self) -> str:
        same = "all answers equal" if self.equal == self.images else f"{self.equal} answers equal"
        return (
            f"on {counted(self.images, 'test picture')}: {same}, largest difference "
            f"{self.logits:.1e} of a logit, {self.confidence:.1e} of a confidence"
        )


def pictures_of_run(folder: Path, card: dict, built: str, most: int) -> Tensor:
    """Pictures of a run's test set, evenly spread over it, as evaluation sees them (uint8).

    built: what build_from knows the model by, where its own file has moved.

    Raises UserError or OSError where the data set is not to be had.
    """
    moved = ["--model", built, "--allow-change", "model"] * (built != card["model"])
    settings = parse(["--resume", str(folder), *moved])
    config = settings.config
    source = source_named(config, split_of(config, folder), levels_in(card))
    if list(source.classes) != list(card["classes"]):
        raise UserError("the data have other classes by now", code="other-classes")
    count = len(source.test)
    chosen = torch.linspace(0, count - 1, min(most, count)).long()
    few = replace(source, test=source.test.part(chosen))
    data = build_data(settings, few, torch.device("cpu"), 1, 0)
    batches = [batch["images"][batch["weights"] > 0] for batch in data.evaluation("test")]
    return torch.cat(batches)


@torch.no_grad()
def compare(model: nn.Module, card: dict, ask: Ask, pictures: Tensor) -> Checked:
    """A file and the trained model, each asked by its own way to its pixels."""
    augment = Augment(
        "none", card["image_size"], card["mean"], card["std"], seed=0,
        cut=bool(card.get("photographs")),
    )  # fmt: skip
    many, least = card.get("task") == "multilabel", card.get("threshold", 0.5)
    equal, logits, confidence = 0, 0.0, 0.0
    for part in (pictures[:1], *pictures[1:].split(AT_ONCE)):  # one alone, and many together
        mine = answer(model, augment.evaluate(part))
        its = ask(in_unit(part, card))
        logits = max(logits, float((mine - its).abs().max()))
        sure, others = (x.sigmoid() if many else x.softmax(1) for x in (mine, its))
        same = (
            ((sure >= least) == (others >= least)).all(1)
            if many
            else mine.argmax(1) == its.argmax(1)
        )
        equal += int(same.sum())
        confidence = max(confidence, float((sure - others).abs().nan_to_num(nan=1.0).max()))
    return Checked(len(pictures), equal, logits, confidence)
