"""Optimizers that update a group of weights as one long row: Lion, NAdamW, LAMB and others.

Each of these keeps the law of build_optimizer: where `found_inf` is 1, nothing changes.
"""

import functools

import torch
from torch import Tensor

from models.state import as_real

Row = dict[str, Tensor]  # what is kept beside the weights, by name


class InRows(torch.optim.Optimizer):
    """The weights of a group are updated as one long row: few operations, however many there are.

    `update` says what becomes of a row; `rows` names what is kept of each weight, `numbers` what is
    kept of a group (0-dim, one copy with each of its parameters, for a checkpoint). Gradients come
    without a gradient scaler's factor: unscale them before.
    """

    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True  # else a gradient scaler would read found_inf, and wait
    rows: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ("step",)
    betas, eps = (0.0, 0.0), 0.0  # the usual ones, of those that have some

    def begin(self) -> None:
        """The state of a beginning, once the weights lie where they will."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                for name in (*self.rows, *self.numbers):
                    if name not in state:
                        state[name] = self.first(name, p)

    def first(self, name: str, p: Tensor) -> Tensor:
        """What is kept of a weight, or of its group, before the first update."""
        return torch.zeros_like(p) if name in self.rows else torch.zeros((), device=p.device)

    def update(
        self, weights: Tensor, gradients: Tensor, kept: Row, group: dict, sizes: list[int]
    ) -> tuple[Tensor, Row]:
        """The row of weights and what is kept after an update; nothing is changed in place."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Every trainable weight has a gradient: zero where no image used it."""
        self.begin()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            kinds = dict.fromkeys((p.dtype, p.device) for p in parameters)
            for kind in kinds:
                self._step_row([p for p in parameters if (p.dtype, p.device) == kind], group)

    def _step_row(self, parameters: list[Tensor], group: dict) -> None:
        states = [self.state[p] for p in parameters]
        weights = _row(parameters, parameters)
        gradients = _row([p.grad for p in parameters if p.grad is not None], parameters)
        kept = {name: _row([s[name] for s in states], parameters) for name in self.rows}
        kept |= {name: states[0][name] for name in self.numbers}
        sizes = [as_real(p).numel() for p in parameters]
        moved, now = self.update(weights, gradients, kept, group, sizes)
        if self.found_inf is not None:
            bad = self.found_inf > 0
            moved = torch.where(bad, weights, moved)
            now = {name: torch.where(bad, kept[name], value) for name, value in now.items()}
        _put(parameters, moved, parameters)
        for name in self.rows:
            _put([s[name] for s in states], now[name], parameters)
        for name in self.numbers:
            torch._foreach_copy_([s[name] for s in states], [now[name]] * len(states))


def as_stored(tensor: Tensor, weight: Tensor) -> Tensor:
    """The axes in the order in which those of the weight lie in memory: with channels last, last.

    Then a row is no copy. Complex numbers are pairs.
    """
    channels_last = weight.ndim == 4 and not weight.is_contiguous()
    return as_real(tensor).movedim(1, 3) if channels_last else as_real(tensor)


def _row(tensors: list[Tensor], weights: list[Tensor]) -> Tensor:
    return torch.cat([as_stored(t, w).flatten() for t, w in zip(tensors, weights, strict=True)])


def _put(tensors: list[Tensor], row: Tensor, weights: list[Tensor]) -> None:
    mine = [as_stored(t, w) for t, w in zip(tensors, weights, strict=True)]
    parts = row.split([m.numel() for m in mine])
    torch._foreach_copy_(mine, [part.view(m.shape) for part, m in zip(parts, mine, strict=True)])


