"""When a run is saved, and where it goes on."""

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.disk import Json, read_json
from common.errors import UserError
from common.text import both_sides, seconds
from distributed.checkpoint import (
    Progress,
    Writer,
    capture,
    card_of,
    copy_state,
    newest_valid,
    read_checkpoint,
    read_progress,
    restore,
    save_tensors,
    visible,
)
from distributed.world import World
from models.own_file import CODE, digests_of, holds
from training.learner import Learner
from training.plan import Plan, classes_of_run
from training.schedule import Schedule
from training.snapshots import Snapshots, step_of

LAST = "last.safetensors"


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
        card: dict[str, Json],
        world: World,
        on_saved: Callable[[str], None],
    ) -> None:
        self.plan, self.facts, self.card, self.world = plan, facts, card, world
        self.folder, config = plan.folder, plan.config
        self.writer: Writer | None = None  # on the main process, where there is a folder
        self.snapshots = Snapshots(plan, facts, world)
        world.watch.before_the_end = self._finish_writing
        if self.folder is not None and world.is_main:
            self.writer = Writer(
                self.folder / "checkpoints", config.keep, lambda _: on_saved(self._problem())
            )
        by_time = config.checkpoint_every != "epoch" and not config.checkpoint_every.isdigit()
        world.stop.save_every = seconds(config.checkpoint_every) if by_time else None
        self._mark = world.began
        self._saved: tuple[int, int] | None = None
        self._lost = False  # the state that updates need was deleted
        self._waiting: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {}  # for the disk

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self.writer is not None:
            self.writer.end()
        self.snapshots.end()

    def resume(
        self, learner: Learner, warn: Callable[[str], None], note: Callable[[str], None]
    ) -> Progress:
        """Restore the newest whole checkpoint, in memory or on the disk; where the run stands.

        For --eval-only it restores the best weights of a named run. Raises UserError where the
        data are others.
        """
        progress = self._restored(learner, warn)
        if self.writer is not None and self.writer.problem:
            warn(self.writer.problem)
        self.snapshots.begin(learner, progress, warn, note)
        return progress

    def _restored(self, learner: Learner, warn: Callable[[str], None]) -> Progress:
        if self.plan.actions.eval_only and self.plan.config.run_dir is not None:
            self._compare_classes()
            self._load_best(Path(self.plan.config.run_dir) / "model.safetensors", learner)
        if self.folder is None:
            return Progress()
        in_memory = self.snapshots.find(warn)
        found = self.world.main_decides(lambda: self._on_disk(in_memory, warn))
        path = self.snapshots.fetch(warn) if in_memory and found is None else None
        if in_memory and found is None and path is None:
            found = self.world.main_decides(lambda: self._on_disk(0, warn))
        if found is not None:
            path = found[0]
            self.snapshots.source = "from the disk" if self.snapshots.takes else ""
            self._compare(found[1]["facts"], warn)
        if path is None:
            return self._without_checkpoints(learner, warn)
        files, progress = read_checkpoint(path)
        learner.unfreeze(progress.last_epoch)  # what was trained has an optimizer's state
        restore(
            files, learner.bare, learner.optimizer.optimizer, learner.averaged_model, learner.scaler
        )
        self._take_up(learner, progress)
        return progress

    def _on_disk(self, in_memory: int, warn: Callable[[str], None]) -> tuple[Path, dict] | None:
        """The newest whole checkpoint there; None where the snapshot of that step is newer."""
        places = Path(str(self.folder)) / "checkpoints"
        if in_memory and not any(step_of(path) >= in_memory for path in visible(places)):
            return None
        try:
            found = newest_valid(places, warn)
        except UserError as error:
            if not in_memory or error.code != "no-whole-checkpoint":
                raise
            return None
        return None if found and step_of(found[0]) < in_memory else found

    def _without_checkpoints(self, learner: Learner, warn: Callable[[str], None]) -> Progress:
        """A run begins; where there was one, its checkpoints were deleted, and nothing else may be.

        Its last weights are taken up; whether they suffice the schedule tells: `refuse_lost_state`.
        """
        folder = self.folder
        assert folder is not None  # where nothing is kept, nothing is resumed
        last = folder / "last.safetensors"
        card, status, table = self.world.main_decides(
            lambda: (
                card_of(last),
                read_json(folder / "status.json", {}),
                read_json(folder / "confusion.json", {}),
            )
        )
        if not card and not status.get("saved"):
            return Progress()
        progress = read_progress(card.get("progress", {}))
        if not progress.step:
            raise self._gone()
        self._compare(card["facts"], warn)
        learner.unfreeze(progress.last_epoch)
        copy_state(learner.bare, load_file(last), "model")
        if learner.averaged_model is not None:
            copy_state(learner.averaged_model, load_file(last), "averaged model")
        self._take_up(learner, progress)
        if "matrix" in table:
            progress.best_metrics["confusion"] = table["matrix"]
        self._saved = (progress.step, progress.evaluated)  # without an optimizer it were no save
        config = self.plan.config
        stateless = config.optimizer == "sgd" and not config.momentum
        self._lost = not stateless or learner.average is not None or learner.scaler is not None
        why = ": it cannot be made longer, --fresh starts over" if self._lost else ""
        warn(f"the checkpoints of this run are gone, {last.name} tells where it ended{why}")
        return progress

    def refuse_lost_state(self, schedule: Schedule, progress: Progress) -> None:
        """UserError where training would go on from weights alone, and its updates need more."""
        if self._lost and not schedule.over(progress):
            raise self._gone()

    def _gone(self) -> UserError:
        folder = Path(str(self.folder))
        names = [n for n in ("last", "model") if (folder / f"{n}.safetensors").is_file()]
        weights = folder / f"{names[0]}.safetensors" if names else ""
        begin = f"; a new run can begin with --weights {shlex.quote(str(weights))}"
        return UserError(
            f"the checkpoints of {folder} are gone, and with them what training goes on "
            "from (the optimizer's state): --fresh starts over and keeps the old files aside"
            + (begin if names else ""),
            code="checkpoints-gone",
        )

    def _take_up(self, learner: Learner, progress: Progress) -> None:
        """What the next row adds up, to each process its own, in the order it would have had."""
        if learner.average is not None:
            learner.average.warms_up = progress.average_warms_up
        other = progress.batch_size not in (0, self.plan.config.batch_size)
        if len(progress.sums) != len(learner.sums) or other:
            progress.summed = 0
        else:
            mine = learner.shards.mine
            learner.sums[mine] = torch.tensor(progress.sums[mine], device=learner.device)
            learner.right += progress.right if self.world.is_main else 0

    def go_on_in(self, folder: Path) -> None:
        """The run folder is another one from here on."""
        self.folder, self.world.watch.folder = folder, folder / "crash"
        if self.writer is not None:
            self.writer.wait()
            self.writer.folder = folder / "checkpoints"
        self._saved = None

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
        own = self.facts.get("own code")
        other_code = bool(own and facts.get("own code")) and facts["own code"] != own
        if other_code and "code" not in allowed:  # a class in memory has no files to compare
            files = digests_of(*self.plan.config.may_be_files)
            kept = Path(str(self.folder)) / CODE
            other = [n for n, value in files.items() if not holds(kept, {n: value})]
            raise UserError(
                f"the code changed since this checkpoint: {', '.join(other) or 'other files'} of "
                f"this run; bring the old files back (they are in {kept}), start a "
                "new run, or add --allow-change code",
                code="other-code",
            )
        if facts.get("order", self.facts["order"]) != self.facts["order"]:
            warn("the order of the samples is no longer that of this checkpoint")
        if facts.get("code") != self.facts["code"] or other_code:
            warn(
                "the code changed since this checkpoint: the run goes on, but no longer bit for bit"
            )

    def _compare_classes(self) -> None:
        """UserError where the data have other classes; those in another order are renumbered."""
        known = classes_of_run(self.plan)
        classes = cast(Sequence[str], self.card.get("classes", ()))
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

    def due(self, progress: Progress, schedule: Schedule) -> str:
        """Where it is time to save to, by steps or by the clock of all: disk, memory or ""."""
        if self.world.stop.save_agreed or schedule.saves(progress.step):
            return "disk"
        return "memory" if self.snapshots.due(progress.step) else ""

    def save(self, learner: Learner, progress: Progress, where: str = "disk") -> None:
        """A checkpoint of this step: a copy to host memory now, all else in the background.

        All processes take part.
        """
        self.world.phase("save", progress.step)
        began = time.monotonic()
        learner.agree_on_buffers()
        progress.sums, progress.right = learner.summed()
        progress.seconds += began - self._mark
        self._mark = began
        if where == "memory":
            self.snapshots.take(learner, progress, began)
            return
        if self.writer is not None:
            self.writer.wait()
            self.write_waiting()
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
        if not failed:
            self.snapshots.forget()
        return failed

    def _wait(self) -> str:
        assert self.writer is not None
        self.writer.wait()
        return self.writer.error

    def _finish_writing(self) -> None:
        """From the watch's thread, before it ends a process that hangs: a whole save is no loss."""
        if self.writer is not None:
            self.writer.wait(60)
        self.snapshots.wait(60)

    def _problem(self) -> str:
        return self.writer.error if self.writer is not None else ""

    def save_weights(self, name: str, learner: Learner, progress: Progress) -> str:
        """Main process: the evaluated weights with all that prediction needs.

        Readable without this program. Returns why they could not be written.
        """
        if self.writer is None or self.folder is None:
            return ""
        more: dict[str, Json] = {}
        if name == LAST:
            more = {"facts": self.facts, "progress": _without_tables(progress)}
        return self.write_weights(name, learner.weights(), {"step": progress.step, **more})

    def write_weights(self, name: str, weights: dict[str, Tensor], more: dict[str, Json]) -> str:
        """Main process: weights, and this run's card with `more`; why they could not be written."""
        card = {**self.card, **more}
        metadata = {"lockstep": json.dumps(card)}  # one key: safetensors keeps no order of several
        self._waiting[name] = weights, metadata
        return self.write_waiting()

    def write_waiting(self) -> str:
        """Main process: write the weights that a full disk refused, until they are on it."""
        problems = []
        for name, (tensors, metadata) in list(self._waiting.items()):
            try:
                save_tensors(Path(str(self.folder)) / name, tensors, metadata)
                del self._waiting[name]
            except Exception as error:
                message = f"{name} could not be written ({error}); it is tried again at each save"
                problems.append(message)
        return "; ".join(problems)


def _without_tables(progress: Progress) -> dict:
    """Progress small enough for the head of a file: no confusion matrix."""
    found = asdict(progress)
    del found["seconds"]  # the same run has the same bytes
    for name in ("best_metrics", "last"):
        found[name] = {k: v for k, v in found[name].items() if isinstance(v, int | float)}
    return found
