"""Runs on photographs begin again at any position, and end beside threads that hang or fail."""

import json
import signal
import time
from pathlib import Path

import pytest
from launches import children_with, command, finish, start, train, wait_for
from test_photographs import NET, photographs

pytestmark = pytest.mark.slow

CACHE = {"LOCKSTEP_CACHE_SIZE": "0"}  # the files are decoded in every epoch
RUN = ["--model", "net.py:Net", "--dataset", "photos", "--image-size", "48", "--batch-size", "4"]
RUN += ["--epochs", "1", "--threads", "1", "--decode-threads", "2", "--log-every", "1"]
RUN += ["--no-plots", "--augment", "resized_crop"]
IN_FLIGHT = (3 + 2) * 4  # pictures that may be read beyond the step that is taken

# What a model's file does runs in the process.
COUNTED = """
import os
from data.photographs import FileStore

READ, STEPS = [], []
quick = FileStore.encoded

def encoded(self, place):
    READ.append(place)
    return quick(self, place)

FileStore.encoded = encoded
whole = Net.forward

def forward(self, x):
    if self.training and len(x) == 4 and not STEPS:
        STEPS.append(len(READ))
        open(os.environ["COUNT"], "w").write(str(len(READ)))
    return whole(self, x)

Net.forward = forward
"""
BROKEN = """
import os, signal, sys, threading, time
from data.photographs import FileStore

quick, lock, reads = FileStore.encoded, threading.Lock(), [0]

def encoded(self, place):
    with lock:
        reads[0] += 1
        number = reads[0]
    if number == 60 and os.environ.get("RANK", "1") == "1":
        open("broken", "w").close()
        kind = os.environ["BROKEN"]
        if kind == "hang":
            time.sleep(3600)
        elif kind == "memory":
            raise MemoryError("no room")
        elif kind == "exit":
            raise SystemExit(3)
        elif kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    return quick(self, place)

FileStore.encoded = encoded
"""


def test_what_is_read_before_the_first_step_of_a_later_life_does_not_depend_on_its_position(
    tmp_path,
):
    (tmp_path / "net.py").write_text(NET + COUNTED)
    photographs(tmp_path / "photos", 32)  # some 76 train
    read = {}
    for step in (2, 16):
        words = [*RUN, "--run-dir", f"at{step}"]
        counted = {"COUNT": str(tmp_path / f"count{step}"), **CACHE}
        done = train([*words, "--stop-after", step], tmp_path, **counted)
        assert done.status in (0, 75), done.out
        done = train([*words, "--stop-after", step + 2], tmp_path, **counted)
        assert "resumed" in done.out, done.out
        read[step] = int(Path(counted["COUNT"]).read_text())
    assert abs(read[16] - read[2]) <= IN_FLIGHT < 14 * 4, read


@pytest.mark.parametrize(
    ("kind", "processes"), [("hang", 1), ("hang", 2), ("memory", 1), ("exit", 2), ("kill", 2)]
)
def test_a_thread_that_fails_or_hangs_holds_no_run_up(tmp_path, kind, processes):
    (tmp_path / "net.py").write_text(NET + BROKEN)
    photographs(tmp_path / "photos", 32)
    name = f"ends-{kind}-{processes}"
    words = [*RUN, "--epochs", "40", "--run-dir", name]
    process, log = start(command(words, processes), tmp_path, BROKEN=kind, **CACHE)
    if kind == "hang":
        wait_for((tmp_path / "broken").exists, process, log)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
    done = finish(process, log, 120)
    assert done.status not in (0, None), done.out
    assert (tmp_path / "broken").exists()
    if (kind, processes) == ("hang", 1):  # alone, it need wait for nobody
        assert done.status == 75, done.out
        told = json.loads((tmp_path / name / "status.json").read_text())
        assert told["status"] == "stopped", told
        more = ["--stop-after", told["step"] + 2]
        done = train(["--resume", name, *more], tmp_path, BROKEN="", **CACHE)
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        steps = [row["step"] for row in rows if "train/loss" in row]
        assert "resumed" in done.out and steps == [*range(1, told["step"] + 3)], done.out
    end = time.monotonic() + 60  # who waits for a dead peer notices after ten seconds
    while children_with(name) and time.monotonic() < end:
        time.sleep(0.2)
    assert children_with(name) == []
    if kind == "memory":
        assert "cannot decode" not in done.out and "memory" in done.out.lower(), done.out
        assert json.loads((tmp_path / name / "status.json").read_text())["status"] == "failed"