@functools.cache
def _lengths(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(sizes, device=device)


class Lion(InRows):
    """The sign of a momentum (Chen et al., 2023), with decoupled weight decay."""

    rows = ("momentum",)
    numbers = ()
    betas = (0.9, 0.99)

    def update(
        self, weights: Tensor, gradients: Tensor, kept: Row, group: dict, sizes: list[int]
    ) -> tuple[Tensor, Row]:
        (first, second), lr = group["betas"], group["lr"]
        momentum = kept["momentum"]
        change = momentum.lerp(gradients, 1 - first).sign()
        moved = (weights * (1 - lr * group["weight_decay"])).sub(change, alpha=lr)
        return moved, {"momentum": momentum.lerp(gradients, 1 - second)}


def _moments(gradients: Tensor, kept: Row, group: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's step count and running means of gradients and of their squares."""
    first, second = group["betas"]
    mean = kept["mean"].lerp(gradients, 1 - first)
    square = (kept["square"] * second).addcmul(gradients, gradients, value=1 - second)
    return kept["step"] + 1, mean, square


class NAdamW(InRows):
    """AdamW with Nesterov's momentum (Dozat, 2016), as torch's NAdam with decoupled decay."""

    rows = ("mean", "square")
    numbers = ("step", "product")
    betas, eps = (0.9, 0.999), 1e-8
    DECAY = 0.004  # of the momentum, as torch has it

    def first(self, name: str, p: Tensor) -> Tensor:
        return super().first(name, p) + (name == "product")

    def update(
        self, weights: Tensor, gradients: Tensor, kept: Row, group: dict, sizes: list[int]
    ) -> tuple[Tensor, Row]:
        (first, second), lr = group["betas"], group["lr"]
        step, mean, square = _moments(gradients, kept, group)
        now, following = (
            first * (1 - 0.5 * 0.96 ** (n * self.DECAY)) for n in (step, step + 1)
        )  # fmt: skip
        product = kept["product"] * now
        length = (square / (1 - second**step)).sqrt() + group["eps"]
        change = gradients * ((1 - now) / (1 - product))
        change = (change + mean * (following / (1 - product * following))) / length
        moved = (weights * (1 - lr * group["weight_decay"])).sub(change, alpha=lr)
        return moved, {"mean": mean, "square": square, "step": step, "product": product}


class Lamb(InRows):
    """Adam whose update of each weight tensor is as long as the tensor (You et al., ICLR 2020).

    Biases and norms take Adam's own step, as in the large-batch recipes that use it.
    """

    rows = ("mean", "square")
    betas, eps = (0.9, 0.999), 1e-6

    def update(
        self, weights: Tensor, gradients: Tensor, kept: Row, group: dict, sizes: list[int]
    ) -> tuple[Tensor, Row]:
        first, second = group["betas"]
        step, mean, square = _moments(gradients, kept, group)
        length = (square / (1 - second**step)).sqrt() + group["eps"]
        change = mean / (1 - first**step) / length + weights * group["weight_decay"]
        if group["adapts"]:
            norms = [torch.stack(torch._foreach_norm(x.split(sizes))) for x in (weights, change)]
            ratio = torch.where((norms[0] > 0) & (norms[1] > 0), norms[0] / norms[1], 1.0)
            parts = _lengths(tuple(sizes), weights.device)
            change = change * ratio.repeat_interleave(parts, output_size=len(change))
        moved = weights.sub(change, alpha=group["lr"])
        return moved, {"mean": mean, "square": square, "step": step}


class RMSprop(InRows):
    """Gradients over their running length (Hinton, 2012), with momentum; torch's RMSprop."""

    rows = ("square", "momentum")
    numbers = ()
    eps = 1e-8
    DECAY = 0.99

    def update(
        self, weights: Tensor, gradients: Tensor, kept: Row, group: dict, sizes: list[int]
    ) -> tuple[Tensor, Row]:
        gradients = gradients.add(weights, alpha=group["weight_decay"])
        square = (kept["square"] * self.DECAY).addcmul(gradients, gradients, value=1 - self.DECAY)
        change = gradients / (square.sqrt() + group["eps"])
        momentum = kept["momentum"] * group["momentum"] + change
        moved = weights.sub(momentum, alpha=group["lr"])
        return moved, {"square": square, "momentum": momentum}


class ScheduleFreeAdamW(InRows):
    """AdamW whose averaged weights need no falling rate (Defazio et al., 2024).

    Trained is y, between z, which takes the steps, and x, the mean of all z so far, which is
    evaluated: `averaged`. A z weighs as the square of the highest rate so far.
    """

    rows = ("z", "square")
    numbers = ("step", "highest", "sum")
    betas, eps = (0.9, 0.999), 1e-8

    def first(self, name: str, p: Tensor) -> Tensor:
        return p.detach().clone() if name == "z" else super().first(name, p)

    def update(
        self, weights: Tensor, gradients: Tensor, kept: Row, group: dict, sizes: list[int]
    ) -> tuple[Tensor, Row]:
        (first, second), lr = group["betas"], group["lr"]
        step = kept["step"] + 1
        square = (kept["square"] * second).addcmul(gradients, gradients, value=1 - second)
        change = gradients / ((square / (1 - second**step)).sqrt() + group["eps"])
        change = change.add(weights, alpha=group["weight_decay"])
        highest = kept["highest"].clamp(min=lr)
        total = kept["sum"] + highest**2
        part = torch.where(total > 0, highest**2 / total, 0.0)
        moved = weights.lerp(kept["z"], part) + change * (lr * (first * (1 - part) - 1))
        z = kept["z"].sub(change, alpha=lr)
        return moved, {"z": z, "square": square, "step": step, "highest": highest, "sum": total}

    @torch.no_grad()
    def averaged(self) -> dict[Tensor, Tensor]:
        """x by its parameter, of those that are trained."""
        return {
            p: p.lerp(self.state[p]["z"], 1 - 1 / group["betas"][0])
            for group in self.param_groups
            for p in group["params"]
        }


IN_ROWS: dict[str, type[InRows]] = {
    "lion": Lion,
    "nadamw": NAdamW,
    "lamb": Lamb,
    "rmsprop": RMSprop,
    "schedule_free": ScheduleFreeAdamW,
}
