"""The optimizer of the config, and the groups that its parameters stand in."""

import torch
from torch import nn

from config import TrainConfig
from models.hooks import HasMuonGroups
from models.own_file import is_own_file
from models.weights import depths
from optim.muon import Muon
from optim.own import WaitingAdamW, WaitingSGD, build_own
from optim.rows import IN_ROWS, InRows


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
