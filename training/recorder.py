"""What a run really did, shard by shard, for those who compare runs: LOCKSTEP_RECORD=FOLDER.

Attached from outside the loop, so the recorded run is the ordinary one. Each process appends JSON
lines to FOLDER/rank-<n>.jsonl: {"step", "shard", "indices", "pixels", "loss"} for each of its
shards, {"evaluated", "state"} for each evaluation, a digest of the weights and buffers it used,
and {"step", "norm", "weights"} for each update (rank 0).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.disk import Json
from distributed.checkpoint import Progress
from training.data import Batch, Data
from training.learner import Learner
from training.observer import Observer
from training.schedule import Schedule


def digest(tensors: Iterable[Tensor]) -> str:
    """blake2b of the tensors' bytes, whatever their memory layout."""
    state = hashlib.blake2b(digest_size=12)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        state.update(flat.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


class Recorder(Observer):
    """Writes down what a run does, from a place outside the loop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._progress = Progress()
        self._pixels: list[str] = []  # of the shards of the step under way
        self._before = torch.empty(0)  # the loss sums before it
        self._evaluated = -1

    def started(self, learner: Learner, data: Data, schedule: Schedule, progress: Progress) -> None:
        rank = learner.accelerator.process_index
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = (self.folder / f"rank-{rank}.jsonl").open("a", encoding="utf-8")
        self.learner, self._progress = learner, progress
        for module in filter(None, (learner.bare, learner.averaged_model)):
            module.register_forward_pre_hook(self._before_forward)
        learner.optimizer.optimizer.register_step_pre_hook(self._before_update)

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._batch, self._before = batch, self.learner.sums.clone()
            self._pixels.clear()
            yield batch

    def _write(self, **row: Json) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def _before_forward(self, module: nn.Module, inputs: tuple) -> None:
        if module.training:
            self._pixels.append(digest(inputs))
        elif not torch.is_grad_enabled() and self._evaluated != self._progress.step:
            self._evaluated = self._progress.step
            self._write(evaluated=self._evaluated, state=digest(module.state_dict().values()))

    def _before_update(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        learner, step = self.learner, self._progress.step
        first, size = learner.shards.first, learner.shards.plan.micro_batch_size
        losses = (learner.sums - self._before).tolist()
        for place, (pixels, indices) in enumerate(
            zip(self._pixels, self._batch["indices"].split(size), strict=True)
        ):
            loss, shard = losses[first + place], first + place
            self._write(step=step, shard=shard, indices=indices.tolist(), loss=loss, pixels=pixels)
        if learner.accelerator.is_main_process:
            gradients = [p.grad for p in learner.parameters if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            self._write(step=step, norm=norm, weights=digest(learner.bare.state_dict().values()))


def read(folder: str | Path) -> tuple[dict, dict]:
    """({(step, shard): row}, {step: row}) of all processes; a row written twice counts once."""
    shards, updates, _ = read_all(folder)
    return shards, updates


def read_all(folder: str | Path) -> tuple[dict, dict, dict]:
    """Like `read`, and {step: digests of what the processes evaluated with}."""
    shards, updates, evaluated = {}, {}, {}
    for path in sorted(Path(folder).glob("rank-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "shard" in row:
                shards[row["step"], row["shard"]] = row
            elif "evaluated" in row:
                evaluated.setdefault(row["evaluated"], set()).add(row["state"])
            else:
                updates[row["step"]] = row
    return shards, updates, evaluated


def observer_asked_for() -> Observer:
    """A recorder where LOCKSTEP_RECORD names a folder for it, else one that does nothing."""
    folder = os.environ.get("LOCKSTEP_RECORD")
    return Recorder(Path(folder)) if folder else Observer()
