"""Optimizers, parameter groups, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.sgd import sgd

from config import TrainConfig
from models.hooks import HasMuonGroups
from models.own_file import is_own_file
from models.state import has_extra_state, twin
from models.weights import depths
from optimizers import IN_ROWS, InRows, ScheduleFreeAdamW, Waiting, as_stored, build_own


def lr_at(
    step: int, *, peak: float, schedule: str, total_steps: int, warmup_steps: int = 0
) -> float:
    """The learning rate of update number `step` (from 0), for `total_steps` updates in all.

    Warm-up rises linearly and reaches the peak at update `warmup_steps`; `step` divides by ten
    after half and after three quarters of the way. `exponential` falls to a thousandth,
    `cosine_restarts` begins anew after 1/7 and 3/7 of the way (SGDR with T_mult 2), `one_cycle` is
    torch's OneCycleLR as it comes, without the momentum's cycle. `plateau` is constant here: what
    has been evaluated decides when it falls (Schedule.lr).
    """
    if step < warmup_steps and schedule != "one_cycle":
        return peak * (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule in ("constant", "plateau"):
        return peak
    if schedule == "exponential":
        return peak * 0.001**done
    if schedule == "one_cycle":
        return _one_cycle(step, peak, total_steps)
    if schedule == "cosine_restarts":
        done = next(
            c * done - s for c, s in ((7, 0), (3.5, 0.5), (1.75, 0.75)) if c * done - s <= 1
        )
    if schedule == "linear":
        return peak * (1 - done)
    if schedule in ("cosine", "cosine_restarts"):
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * 0.1 ** ((done >= 0.5) + (done >= 0.75))


def _one_cycle(step: int, peak: float, total_steps: int) -> float:
    """From a 25th up to the peak over 30 % of the way, then down to a 10,000th of that."""
    low, rise = peak / 25, max(1.0, 0.3 * total_steps - 1)
    start, end, done = low, peak, step / rise
    if step > rise:
        fall = max(1.0, total_steps - 1 - rise)
        start, end, done = peak, low / 1e4, min(1.0, (step - rise) / fall)
    return end + (start - end) / 2 * (1 + math.cos(math.pi * done))


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool = False) -> list[dict]:
    """Trainable parameters in two groups: weights decay, biases and norms (1-D) only if asked."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    others = weight_decay if decay_all else 0.0
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": others},
    ]


