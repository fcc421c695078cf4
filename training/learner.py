"""What learns: model, optimizer, average, gradient scaler, and the numbers that a step leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from config import BatchPlan, TrainConfig
from data.keyed_random import hash_integers
from distributed import faults
from distributed.checkpoint import copy_state
from distributed.checksums import refuse_difference
from distributed.generators import Generators
from distributed.shards import Guard, Shards
from distributed.world import World
from models import lookup
from models.state import beside_state_dict, whole_state
from optim import ScheduleFreeWeights, WeightAverage, add_parameters, start_state
from tasks import split_outputs
from tasks.losses import WEIGHT_UNIT
from training.data import Data
from training.norms import measure

if TYPE_CHECKING:
    from training.start import Started

DROPOUT, EVALUATION = 101, 103  # streams of `hash_integers`, beside those of data/keyed_random.py
T = TypeVar("T")
SKIPS_IN_A_ROW = 10  # updates left out for numbers that are not finite


@dataclass(frozen=True)
class NotFinite:
    """The first update that was not made; the ranks whose loss was not finite then."""

    step: int
    ranks: list[int]


class Learner:
    """Holds what an update changes; knows neither disk nor screen.

    `model` and `optimizer` are what Accelerate prepared, `bare` the module itself; `average` is
    None without --ema. `sums` are loss sums, one per shard of the global batch, `right` counts this
    process's right answers, and `grad_norm` is that of the last step before it was clipped, all on
    the device.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        average: WeightAverage | None,
        started: Started,
        config: TrainConfig,
        batch: BatchPlan,
        world: World,
    ) -> None:
        self.model, self.optimizer, self.average = model, optimizer, average
        self.config, self.batch = config, batch
        self.task, self.frozen = started.task, started.frozen
        self.nature = started.trial.nature
        self.changing = self.nature.changing
        self.draws = started.trial.random  # also where it is evaluated
        self.accelerator, self.device = world.accelerator, world.device
        self.bare: nn.Module = self.accelerator.unwrap_model(model)
        self.channels_last = lookup(config.model).channels_last
        self.seed = config.seed
        self.grad_clip = config.grad_clip
        self.scaler = self.accelerator.scaler if config.mixed_precision == "fp16" else None
        self.pace, self.pace.shares = world.pace, batch.shares
        self.shards = self._build_shards()
        self.parameters = self.shards.parameters
        skip, most = config.on_nonfinite == "skip", SKIPS_IN_A_ROW
        if self.scaler is not None:  # fp16 overflows now and then, above all at its start
            skip, most = True, 3 * SKIPS_IN_A_ROW
        start_state(optimizer.optimizer)
        self.guard = Guard(self.device, optimizer.optimizer, skip, most)
        self.shards.undoes = skip
        self.sums = torch.zeros(batch.shards, device=self.device)
        self.right = torch.zeros((), dtype=torch.int64, device=self.device)
        self.grad_norm = torch.zeros((), device=self.device)

    def _build_shards(self) -> Shards:
        seed = self.seed
        return Shards(
            self.accelerator, self.model, self.batch,
            lambda step, shard: hash_integers(seed, DROPOUT, step, shard), self.config.bitwise,
            self.nature, self.task.weight, WEIGHT_UNIT, self.pace,
        )  # fmt: skip

    def unfreeze(self, epoch: int) -> int:
        """Let train what trains in this epoch, from 0; how many numbers begin to. All take part.

        DDP adds up what needed a gradient when it was made: it is made anew. What was trained
        before keeps its place and state in the optimizer.
        """
        fresh = self.frozen.hold(self.bare, epoch) if self.frozen.stages else []
        if fresh:
            add_parameters(self.optimizer.optimizer, self.bare, self.config, set(fresh))
            old, undoes = self.model, self.shards.undoes
            if isinstance(old, DDP):  # nobody may wait for its hooks, nor its buckets stay
                old._remove_autograd_hooks()
                del old.reducer, old.logger
            bare = self.accelerator.unwrap_model(old, keep_fp32_wrapper=False)
            self.accelerator._models.remove(bare)  # where it stands before it is wrapped
            self.model = self.accelerator.prepare_model(bare)
            self.shards = self._build_shards()
            self.shards.undoes, self.parameters = undoes, self.shards.parameters
        return sum(p.numel() for p in fresh)

    @property
    def averaged_model(self) -> nn.Module | None:
        return self.average.model if self.average is not None else None

    def inputs(self, images: Tensor) -> Tensor:
        """Augmented images on the device, in the memory layout that the model has."""
        return inputs(images, self.device, self.channels_last)

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """What a model answers to augmented images, without what else it may answer."""
        return split_outputs(model(self.inputs(images)))[0]

    def seeded(self, loader: Iterable[T]) -> Iterator[T]:
        """Batches to evaluate; a model that draws even then draws alike on any number of processes.

        A batch has the same size on each of them, and its place among all is what seeds it.
        """
        first, among = self.accelerator.process_index, self.accelerator.num_processes
        generators = Generators(self.device, filter(None, (self.bare, self.averaged_model)))
        for number, batch in enumerate(loader):
            generators.seed(hash_integers(self.seed, EVALUATION, number * among + first))
            yield batch

    def check_gradients(self, step: int) -> Tensor:
        """Clip; tell the optimizer to leave the weights alone if a number is not finite.

        Returns 1.0 (0-dim, on the device) where it must. No host wait.
        """
        if faults.hit("backward", step):
            self.parameters[0].grad.fill_(math.nan)
        if self.scaler is not None:
            self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.grad_norm = norm = torch.nn.utils.get_total_norm(gradients)
        if self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm)
        found = self.guard.check(norm, self.sums.sum(), step)
        return self.shards.undo_buffers(found)

    def not_finite(self) -> NotFinite | None:
        """What keeps training from going on, the same on every process; one host wait."""
        report = self.guard.report()
        if not self.guard.must_stop(report):
            return None
        bad_loss = torch.tensor([report["bad_loss"]], device=self.device)
        everyone = cast(Tensor, self.accelerator.gather(bad_loss)).tolist()
        return NotFinite(
            report["bad_step"], [rank for rank, bad in enumerate(everyone) if bad >= 0]
        )

    def add(self, shard: int, loss: Tensor, right: Tensor | int) -> None:
        """What a row will tell of a shard; on the device: reading it each step would wait."""
        self.sums[shard] += loss
        self.right += right

    def summed(self) -> tuple[list[float], int]:
        """Each shard's loss sum and all right answers since a row took them: alike on all."""
        *sums, right = self._summed().tolist()
        return sums, int(right)

    def _summed(self, *beside: Tensor) -> Tensor:
        numbers = torch.cat([self.sums, self.right.to(self.sums).view(1), *beside])
        if self.accelerator.num_processes == 1:
            return numbers
        return cast(Tensor, self.accelerator.reduce(numbers, reduction="sum"))

    def take_row(self, images: int) -> dict[str, float]:
        """The numbers of a row about so many images; the sums begin anew. One host wait."""
        beside = [self.pace.numbers(self.sums)] if self.accelerator.num_processes > 1 else []
        numbers = [self._summed(*beside), self.grad_norm.to(self.sums).view(1)]
        *found, norm = torch.cat(numbers).tolist()
        count = len(self.sums)
        sums, right = found[:count], found[count]
        self.pace.hear(found[count + 1 :])
        self.sums.zero_()
        self.right.zero_()
        row = {"train/loss": math.fsum(sums) / images, "train/grad_norm": norm}
        return row | ({f"train/{name}": right / images} if (name := self.task.right_is) else {})

    def agree_on_buffers(self) -> None:
        """Every process, and the average, get the main process's buffers.

        All else must be the same on all of them already.
        """
        if self.accelerator.num_processes > 1:
            refuse_difference(dict(self.bare.named_parameters()), self._made_of_them())
        self.shards.broadcast_buffers()
        if self.average is not None:
            self.average.follow(self.bare, self.optimizer.optimizer)

    def _made_of_them(self) -> dict[str, Tensor]:
        """What belongs to parameters: the optimizer's state and averages, by name."""
        state = self.optimizer.optimizer.state
        found = {
            f"{key} of {name} in the optimizer": value
            for name, p in self.bare.named_parameters()
            for key, value in state.get(p, {}).items()
            if torch.is_tensor(value) and value.device == p.device
        }
        if self.average is not None:
            average = self.average.model.named_parameters()
            found |= {f"the average of {name}": p for name, p in average}
        return found

    @property
    def kept_model(self) -> nn.Module:
        """What is evaluated and kept: the averaged weights if there are any, else the model's."""
        return self.averaged_model or self.bare

    def evaluated_model(self, data: Data) -> nn.Module:
        """`kept_model`, once all processes have the same buffers."""
        self.agree_on_buffers()
        if isinstance(self.average, ScheduleFreeWeights):
            measure(self.average.model, self, data)
        return self.kept_model

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Take weights to evaluate; from now on there is no average."""
        copy_state(self.bare, tensors, "model")
        self.average = None

    def weights(self) -> dict[str, Tensor]:
        """Host copies of the evaluated weights by name."""
        state, kept = whole_state(self.kept_model), self.kept_model
        beside = beside_state_dict(kept) - set(self.changing)
        state = {k: v for k, v in state.items() if k not in beside}  # constants of __init__
        return {  # copies: safetensors refuses a layer that the model holds under two names
            k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.items()
        }


def inputs(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """Images (n, C, H, W) or features (n, F) on the device, in the model's memory layout."""
    images = images.to(device, non_blocking=True)
    if channels_last and images.ndim == 4:  # features have no layout
        images = images.contiguous(memory_format=torch.channels_last)
    return images
