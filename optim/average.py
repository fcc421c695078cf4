"""Averaged weights: a moving average, and the mean that a schedule-free optimizer keeps."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from config import TrainConfig
from models.state import has_extra_state, twin
from optim.rows import ScheduleFreeAdamW


def build_average(model: nn.Module, config: TrainConfig) -> "WeightAverage | None":
    """The averaged weights of --ema; to be made before Accelerate wraps the model's forward."""
    if config.optimizer == "schedule_free":
        return ScheduleFreeWeights(model)
    return WeightAverage(model, config.ema) if config.ema else None


class WeightAverage:
    """An exponential moving average of the weights (EMA), as a second, separate model.

    Buffers (running statistics) are copied, not averaged. A skipped update averages nothing.
    After n updates the decay is at most (1 + n) / (10 + n): where the weights began is soon
    forgotten, however short the run.
    """

    def __init__(self, model: nn.Module, decay: float, warms_up: bool = True):
        self.decay, self.warms_up = decay, warms_up
        self.model = twin(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module, n: int, skipped: torch.Tensor | None = None) -> None:
        """Average update number n (from 0); `skipped`: 0-dim, on the device, 1: none was made."""
        mine: list[torch.Tensor] = list(self.model.parameters())
        change = torch._foreach_sub([p.detach() for p in model.parameters()], mine)
        weight = 1 - (min(self.decay, (1 + n) / (10 + n)) if self.warms_up else self.decay)
        torch._foreach_mul_(change, weight if skipped is None else weight * (1 - skipped))
        torch._foreach_add_(mine, change)

    def follow(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Whatever must be right before it is evaluated or saved."""
        self.copy_buffers(model)

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Also what modules answer to get_extra_state, and buffers that forward made anew."""
        mine, theirs = dict(self.model.named_buffers()), dict(model.named_buffers())
        if [b.shape for b in mine.values()] == [b.shape for b in theirs.values()]:
            if mine:
                torch._foreach_copy_(list(mine.values()), list(theirs.values()))
        else:
            for path, module in model.named_modules():
                self.model.get_submodule(path)._buffers |= {
                    k: b if b is None else b.clone() for k, b in module._buffers.items()
                }
        for path, module in model.named_modules():
            if has_extra_state(module):
                self.model.get_submodule(path).set_extra_state(module.get_extra_state())


class ScheduleFreeWeights(WeightAverage):
    """The mean of all steps that the optimizer schedule_free keeps, made when it is needed.

    No batch was trained with them: the statistics of norm layers are measured for each evaluation
    (training/norms.py), and stay until the next one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, 0.0)

    def update(self, *_: nn.Module | torch.Tensor | int | None) -> None:
        """The optimizer's own step did."""

    @torch.no_grad()
    def follow(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        assert isinstance(optimizer, ScheduleFreeAdamW)
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm)]
        measured = [b for norm in norms for b in norm.buffers(recurse=False)]
        kept = [b.clone() for b in measured]
        self.copy_buffers(model)
        for buffer, value in zip(measured, kept, strict=True):
            buffer.copy_(value)
        averaged = optimizer.averaged()
        for mine, p in zip(self.model.parameters(), model.parameters(), strict=True):
            if p in averaged:
                mine.copy_(averaged[p])
