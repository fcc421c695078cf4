"""Copies of metrics.jsonl elsewhere: wandb and TensorBoard, which may fail but never stop a run."""

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

from run_dir import read_json, write_json

REACH_SECONDS = 3.0


def build_trackers(kind: str, folder: Path, name: str, config: dict, warn: Callable) -> list:
    """The trackers of `--track`; on the main process only. An empty list where none can be had."""
    if kind == "none":
        return []
    try:
        made = (start_wandb if kind == "wandb" else start_tensorboard)(folder, name, config, warn)
    except Exception as error:  # whatever a tracker raises, training goes on
        warn(f"--track {kind} is off: {type(error).__name__}: {error}")
        return []
    return [Guarded(made, kind, warn)]


class Guarded:
    """A tracker whose first failure is told once and ends it."""

    def __init__(self, tracker, kind: str, warn: Callable):
        self.tracker, self.kind, self.warn = tracker, kind, warn

    def log(self, row: dict) -> None:
        self._call("log", dict(row))

    def finish(self) -> None:
        self._call("finish")

    def _call(self, method: str, *arguments) -> None:
        if self.tracker is None:
            return
        try:
            getattr(self.tracker, method)(*arguments)
        except Exception as error:
            self.tracker = None
            self.warn(f"--track {self.kind} failed and is off from here: {error}")


def wandb_mode() -> tuple[str, str]:
    """("online" | "offline" | "disabled", why): decided in seconds, never by a prompt."""
    chosen = os.environ.get("WANDB_MODE", "")
    if chosen:
        return chosen, f"WANDB_MODE is {chosen}"
    if not os.environ.get("WANDB_API_KEY") and not _saved_key():
        return "offline", "there is no key (wandb login, or WANDB_API_KEY)"
    try:
        socket.create_connection(("api.wandb.ai", 443), timeout=REACH_SECONDS).close()
    except OSError:
        return "offline", "its server cannot be reached"
    return "online", ""


def _saved_key() -> bool:
    for name in (".netrc", "_netrc"):
        with contextlib.suppress(OSError):
            if "wandb" in (Path.home() / name).read_text():
                return True
    return False


def start_wandb(folder: Path, name: str, config: dict, warn: Callable):
    """A wandb run through Accelerate's tracker, in the run folder; one run across restarts."""
    mode, why = wandb_mode()
    if mode == "offline":
        warn(f"wandb is offline, because {why}; later: wandb sync {folder / 'wandb'}/offline-*")
    os.environ.setdefault("WANDB_SILENT", "true")
    from accelerate.tracking import WandBTracker

    known = read_json(folder / "tracking.json", {})
    options = {"id": known["wandb"], "resume": "allow"} if "wandb" in known else {}
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", "lockstep"), name=name, dir=str(folder), mode=mode,
        config=config, settings={"console": "off", "save_code": False, "init_timeout": 20},
        **options,
    )  # fmt: skip
    tracker.start()
    run = tracker.tracker
    write_json(folder / "tracking.json", {"wandb": run.id})
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # no positional step: it may not go back
    return run


def start_tensorboard(folder: Path, name: str, config: dict, warn: Callable):
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker("tensorboard", logging_dir=str(folder))
    tracker.start()

    class Writer:
        def log(self, row: dict) -> None:
            step = row["step"]
            for key, value in row.items():
                if key != "step":
                    tracker.writer.add_scalar(key, value, global_step=step)

        def finish(self) -> None:
            tracker.finish()

    return Writer()
