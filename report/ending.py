"""The end of a run: exit status, last words, summary, pictures, page, the last panel."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from config import Settings
from distributed.checkpoint import Progress
from distributed.stop import SAVE_FAILED
from distributed.world import World, restarts_left
from errors import FAILED, FINISHED, STOPPED, USER_ERROR, NumbersGoneBad, UserError
from report import page, panels
from report.logbook import Logbook
from report.samples import draw_pictures
from report.screen import quiet_libraries, show_tracebacks
from training.checkpoints import Checkpoints
from training.data import Data
from training.learner import Learner
from training.observer import Observer
from training.recorder import observer_asked_for
from training.schedule import Schedule


def finish(
    log: Logbook, checkpoints: Checkpoints, learner: Learner, data: Data, schedule: Schedule,
    progress: Progress, world: World,
) -> int:  # fmt: skip
    """The last save, the final report, status and summary; returns the exit status."""
    world.phase("end", progress.step)
    log.screen.close_bar()
    failed = checkpoints.save_last(learner, progress)
    code = STOPPED if world.stop.reason else FINISHED
    if failed:
        world.stop.reason, code = SAVE_FAILED, FAILED
    if log.folder is not None:
        reason = failed or (world.stop.why(world.stop.reason) if world.stop.reason else "")
        _write(log, checkpoints, learner, data, schedule, progress, world, code, reason)
    if code == STOPPED and restarts_left():
        return FINISHED  # an agent would count any other status as a failure, and restart
    return code


def _write(
    log: Logbook, checkpoints: Checkpoints, learner: Learner, data: Data, schedule: Schedule,
    progress: Progress, world: World, code: int, reason: str,
) -> None:  # fmt: skip
    """Main process: whatever cannot be written is said, and the rest is."""
    folder, plan, screen = log.folder.folder, log.plan, log.screen
    status = {FINISHED: "finished", STOPPED: "stopped", FAILED: "failed"}[code]
    if problem := checkpoints.save_weights("last.safetensors", learner, progress):
        screen.warn(problem)
    skipped = learner.guard.report()["skipped"]
    try:
        panels.write_summary(
            folder, plan, data, schedule, progress, status, reason, log.life, skipped
        )
    except OSError as error:
        screen.warn(f"the run's summary cannot be written ({error})")
    world.left_behind = not log.finish_trackers(code)
    try:
        if plan.config.plots and code == FINISHED:
            draw_pictures(log.folder.read_metrics(), learner, data, progress, folder)
    except Exception as error:  # pictures are worth no failed run
        screen.warn(f"not all pictures could be drawn: {type(error).__name__}: {error}")
    written: Path | None = None
    try:
        written = page.write_page(folder)
    except Exception as error:  # nor is its page
        screen.warn(f"report.html cannot be written: {type(error).__name__}: {error}")
    panels.show_ending(screen, folder, written, data, progress, learner.bare, code, reason)
    log.status(status=status, reason=reason, step=progress.step)


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
        if world.left_behind:  # the interpreter's end would wait for what hangs
            sys.stdout.flush()
            os._exit(status)
        return status
    except UserError as error:
        if world.is_main if world is not None else os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr, flush=True)
        return USER_ERROR
    except Exception as error:
        if settings.actions.debug:
            show_tracebacks()
            raise
        words = world.failure(error) if world is not None else f"{type(error).__name__}: {error}"
        tell_agent(error)
        if not isinstance(error, NumbersGoneBad) or world.is_main:
            print(f"\n{words}", file=sys.stderr, flush=True)
        # Not through the interpreter's end: a process group whose peer is gone would wait there.
        sys.stdout.flush()
        os._exit(FAILED)


def tell_agent(error: BaseException) -> None:
    """Leave the error where torchrun looks for it, so that its report names the right process."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
