"""`--find-lr`: loss against a rising learning rate, and a suggestion (Smith, 2017)."""

import math
from pathlib import Path

from distributed.accelerator import end
from errors import FINISHED, STOPPED, UserError
from optim import set_lr
from report import pictures
from report.screen import Report

LOWEST, HIGHEST, STEPS = 1e-6, 10.0, 100
SMOOTHING = 0.85


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


def find_lr(run, train_step) -> int:
    """Train up to a hundred steps at rising rates; all processes take part, one tells."""
    rates, raw = [], []
    batches = run.endless_batches()
    run.model.train()
    for step in range(STEPS):
        rate = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
        set_lr(run.optimizer.optimizer, rate)
        run.sums.zero_()
        train_step(run, next(batches))
        loss = math.fsum(run.window()) / run.plan.batch_size
        best = min(smooth(raw), default=loss)
        if not math.isfinite(loss) or (step > 10 and loss > 4 * best):
            break
        rates.append(rate)
        raw.append(loss)
        run.progress.step += 1
        if run.beat():
            break
    end(run.accelerator)  # first: what fails below is the main process's affair alone
    if run.stop_reason:
        run.report.show(f"--find-lr: {run.stop.why(run.stop_reason)} after {len(raw)} steps")
        return STOPPED
    if not raw:
        raise UserError(
            "--find-lr: the loss is not finite even at the smallest learning rate",
            code="loss-not-finite",
        )
    losses = smooth(raw)
    suggestion = suggest(rates, losses)
    if run.is_main:
        tell(run.report, run.config, rates, losses, suggestion)
    return FINISHED


def tell(report: Report, config, rates: list, losses: list, suggestion: float) -> None:
    """The table, the picture and what to type."""
    path = Path("runs") / f"find-lr-{Path(config.model.replace(':', '-')).name}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        pictures.lr_curve(rates, losses, suggestion, path)
        picture = str(path)
    except OSError as error:
        report.warn(f"--find-lr: {path} cannot be written ({error}); type it in another folder")
        picture = "none"
    every = max(1, len(rates) // 12)
    shown = list(zip(rates, losses, strict=True))[::every]
    rows = [(f"{rate:.2e}", f"loss {loss:.4f}") for rate, loss in shown]
    rows += [("picture", picture), ("suggested", f"--lr {suggestion:.2g}")]
    rows.append(("optimizer", f"{config.optimizer}, batch {config.batch_size}; no run was made"))
    report.end_panel("learning rate", rows, good=True)
