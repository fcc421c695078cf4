"""Copies of metrics.jsonl elsewhere, in trackers that may fail but never stop a run."""

import contextlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from common.disk import read_json, write_json
from common.reach import unreached

if TYPE_CHECKING:
    import wandb

REACH_SECONDS = 3.0
FINISH_SECONDS, STOP_SECONDS = 60.0, 10.0  # for its last rows; a stop may have half a minute


class Sink(Protocol):
    """Where rows go: a run of wandb, trackio or mlflow, a writer of TensorBoard."""

    def log(self, row: dict) -> None:
        """One row of metrics.jsonl."""

    def finish(self) -> None:
        """All rows are there; what waits is sent."""


def build_trackers(
    kind: str, folder: Path, name: str, config: dict, warn: Callable[[str], None]
) -> "list[Tracker]":
    """The trackers of `--track`; on the main process only. An empty list for "none"."""
    if kind == "none":
        return []
    package, begin = TRACKERS[kind]
    if find_spec(package) is None:
        warn(f"--track {kind} is off: {package} is not installed (pip install {package})")
        return []
    file = folder / "metrics.jsonl"  # read here and now: the loop will write to it
    known = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [Tracker(lambda: begin(folder, name, config, known, warn), kind, warn)]


class Tracker:
    """A tracker on a thread of its own: it may fail, sleep or hang, and the loop never waits.

    `start()` makes something with log(row) and finish(); its first failure is reported once by
    `warn` and ends it.
    """

    def __init__(self, start: Callable[[], Sink], kind: str, warn: Callable[[str], None]):
        self.kind, self.warn = kind, warn
        self.rows: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, args=(start,), daemon=True)
        self.thread.start()

    def log(self, row: dict) -> None:
        if self.thread.is_alive():
            self.rows.put(dict(row))

    def finish(self, seconds: float = FINISH_SECONDS) -> bool:
        """Wait until it has all rows, so long at most; whether it ended."""
        self.rows.put(None)
        self.thread.join(seconds)
        if self.thread.is_alive():
            self.warn(f"--track {self.kind} did not end within {seconds:g} s and is left behind")
        return not self.thread.is_alive()

    def _work(self, start: Callable[[], Sink]) -> None:
        try:
            tracker = start()
            for row in iter(self.rows.get, None):
                tracker.log(row)
            tracker.finish()
        except Exception as error:  # whatever a tracker raises, training goes on
            self.warn(f"--track {self.kind} failed and is off: {type(error).__name__}: {error}")
            # SLURM's TERM also ends wandb's own process, which wandb would mourn at our exit.
            if isinstance(error, ConnectionError) and "wandb" in sys.modules:
                with contextlib.suppress(Exception):
                    sys.modules["wandb"].teardown()


def wandb_mode() -> tuple[str, str]:
    """("online" | "offline" | ..., why): decided in seconds, never by a prompt."""
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    chosen = os.environ.get("WANDB_MODE", "")
    if chosen not in ("", "online"):
        return chosen, f"WANDB_MODE is {chosen}"
    if not os.environ.get("WANDB_API_KEY") and not _saved_key(urlsplit(server).hostname or ""):
        return "offline", "there is no key (wandb login, or WANDB_API_KEY)"
    if why := unreached(server, REACH_SECONDS):
        return "offline", why
    return "online", ""


def _saved_key(host: str) -> bool:
    for name in (".netrc", "_netrc"):
        with contextlib.suppress(OSError):
            if host in (Path.home() / name).read_text():
                return True
    return False


def start_wandb(
    folder: Path, name: str, config: dict, known: list[str], warn: Callable[[str], None]
) -> Sink:
    """A wandb run through Accelerate's tracker, in the run folder; one run across restarts."""
    mode, why = wandb_mode()
    if mode == "offline":
        warn(
            f"wandb is offline, because {why}; later: wandb sync {folder / 'wandb' / 'latest-run'}"
        )
    os.environ.setdefault("WANDB_SILENT", "true")
    alone = not uses_wandb()
    from accelerate.tracking import WandBTracker

    earlier = read_json(folder / "tracking.json", {})
    options = {"id": earlier["wandb"], "resume": "allow"} if "wandb" in earlier else {}
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", "lockstep"), name=name, dir=str(folder), mode=mode,
        config=config, settings={"console": "off", "save_code": False, "init_timeout": 20},
        reinit="create_new",  # beside a notebook's own, which would get our rows, or be ended
        **options,
    )  # fmt: skip
    tracker.start()
    run = tracker.tracker
    write_json(folder / "tracking.json", {"wandb": run.id})
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return Rows(run, known, alone)


