"""What an evaluation of one split fills, batch by batch, and what all processes' parts come to."""

from collections.abc import Callable

import torch
from torch import Tensor

from tasks.task import Outputs, Task

# What each process counted and answered -> the sums; and what each kept, (processes, ...).
Together = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Evaluation:
    """Counters, examples worth showing, and the answer to each image: every one counted once."""

    def __init__(self, task: Task, images: int, device: torch.device) -> None:
        self.task = task
        self.counts, self.kept = task.new_counts(device), task.new_examples(device)
        self.answers = task.new_answers(images, device)

    def add(self, logits: Outputs, batch: dict[str, Tensor]) -> None:
        """A batch that was answered; indices (n,) int64 are its images, -1 for padding."""
        device = self.counts.device
        labels, weights, indices = (batch[k].to(device) for k in ("labels", "weights", "indices"))
        answers = self.task.count(self.counts, logits, labels, weights)
        self.task.keep_examples(self.kept, answers, labels, indices)
        places = indices % len(self.answers)  # padding's, -1, is the last
        self.answers.index_copy_(0, places, self.task.as_integers(answers))

    def results(self, together: Together) -> dict:
        """The metrics; "examples" to show, and "answers" to each image as Task.answered reads."""
        counts, answers, kept = together(self.counts, self.answers, self.kept)
        found = {"examples": self.task.examples(kept), "answers": answers[:-1]}
        return self.task.results(counts) | found