def layer_groups(model: nn.Module, groups: list[dict], config: TrainConfig) -> list[dict]:
    """The groups, each once per depth, with the factor of the rate that --layer-decay gives it.

    As BEiT (Bao et al., 2021) fine-tunes: the head learns at the whole rate, what lies d layers
    before it at layer_decay ** d of it.
    """
    depth = depths(model, config.model, config.image_size)
    at = {p: depth[name] for name, p in model.named_parameters()}
    deepest = max(depth.values())
    return [
        {**group, "params": [p for p in group["params"] if at[p] == d], "lr_scale": scale}
        for d in range(deepest, -1, -1)
        for scale in [config.layer_decay ** (deepest - d)]
        for group in groups
    ]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of the config, fused where torch has it; lr is set by us at each step.

    Each one that --optimizer names keeps a law: in a step whose `found_inf` (0-dim, on the device)
    is 1 it leaves weights and state alone, the first step too, once `start_state` was called; a
    step that was left out leaves no trace in later ones.
    """
    groups = build_groups(model, config)
    betas = tuple(map(float, config.betas.split(","))) if config.betas else None
    eps = config.eps
    if config.optimizer in IN_ROWS:
        kind = IN_ROWS[config.optimizer]
        defaults = {"lr": config.lr, "momentum": config.momentum, "betas": betas or kind.betas}
        return kind(groups, defaults | {"eps": kind.eps if eps is None else eps})
    if is_own_file(config.optimizer):
        known = {"lr": config.lr, "momentum": config.momentum, "betas": betas, "eps": eps}
        return build_own(config.optimizer, groups, known | {"nesterov": config.nesterov or None})
    fused = not any(p.is_complex() for p in model.parameters())
    adamw, plain = (torch.optim.AdamW, torch.optim.SGD) if fused else (WaitingAdamW, WaitingSGD)
    if config.optimizer == "adamw":
        adam = {"betas": betas or (0.9, 0.999), "eps": 1e-8 if eps is None else eps}
        return adamw(groups, lr=config.lr, fused=fused, **adam)
    if config.optimizer == "muon":
        return Muon(groups, lr=config.lr, momentum=config.momentum)
    momentum, nesterov = config.momentum, config.nesterov
    return plain(groups, lr=config.lr, momentum=momentum, nesterov=nesterov, fused=fused)


def build_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """The trainable parameters in groups, as the optimizer of the config takes them."""
    if config.optimizer == "muon":
        return muon_groups(model, config.weight_decay, config.decay_all)
    groups = parameter_groups(model, config.weight_decay, config.decay_all)
    if config.layer_decay != 1:
        groups = layer_groups(model, groups, config)
    groups = [group for group in groups if group["params"]]
    if config.optimizer in IN_ROWS:
        for group in groups:
            group["adapts"] = group["params"][0].ndim > 1  # lamb's step is as long as the weights
    return groups


def add_parameters(
    optimizer: torch.optim.Optimizer, model: nn.Module, config: TrainConfig,
    fresh: set[nn.Parameter],
) -> None:  # fmt: skip
    """Groups of their own for parameters that begin to train; those of the others stay.

    What is counted per group (Adam's steps) begins with them.
    """
    for group in build_groups(model, config):
        if params := [p for p in group["params"] if p in fresh]:
            optimizer.add_param_group({**group, "params": params})
    start_state(optimizer)


def start_state(optimizer: torch.optim.Optimizer) -> None:
    """The momentum of a beginning: zeros like the weights, where nothing was kept before.

    To be called once all have wrapped the model and its weights lie where they will. Without it
    torch's fused SGD would make its momentum of whatever a first step that is left out had.
    """
    if isinstance(optimizer, InRows):
        optimizer.begin()
        return
    for group in optimizer.param_groups:
        for p in group["params"] if group.get("momentum") else ():
            optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))


class WaitingSGD(Waiting, torch.optim.SGD):
    """SGD for complex parameters."""


class WaitingAdamW(Waiting, torch.optim.AdamW):
    """AdamW for complex parameters."""


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate; a group may scale it (`lr_scale`)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def muon_groups(model: nn.Module, weight_decay: float, decay_all: bool = False) -> list[dict]:
    """Groups for Muon: those that the model declares, else filters, other weights and 1-D ones.

    Where a group's rate is scaled, its weight decay shrinks the weights as much as in the others.
    """
    if isinstance(model, HasMuonGroups):
        groups = model.muon_groups()
    else:
        weights, others = parameter_groups(model, weight_decay, decay_all)
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
    nothing changes. Gradients come without a gradient scaler's factor: unscale them before.

    On a GPU a group is updated in few operations over all of it, in the same way up to rounding.
    """

    found_inf: torch.Tensor | None = None
    _step_supports_amp_scaling = True  # else a gradient scaler would read found_inf, and wait

    def __init__(self, groups: list[dict], lr: float, momentum: float):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": 0.0}
        super().__init__(groups, defaults | {"orthogonal": False, "hold_length": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and parameters[0].is_cuda:
                self._update_together(parameters, group)
                continue
            for p in parameters:
                self._update(p, group)

    def _momentum(self, p: torch.Tensor) -> torch.Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    def _update(self, p: torch.Tensor, group: dict) -> None:
        lr, decay, beta = group["lr"], group["weight_decay"], group["momentum"]
        old = self._momentum(p)
        assert p.grad is not None
        gradient = p.grad if group["orthogonal"] else p.grad.add(p, alpha=decay)
        momentum = gradient.add(old, alpha=beta)
        change = gradient.add(momentum, alpha=beta)
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

    def _update_together(self, parameters: list[torch.Tensor], group: dict) -> None:
        lr, decay, beta = group["lr"], group["weight_decay"], group["momentum"]
        buffers = [self._momentum(p) for p in parameters]
        if not group["orthogonal"]:
            sgd(
                parameters, [p.grad for p in parameters if p.grad is not None], [*buffers],
                fused=True, found_inf=self.found_inf, weight_decay=decay, momentum=beta, lr=lr,
                dampening=0.0, nesterov=True, maximize=False,
            )  # fmt: skip
            return
        # One long row of all filters as they lie in memory, equal shapes side by side: the columns
        # of a filter's matrix may have any order, Muon turns them all alike.
        shapes = [(len(p), p[0].numel()) for p in parameters]
        order = sorted(range(len(shapes)), key=shapes.__getitem__)
        filters = [parameters[i] for i in order]
        weights = [as_stored(p, p).view(len(p), -1) for p in filters]
        olds = [as_stored(buffers[i], parameters[i]).view(shapes[i]) for i in order]
        gradients = [as_stored(p.grad, p) for p in filters if p.grad is not None]
        gradient = torch.cat([g.flatten() for g in gradients])
        weight = torch.cat([w.flatten() for w in weights])
        old = torch.cat([b.flatten() for b in olds])
        momentum = gradient.add(old, alpha=beta)
        change = gradient.add(momentum, alpha=beta)
        change = torch.cat([x.flatten() for x in orthogonal_stacks(_stacks(change, weights))])
        if group["hold_length"]:
            lengths = torch._foreach_norm(weights)
            lengths = torch.stack(torch._foreach_div(lengths, [len(w) ** 0.5 for w in weights]))
            stacks, moved = _stacks(weight, weights), []
            for stack, length in zip(stacks, lengths.split([len(x) for x in stacks]), strict=True):
                moved.append((stack / length[:, None, None]).flatten())
            moved = torch.cat(moved)
        else:
            moved = weight * (1 - lr * decay)
        moved = moved.sub_(change, alpha=lr)
        if self.found_inf is not None:
            bad = self.found_inf > 0
            momentum, moved = torch.where(bad, old, momentum), torch.where(bad, weight, moved)
        for mine, row in ((olds, momentum), (weights, moved)):
            parts = row.split([m.numel() for m in mine])
            torch._foreach_copy_(mine, [x.view_as(m) for x, m in zip(parts, mine, strict=True)])


def _stacks(row: torch.Tensor, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Views (k, n, m) of a row that holds matrices, equal shapes side by side."""
    shapes = [m.shape for m in matrices]
    kinds = list(dict.fromkeys(shapes))
    parts = row.split([shapes.count(kind) * kind.numel() for kind in kinds])
    return [part.view(-1, *kind) for part, kind in zip(parts, kinds, strict=True)]


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # x <- a x + (b s + c s s) x with s = x x'
SMALLEST_SQUARE = 256  # smaller ones are filled up: on a GPU that costs less than more operations


def orthogonal(matrix: torch.Tensor, steps: int = 3) -> torch.Tensor:
    """About the nearest (semi-)orthogonal matrix (n, m): singular values of 0.7 to 1.2.

    Newton-Schulz iterations whose polynomial is steep at 0 rather than exact at 1: three of them
    are enough for a direction of an update (Jordan et al., 2024).
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.float()
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x if wide is matrix else x.T).to(matrix.dtype)


def orthogonal_stacks(stacks: list[torch.Tensor], steps: int = 3) -> list[torch.Tensor]:
    """`orthogonal` of each matrix in stacks (k, n, m), in as few operations as may be.

    An iteration multiplies x by a polynomial of the square x x'. The next square follows from this
    one alone, so all iterations are on squares, filled up with zeros and stacked together, and x is
    multiplied once, at the end.
    """
    a, b, c = NEWTON_SCHULZ
    wide = [x if x.shape[1] <= x.shape[2] else x.mT for x in stacks]
    sides = [max(SMALLEST_SQUARE, x.shape[1]) for x in wide]
    done: dict[int, torch.Tensor] = {}
    for side in dict.fromkeys(sides):
        mine = [i for i, other in enumerate(sides) if other == side]
        square = wide[0].new_zeros(sum(len(wide[i]) for i in mine), side, side)
        places = square.split([len(wide[i]) for i in mine])
        for i, place in zip(mine, places, strict=True):
            n = wide[i].shape[1]
            torch.bmm(wide[i], wide[i].mT, out=place[:, :n, :n])
        length = (square.diagonal(dim1=1, dim2=2).sum(1).sqrt() + 1e-7)[:, None, None]
        square /= length.square()
        factor = None
        for step in range(steps):
            polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
            polynomial.diagonal(dim1=1, dim2=2).add_(a)
            factor = polynomial if factor is None else polynomial @ factor
            if step < steps - 1:
                square = polynomial @ square @ polynomial
        assert factor is not None
        factor = factor / length
        for i, part in zip(mine, factor.split([len(wide[i]) for i in mine]), strict=True):
            n = wide[i].shape[1]
            done[i] = part[:, :n, :n] @ wide[i]
    return [done[i] if wide[i] is x else done[i].mT for i, x in enumerate(stacks)]


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