def uses_wandb() -> bool:
    """Whether wandb works in this process already, as in a notebook that has a run of its own."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    return run is not None or any(one.name.startswith("wandb") for one in threading.enumerate())


class Rows:
    """A wandb run whose history is metrics.jsonl, row by row, over all lives of the run.

    wandb's own step is the row's number. Offline, wandb cannot resume: each life starts a new file
    under the same id, and of several such files a sync keeps the last. So the rows that this file
    (or, online, the server) does not have are written again first; what it has twice, after a
    crash, it drops. Where it was `alone` in the process, its threads and its service end with it.
    """

    def __init__(self, run: "wandb.Run", known: list[str], alone: bool):
        self.run, self.alone, self.number = run, alone, 0
        for line in known:
            if self.number >= run.starting_step:
                self.log(json.loads(line))
            else:
                self.number += 1

    def log(self, row: dict) -> None:
        self.run.log(row, step=self.number)
        self.number += 1

    def finish(self) -> None:
        self.run.finish()
        if self.alone:
            import wandb

            wandb.teardown()


def start_tensorboard(
    folder: Path, name: str, config: dict, known: list[str], warn: Callable[[str], None]
) -> Sink:
    """A writer of TensorBoard's files, which shows each step once over all lives of the run.

    What an earlier life wrote from the last known step on is purged, and the rows of that step,
    of training and of an evaluation, are written again.
    """
    from accelerate.tracking import TensorBoardTracker

    rows = [json.loads(line) for line in known]
    last = rows[-1]["step"] if rows else 0
    tracker = TensorBoardTracker("tensorboard", logging_dir=str(folder), purge_step=last)
    tracker.start()

    class Writer:
        def log(self, row: dict) -> None:
            step = row["step"]
            for key, value in row.items():
                if key != "step":
                    tracker.writer.add_scalar(key, value, global_step=step)

        def finish(self) -> None:
            tracker.finish()

    writer = Writer()
    for row in rows:
        if row["step"] == last:
            writer.log(row)
    return writer


def start_mlflow(
    folder: Path, name: str, config: dict, known: list[str], warn: Callable[[str], None]
) -> Sink:
    """A run of mlflow through Accelerate's tracker: one over all lives, each number once.

    Where MLFLOW_TRACKING_URI names no server it lies in the run folder, in mlflow's own files.
    """
    place = os.environ.get("MLFLOW_TRACKING_URI") or (folder.resolve() / "mlruns").as_uri()
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow 3 asks for it
    import mlflow  # pyright: ignore[reportMissingImports] - of an extra
    from accelerate.tracking import MLflowTracker

    mlflow.set_tracking_uri(place)
    earlier = read_json(folder / "tracking.json", {}).get("mlflow")
    tracker = MLflowTracker("lockstep", run_id=earlier, run_name=None if earlier else name)
    tracker.start()
    run = tracker.tracker.info.run_id
    client, there = mlflow.MlflowClient(), set()
    if earlier:
        for key in client.get_run(run).data.metrics:
            there |= {(key, one.step) for one in client.get_metric_history(run, key)}
    else:
        write_json(folder / "tracking.json", {"mlflow": run})
        tracker.store_init_configuration(config)

    class Run:
        def log(self, row: dict) -> None:
            step = row["step"]
            new = {k: v for k, v in row.items() if k != "step" and (k, step) not in there}
            if new:  # a life that was killed had sent the rest of it
                there.update((key, step) for key in new)
                tracker.log(new, step=step)

        def finish(self) -> None:
            tracker.finish()

    return caught_up(Run(), known)


def start_trackio(
    folder: Path, name: str, config: dict, known: list[str], warn: Callable[[str], None]
) -> Sink:
    """A run of trackio through Accelerate's tracker; each life of ours is one, with all rows.

    trackio cannot take back what a life that was killed had written. Where TRACKIO_DIR names no
    other place its files lie in the run folder.
    """
    os.environ.setdefault("TRACKIO_DIR", str(folder.resolve() / "trackio"))
    from accelerate.tracking import TrackioTracker

    lives = int(read_json(folder / "tracking.json", {}).get("trackio", 0)) + 1
    title = name if lives == 1 else f"{name} life {lives}"
    plain = {k: v for k, v in config.items() if isinstance(v, str | int | float | bool)}
    tracker = TrackioTracker(os.environ.get("TRACKIO_PROJECT", "lockstep"), name=title,
                             config=plain, auto_log_gpu=False, embed=False)  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        tracker.start()
    write_json(folder / "tracking.json", {"trackio": lives})

    class Run:
        def log(self, row: dict) -> None:
            tracker.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

        def finish(self) -> None:
            tracker.finish()

    return caught_up(Run(), known)


def caught_up(sink: Sink, known: list[str]) -> Sink:
    """The same, which has been given the rows of earlier lives."""
    for line in known:
        sink.log(json.loads(line))
    return sink


# What --track may name: the package it needs, and how it begins.
TRACKERS = {
    "wandb": ("wandb", start_wandb), "tensorboard": ("tensorboard", start_tensorboard),
    "trackio": ("trackio", start_trackio), "mlflow": ("mlflow", start_mlflow),
}  # fmt: skip
