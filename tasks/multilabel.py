"""Multi-label: a picture has any number of classes, or none; a yes or no for each."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from common.confusion import totals
from common.metric import METRICS, Metric
from common.text import percent, some
from tasks.losses import Binary, Criterion
from tasks.task import (
    LARGEST_LOSS,
    LOSS_UNIT,
    MOST_EXAMPLES,
    Answers,
    Outputs,
    Task,
    not_found,
    split_outputs,
)  # fmt: skip

# Logits are ranked after they were rounded: integer counts are the same in any order of addition.
RANGE = 16.0  # a sigmoid is 0 or 1 to seven digits beyond it
STEPS = 2**16
BITS = 32  # classes whose answers share a number
MOST_CELLS = 2**23  # of the histograms of all classes, eight bytes each: of more, coarser ones
YES = 2**32  # what a picture that has the class counts beside the 1 that any picture does


def steps(classes: int) -> int:
    """To how many values logits are rounded where there are so many classes."""
    return max(256, min(STEPS, 2 ** ((MOST_CELLS // max(1, classes)).bit_length() - 1)))


class Multilabel(Task):
    """A sigmoid for each class; mean average precision, and F1 at a threshold."""

    name = "multilabel"
    metrics = METRICS["multilabel"]
    class_metrics = (
        Metric(key="images", title="images", format=",.0f"),
        Metric(key="ap", title="average precision"),
        Metric(key="precision", title="precision", format=".2%"),
        Metric(key="recall", title="recall", format=".2%"),
        Metric(key="f1", title="F1", format=".3f"),
    )
    best_is, right_is = "mean_ap", "exact_match"
    criterion_kind = Binary

    def __init__(
        self, num_classes: int = 1, label_smoothing: float = 0.0, auxiliary: float = 0.3,
        criterion: Criterion | None = None, threshold: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(num_classes, label_smoothing, auxiliary, criterion, threshold)
        self.yes = math.log(threshold / (1 - threshold))  # the least logit that says yes
        self.steps = steps(num_classes)

    @property
    def chosen_by(self) -> str:
        at = "" if self.best_is in ("mean_ap", "loss") else f" at {self.threshold}"
        return self.best_is + at

    def right(self, outputs: Outputs, labels: Tensor) -> Tensor | int:
        """Of a mixture of two pictures the classes of the one that it holds more of are right."""
        logits = split_outputs(outputs)[0].detach()
        same = (logits >= self.yes) == (labels >= 0.5)
        return (same & (labels >= 0)).all(1).sum()

    def new_counts(self, device: torch.device) -> Tensor:
        """Integer counters: [loss units, all right, images, three of each class, ranked logits].

        The three are how many pictures have the class, are said to have it, and both.
        """
        size = 3 + self.num_classes * (3 + self.steps + 1)
        return torch.zeros(size, dtype=torch.int64, device=device)

    def count(self, counts: Tensor, outputs: Outputs, labels: Tensor, weights: Tensor) -> Answers:
        logits, there, size = split_outputs(outputs)[0].float(), labels.long(), self.num_classes
        loss = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").sum(1)
        loss = loss.clamp(max=LARGEST_LOSS).nan_to_num(nan=LARGEST_LOSS)
        broken = logits.isnan()  # an answer that is no number is wrong
        given = torch.where(broken, 1 - there, (logits >= self.yes).long())
        units, right = (loss / LOSS_UNIT).round().long(), (given == there).all(1)
        counts[:3].add_((torch.stack([units, right, torch.ones_like(units)]) * weights).sum(1))
        three = torch.stack([there, given, given * there]) * weights[:, None]
        counts[3 : 3 + 3 * size].view(3, size).add_(three.sum(1))
        cells = (logits.clamp(-RANGE, RANGE) + RANGE) * (self.steps / (2 * RANGE))
        cells = torch.where(broken, self.steps * (1 - there), cells.nan_to_num(0.0).round().long())
        rows = torch.arange(0, size * (self.steps + 1), self.steps + 1, device=cells.device)
        worth = weights[:, None] * (1 + there * YES)
        counts[3 + 3 * size :].scatter_add_(0, (cells + rows).flatten(), worth.flatten())
        return Answers(given, logits.sigmoid())

    def average_precisions(self, counts: Tensor) -> list[float | None]:
        """Of each class the mean precision over its pictures, surest first, as scikit-learn's.

        Pictures with the same rounded logit come together; None where no picture has the class.
        """
        found = []
        for row in counts[3 + 3 * self.num_classes :].cpu().view(self.num_classes, -1):
            mine, seen = (row >> 32).flip(0), (row & (YES - 1)).flip(0)
            cells = mine.nonzero()[:, 0]
            parts = mine[cells] * mine.cumsum(0)[cells].double() / seen.cumsum(0)[cells].double()
            total = int(mine.sum())
            found.append(math.fsum(parts.tolist()) / total if total else None)
        return found

    def results(self, counts: Tensor) -> dict:
        """The metrics; "by_class" has a list for each of class_metrics, with None for no number.

        The mean over the classes is over those that a picture has.
        """
        loss, exact, images = counts[:3].tolist()
        there, given, hits = counts[3 : 3 + 3 * self.num_classes].view(3, -1).tolist()
        each = list(zip(there, given, hits, strict=True))
        ap = self.average_precisions(counts)
        known = [value for value in ap if value is not None]
        f1 = [2 * both / (n + said) if n + said else None for n, said, both in each]
        counted_f1 = [value or 0.0 for value, n in zip(f1, there, strict=True) if n]
        return {
            "loss": loss * LOSS_UNIT / images,
            "mean_ap": math.fsum(known) / max(1, len(known)),
            "macro_f1": math.fsum(counted_f1) / max(1, len(counted_f1)),
            "micro_f1": 2 * sum(hits) / max(1, sum(there) + sum(given)),
            "exact_match": exact / images,
            "images": images,
            "per_class": {"images": there, "answers": given, "right": hits},
            "by_class": {
                "images": there, "ap": ap, "f1": f1,
                "precision": [both / said if said else None for _, said, both in each],
                "recall": [both / n if n else None for n, _, both in each],
            },
        }  # fmt: skip

    def new_examples(self, device: torch.device) -> Tensor:
        """The surest mistakes, int64 (2, 1, places), see `keep_examples`; 0: none."""
        return torch.zeros(2, 1, 4 * MOST_EXAMPLES, dtype=torch.int64, device=device)

    def keep_examples(
        self, kept: Tensor, answers: Answers, labels: Tensor, indices: Tensor
    ) -> None:
        """Of a picture its surest mistake: its key as Classification makes it, class and label.

        How sure a mistake is: how far the confidence is from what it should be.
        """
        there = labels.long()
        off = torch.where(answers.given != there, (answers.sure - there).abs(), -1.0)
        off, worst = off.nan_to_num(1.0).max(1)
        keys = (off.clamp(min=0.0) * 2**20).long() * 2**32 - indices
        keys = keys * ((off >= 0) & (indices >= 0))
        cells = 2 * worst + there.gather(1, worst[:, None])[:, 0]
        keys, cells = torch.cat([kept[0, 0], keys]), torch.cat([kept[1, 0], cells])
        best, places = keys.topk(kept.shape[2])
        kept[0, 0], kept[1, 0] = best, cells[places]

    def new_answers(self, images: int, device: torch.device) -> Tensor:
        """A bit for each class, and a last number that is 1 where there is an answer."""
        words = -(-self.num_classes // BITS)
        return torch.zeros(images + 1, words + 1, dtype=torch.int64, device=device)

    def as_integers(self, answers: Answers) -> Tensor:
        given = F.pad(answers.given.long(), (0, -self.num_classes % BITS))
        places = 2 ** torch.arange(BITS, device=given.device)
        words = (given.unflatten(1, (-1, BITS)) * places).sum(2)
        return F.pad(words, (0, 1), value=1)

    def answered(self, answers: Tensor, classes: list[str]) -> list[tuple[str, str]]:
        bits = answers[:, :-1, None] >> torch.arange(BITS) & 1
        found = []
        for row in bits.flatten(1).tolist():  # longer than the classes
            names = (name for name, bit in zip(classes, row, strict=False) if bit)
            found.append(("|".join(names), ""))
        return found

    def examples(self, kept: Tensor) -> list[dict]:
        """The surest mistakes, surest first; `confidence` is that the picture has the class."""
        keys, places = kept[:, 0].flatten().sort(descending=True)
        found = []
        for key, cell in zip(keys.tolist(), kept[:, 1].flatten()[places].tolist(), strict=True):
            if key <= 0 or len(found) == MOST_EXAMPLES:
                break
            (of, there), off = divmod(cell, 2), -(-key >> 32) / 2**20
            found.append({
                "index": -key % 2**32, "class": of, "label": there,
                "confidence": 1 - off if there else off,
            })  # fmt: skip
        return found

    def caption(self, example: dict, label: str, classes: list[str]) -> str:
        word = "not" if example["label"] else "also"
        sure = percent(example["confidence"])
        return f"{label or 'nothing'}\n{word} {classes[example['class']]}, {sure}"

    def surest(self, logits: Tensor, top: int | None) -> list[tuple[int, float]]:
        order = logits.argsort(descending=True, stable=True)
        yes = order[logits[order] >= self.yes][:top]
        return list(zip(yes.tolist(), logits.sigmoid()[yes].tolist(), strict=True))

    def never_found(self, results: dict, classes: list[str]) -> str:
        if not (missed := not_found(results, classes)):
            return ""
        return (
            f"the best weights find no picture of class {some(missed, 5)} at the threshold "
            f"{self.threshold:g}; a lower --threshold says yes more often"
        )

    def doubts(self, results: dict, classes: list[str]) -> dict[str, str]:
        images, (there, _, _) = results["images"], totals(results)
        shares = [n / images for n in there]
        guessing = sum(
            -p * math.log(p) - (1 - p) * math.log(1 - p) for p in shares if 0 < p < 1
        )  # fmt: skip
        present = [p for p in shares if p]
        chance, loss = sum(present) / max(1, len(present)), results["loss"]
        if guessing < 0.1:  # hardly anything differs: nothing can be told
            return {}
        if loss > 10 * guessing:
            return {"explodes": (
                f"the test loss is {loss:.4g}, where always answering how frequent each class is "
                f"costs {guessing:.2f}: the steps are too large (try a tenth of the --lr)"
            )}  # fmt: skip
        if loss > 0.95 * guessing and results["mean_ap"] < chance + 0.05:
            return {"guesses": (
                f"the test loss {loss:.4f} is what always answering how frequent each class is "
                f"costs ({guessing:.4f}), and mAP {results['mean_ap']:.3f} is hardly more than "
                f"that gives ({chance:.3f}): the model knows nothing of the test images"
            )}  # fmt: skip
        return {}
