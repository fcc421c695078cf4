"""How long a run is, and what is due at which step: a pure function of numbers."""

from dataclasses import dataclass

from config import TrainConfig
from distributed.checkpoint import Progress
from optim import lr_at

ROWS_PER_EPOCH, MOST_STEPS_PER_ROW = 10, 50  # unless --log-every says otherwise


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps are optimizer updates, counted from 0; epochs too."""

    steps_per_epoch: int
    total_steps: int  # what the learning rate falls over
    last_step: int  # updates in all, where nothing stops the run
    peak_lr: float
    shape: str  # of the learning rate, as --schedule names it
    warmup_steps: int
    eval_every: int  # epochs
    log_every: int  # steps
    save_every: int  # steps; 0: by time
    patience: int = 0  # evaluations in a row without a better value that end a run; 0: none do
    plateau: int = 0  # those after which --schedule plateau divides the rate by ten

    def lr(self, step: int, drops: int = 0) -> float:
        """The learning rate of update number `step`, after so many drops of a plateau."""
        return lr_at(
            step, peak=self.peak_lr * 0.1**drops, schedule=self.shape,
            total_steps=self.total_steps, warmup_steps=self.warmup_steps,
        )  # fmt: skip

    def place(self, step: int) -> tuple[int, int]:
        """The epoch that update number `step` belongs to, and its number within it."""
        return divmod(step, self.steps_per_epoch)

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
        due = step % every == 0 or step >= self.last_step
        return due and step > progress.evaluated

    def over(self, progress: Progress) -> bool:
        return not (self.trains(progress) or self.evaluates(progress))

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, ends with so many updates made."""
        return step % self.steps_per_epoch == 0 or step == self.last_step

    def logs(self, step: int) -> bool:
        """Whether a row is due after so many updates."""
        return step % self.log_every == 0 or self.ends_epoch(step)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due by steps after so many updates."""
        return bool(self.save_every) and step % self.save_every == 0


def build_schedule(
    config: TrainConfig, steps_per_epoch: int, dry_run: bool = False, rows_by_time: bool = False
) -> Schedule:
    """The schedule of a configuration for a training set of so many batches.

    With `rows_by_time` only the ends of epochs are rows that are due by steps.
    """
    total = config.epochs * steps_per_epoch
    usual = max(1, min(MOST_STEPS_PER_ROW, steps_per_epoch // ROWS_PER_EPOCH))
    usual = total if rows_by_time else usual
    every = config.checkpoint_every
    return Schedule(
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        last_step=1 if dry_run else min(total, config.max_steps or total),
        peak_lr=config.lr,
        shape=config.schedule,
        warmup_steps=round(config.warmup * steps_per_epoch),
        eval_every=config.eval_every,
        log_every=config.log_every or usual,
        patience=config.patience,
        plateau=config.plateau,
        save_every=int(every) if every.isdigit() else steps_per_epoch * (every == "epoch"),
    )
