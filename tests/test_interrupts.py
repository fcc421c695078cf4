"""Ctrl-C at a terminal while data are looked at, packed, or made ready for a run; and the bars."""

import os
import pty
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import SMALL, command
from test_photographs import photographs

from common import progress
from data import pack, scan
from data.__main__ import main
from data.sources import load_source

KEEP = ["--short-side", "keep"]
PATIENCE = 120.0  # seconds until a process at a terminal says what it is waited for


def at_a_terminal(work: Callable[[], int], wait_for: Callable[[str], bool]) -> tuple[int, str]:
    """Do it in a process at a terminal of its own, press Ctrl-C when it has said so; its status.

    A process that does not end is killed.
    """
    child, terminal = pty.fork()
    if not child:
        status = 1
        try:
            for number, stream in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
                mode = "r" if number == 0 else "w"
                setattr(sys, stream, os.fdopen(number, mode, buffering=1, closefd=False))
            os.environ |= {"TERM": "xterm", "COLUMNS": "100"}
            status = work()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    said, pressed, deadline = "", False, time.monotonic() + PATIENCE
    try:
        while time.monotonic() < deadline:
            if not select.select([terminal], [], [], 0.1)[0]:
                continue
            try:
                part = os.read(terminal, 65536)
            except OSError:  # the last process has closed it
                break
            if not part:
                break
            said += part.decode(errors="replace")
            if not pressed and wait_for(said):
                os.write(terminal, b"\x03")
                pressed = True
        else:
            os.kill(child, 9)
    finally:
        status = os.waitpid(child, 0)[1]
        os.close(terminal)
    return os.waitstatus_to_exitcode(status), said


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Photographs, and a place beside them where each look and each decoding is counted."""
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    photographs(tmp_path / "photos", 40)
    return tmp_path


def slow(monkeypatch, owner: object, name: str, counted: Path) -> None:
    """Make a function take its time, and leave a byte for each call."""
    quick = getattr(owner, name)

    def taking_time(*words):
        time.sleep(0.05)
        with counted.open("a") as file:
            file.write(".")
        return quick(*words)

    monkeypatch.setattr(owner, name, taking_time)


def under_way(counted: Path) -> Callable[[str], bool]:
    """Whether the bar is there, and three are done."""
    return lambda said: "/120" in said and counted.exists() and counted.stat().st_size >= 3


def test_an_interrupted_scan_waits_for_no_other_picture(folder, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", 1)
    monkeypatch.setattr(scan, "MOST_THREADS", 1)
    with monkeypatch.context() as patch:
        slow(patch, scan, "_look", folder / "looked")
        words = ["stats", "--dataset", str(folder / "photos")]
        status, said = at_a_terminal(lambda: main(words), under_way(folder / "looked"))
    assert status == 130 and "stopped. What is finished stays" in said and "Traceback" not in said
    assert "reading headers" in said and "to come" in said
    assert (folder / "looked").stat().st_size < 100
    assert main(words) == 0


def test_an_interrupted_prepare_leaves_whole_shards_which_are_not_made_again(folder, monkeypatch):
    dataset, out, whole = folder / "photos", folder / "out", folder / "whole"
    monkeypatch.setattr(pack, "SHARD_BYTES", 60_000)
    monkeypatch.setattr(pack, "CHUNK", 1)
    words = ["prepare", "--dataset", str(dataset), *KEEP, "--out"]
    assert main([*words, str(whole)]) == 0

    def finished() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.glob("shard-*.bin")}

    with monkeypatch.context() as patch:
        slow(patch, pack._Packing, "_content", folder / "made")
        status, said = at_a_terminal(
            lambda: main([*words, str(out)]), lambda said: "/120" in said and len(finished()) > 1
        )
    assert status == 130 and "stopped. What is finished stays" in said and "Traceback" not in said
    assert "packing" in said and "to come" in said
    before = finished()
    assert 1 < len(before) < len(list(whole.glob("shard-*.bin")))
    assert all(path.read_bytes() == (whole / path.name).read_bytes() for path in before)
    assert main([*words, str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_an_interrupted_start_of_a_run_is_a_sentence(folder, monkeypatch):
    from config import parse_or_exit
    from report.ending import run_to_exit
    from train import main as train

    monkeypatch.setattr(scan, "CHUNK", 1)
    monkeypatch.setattr(scan, "MOST_THREADS", 1)
    slow(monkeypatch, scan, "_look", folder / "looked")
    words = ["--model", "my_cnn", "--dataset", str(folder / "photos"), "--image-size", "32"]
    words += ["--run-dir", str(folder / "run"), "--threads", "1"]
    status, said = at_a_terminal(
        lambda: run_to_exit(train, parse_or_exit(words)), under_way(folder / "looked")
    )
    assert status == 75 and "stopped before the first step" in said and "Traceback" not in said
    assert (folder / "looked").stat().st_size < 100
    assert not (folder / "run" / "checkpoints").exists()


def test_what_a_scan_did_is_one_line_and_without_a_terminal_there_is_no_bar(folder, capfd):
    told: list[str] = []
    load_source(str(folder / "photos"), say=told.append)
    assert [line for line in told if line.startswith("read the headers of 120 photographs in ")]
    again: list[str] = []
    load_source(str(folder / "photos"), say=again.append)
    assert not again and capfd.readouterr().err == ""


def test_long_work_tells_a_file_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    with progress.progress("packing", "pictures") as count:
        count(0, 4000)
        count(1000, 4000)
    told = capsys.readouterr().err
    assert told.startswith("packing: 1,000 of 4,000 pictures, about ")
    assert told.endswith(" to come\n") and told.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_under_accelerate_launch_ends_with_the_runs_own_panel(tmp_path, nets, monkeypatch):
    """The launcher's traceback cannot be helped: it dies of the terminal's signal, in a wait.

    It comes a quarter of a second later, before the run's panel or after it.
    """
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "--model", f"{nets / 'plain.py'}:Net", "--epochs", "9999", "--run-dir", "run"]
    launch = command(words, launcher="accelerate")
    status, said = at_a_terminal(
        lambda: os.execv(launch[0], launch), lambda said: "epoch 2/9999" in said
    )
    assert status != 0 and "stopped at step" in said, said[-3000:]
    _, _, panel = said.rpartition("stopped at step")
    assert said.count("Traceback") == said.count("in launch_command") <= 1, said[-3000:]
    assert "a traceback above or below is its own" in panel and "--resume run" in panel, panel
