"""The end of a run: exit status, last words, summary, pictures, page, the last panel."""

import os
import sys
import time
from bdb import BdbQuit
from collections.abc import Callable
from pathlib import Path

from common.errors import FAILED, FINISHED, STOPPED, USER_ERROR, NumbersGoneBad, UserError
from common.text import counted
from config import Settings, has_own_terminal
from distributed.accelerator import leave
from distributed.checkpoint import Progress
from distributed.stop import DAMAGED, SAVE_FAILED, restarts_left
from distributed.watch import failed_at_start, tell_agent
from distributed.world import World
from optim import ScheduleFreeWeights
from report import panels
from report.gradcam import keep_mistakes
from report.logbook import Logbook
from report.samples import draw_pictures
from report.screen import quiet_libraries, show_tracebacks
from training.checkpoints import LAST, Checkpoints
from training.data import Data
from training.goodput import goodput
from training.learner import Learner
from training.observer import Observer
from training.out_of_fold import write_out_of_fold
from training.recorder import observer_asked_for
from training.run_dir import DAMAGED as DAMAGED_LIST
from training.run_dir import UNDECODED
from training.schedule import Schedule


def finish(
    log: Logbook, checkpoints: Checkpoints, learner: Learner, data: Data, schedule: Schedule,
    progress: Progress, world: World,
) -> int:  # fmt: skip
    """The last save, the final report, status and summary; returns the exit status."""
    world.phase("end", progress.step)
    began = time.monotonic()
    log.screen.close_bar()
    if folder := world.main_decides(lambda: log.follow_folder(data, checkpoints.facts, progress)):
        checkpoints.go_on_in(folder)
    failed = checkpoints.save_last(learner, progress)
    if isinstance(learner.average, ScheduleFreeWeights) and progress.evaluated != progress.step:
        learner.evaluated_model(data)  # the average has moved since its norms were measured
    code = STOPPED if world.stop.reason else FINISHED
    if failed:
        world.stop.reason, code = SAVE_FAILED, FAILED
    world.phase("end", progress.step)  # the save had a phase of its own
    for sentence in data.clipped(world):
        log.screen.warn(sentence)
    damaged = data.damaged(world)
    if damaged and not log.plan.config.skip_bad_images:
        if not failed:
            world.stop.reason, failed = DAMAGED, panels.cannot_decode(damaged)
        code = FAILED
    if log.plan.config.fold and code == FINISHED and log.plan.folder is not None:
        whole = write_out_of_fold(log.plan.folder, learner, data, world, progress)
        code = FINISHED if whole else STOPPED  # the next life has no more to do than that
    if log.folder is not None:
        reason = failed or (world.stop.why(world.stop.reason) if world.stop.reason else "")
        if not reason and schedule.gave_up(progress):
            count = counted(schedule.patience, "evaluation")
            reason = f"no better {learner.task.best.title} for {count} (--patience)"
        elif code == FINISHED and schedule.stops_early:
            reason = f"{panels.STOP_AFTER} {schedule.last_step}"
        log.ledger.charge("end", time.monotonic() - began)
        _write(log, checkpoints, learner, data, schedule, progress, world, code, reason, damaged)
    if code == STOPPED and restarts_left() and not world.stop.rest_goes_on(world.num_processes):
        return FINISHED  # an agent would count any other status as a failure, and restart
    return code


def _write(
    log: Logbook, checkpoints: Checkpoints, learner: Learner, data: Data, schedule: Schedule,
    progress: Progress, world: World, code: int, reason: str, damaged: dict[str, str],
) -> None:  # fmt: skip
    """Main process: whatever cannot be written is said, and the rest is."""
    assert log.folder is not None
    folder, plan, screen = log.folder.folder, log.plan, log.screen
    status = {FINISHED: "finished", STOPPED: "stopped", FAILED: "failed"}[code]
    status = "stopped" if reason.startswith(panels.STOP_AFTER) else status
    if problem := checkpoints.save_weights(LAST, learner, progress):
        screen.warn(problem)
    if problem := checkpoints.write_waiting() or log.folder.write_rows():
        screen.warn(problem)
    skipped = learner.guard.report()["skipped"]
    log.ledger.close()
    log.status()  # what this life has come to, for the summary and the page
    spent = goodput(log.folder.read_status().get("lives") or [])
    left_out = data.excluded_by_hand()
    try:
        left_out |= dict.fromkeys(log.folder.write_damaged(damaged), UNDECODED)
        if left_out:
            log.folder.write_split(data.source, data.places, left_out)
        if damaged and plan.config.skip_bad_images:
            count = counted(len(damaged), "image")
            screen.warn(f"left out, as it cannot be decoded: {count}, see {folder / DAMAGED_LIST}")
    except OSError as error:
        screen.warn(f"the list of damaged images cannot be written ({error})")
    try:
        panels.write_summary(
            folder, plan, learner.task, data, schedule, progress, status, reason, log.life,
            skipped, spent, len(left_out),
        )  # fmt: skip
    except OSError as error:
        screen.warn(f"the run's summary cannot be written ({error})")
    world.left_behind = not log.finish_trackers(code)
    try:
        if plan.config.plots and code == FINISHED:
            draw_pictures(log.folder.read_metrics(), learner.task, data, progress, folder)
            screen.note(keep_mistakes(data, progress, folder, plan.config.model))
    except Exception as error:  # pictures are worth no failed run
        screen.warn(f"not all pictures could be drawn: {type(error).__name__}: {error}")
    written: Path | None = None
    try:
        from report import page  # its templates cost a start nothing

        written = page.write_page(folder)
    except Exception as error:  # nor is its page
        screen.warn(f"report.html cannot be written: {type(error).__name__}: {error}")
    panels.show_ending(
        screen,
        plan,
        folder,
        written,
        learner.task,
        data,
        progress,
        learner.bare,
        code,
        reason,
        world,
    )
    log.status(status=status, reason=reason, step=progress.step)


def speaks(world: World | None) -> bool:
    """Whether this process says why all end: the main one, and one for each other terminal."""
    main = world.is_main if world is not None else os.environ.get("RANK", "0") == "0"
    return main or has_own_terminal()


def run_to_exit(
    main: Callable[[World, Observer], int], settings: Settings, observer: Observer | None = None
) -> int:
    """Run main in a world of its own; every ending is a sentence, told once, and a status."""
    world = None
    try:
        quiet_libraries()
        world = World(settings)
        with world:
            status = main(world, observer or observer_asked_for())
    except UserError as error:
        status, words = STOPPED if error.code == "stopped-early" else USER_ERROR, str(error)
        if not speaks(world):
            words = world.own_words if world is not None else ""
        if error.printed:
            words = ""
        if words:
            print(words, file=sys.stderr, flush=True)
    except (Exception, SystemExit) as error:  # a model that calls sys.exit() ends no run unseen
        if settings.actions.debug and isinstance(error, BdbQuit):  # q at breakpoint()
            print("\nthe debugger was left: the run ends here (c goes on)", file=sys.stderr)
            return FAILED
        if settings.actions.debug:
            show_tracebacks()
            raise
        words = world.failure(error) if world is not None else failed_at_start(error)
        tell_agent(error)
        if not isinstance(error, NumbersGoneBad) or world is None or world.is_main:
            print(f"\n{words}", file=sys.stderr, flush=True)
        # Not through the interpreter's end: a process group whose peer is gone would wait there.
        sys.stdout.flush()
        os._exit(FAILED)
    if world.left_behind if world is not None else not leave():
        sys.stdout.flush()
        os._exit(status)  # the interpreter's end would wait for what hangs
    return status
