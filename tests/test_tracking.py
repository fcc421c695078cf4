"""Trackers are copies: they may fail, sleep or hang, and nobody is asked or held."""

import contextlib
import json
import socket
import sqlite3
import subprocess
import sys
import threading

import pytest
from launches import REPOSITORY, SMALL, children_with, rows, train

from report.tracking import TRACKERS, Tracker, build_trackers, wandb_mode


def test_a_tracker_that_fails_is_told_once_and_stops_nothing(tmp_path):
    class Broken:
        def log(self, row):
            raise ConnectionError("gone")

    told = []
    tracker = Tracker(Broken, "wandb", told.append)
    for step in range(3):
        tracker.log({"step": step})
    assert tracker.finish()
    assert len(told) == 1 and "gone" in told[0]
    assert build_trackers("none", tmp_path, "x", {}, told.append) == []


def test_a_tracker_that_sleeps_holds_nobody_and_is_left_behind():
    wake, got, told = threading.Event(), [], []

    class Sleeping:
        def log(self, row):
            wake.wait(60)
            got.append(row["step"])

        def finish(self):
            got.append("end")

    tracker = Tracker(Sleeping, "wandb", told.append)
    for step in range(3):
        tracker.log({"step": step})
    assert got == [] and not tracker.finish(0.1)
    assert len(told) == 1 and "left behind" in told[0]
    wake.set()
    assert tracker.finish() and got == [0, 1, 2, "end"]  # it had all rows all the same


def test_wandb_is_asked_for_nothing_it_would_prompt_for(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_mode()[0] == "offline" and "no key" in wandb_mode()[1]
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_mode()[0] == "offline" and "no key" in wandb_mode()[1]
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", f"http://{address}")
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password x\n")
        assert wandb_mode() == ("online", "")
        monkeypatch.setenv("WANDB_MODE", "disabled")
        assert wandb_mode()[0] == "disabled"
        monkeypatch.delenv("WANDB_MODE")
    assert wandb_mode()[0] == "offline" and "cannot be reached" in wandb_mode()[1]


@pytest.mark.slow
def test_a_wandb_server_that_never_answers_costs_no_step_and_no_row(nets):
    arguments = ["--model", "plain.py:Net", *SMALL, "--epochs", "4", "--track", "wandb"]
    with socket.create_server(("127.0.0.1", 0)) as server:  # it takes connections, and that is all
        done = train(
            [*arguments, "--run-dir", "deaf"], nets, WANDB_API_KEY="k" * 40, WANDB_MODE="online",
            WANDB_BASE_URL=f"http://127.0.0.1:{server.getsockname()[1]}",
        )  # fmt: skip
    assert done.status == 0 and done.out.count("--track wandb") == 1, done.out
    assert "finished" in done.out and "Traceback" not in done.out
    assert rows(nets / "deaf")[-1]["epoch"] == 4
    assert children_with("deaf") == []


def test_tensorboard_gets_the_rows_with_their_steps(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (tracker,) = build_trackers("tensorboard", tmp_path, "x", {"lr": 0.1}, pytest.fail)
    tracker.log({"step": 7, "train/loss": 1.5})
    tracker.finish()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = [p.parent for p in tmp_path.rglob("events.out*")]
    scalars = EventAccumulator(str(found[0])).Reload().Scalars("train/loss")
    assert [(s.step, s.value) for s in scalars] == [(7, 1.5)]


def test_tensorboard_shows_each_step_once_after_a_life_that_was_killed(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    rows = [{"step": step, "train/loss": 1.0 / step} for step in (2, 4, 6, 8, 10)]
    rows.insert(2, {"step": 4, "test/loss": 0.5})  # an evaluation has the step of a row
    for kept, made in ((0, rows), (3, rows[3:]), (2, rows[2:])):  # lives: what was known, what came
        known = "".join(json.dumps(row) + "\n" for row in rows[:kept])
        (tmp_path / "metrics.jsonl").write_text(known)
        (tracker,) = build_trackers("tensorboard", tmp_path, "x", {}, pytest.fail)
        for row in made:
            tracker.log(row)
        tracker.finish()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent)).Reload()
    assert [s.step for s in found.Scalars("train/loss")] == [2, 4, 6, 8, 10]
    assert [s.step for s in found.Scalars("test/loss")] == [4]


def test_there_is_one_table_of_names():
    from config import TrainConfig
    from config.fields import HINTS

    assert HINTS["track"].metadata["choices"] == ("none", *TRACKERS) and TrainConfig.track == "none"


@pytest.mark.parametrize("kind", TRACKERS)
def test_a_package_that_is_not_there_is_a_sentence(kind, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("report.tracking.find_spec", lambda name: None)
    assert build_trackers(kind, tmp_path, "x", {}, told.append) == []
    assert len(told) == 1 and "is not installed (pip install" in told[0]


ROWS = [{"step": step, "train/loss": 1.0 / step} for step in (2, 4, 6, 8)]
ROWS.insert(2, {"step": 4, "test/loss": 0.5})


def lives(kind, folder, warn) -> None:
    """Two lives: the first is killed after four rows, of which a checkpoint knew two."""
    for known, made in (([], ROWS[:4]), (ROWS[:2], ROWS[2:])):
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known))
        config = {"lr": 0.1, "loss": None, "model": "x" * 9000}
        (tracker,) = build_trackers(kind, folder, "mine", config, warn)
        for row in made:
            tracker.log(row)
        assert tracker.finish()


@pytest.fixture
def secrets(tmp_path, monkeypatch):
    """What a user's environment may hold, and whether a folder has it."""
    pytest.importorskip("accelerate").PartialState()
    canary = "canary0123456789abcdef"
    for name in ("HF_TOKEN", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, canary)
    for name in ("MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    yield
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not [p for p in files if canary.encode() in p.read_bytes()]


def test_mlflow_has_each_number_once_over_two_lives(tmp_path, secrets):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    lives("mlflow", tmp_path, pytest.fail)
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    run = client.get_run(json.loads((tmp_path / "tracking.json").read_text())["mlflow"])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((one.step, one.value) for one in history) == [(s, 1.0 / s) for s in (2, 4, 6, 8)]
    assert [one.step for one in client.get_metric_history(run.info.run_id, "test/loss")] == [4]
    assert run.data.params["lr"] == "0.1" and run.info.run_name == "mine"


def test_trackio_has_all_rows_of_the_last_life(tmp_path, secrets):
    pytest.importorskip("trackio", reason="trackio is not installed")
    code = f"""
import sys; sys.path[:0] = {[str(REPOSITORY), str(REPOSITORY / "tests")]!r}
from pathlib import Path
from accelerate import PartialState; PartialState()
from test_tracking import lives
lives("trackio", Path({str(tmp_path)!r}), lambda text: sys.exit(text))
"""
    # In a process of its own: trackio reads TRACKIO_DIR when it is imported, and leaves a thread.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {}
    for path in (tmp_path / "trackio").rglob("*.db"):
        with contextlib.closing(sqlite3.connect(path)) as base:
            for name, step, metrics in base.execute("select run_name, step, metrics from metrics"):
                found.setdefault(name, []).append((step, *json.loads(metrics)))
    assert sorted(found["mine life 2"]) == sorted((r["step"], list(r)[1]) for r in ROWS)
