"""An optimizer of the learner's own, and those that wait for the host to know of a bad step."""

import inspect

import torch
from torch import Tensor, nn

from common.errors import UserError
from models.own_file import load_own_class


class Waiting(torch.optim.Optimizer):
    """Asks on the host whether the update must be left out.

    Torch fuses no complex parameters, and an optimizer that is not fused knows no `found_inf`.
    """

    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True

    def step(self, closure: None = None) -> None:
        found, self.found_inf, self.grad_scale = self.found_inf, None, None  # torch's own names
        if found is None or found == 0:
            super().step()


class WaitingSGD(Waiting, torch.optim.SGD):
    """SGD for complex parameters."""


class WaitingAdamW(Waiting, torch.optim.AdamW):
    """AdamW for complex parameters."""


OURS = ("lr", "weight_decay", "momentum", "eps", "nesterov", "betas")  # settings of a group


def build_own(name: str, groups: list[dict], known: dict) -> torch.optim.Optimizer:
    """The optimizer FILE.py:Class, given what it takes of lr, momentum, betas and the like.

    One that does not read `found_inf` itself is made to wait: the host reads one number from the
    device in each step. It is tried on two weights first.
    """
    made = load_own_class(name, "--optimizer")
    takes = inspect.signature(made).parameters
    given = {key: value for key, value in known.items() if key in takes and value is not None}
    if not getattr(made, "_step_supports_amp_scaling", False):
        made = type(made.__name__, (Waiting, made), {})
    try:
        p = nn.Parameter(torch.ones(2, 2))
        tried = made([{"params": [p], "weight_decay": 0.0}], **given)
        p.grad = torch.ones(2, 2)
        tried.step()
        optimizer = made(groups, **given)
    except Exception as error:  # whatever a learner's code may raise
        raise UserError(
            f"--optimizer {name}: fails: {type(error).__name__}: {error}; it is made with groups "
            "of parameters and what its __init__ takes of lr, momentum, betas, eps, nesterov, and "
            "step() is called without a closure",
            code="optimizer-fails",
        ) from error
    other = [k for k, v in tried.state[p].items() if not isinstance(v, Tensor | int | float)]
    other += [k for k, v in tried.param_groups[0].items() if isinstance(v, Tensor)]
    if other:
        raise UserError(
            f"--optimizer {name}: keeps {', '.join(map(str, other))}; a checkpoint holds tensors "
            "and numbers in self.state[p], and numbers in self.param_groups",
            code="optimizer-state",
        )
    optimizer.set_by_us = OURS  # pyright: ignore[reportAttributeAccessIssue] - the rest is state
    return optimizer
