"""When a run is saved, and where it goes on."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.text import both_sides, seconds
from distributed.checkpoint import (
    Progress,
    Writer,
    capture,
    newest_valid,
    read_checkpoint,
    restore,
    save_tensors,
)
from distributed.world import World
from errors import UserError
from training.learner import Learner
from training.plan import Plan, classes_of_run
from training.schedule import Schedule


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints and weights of one run folder; of none, where nothing is kept.

    `facts` are fingerprints (data, order, model, code) that a checkpoint carries and a resume
    compares. `card` is what a file of weights says of itself. Leaving the context waits for the
    save that is under way.
    """

    def __init__(
        self,
        plan: Plan,
        facts: dict[str, str],
        card: dict[str, object],
        world: World,
        on_saved: Callable[[str], None],
    ) -> None:
        self.plan, self.facts, self.card, self.world = plan, facts, card, world
        self.folder, config = plan.folder, plan.config
        self.writer = None
        if self.folder is not None and world.is_main:
            world.watch.before_the_end = self._finish_writing
            self.writer = Writer(
                self.folder / "checkpoints", config.keep, lambda _: on_saved(self._problem())
            )
        by_time = config.checkpoint_every != "epoch" and not config.checkpoint_every.isdigit()
        world.stop.save_every = seconds(config.checkpoint_every) if by_time else None
        self._mark = world.began
        self._saved: tuple[int, int] | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self.writer is not None:
            self.writer.wait()

    def resume(self, learner: Learner, warn: Callable[[str], None]) -> Progress:
        """Restore the newest whole checkpoint, if there is one; where the run stands.

        For --eval-only it restores the best weights of a named run. Raises UserError where the
        data are others.
        """
        if self.plan.actions.eval_only and self.plan.config.run_dir is not None:
            self._compare_classes()
            self._load_best(Path(self.plan.config.run_dir) / "model.safetensors", learner)
        if self.folder is None:
            return Progress()
        places = self.folder / "checkpoints"
        found = self.world.main_decides(lambda: newest_valid(places, warn))
        if found is None:
            return Progress()
        path, manifest = found
        self._compare(manifest["facts"], warn)
        files, progress = read_checkpoint(path)
        restore(
            files, learner.bare, learner.optimizer.optimizer, learner.averaged_model, learner.scaler
        )
        if learner.average is not None:
            learner.average.warms_up = progress.average_warms_up
        if len(progress.sums) != len(learner.sums) or self._other_batch(progress):
            progress.summed = 0
        else:  # its own to each process, which adds to them in the order it would have had
            mine = learner.shards.mine
            learner.sums[mine] = torch.tensor(progress.sums[mine], device=learner.device)
        return progress

    def _compare(self, facts: dict[str, str], warn: Callable[[str], None]) -> None:
        allowed = self.plan.actions.allow_change
        if facts.get("data") != self.facts["data"] and "dataset" not in allowed:
            raise UserError(
                f"the data are not those this run was trained on (fingerprint {facts.get('data')}, "
                f"now {self.facts['data']}); bring the old data back, start a new run, or add "
                "--allow-change dataset",
                code="other-data",
            )
        self._compare_classes()
        if facts.get("order", self.facts["order"]) != self.facts["order"]:
            warn("the order of the samples is no longer that of this checkpoint")
        if facts.get("code") != self.facts["code"]:
            warn(
                "the code changed since this checkpoint: the run goes on, but no longer bit for bit"
            )

    def _other_batch(self, progress: Progress) -> bool:
        """Whether what a row adds up would be of two sizes."""
        return progress.batch_size not in (0, self.plan.config.batch_size)

    def _compare_classes(self) -> None:
        """UserError where the data have other classes; those in another order are renumbered."""
        known, classes = classes_of_run(self.plan), self.card.get("classes", ())
        if known and list(known) != list(classes):
            sides = both_sides("the run knows", known, "the data have", classes)
            weights = Path(str(self.plan.config.run_dir)) / "model.safetensors"
            raise UserError(
                f"the classes are not those of this run: {sides}; a new run with --weights "
                f"{weights} keeps what it knows of those that both have",
                code="other-classes",
            )

    def _load_best(self, path: Path, learner: Learner) -> None:
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError):
            raise UserError(
                f"--eval-only: {path} is missing or cannot be read", code="weights-unreadable"
            ) from None
        learner.load_weights(tensors)

    def due(self, progress: Progress, schedule: Schedule) -> bool:
        """Whether it is time, by steps or by the clock that all processes share."""
        return self.world.stop.save_agreed or schedule.saves(progress.step)

    def save(self, learner: Learner, progress: Progress) -> None:
        """A checkpoint of this step: a copy to host memory now, the disk in the background.

        All processes take part.
        """
        self.world.phase("save", progress.step)
        learner.agree_on_buffers()
        progress.sums = learner.loss_sums()
        if self.writer is not None:
            self.writer.wait()
            now = time.monotonic()
            progress.seconds += now - self._mark
            self._mark = now
            files = capture(
                learner.bare, learner.optimizer.optimizer, learner.averaged_model, learner.scaler
            )
            self.writer.start(files, progress, self.facts)
        self.world.stop.saved()
        self._saved = (progress.step, progress.evaluated)

    def save_last(self, learner: Learner, progress: Progress) -> str:
        """Make sure that this very state is on the disk; why it is not, on every process."""
        if self._saved != (progress.step, progress.evaluated):
            self.save(learner, progress)
        failed = self.world.main_decides(self._wait)
        if failed:  # once more: the disk may have room again
            self.save(learner, progress)
            failed = self.world.main_decides(self._wait)
        return failed

    def _wait(self) -> str:
        self.writer.wait()
        return self.writer.error

    def _finish_writing(self) -> None:
        """From the watch's thread, before it ends a process that hangs: a whole save is no loss."""
        self.writer.wait(60)

    def _problem(self) -> str:
        return self.writer.error if self.writer is not None else ""

    def save_weights(self, name: str, learner: Learner, progress: Progress) -> str:
        """Main process: the evaluated weights with all that prediction needs, readable without
        this program. Returns why they could not be written."""
        if self.writer is None:
            return ""
        card = {**self.card, "step": progress.step}
        metadata = {"lockstep": json.dumps(card)}  # one key: safetensors keeps no order of several
        try:
            save_tensors(self.folder / name, learner.weights(), metadata)
        except Exception as error:
            return f"{name} could not be written ({error}); training goes on"
        return ""
