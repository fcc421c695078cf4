"""What the wall time of a run went to: every second once, over all its lives."""

import json

import pytest
from launches import SMALL, train

from training.goodput import LOST, Ledger, goodput, in_words


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def life(step, at, born, until, **seconds):
    return {"step": step, "at": at, "born": born, "until": until, "seconds": seconds}


def test_every_second_of_a_life_has_one_cause():
    clock = Clock()
    ledger = Ledger(own_process=False, clock=clock)
    clock.now += 7
    ledger.charge("evaluation", 2)  # of a life that begins with one
    ledger.begin_steps()
    clock.now += 20
    ledger.begin_steps()  # of a second epoch
    ledger.charge("saving", 3)
    ledger.charge("saving", 1)
    ledger.step = 16
    found = goodput([{"step": 0, **ledger.entry()}])
    wanted = {"useful": 16, "start": 5, "evaluation": 2, "saving": 4, "wall": 27}
    assert found == {**dict.fromkeys(("useful", *LOST), 0), **wanted}


def test_a_life_that_ends_before_its_first_step_was_all_start():
    clock = Clock()
    ledger = Ledger(own_process=False, clock=clock)
    clock.now += 4
    found = goodput([{"step": 0, **ledger.entry()}])
    assert (found["useful"], found["start"]) == (0, 4)


def test_steps_made_again_are_lost_at_the_speed_of_their_first_time():
    killed = life(0, 40, born=0, until=90, start=10)  # 40 steps of 2 s
    second = life(30, 60, born=95, until=170, start=15, evaluation=0)  # 30 of 2 s
    found = goodput([killed, second])
    assert found["repeated"] == 20 and found["between"] == 5 and found["start"] == 25
    assert found["useful"] == 60 + 60 and found["wall"] == 170
    assert in_words(found) == (
        "71 % of 2m50s computed steps; 15 % starting, 12 % steps made again after a kill, "
        "3 % between lives"
    )


def test_lives_of_an_older_program_are_left_out():
    assert goodput([{"life": 0, "began": "2026-01-01 00:00:00", "step": 0}]) == {}
    assert goodput([]) == {}


def test_a_killed_and_resumed_run_tells_what_it_lost(tmp_path):
    words = ["--model", "my_cnn", *SMALL, "--limit", "256", "--epochs", "3", "--run-dir", "run"]
    words += ["--checkpoint-every", "5"]
    assert train(words, tmp_path, LOCKSTEP_FAULT="kill@step=9").status != 0
    done = train(words, tmp_path)
    assert done.status == 0, done.out
    spent = json.loads((tmp_path / "run/summary.json").read_text())["goodput"]
    lives = json.loads((tmp_path / "run/status.json").read_text())["lives"]
    assert [one["at"] for one in lives] == [9, 12] and [one["step"] for one in lives] == [0, 5]
    for cause in ("useful", "start", "evaluation", "repeated"):
        assert spent[cause] > 0, cause
    parts = sum(seconds for cause, seconds in spent.items() if cause != "wall")
    assert parts == pytest.approx(spent["wall"], abs=0.01)
    # The kernel tells a process's birth to a second or so.
    assert spent["wall"] <= lives[1]["until"] - lives[0]["born"] + 1.5
    page = (tmp_path / "run/report.html").read_text()
    assert 'class="goodput"' in page and "steps made again after a kill" in page
