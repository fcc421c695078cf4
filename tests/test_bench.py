"""The measurements: they start, their windows count what they say, their statistics are right."""

import io
import json
import math
import os
import subprocess
import sys
import warnings
from importlib import import_module

import pytest
import torch
from launches import REPOSITORY, finish, python, start
from safetensors.torch import save_file

from bench import gpu, tables
from bench.measure import WORD, Gate, ratio, spread, table
from bench.seeds import accuracy_said, statistics

MODULES = (
    "throughput",
    "options",
    "augment",
    "startup",
    "seeds",
    "checkpoint",
    "kills",
    "shards",
    "launches",
    "pace",
)


@pytest.mark.parametrize("module", MODULES)
def test_every_measurement_says_what_it_does(module):
    done = python("-m", f"bench.{module}", "--help")
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout


IN_SMALL = {
    "options": "--models my_cnn --rounds 1 --steps 3 --batch-size 16 --options DDP;bf16",
    "augment": "--rounds 1 --batch-size 4",
    "startup": "--model my_cnn --image-size 16 --batch-size 8 --rounds 1",
    "seeds": "--runs 2 -- --model my_cnn --dataset digits --image-size 16 --epochs 1",
    "checkpoint": "--model my_cnn --image-size 32 --batch-size 4 --rounds 1",
    "shards": "--model my_cnn --image-size 32 --micro-batch 4 --shards 4 --rounds 1",
    "loader": "--images 40 --large 0 --rounds 1",
    "later_epochs": "--images 64 --rounds 1",
    "kills": "--kills 1 --seconds 2",
}


def numbers(found: object) -> list[float]:
    """All that a measurement found, however deep it stands."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list):
        return [number for one in found for number in numbers(one)]
    return [float(found)] if isinstance(found, int | float) else []


@pytest.mark.slow
@pytest.mark.parametrize("module", IN_SMALL)
def test_every_measurement_comes_to_its_end_and_has_found_numbers(module, tmp_path):
    """One waited for ever for a thread that had begun to live as long as the run."""
    file = tmp_path / "found.json"
    done = python("-m", f"bench.{module}", "--json", file, *IN_SMALL[module].split())
    assert done.returncode == 0, done.stderr
    found = numbers(json.loads(file.read_text()))
    assert len(found) > 3 and all(map(math.isfinite, found)), found
    assert "|" in done.stdout


def test_the_accuracy_that_was_printed_is_no_other_metrics():
    words = (
        "│ more of val   balanced_accuracy 0.1, ece 0.1 │\n"
        "│ val           300 images: loss 0.3, accuracy 0.2 │\n"
        "│ more of test  top5 0.99, balanced_accuracy 0.3, macro_f1 0.4 │\n"
        "│ test          1,355 images: loss 0.3, accuracy 0.9 │\n"
    )
    assert accuracy_said(words) == 0.9


def test_a_gate_lets_whole_windows_through_and_warms_up_first(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\ngo\n"))
    gate = Gate(steps=3, warm=2, batch_size=10)
    passed = []
    with pytest.raises(SystemExit):
        for batch in gate.through(range(100)):
            passed.append(batch)
    assert passed == list(range(10))  # two windows of five; then the end of what was asked
    lines = capsys.readouterr().out.splitlines()
    said = [json.loads(line.removeprefix(WORD)) for line in lines if line.startswith(WORD)]
    assert [("ready" in s, "speed" in s) for s in said] == [(1, 0), (0, 1)] * 2 + [(1, 0)]
    assert all(s["host_mb"] > 50 for s in said if "speed" in s)


def test_time_of_a_part_is_counted_per_step_of_the_timed_steps(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    gate = Gate(steps=2, warm=1, batch_size=1)
    with pytest.raises(SystemExit):
        for _ in gate.through(range(9)):
            gate.count("part", 0.5)
    said = [line for line in capsys.readouterr().out.splitlines() if "speed" in line]
    assert len(said) == 1 and json.loads(said[0].removeprefix(WORD))["milliseconds"]["part"] == 500


def test_ratios_are_taken_round_by_round():
    found = ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert found == {"median": 2.0, "low": 1.0, "high": 3.0, "n": 3}
    assert spread([3.0, 1.0])["median"] == 2.0
    assert table(["a"], [[1]]).splitlines() == ["| a |", "| --- |", "| 1 |"]


def test_the_interval_is_students():
    found = statistics([0.90, 0.92, 0.94])
    assert math.isclose(found["mean"], 0.92) and math.isclose(found["sd"], 0.02)
    assert math.isclose(found["half_width"], 4.303 * 0.02 / math.sqrt(3))
    assert math.isnan(statistics([0.9])["half_width"])


def test_the_tables_of_the_pages_are_what_the_results_say():
    shown = set()
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.made(page) == text, "python -m bench.tables --write"
        shown |= {(page.parent / place[4]).resolve() for place in tables.PLACE.finditer(text)}
    assert shown == set((REPOSITORY / "bench" / "results").glob("*.json"))


def test_the_study_of_no_restart_says_what_a_start_costs_as_the_results_do():
    results = REPOSITORY / "bench" / "results"
    start, kills = (
        json.loads((results / name).read_text())["results"]
        for name in ("startup.json", "kills.json")
    )
    start = start["first step"]["median"]
    again = kills["import"]["median"] + kills["load"]["median"]
    text = " ".join((REPOSITORY / "docs" / "without_restart.md").read_text().split())
    assert f"The imports and the start: {start:.1f} s on this machine" in text
    assert f" {again:.1f} s after a kill" in text


ROOM = """
import os, time
from bench.gpu import Found

def good(place):
    yield Found("a", "1", True, {"number": 1})
    yield Found("b", "2")

