"""How long a run is, and what is due at which step: a pure function of numbers."""

import math
from dataclasses import dataclass

from common.text import counted
from config import TrainConfig, unfreezing
from distributed.checkpoint import Progress
from optim import lr_at

ROWS_PER_EPOCH, MOST_STEPS_PER_ROW = 10, 50  # unless --log-every says otherwise


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps are optimizer updates, counted from 0; epochs too.

    A run whose batch or data changed is `ahead` of its steps: what depends on how much was seen
    (the rate, the place in the order, the end) is a function of step + ahead.
    """

    steps_per_epoch: int
    total_steps: int  # what the learning rate falls over, with those it is ahead
    last_step: int  # updates in all, where nothing stops the run
    ahead: int = 0
    peak_lr: float
    shape: str  # of the learning rate, as --schedule names it
    warmup_steps: int
    eval_every: int  # epochs
    log_every: int  # steps
    save_every: int  # steps; 0: by time, or at the ends of epochs
    save_epochs: bool = False
    patience: int = 0  # evaluations in a row without a better value that end a run; 0: none do
    plateau: int = 0  # those after which --schedule plateau divides the rate by ten

    def lr(self, step: int, drops: int = 0) -> float:
        """The learning rate of update number `step`, after so many drops of a plateau."""
        return lr_at(
            step + self.ahead, peak=self.peak_lr * 0.1**drops, schedule=self.shape,
            total_steps=self.total_steps, warmup_steps=self.warmup_steps,
        )  # fmt: skip

    def place(self, step: int) -> tuple[int, int]:
        """The epoch that update number `step` belongs to, and its number within it."""
        return divmod(step + self.ahead, self.steps_per_epoch)

    def seen(self, step: int) -> float:
        """Epochs seen after so many updates."""
        return (step + self.ahead) / self.steps_per_epoch

    @property
    def epochs(self) -> int:
        """Passes over the training images, the last one maybe not whole."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    @property
    def stops_early(self) -> bool:
        """Whether --stop-after ends this life before the schedule does."""
        return self.last_step < self.total_steps - self.ahead

    def trains(self, progress: Progress) -> bool:
        return progress.step < self.last_step and not self.gave_up(progress)

    def gave_up(self, progress: Progress) -> bool:
        """Whether too many evaluations in a row were no better."""
        return bool(self.patience) and progress.stale >= self.patience

    def judge(self, progress: Progress, better: bool) -> bool:
        """Count an evaluation, better than all before or not; whether the rate falls by it."""
        progress.stale = 0 if better else progress.stale + 1
        progress.flat = 0 if better else progress.flat + 1
        if self.shape != "plateau" or progress.flat < self.plateau:
            return False
        progress.flat, progress.drops = 0, progress.drops + 1
        return True

    def evaluates(self, progress: Progress) -> bool:
        """Whether an evaluation is due before the next update."""
        step, every = progress.step, self.steps_per_epoch * self.eval_every
        due = (step + self.ahead) % every == 0 or step >= self.last_step
        return due and step > progress.evaluated

    def evaluations_left(self, progress: Progress) -> int:
        """How many evaluations are to come, where nothing ends the run early."""
        every, now = self.steps_per_epoch * self.eval_every, progress.step + self.ahead
        end = self.last_step + self.ahead
        last = end % every > 0 and now < end  # in mid-epoch
        return end // every - now // every + last + self.evaluates(progress)

    def over(self, progress: Progress) -> bool:
        return not (self.trains(progress) or self.evaluates(progress))

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, ends with so many updates made."""
        return self.place(step)[1] == 0 or step == self.last_step

    def logs(self, step: int) -> bool:
        """Whether a row is due after so many updates."""
        return step % self.log_every == 0 or self.ends_epoch(step)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due by steps after so many updates."""
        if self.save_epochs:
            return self.place(step)[1] == 0
        return bool(self.save_every) and step % self.save_every == 0


def build_schedule(
    config: TrainConfig, steps_per_epoch: int, dry_run: bool = False, rows_by_time: bool = False,
    *, ahead: int = 0, stop_after: int | None = None, epochs_bind: bool = False,
) -> Schedule:  # fmt: skip
    """The schedule of a configuration for a training set of so many batches.

    --max-steps is the length where it is given; with `epochs_bind` (both were typed) the epochs
    may end it before. --stop-after only ends this life. With `rows_by_time` only the ends of
    epochs are rows that are due by steps.
    """
    total = config.epochs * steps_per_epoch
    if config.max_steps:
        asked = config.max_steps + ahead
        total = min(total, asked) if epochs_bind else asked
    last = total - ahead if stop_after is None else min(total - ahead, stop_after)
    usual = max(1, min(MOST_STEPS_PER_ROW, steps_per_epoch // ROWS_PER_EPOCH))
    usual = total if rows_by_time else usual
    every = config.checkpoint_every
    return Schedule(
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        last_step=1 if dry_run else last,
        ahead=ahead,
        peak_lr=config.lr,
        shape=config.schedule,
        warmup_steps=round(config.warmup * steps_per_epoch),
        eval_every=config.eval_every,
        log_every=config.log_every or usual,
        patience=config.patience,
        plateau=config.plateau,
        save_every=int(every) if every.isdigit() else 0,
        save_epochs=every == "epoch",
    )


def doubts(config: TrainConfig, schedule: Schedule, progress: Progress, bound: bool) -> list[str]:
    """What is odd about the length of a run: sentences for its start.

    `bound`: --epochs and --max-steps were both typed.
    """
    found, total = [], schedule.total_steps
    seen = progress.step + schedule.ahead
    if schedule.warmup_steps >= total:
        found.append(
            f"the warm-up of --warmup {config.warmup:g} ({counted(schedule.warmup_steps, 'step')}) "
            f"is longer than the run ({counted(total, 'step')}): the rate never reaches --lr "
            f"{config.lr:g}"
        )
    if config.ema and 1 / (1 - config.ema) > total:
        found.append(
            f"an average of --ema {config.ema:g} spans {1 / (1 - config.ema):,.0f} updates, the "
            f"run has {total}: it averages about its last tenth"
        )
    late = [epoch + 1 for epoch, _ in unfreezing(config.unfreeze) if epoch >= schedule.epochs]
    if late:
        found.append(
            f"--unfreeze {config.unfreeze}: the run has {counted(schedule.epochs, 'epoch')}, and "
            f"epoch {late[0]} never comes"
        )
    if bound and config.max_steps and config.max_steps + schedule.ahead > total:
        found.append(
            f"--epochs {config.epochs} ends the run at step {total - schedule.ahead}, before "
            f"--max-steps {config.max_steps}; leave --epochs out to train so many steps"
        )
    if seen > total:
        found.append(
            f"the run has seen {seen / schedule.steps_per_epoch:.3g} epochs, more than the "
            f"{total / schedule.steps_per_epoch:.3g} that are asked for: nothing is trained"
        )
    now = schedule.lr(progress.step, progress.drops)
    if 0 < progress.step < schedule.last_step and 0 < 1.5 * progress.lr < now:
        rises = schedule.shape in ("one_cycle", "cosine_restarts")  # by its own design
        if not rises and seen > schedule.warmup_steps:
            found.append(
                f"the learning rate jumps up from {progress.lr:.3g} to {now:.3g}: the schedule is "
                f"now that of a run of {counted(schedule.epochs, 'epoch')}; a new run with "
                "--weights and a lower --lr goes on more gently"
            )
    return found
