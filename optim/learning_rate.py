"""The learning rate as a pure function of the step."""

import math

import torch


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


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate; a group may scale it (`lr_scale`)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