def wrong(place):
    yield Found("c", "3", False)

def raises(place):
    yield Found("d", "4", True)
    raise RuntimeError("no luck")

def dies(place):
    print("last words", flush=True)
    os._exit(7)

def hangs(place):
    yield Found("e", "5", True)
    time.sleep(600)

def after(place, case):
    assert not list(place.folder.iterdir())
    yield Found("pid", str(os.getpid()))
"""


@pytest.fixture
def room(tmp_path, monkeypatch):
    (tmp_path / "a_room.py").write_text(ROOM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda name, seconds=60.0, case="": gpu.Row("a_room", name, seconds, case)


def test_a_bad_row_costs_its_process_and_no_other_row(room, tmp_path):
    rows = [room("good"), room("wrong"), room("after", case="one"), room("raises"), room("dies"),
            room("hangs", 1.0), room("after", case="two")]  # fmt: skip
    lines = []
    found = gpu.measured(rows, tmp_path / "out", budget=120, show=lines.append)
    verdicts = [(row.title, found[row.title]["verdict"]) for row in rows]
    assert verdicts == [
        ("good", gpu.PASS), ("wrong", gpu.FAIL), ("after one", gpu.FIGURE), ("raises", gpu.FAIL),
        ("dies", gpu.FAIL), ("hangs", gpu.FAIL), ("after two", gpu.FIGURE),
    ]  # fmt: skip
    assert found["good"]["found"][0]["numbers"] == {"number": 1}
    assert found["raises"]["problem"] == "RuntimeError: no luck"
    assert [f["what"] for f in found["raises"]["found"]] == ["d"]  # what came before stays
    assert "status 7" in found["dies"]["problem"] and "last words" in found["dies"]["problem"]
    assert found["hangs"]["problem"] == "cut after 1 s"
    assert len([line for line in lines if " e: 5" in line]) == 1
    pids = {found[f"after {case}"]["found"][0]["figure"] for case in ("one", "two")}
    assert len(pids) == 2
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"gpu.json", "gpu.md", "gpu.log"}
    assert json.loads((out / "gpu.json").read_text())["rows"] == found
    assert "| wrong: c | 3 | FAIL |" in (out / "gpu.md").read_text()


def test_when_the_time_is_over_the_rest_is_told_as_not_reached(room, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    rows = [room("good"), room("hangs"), room("after", case="one")]
    found = gpu.measured(rows, tmp_path, budget=5, show=lambda line: None)
    verdicts = [found[row.title]["verdict"] for row in rows]
    assert verdicts == [gpu.PASS, gpu.LATE, gpu.LATE]
    assert found["hangs"]["found"][0]["figure"] == "5"
    text = (tmp_path / "gpu.md").read_text()
    assert "1 PASS, 0 FAIL, 0 figure, 2 not reached" in text and "| after one |" in text


def test_every_row_has_its_function_and_each_room_one_turn():
    for row in gpu.ROWS:
        assert callable(getattr(import_module(row.room), row.name)), row
    assert len({row.title for row in gpu.ROWS}) == len(gpu.ROWS)
    rooms = [row.room for row in gpu.ROWS]
    assert rooms == sorted(rooms, key=[gpu.CHECKS, gpu.SPEED].index)  # right or wrong comes first


def test_waits_are_counted_where_they_happen():
    from bench.gpu_checks import WAIT, Waits

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = Waits(caught)
        for number in range(3):
            watch.step(number)
            with watch.phase("optimizer"):
                warnings.warn("anything else", stacklevel=1)
            if number == 1:
                warnings.warn(WAIT, stacklevel=1)
                with watch.phase("save"):
                    warnings.warn(f"{WAIT} (somewhere)", stacklevel=1)
                    warnings.warn(WAIT, stacklevel=1)
    assert watch.phases == {"step": [0, 1, 0], "save": [2]}


def test_one_other_bit_of_any_state_is_another_run(tmp_path):
    from bench.gpu_checks import same

    for speed, name in enumerate(("one", "two")):
        folder = tmp_path / name / "checkpoints" / "step-000000004"
        folder.mkdir(parents=True)
        row = json.dumps({"train/loss": 1.5, "speed/images_per_second": speed})
        (tmp_path / name / "metrics.jsonl").write_text(row + "\n")
        for path in (folder / "model.safetensors", folder / "optimizer.safetensors",
                     tmp_path / name / "last.safetensors"):  # fmt: skip
            save_file({"x": torch.zeros(4)}, path)
    assert same("repeat", tmp_path / "one", tmp_path / "two").passed
    changed = torch.zeros(4)
    changed[3] = 1e-45
    save_file({"x": changed}, tmp_path / "two/checkpoints/step-000000004/optimizer.safetensors")
    found = same("repeat", tmp_path / "one", tmp_path / "two")
    assert not found.passed and "optimizer.safetensors" in found.figure
    (tmp_path / "two" / "metrics.jsonl").write_text('{"train/loss": 1.25}\n')
    assert "metrics.jsonl" in same("repeat", tmp_path / "one", tmp_path / "two").figure


def test_what_a_test_launches_sees_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    words = [sys.executable, "-c", "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"]
    assert finish(*start(words, tmp_path)).out.strip() == "''"


def test_no_test_but_those_of_a_gpu_sees_one():
    code = "import os, conftest, launches; print(os.environ['CUDA_VISIBLE_DEVICES'], launches.SEEN)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY / "tests", capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "3", "PYTHONPATH": str(REPOSITORY)}, timeout=120,
    )  # fmt: skip
    assert done.stdout.split(maxsplit=1) == ["{'CUDA_VISIBLE_DEVICES':", "'3'}\n"], done
