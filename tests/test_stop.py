"""Stop requests: a handler that only sets a flag, and a vote after which all leave together."""

import itertools
import json
import os
import signal
import time
from pathlib import Path

import pytest
from launches import Command, finish, start

from distributed.stop import (
    ORPHAN,
    SAVE_FAILED,
    SIGNAL,
    SIGNALS,
    STOP_FILE,
    TIME_LIMIT,
    StopVote,
    launched,
)

REPOSITORY = str(Path(__file__).resolve().parent.parent)
SCRIPT = '''
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[3])
import torch.distributed as dist
from distributed.stop import StopVote

rank, world, _, _, port = map(lambda w: int(w) if w.isdigit() else w, sys.argv[1:6])
vote = StopVote(interval=0.02).install()
dist.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
)
vote.connect(dist.new_group(), rank == 0)
told = {"early": [vote.ask_all(), vote.ask_all()]}

def beats_until(stop_at, wait, limit=5000):
    """Beat until all agree; at beat `stop_at` the last rank (only) hears a signal."""
    for beat in range(limit):
        if beat == stop_at and rank == world - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
        if wait:
            time.sleep(wait)
        code = vote.poll()
        if code:
            return beat, code
        if stop_at is None and (vote.save_agreed or vote.snapshot_agreed):
            return beat, "save" if vote.save_agreed else "snapshot"
    return limit, None

# A save that the main process's clock asks for is agreed at the same beat by all.
if rank == 0:
    vote.save_every = 0.2
told["save"] = beats_until(None, 0.001 * (rank + 1))
vote.saved()
told["again"] = beats_until(None, 0.001)
vote.saved()
vote.save_every = None
if rank == 0:
    vote.snapshot_every = 0.2
told["snapshot"] = beats_until(None, 0.001)
vote.snapshotted()
vote.snapshot_every = None
# Fast beats make votes rare, slow ones frequent: the same on all.
told["quiet"], told["fast"] = [], 1
for wait in (0.001, 0.03):
    for _ in range(400):
        told["quiet"].append(beats_until(-1, wait, 1)[1])
        told["fast"] = max(told["fast"], vote._beats_per_vote)
        if wait > 0.02 and vote._beats_per_vote == 1:
            break
told["slow"] = vote._beats_per_vote
told["stop"] = beats_until(7, 0.01)
told["after"] = vote.ask_all()
told["code"], told["why"] = vote.code, vote.why(told["stop"][1])
with open(sys.argv[4] + f"/{rank}.json", "w") as file:
    json.dump(told, file)
dist.destroy_process_group()
'''


@pytest.fixture
def vote(monkeypatch):
    """A vote of one process, whose next poll looks; the signal handlers are put back after it."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    names = [n for n in SIGNALS if hasattr(signal, n)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    yield StopVote(interval=0.0).install()
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


def answer(vote) -> int:
    vote._last_vote = -1e9  # a look is due
    return vote.poll()


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_only_sets_a_flag_and_a_second_one_changes_nothing(vote, name):
    assert answer(vote) == 0
    before = {k: v for k, v in vars(vote).items() if k not in ("code", "signal_name")}
    os.kill(os.getpid(), getattr(signal, name))
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert vote.code == SIGNAL and vote.signal_name == name
    after = {k: v for k, v in vars(vote).items() if k not in ("code", "signal_name")}
    assert after == before
    assert answer(vote) == vote.poll() == vote.ask_all() == SIGNAL
    assert vote.why(SIGNAL) == f"a stop signal ({name})"


def test_the_stop_file_asks_on_the_main_process_only(vote, tmp_path):
    vote.stop_file = tmp_path / "STOP"
    assert answer(vote) == 0
    vote.stop_file.touch()
    vote.is_main = False
    assert answer(vote) == 0
    vote.is_main = True
    assert answer(vote) == STOP_FILE and vote.why(STOP_FILE) == "the STOP file"


def test_a_deadline_asks_when_it_has_passed(vote):
    vote.deadline = time.monotonic() + 3600
    assert answer(vote) == vote.ask_all() == 0
    vote.deadline = time.monotonic() - 1
    assert answer(vote) == TIME_LIMIT and "--max-time" in vote.why(TIME_LIMIT)


def test_a_dead_launcher_asks_and_a_shell_that_ends_does_not(vote, monkeypatch):
    there = os.getppid()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert not launched() and answer(vote) == 0  # no launcher: nohup and disown go on
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(os, "getppid", lambda: there)
    under_a_launcher = StopVote()
    assert answer(under_a_launcher) == 0
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert answer(under_a_launcher) == ORPHAN
    assert answer(StopVote()) == ORPHAN  # it was gone before the imports were done


def test_the_gravest_reason_stays(vote):
    vote.request(SAVE_FAILED)
    vote.request(STOP_FILE)
    assert answer(vote) == SAVE_FAILED


def test_alone_a_checkpoint_is_due_after_its_time_and_the_clock_starts_anew_when_saved(vote):
    vote.save_every = 60.0
    answer(vote)
    assert not vote.save_agreed
    vote._last_save -= 61
    answer(vote)
    assert vote.save_agreed
    answer(vote)
    assert vote.save_agreed  # until the loop says that it saved
    vote.saved()
    answer(vote)
    assert not vote.save_agreed


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What three real processes agreed on, in one launch."""
    import socket

    folder = tmp_path_factory.mktemp("vote")
    (folder / "vote.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        start(Command([folder / "vote.py", rank, 3, REPOSITORY, folder, port]), folder)
        for rank in range(3)
    ]
    for rank in ranks:
        done = finish(*rank, 90)
        assert done.status == 0, done.out
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


