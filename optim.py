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
    if config.optimizer == "muon":
        groups = muon_groups(model, config.weight_decay)
        return Muon(groups, lr=config.lr, momentum=config.momentum)
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


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Groups for Muon: those that the model declares, else filters, other weights and 1-D ones.

    Where a group's rate is scaled, its weight decay shrinks the weights as much as in the others.
    """
    if hasattr(model, "muon_groups"):
        groups = model.muon_groups()
    else:
        weights, others = parameter_groups(model, weight_decay)
        filters = [p for p in weights["params"] if p.ndim > 2]
        matrices = [p for p in weights["params"] if p.ndim == 2]
        groups = [{"params": filters, "orthogonal": True}, {"params": matrices}, others]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
        group.setdefault("weight_decay", weight_decay / group.get("lr_scale", 1.0))
    return [group for group in groups if group["params"]]


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for convolutions (Jordan et al., 2024), SGD for the rest.

    In a group with `orthogonal`, a filter (out, in, height, width) is a matrix of `out` rows, and
    its update is its Nesterov momentum made orthogonal: every direction moves equally far, by lr.
    `hold_length` keeps the filter's norm at sqrt(out), for filters that a norm layer follows.
    The other groups take Nesterov SGD steps. Where `found_inf` (0-dim, on the device) is 1,
    nothing changes.
    """

    found_inf: torch.Tensor | None = None

    def __init__(self, groups: list[dict], lr: float, momentum: float):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": 0.0}
        super().__init__(groups, defaults | {"orthogonal": False, "hold_length": False})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: torch.Tensor, group: dict) -> None:
        lr, decay, keep = group["lr"], group["weight_decay"], group["momentum"]
        old = self.state[p]["momentum_buffer"]
        gradient = p.grad if group["orthogonal"] else p.grad.add(p, alpha=decay)
        momentum = gradient.add(old, alpha=keep)
        change = gradient.add(momentum, alpha=keep)
        weight = p
        if group["orthogonal"]:
            change = orthogonal(change.flatten(1)).view(p.shape)
            scale = len(p) ** 0.5 / p.norm() if group["hold_length"] else 1 - lr * decay
            weight = p * scale
        weight = weight.sub(change, alpha=lr)
        if self.found_inf is not None:
            bad = self.found_inf > 0
            momentum, weight = torch.where(bad, old, momentum), torch.where(bad, p, weight)
        old.copy_(momentum)
        p.copy_(weight)


def orthogonal(matrix: torch.Tensor, steps: int = 3) -> torch.Tensor:
    """About the nearest (semi-)orthogonal matrix (n, m): singular values of 0.7 to 1.2.

    Newton-Schulz iterations whose polynomial is steep at 0 rather than exact at 1: three of them
    are enough for a direction of an update (Jordan et al., 2024).
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    # bf16 is the fast matrix type of GPUs; most CPUs have none.
    x = wide.bfloat16() if matrix.is_cuda else wide.float()
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x if wide is matrix else x.T).to(matrix.dtype)


def build_average(model: nn.Module, config: TrainConfig) -> "WeightAverage | None":
    """The averaged weights of --ema; to be made before Accelerate wraps the model's forward."""
    return WeightAverage(model, config.ema) if config.ema else None


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
