"""Regression: numbers are predicted, as of the points of a line."""

import torch
from torch import Tensor
from torch.nn import functional as F

from common.metric import METRICS
from tasks.task import LARGEST_LOSS, LOSS_UNIT, Answers, Outputs, Task, split_outputs

MOST_POINTS = 200  # answers of a regression that are kept


class Regression(Task):
    """Mean squared error and R2, from exact sums in units of 2**-20."""

    name = "regression"
    metrics = METRICS["regression"]
    best_is = "loss"

    def loss(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Squared error summed over the samples; a shape that would broadcast is an error."""
        predictions = split_outputs(outputs)[0]
        if predictions.shape != targets.shape:
            raise ValueError(
                f"the model answers {tuple(predictions.shape)} where the targets are "
                f"{tuple(targets.shape)}; a difference of the two would broadcast to something else"
            )
        return F.mse_loss(predictions.float(), targets, reduction="sum")

    def new_counts(self, device: torch.device) -> Tensor:
        return torch.zeros(4, dtype=torch.int64, device=device)

    def count(self, counts: Tensor, outputs: Outputs, targets: Tensor, weights: Tensor) -> Answers:
        predictions = split_outputs(outputs)[0].float()
        if predictions.shape != targets.shape:
            self.loss(outputs, targets)
        squares = ((predictions - targets) ** 2).sum(1).clamp(max=LARGEST_LOSS)
        values = (squares.nan_to_num(nan=LARGEST_LOSS), targets.sum(1), (targets**2).sum(1))
        units = (torch.stack(values) / LOSS_UNIT).round().long() * weights
        counts[:3].add_(units.sum(1))
        counts[3].add_(weights.sum())
        return Answers(predictions[:, 0], torch.ones_like(predictions[:, 0]))

    def results(self, counts: Tensor) -> dict:
        squares, total, total_squares = (x * LOSS_UNIT for x in counts[:3].tolist())
        images = int(counts[3])
        spread = total_squares - total**2 / images
        return {
            "loss": squares / images,
            "r2": 1 - squares / spread if spread > 0 else 0.0,
            "images": images,
        }

    def doubts(self, results: dict, classes: list[str]) -> dict[str, str]:
        worse = 1 - results["r2"]  # how many times what the mean costs
        if worse <= 10:
            return {}
        loss = results["loss"]
        counted = f" (an error counts {LARGEST_LOSS:,.0f} at most)" * (loss > LARGEST_LOSS / 2)
        return {"explodes": (
            f"the test loss is {loss:,.4g}{counted}, where always answering the mean costs "
            f"{loss / worse:.4g}: the steps are too large (try a tenth of the --lr)"
        )}  # fmt: skip

    def new_examples(self, device: torch.device) -> Tensor:
        """By the sample's index, int64 (MOST_POINTS + 1, 2): its answer's bits, 1 where it is."""
        return torch.zeros(MOST_POINTS + 1, 2, dtype=torch.int64, device=device)

    def keep_examples(
        self, kept: Tensor, answers: Answers, labels: Tensor, indices: Tensor
    ) -> None:
        shown = (indices >= 0) & (indices < MOST_POINTS)
        places = torch.where(shown, indices, MOST_POINTS)  # the last is for all others
        bits = answers.given.view(torch.int32).long()
        kept.index_copy_(0, places, torch.stack([bits, torch.ones_like(bits)], 1))

    def as_integers(self, answers: Answers) -> Tensor:
        bits = answers.given.view(torch.int32).long()
        return torch.stack([bits, torch.ones_like(bits)], 1)

    def answered(self, answers: Tensor, classes: list[str]) -> list[tuple[str, str]]:
        values, there = answers[:, 0].int().view(torch.float32).tolist(), answers[:, 1].tolist()
        return [(f"{v:.6g}" if known else "", "") for v, known in zip(values, there, strict=True)]

    def examples(self, kept: Tensor) -> list[dict]:
        """The answers to the first samples."""
        bits, there = kept.sum(0)[:MOST_POINTS].T  # each is one process's
        answers = bits.int().view(torch.float32)
        return [{"index": int(i), "answer": float(answers[i])} for i in there.nonzero().flatten()]