def test_a_signal_on_one_rank_stops_all_at_the_same_beat(told):
    assert told[0]["stop"] == told[1]["stop"] == told[2]["stop"]
    assert told[0]["stop"][1] == SIGNAL and told[0]["stop"][0] >= 7
    assert [one["code"] for one in told] == [SIGNAL] * 3
    assert told[2]["why"] == "a stop signal (SIGUSR1)" and told[0]["why"] == "a stop signal"
    assert [one["after"] for one in told] == [SIGNAL] * 3


def test_a_save_is_agreed_by_all_at_the_same_beat(told):
    for key in ("save", "again", "snapshot"):
        assert told[0][key] == told[1][key] == told[2][key]
        assert told[0][key][1] == ("save" if key != "snapshot" else key)


def test_without_a_request_nobody_stops_and_the_interval_follows_the_speed(told):
    for one in told:
        assert one["early"] == [0, 0] and set(one["quiet"]) == {None}
        assert one["quiet"] == told[0]["quiet"]
        assert one["fast"] == told[0]["fast"] > one["slow"] == 1


class Clockwork:
    """A clock that the test moves, and a group whose votes come back as this process gave them."""

    def __init__(self, monkeypatch):
        self.now, self.votes = 1000.0, []
        monkeypatch.setattr("distributed.stop.time.monotonic", lambda: self.now)
        monkeypatch.setattr("distributed.stop.dist.all_reduce", self.reduce)
        self.vote = StopVote()
        self.vote.group = object()

    def reduce(self, ballot, **options):
        self.votes.append(self.now)
        return self

    def wait(self):
        pass

    def beats(self, seconds: float, length: float, on_beat=lambda: None) -> list[float]:
        """Beat for so long; the seconds between the votes begun meanwhile."""
        began, known = self.now, len(self.votes)
        while self.now < began + seconds:
            self.now += length
            self.vote.poll()
            on_beat()
        marks = [began, *self.votes[known:], self.now]
        return [b - a for a, b in itertools.pairwise(marks)]


@pytest.mark.parametrize("length", [0.001, 0.01, 0.05, 0.4, 3.0])
def test_votes_stay_a_second_apart_whatever_a_step_costs(monkeypatch, length):
    clock = Clockwork(monkeypatch)
    clock.vote.new_phase()
    gaps = clock.beats(200, length)
    assert max(gaps) <= max(1.2, 1.2 * length)
    assert len(gaps) < 30 + 200 / max(0.8, length)  # and no more of them than needed


def test_a_new_phase_with_other_beats_votes_at_once(monkeypatch):
    clock = Clockwork(monkeypatch)
    for length in (0.01, 0.5, 0.002, 2.0):
        clock.vote.new_phase()
        assert max(clock.beats(60, length)) <= max(1.2, 1.2 * length), length


def test_one_process_looks_too_when_its_phases_are_short(monkeypatch, tmp_path):
    clock = Clockwork(monkeypatch)
    clock.vote.group, clock.vote.stop_file = None, tmp_path / "STOP"
    clock.vote.stop_file.touch()
    for _ in range(10):  # epochs of a tenth of a second
        clock.vote.new_phase()
        clock.beats(0.1, 0.01)
    assert clock.vote.poll() == STOP_FILE


def test_beats_that_only_fill_a_queue_do_not_put_votes_off_for_long(monkeypatch):
    clock = Clockwork(monkeypatch)
    clock.vote.new_phase()
    clock.beats(0.0001 * 20, 0.0001)  # twenty steps given to a GPU, none done
    assert max(clock.beats(60, 0.05)) < 4


def test_a_timed_save_is_agreed_once_each_time_it_is_due(monkeypatch):
    clock = Clockwork(monkeypatch)
    clock.vote.save_every, saves = 60.0, []

    def save():
        if clock.vote.save_agreed:
            saves.append(clock.now)
            clock.vote.saved()

    clock.vote.new_phase()
    clock.vote.saved()
    clock.beats(400, 0.02, save)
    assert len(saves) == 6
    assert all(60 <= b - a <= 63 for a, b in itertools.pairwise(saves))
