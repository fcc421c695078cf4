"""The measurements: they start, their windows count what they say, their statistics are right."""

import io
import json
import math
import subprocess
import sys

import pytest
from launches import REPOSITORY

from bench import tables
from bench.measure import WORD, Gate, ratio, spread, table
from bench.seeds import statistics

MODULES = (
    "throughput",
    "options",
    "augment",
    "startup",
    "seeds",
    "checkpoint",
    "shards",
    "launches",
)


@pytest.mark.parametrize("module", MODULES)
def test_every_measurement_says_what_it_does(module):
    words = [sys.executable, "-m", f"bench.{module}", "--help"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout


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
    class Thing:
        def work(self, x):
            return 2 * x

    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    gate, thing = Gate(steps=2, warm=1, batch_size=1), Thing()
    gate.timed(thing, "work", "part")
    with pytest.raises(SystemExit):
        for batch in gate.through(range(9)):
            assert thing.work(batch) == 2 * batch
    said = [line for line in capsys.readouterr().out.splitlines() if "speed" in line]
    assert len(said) == 1 and json.loads(said[0].removeprefix(WORD))["milliseconds"]["part"] > 0


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
