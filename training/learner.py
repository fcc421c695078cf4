"""What learns: model, optimizer, average, gradient scaler, and the numbers that a step leaves."""

import math
from dataclasses import dataclass
from typing import cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from config import BatchPlan, TrainConfig
from data.keyed_random import hash_integers
from distributed import faults
from distributed.checkpoint import copy_state
from distributed.shards import Guard, Shards
from distributed.world import World
from models import lookup
from optim import WeightAverage
from tasks import Classification, Regression

DROPOUT = 101  # a stream of `hash_integers`, beside those of data/keyed_random.py
SKIPS_IN_A_ROW = 10  # updates left out for numbers that are not finite


@dataclass(frozen=True)
class NotFinite:
    """The first update that was not made; the ranks whose loss was not finite then."""

    step: int
    ranks: list[int]


class Learner:
    """Holds what an update changes; knows neither disk nor screen.

    `model` and `optimizer` are what Accelerate prepared, `bare` the module itself; `average` is
    None without --ema. `sums` are loss sums, one per shard of the global batch, on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        average: WeightAverage | None,
        task: Classification | Regression,
        config: TrainConfig,
        batch: BatchPlan,
        world: World,
    ) -> None:
        self.model, self.optimizer, self.average, self.task = model, optimizer, average, task
        self.accelerator, self.device = world.accelerator, world.device
        self.bare: nn.Module = self.accelerator.unwrap_model(model)
        self.channels_last = lookup(config.model).channels_last
        self.grad_clip = config.grad_clip
        self.scaler = self.accelerator.scaler if config.mixed_precision == "fp16" else None
        self.shards = Shards(
            self.accelerator, model, batch,
            lambda step, shard: hash_integers(config.seed, DROPOUT, step, shard), config.bitwise,
        )  # fmt: skip
        self.parameters = self.shards.parameters
        skip, most = config.on_nonfinite == "skip", SKIPS_IN_A_ROW
        if self.scaler is not None:  # fp16 overflows now and then, above all at its start
            skip, most = True, 3 * SKIPS_IN_A_ROW
        self.guard = Guard(self.device, optimizer.optimizer, skip, most)
        self.shards.undoes = skip
        self.sums = torch.zeros(batch.shards, device=self.device)

    @property
    def averaged_model(self) -> nn.Module | None:
        return self.average.model if self.average is not None else None

    def inputs(self, images: Tensor) -> Tensor:
        """Augmented images on the device, in the memory layout that the model has."""
        return inputs(images, self.device, self.channels_last)

    def check_gradients(self, step: int) -> Tensor:
        """Clip; tell the optimizer to leave the weights alone if a number is not finite.

        Returns 1.0 (0-dim, on the device) where it must. No host wait.
        """
        if faults.hit("backward", step):
            self.parameters[0].grad.fill_(math.nan)
        if self.scaler is not None:
            self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
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

    def loss_sums(self) -> list[float]:
        """Each shard's loss sum since they were last taken: the same list on every process."""
        sums = self.sums
        if self.accelerator.num_processes > 1:
            sums = cast(Tensor, self.accelerator.reduce(sums.clone(), reduction="sum"))
        return sums.tolist()

    def take_loss_sums(self) -> list[float]:
        """The sums, which begin anew."""
        sums = self.loss_sums()
        self.sums.zero_()
        return sums

    def agree_on_buffers(self) -> None:
        """Every process, and the average, get the main process's buffers."""
        self.shards.broadcast_buffers()
        if self.average is not None:
            self.average.copy_buffers(self.bare)

    @property
    def kept_model(self) -> nn.Module:
        """What is evaluated and kept: the averaged weights if there are any, else the model's."""
        return self.averaged_model or self.bare

    def evaluated_model(self) -> nn.Module:
        """`kept_model`, once all processes have the same buffers."""
        self.agree_on_buffers()
        return self.kept_model

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Take weights to evaluate; from now on there is no average."""
        copy_state(self.bare, tensors, "model")
        self.average = None

    def weights(self) -> dict[str, Tensor]:
        """Host copies of the evaluated weights by name."""
        state = self.kept_model.state_dict()
        return {  # copies: safetensors refuses a layer that the model holds under two names
            k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.items()
        }


def inputs(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """Images (n, C, H, W) or features (n, F) on the device, in the model's memory layout."""
    images = images.to(device, non_blocking=True)
    if channels_last and images.ndim == 4:  # features have no layout
        images = images.contiguous(memory_format=torch.channels_last)
    return images
