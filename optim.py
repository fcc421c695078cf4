"""Optimizers, parameter groups, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from config import TrainConfig


def lr_at(
    step: int, *, peak: float, schedule: str, total_steps: int, warmup_steps: int = 0
) -> float:
    """The learning rate of update number `step` (from 0), for `total_steps` updates in all.

    Warm-up rises linearly and reaches the peak at update `warmup_steps`; `step` divides by ten
    after half and after three quarters of the way.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * 0.1 ** ((done >= 0.5) + (done >= 0.75))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: weights decay, biases and norms (1-D) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of the config, fused where torch has it; lr is set by us at each step."""
    groups = [g for g in parameter_groups(model, config.weight_decay) if g["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    if config.momentum:  # zeros from the start: a first update that is skipped leaves no garbage
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate; a group may scale it (`lr_scale`)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class WeightAverage:
    """An exponential moving average of the weights (EMA), as a second, separate model.

    Buffers (running statistics) are copied, not averaged. A skipped update averages nothing.
    """

    def __init__(self, model: nn.Module, decay: float):
        import copy

        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module, skipped: torch.Tensor | None = None) -> None:
        """One update's average; `skipped` is a 0-dim float on the device, 1 where none was made."""
        mine = list(self.model.parameters())
        change = torch._foreach_sub([p.detach() for p in model.parameters()], mine)
        weight = 1 - self.decay
        torch._foreach_mul_(change, weight if skipped is None else weight * (1 - skipped))
        torch._foreach_add_(mine, change)

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
