"""What a run tells: rows, status, the best so far, trackers, the screen, the ending."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType

from common.disk import Json
from common.errors import FINISHED, UserError
from common.text import counted, duration
from config import restarted, to_json
from distributed import faults
from distributed.checkpoint import Progress, sweep
from distributed.stop import MOVED
from distributed.world import World
from models.own_file import keep_code
from report import panels
from report.screen import Report, SpeedMeter
from report.tracking import FINISH_SECONDS, STOP_SECONDS, Tracker, build_trackers
from tasks import Task
from training.data import Data, pictures_of
from training.goodput import Ledger, slow_in_words
from training.plan import Plan, starts_over
from training.predictions import keep_predictions, take_answers
from training.run_dir import (
    RunDir,
    describe_environment,
    launch_command,
    refuse_unshared,
    set_aside,
)
from training.schedule import Schedule

LIVES_WITHOUT_PROGRESS = 3
TWICE = "interrupted twice: what came after the last checkpoint is lost"
MOST_SHARED = 2  # times that a core's other work is told of, which on a laptop comes and goes
STEPS_TO_TELL = 10  # until their time says something of the rest


class Logbook(contextlib.AbstractContextManager):
    """Writes on the main process; on the others it only keeps count. Gets numbers, no model.

    Entering the folder happens here: it is locked, and its status says how each life ended. On the
    way out of an error the status says so; a folder in which no run was born is removed. In a
    process that lives on, files are closed and the lock is given back.
    """

    def __init__(self, plan: Plan, world: World) -> None:
        self.plan, self.world = plan, world
        self.screen = Report(enabled=world.is_main, rows=not world.guest)
        if text := world.unseen_gpu():
            self.screen.shout("training on the CPU", text)
        if plan.actions.debug:
            self.screen.has_bar = False  # it would draw over a debugger's prompt
        for title, text in plan.shouts:
            self.screen.shout(title, text)
        for text in plan.warnings:
            self.screen.warn(text)
        self.folder: RunDir | None = None  # on the main process, where there is one
        self.life = 0
        self.clock = SpeedMeter()
        self.ledger = Ledger(own_process=not world.guest)
        self.trackers: list[Tracker] = []
        self._row_problem = ""
        self._begun = False
        self._epoch: list[tuple[int, dict]] = []  # steps and numbers of its rows
        self._row_step = 0
        self._shared_cores = Counter[int]()  # how often each rank was slow by other work
        self._paused = self._evaluation = 0.0  # seconds, of the last pause and evaluation
        if plan.folder is not None:
            self.life, owner = world.main_decides(partial(self._enter_folder, plan.folder))
            self._refuse_unshared(plan.folder, owner)
            world.stop.stop_file = plan.folder / "STOP"
            world.watch.start(plan.folder, limited=not plan.actions.debug)
            if self.folder is not None:
                self.screen.attach(plan.folder)
                world.watch.on_beat = self._beat
                world.watch.on_stall = self._stalled
                world.stop.before_the_end = lambda: self.status(status="failed", reason=TWICE)
        faults.configure(world.process_index, self.life)
        faults.hit("start")

    @property
    def run_folder(self) -> Path | None:
        """Where the main process writes; None on the others and where nothing is left."""
        return self.folder.folder if self.folder is not None else None

    def _enter_folder(self, folder: Path) -> tuple[int, str]:
        """Lock the folder; the number of this life, and what the lock says."""
        actions = self.plan.actions
        if starts_over(actions):
            aside = set_aside(folder)
            if aside is not None:
                self.screen.show(f"the old run is now {aside}")
        if actions.debug and (folder / "config.json").exists():
            raise UserError(
                f"{folder} holds a run, and --debug makes a small one of its own: name another "
                "--run-dir, or none",
                code="run-dir-in-use",
            )
        run_dir = RunDir(folder)
        run_dir.open()
        self.folder = run_dir
        (folder / "STOP").unlink(missing_ok=True)
        sweep(run_dir.checkpoints)
        return int(run_dir.read_status().get("life", -1)) + 1, run_dir.owner()

    def _refuse_unshared(self, folder: Path, owner: str) -> None:
        """All processes must see the folder that the main one has entered."""
        world = self.world
        if world.num_processes == 1:
            return
        try:
            world.all_or_none(lambda: world.is_main or refuse_unshared(folder, owner))
        except UserError:
            if self.folder is not None:
                self.folder.abandon()
                self.folder.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.screen.close_bar()
        if isinstance(error, UserError) and not self._begun:
            self.screen.close()  # Windows removes no open file
            if self.folder is not None:
                self.world.watch.stop()
                self.folder.abandon(str(error))
        elif isinstance(error, KeyboardInterrupt):
            self.status(status="failed", reason=TWICE)
        elif isinstance(error, UserError):
            self.status(status="failed", reason=str(error))
        elif error is not None and self.folder is not None:
            step = self.world.watch.step
            again = self.folder.read_status().get("failed_at") == step
            reason = self.world.failure(error).splitlines()[0]
            if self.world.watch.phase in ("data", "step"):  # the others are charged for their own
                self.ledger.charge("still", self.world.watch.still)
            self.status(status="failed", reason=reason, failed_at=step, failed_twice=again)
        self.close()

    # --- the beginning of a life ----------------------------------------------------------------

    def begin(
        self, plan: Plan, data: Data, task: Task, facts: dict[str, str], progress: Progress
    ) -> None:
        """The files that say this run is alive again; refuses a loop of crashes.

        `plan` is the one that the data completed.
        """
        self.plan = plan
        self.clock = SpeedMeter()
        if self.plan.folder is not None:
            self.world.main_decides(lambda: self._begin(data, task, facts, progress))

    def _begin(self, data: Data, task: Task, facts: dict[str, str], progress: Progress) -> None:
        folder, settings = self.folder, self.plan.settings
        assert folder is not None  # the main process's
        gpus = self.world.device.type == "cuda"
        self._refuse_crash_loop(folder, progress.step)
        folder.keep_metrics(progress.metrics_rows)
        if self.life == 0 or not (folder.folder / "config.json").exists():
            self._write_birth(data, facts)
        else:
            folder.write_config(to_json(settings))
            if progress.step == 0:  # nothing was kept of a life before: the data may be others
                folder.write_source(data.source, data.places)
        folder.write_metrics(task.metrics, task.best_is)
        try:
            if problem := keep_code(folder.folder, *self.plan.config.may_be_files):
                self.screen.warn(problem)
        except OSError as error:
            self.screen.warn(f"the model's code cannot be kept in the run folder ({error})")
        folder.link_latest()
        self.trackers = build_trackers(
            self.plan.config.track, folder.folder, folder.folder.name,
            asdict(self.plan.config), self.screen.warn,
        )  # fmt: skip
        folder.begin_life(self.life, progress.step, self.world.num_processes, gpus)
        self._begun = True
        self.ledger.step = progress.step
        self.status()

    def _write_birth(self, data: Data, facts: dict[str, str]) -> None:
        settings, gpus = self.plan.settings, self.world.device.type == "cuda"
        command = launch_command(list(settings.argv), self.world.num_processes, gpus)
        machine = {"devices": self.world.describe(), **self.world.describe_gpu()}
        about = describe_environment({**machine, **facts})
        assert self.folder is not None  # the main process's
        self.folder.write_birth(to_json(settings), command, about)
        self.folder.write_source(data.source, data.places)

    def _refuse_crash_loop(self, folder: RunDir, step: int) -> None:
        """Automatic restarts end where lives die without getting further."""
        old = folder.read_status()
        died = old.get("status") in ("running", "failed")
        deaths = int(old.get("deaths", 0)) + 1 if died and old.get("resumed_at") == step else 0
        folder.status(
            deaths=deaths, failed_at=old.get("failed_at") if died else None, failed_twice=False
        )
        if not restarted():
            return
        message = ""
        if deaths >= LIVES_WITHOUT_PROGRESS:
            message = f"{deaths} lives in a row died after step {step} without a new checkpoint"
        if old.get("failed_twice"):
            message = f"step {old['failed_at']} failed twice in a row: {old['reason']}"
        if message:
            folder.status(status="failed", reason=message)
            raise UserError(
                f"{message}; see {folder.folder / 'crash'} and start it by hand",
                code="crash-loop",
            )

    # --- while it trains ------------------------------------------------------------------------

    def open_epoch(self, schedule: Schedule, progress: Progress) -> None:
        """A bar for what is left of an epoch, where the screen has one."""
        self.ledger.begin_steps()
        epoch, first = schedule.place(progress.step)
        self._epoch, self._row_step = [], progress.step
        if self.clock.steps == 0:  # this life may go on within it
            self._remember(max(progress.step - first, progress.evaluated), progress.step)
        title = f"epoch {epoch + 1}/{schedule.epochs}"
        self.screen.open_bar(schedule.steps_per_epoch, first, title)

    def step(self, schedule: Schedule, progress: Progress) -> None:
        """An update was made."""
        self.clock.step()
        if self.plan.config.compile and self.clock.steps == 2:
            compiling = self.clock.leave_out_compiling()
            self.ledger.charge("compile", compiling)
            self.screen.show(f"compiling took {duration(compiling)}")
            self.world.watch.patient -= {"data", "step"}
        self.screen.advance(schedule.place(progress.step - 1)[1] + 1)

    def row(
        self, numbers: dict[str, float], data: Data, schedule: Schedule, progress: Progress
    ) -> None:
        """A row of training: the learner's numbers since the last one."""
        waits = data.waits()
        row = {
            "step": progress.step,
            "epoch": schedule.place(progress.step - 1)[0] + 1,
            **numbers,
            "lr": schedule.lr(progress.step - 1, progress.drops),
            "speed/images_per_second": self.clock.speed(data.batch.batch_size),
            **waits,
            **self.world.peak_memory(),
        }
        for share in waits.values():
            self.ledger.charge("data", share * self.clock.timed)
        self._tell_slow(progress.step)
        left = self._left(data, schedule, progress)
        self._record(row, progress, steps=schedule.last_step, left=round(left, 1))
        self._epoch.append((progress.step - self._row_step, numbers))
        self._row_step = progress.step
        self.screen.train_line(row, schedule.last_step, left)
        if self.clock.steps >= STEPS_TO_TELL:
            self._tell_time_limit(schedule, progress)
            panels.advise_on_time(self.screen, self.plan, data, self.world, left)

    def _tell_slow(self, step: int) -> None:
        """A line where the others begin to wait for a process, and where it keeps up again."""
        if not self.world.is_main:
            return
        for slow in self.world.pace.judge(step, self.world.watch.where):
            self.ledger.slow = self.world.pace.history()
            comes, shared = slow.until is None, slow.reason == "core"
            self._shared_cores[slow.rank] += comes and shared
            times = shared * self._shared_cores[slow.rank]
            if times > MOST_SHARED:
                continue
            if comes:
                goes = "; this comes and goes: the next times are in status.json alone"
                self.screen.warn(slow_in_words(asdict(slow)) + goes * (times == MOST_SHARED))
            else:
                self.screen.show(f"{slow.where} keeps up again since step {step}")

    def _left(self, data: Data, schedule: Schedule, progress: Progress) -> float:
        """See time_left."""
        tested = sum(len(pictures_of(loader)) for loader in data.test_loaders.values())
        return time_left(
            self.clock, schedule, progress, self._evaluation, tested / data.batch.batch_size
        )

    def _remember(self, start: int, step: int) -> None:
        """The rows of an epoch that an earlier life has trained: its line tells of all of it."""
        for row in self.folder.read_metrics() if self.folder is not None else ():
            if start < row["step"] <= step and "train/loss" in row:
                numbers = {name: row[name] for name in row if name.startswith("train/")}
                self._epoch.append((row["step"] - start, numbers))
                start = self._row_step = row["step"]

    def _epoch_means(self) -> dict[str, float]:
        """Of an image of the epoch the mean of each number, since the last evaluation."""
        steps = sum(count for count, _ in self._epoch)
        names = self._epoch[0][1] if steps else ()
        return {
            name: math.fsum(count * row[name] for count, row in self._epoch) / steps
            for name in names
        }

    def _tell_time_limit(self, schedule: Schedule, progress: Progress) -> None:
        """Once, from the speed so far: where --max-time will end this life, and at which rate."""
        deadline, per_step = self.world.stop.deadline, self.clock.left(1)
        if deadline is None or not per_step:
            return
        there = progress.step + int((deadline - time.monotonic()) / per_step)
        if there < schedule.last_step:
            limit, rate = self.plan.config.max_time, schedule.lr(there, progress.drops)
            self.screen.warn_once({"time limit": (
                f"--max-time {limit} will stop the run near step {max(there, progress.step)} of "
                f"{schedule.last_step}, at a learning rate of {rate:.3g}, which is that of the "
                "whole run: it can go on later"
            )})  # fmt: skip

    @contextlib.contextmanager
    def pause(self, cause: str) -> Iterator[None]:
        """What happens within counts as no training: the speed and the time left leave it out."""
        began = time.monotonic()
        yield
        self._paused = time.monotonic() - began
        self.clock.pause(self._paused)
        self.ledger.charge(cause, self._paused)

    def evaluated(
        self, results: dict[str, dict], task: Task, data: Data,
        schedule: Schedule, progress: Progress,
    ) -> bool:  # fmt: skip
        """Record an evaluation in rows and progress; whether it is the best so far."""
        self.world.watch.patient.discard("evaluate")
        answers = take_answers(results)
        progress.evaluated = progress.step
        progress.last = results["test"]
        epoch = schedule.seen(progress.step)
        epoch = int(epoch) if epoch.is_integer() else round(epoch, 3)
        row = {"step": progress.step, "epoch": epoch}
        for split, metrics in results.items():
            row |= {f"{split}/{m.key}": metrics[m.key] for m in task.metrics}
        chosen = results[data.chosen_on][task.best_is]
        better = task.best.better(chosen, progress.best)
        falls = schedule.judge(progress, task.best.better_as_shown(chosen, progress.best))
        if better:
            progress.best, progress.best_epoch = chosen, epoch
            progress.best_step, progress.best_metrics = progress.step, results["test"]
            if self.folder is not None:
                keep_predictions(self.folder.folder, answers, task, data, self.screen.warn)
        self._record(row, progress)
        self.status(best=progress.best)
        self._evaluation = self._paused
        left = self._left(data, schedule, progress)
        stopping = bool(self.world.stop.reason)
        panels.show_epoch(
            self.screen, self.plan, task, data, schedule, progress, row, better, left, stopping,
            self._epoch_means(),
        )  # fmt: skip
        if falls:
            rate = schedule.lr(progress.step, progress.drops)
            words = f"no better {task.best.title} for {counted(schedule.plateau, 'evaluation')}"
            self.screen.show(f"{words}: the learning rate falls to {rate:.3g}")
        return better

    def _record(self, row: dict, progress: Progress, **status: float) -> None:
        """A row for metrics.jsonl, the truth, and for the trackers, its copies; the status too."""
        progress.metrics_rows += 1
        if self.folder is None:
            return
        problem = self.folder.append_metrics(row)
        if problem and not self._row_problem:
            self.screen.warn(f"metrics.jsonl cannot be written ({problem}); rows wait in memory")
        self._row_problem = problem
        self.ledger.step = progress.step
        self.status(step=progress.step, **status)
        for tracker in self.trackers:
            tracker.log(row)

    def status(self, **values: Json) -> None:
        """Into status.json, which is worth no crash where the disk is full."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self.folder.status(self.ledger.entry() if self._begun else None, **values)

    def saved(self, problem: str) -> None:
        """From the writer's thread: a failed save is on the screen and in the status at once."""
        if problem:
            self.screen.warn(problem)
        saved = {} if problem else {"saved": True}  # where there is no checkpoint, it was deleted
        self.status(last_save_error=problem, **saved)

    def kept_best(self, problem: str) -> None:
        """The best weights were written, or why not."""
        if problem:
            self.screen.warn(problem)

    # --- at the end -----------------------------------------------------------------------------

    def _stalled(self, message: str) -> None:
        """From the watch's thread: this process ends, and what it stood still was no step."""
        self.ledger.charge("still", self.world.watch.still)
        self.status(status="failed", reason=message)

    def _beat(self) -> None:
        """From the watch's thread: a folder that was taken away ends the run."""
        if self.folder is not None and not self.folder.beat():
            self.world.stop.request(MOVED)

    def follow_folder(self, data: Data, facts: dict[str, str], progress: Progress) -> Path | None:
        """Main process: where the rest is written, if the folder was renamed or deleted."""
        if self.folder is None or self.folder.beat():
            return None
        old, lost = self.folder.folder, self.folder.read_status()
        self.folder.follow()
        new = self.folder.folder
        self.screen.close()
        self.screen.attach(new)
        message = f"{old} was renamed to {new} while it trained: the save is there"
        if not (new / "config.json").exists():
            message = f"{old} was deleted while it trained: a new save is in {new}"
            self._write_birth(data, facts)
            keep_code(new, *self.plan.config.may_be_files)
            self.status(**lost)
            self.folder.write_rows()
            progress.metrics_rows = len(self.folder.metrics_lines())
        self.world.stop.stop_file = new / "STOP"
        self.screen.warn(message)
        return new

    def finish_trackers(self, code: int) -> bool:
        """Whether all have their rows; those that hang are left behind."""
        patience = FINISH_SECONDS if code == FINISHED else STOP_SECONDS
        return all([tracker.finish(patience) for tracker in self.trackers])

    def close(self) -> None:
        """The last line is written."""
        self.screen.close()
        if self.folder is not None:
            self.folder.close()


def time_left(
    clock: SpeedMeter, schedule: Schedule, progress: Progress, evaluation: float, batches: float
) -> float:
    """Seconds to the end of a run: steps at the speed so far, and the evaluations between them.

    evaluation: seconds of the last one. Before the first a batch is taken to cost a third of a
    step, without its backward; `batches` of them make an evaluation. 0 where nothing is known, as
    within the first tenth of an epoch.
    """
    if clock.steps < schedule.steps_per_epoch / 10:
        return 0.0
    step = clock.left(1)
    each = evaluation or step * batches / 3
    steps = schedule.last_step - progress.step
    return step and step * steps + each * schedule.evaluations_left(progress)
