"""`--find-lr`: loss against a rising learning rate, and a suggestion (Smith, 2017)."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import UserError
from distributed.world import World
from optim import set_lr
from training.data import Batch, Data
from training.learner import Learner

LOWEST, HIGHEST, STEPS = 1e-6, 10.0, 100
SMOOTHING = 0.85

Step = Callable[[Learner, Data, Batch, int, int], None]


@dataclass(frozen=True)
class Rates:
    """Learning rates, the smoothed training loss at each, and the rate to take."""

    rates: list[float]
    losses: list[float]
    suggestion: float


def suggest(rates: list[float], losses: list[float]) -> float:
    """The middle of the decade over which the smoothed loss falls most, before its minimum.

    A whole decade, because between neighbours the noise of single batches falls more steeply.
    """
    lowest = min(range(len(losses)), key=losses.__getitem__)
    if len(rates) < 2 or not lowest:
        return rates[0]
    half = max(1, round(0.5 / math.log10(rates[1] / rates[0])))
    middles = range(half, lowest - half + 1)
    if not middles:
        return rates[lowest] / 10
    return rates[min(middles, key=lambda i: losses[i + half] - losses[i - half])]


def smooth(losses: list[float]) -> list[float]:
    """An exponential average without the bias of its start."""
    result, average = [], 0.0
    for count, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        result.append(average / (1 - SMOOTHING**count))
    return result


def find_lr(learner: Learner, data: Data, world: World, train_step: Step) -> Rates | None:
    """Train up to a hundred steps at rising rates, on all processes; None if told to stop."""
    rates, raw = [], []
    learner.model.train()
    for step, batch in enumerate(itertools.islice(world.until_left(data.endless()), STEPS)):
        rate = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
        set_lr(learner.optimizer, rate)
        train_step(learner, data, batch, step, step // data.sampler.steps_per_epoch)
        loss = learner.take_row(data.batch.batch_size)["train/loss"]
        best = min(smooth(raw), default=loss)
        if not math.isfinite(loss) or (step > 10 and loss > 4 * best):
            break
        rates.append(rate)
        raw.append(loss)
        if world.beat(step + 1):
            break
    if world.stop.reason:
        return None
    if not raw:
        raise UserError(
            "--find-lr: the loss is not finite even at the smallest learning rate",
            code="loss-not-finite",
        )
    losses = smooth(raw)
    return Rates(rates, losses, suggest(rates, losses))
