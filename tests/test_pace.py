"""Stragglers: a process that the others wait for is named, with the reason, and no other is."""

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from launches import train
from PIL import Image
from torch import nn

from distributed.pace import BLOCKS, NUMBERS, STEPS, WARM_UP, CoreWaits, Pace, middle
from report.doctor import examine
from training.goodput import slow_in_words

USUAL = (0.002, 0.010, 0.020)  # seconds of a shard: data, forward, backward
WINDOW = BLOCKS * STEPS


def judged(
    steps, shares, planted=lambda step, rank: (0, 0, 0), noise=0.0, seed=0,
    waits=lambda step, rank, draw: 0.0, device="cpu",
):  # fmt: skip
    """What the main process says in a run whose clock is planted: (step, rank, reason or None)."""
    draw = random.Random(seed)
    worlds = [Pace(rank, len(shares), torch.device(device)) for rank in range(len(shares))]
    told = []
    for step in range(steps):
        rows, whole = [], 0.0
        for rank, pace in enumerate(worlds):
            pace.shares = list(shares)
            usual = [seconds * shares[rank] for seconds in USUAL]
            each = [
                seconds * (1 + noise * draw.expovariate(1)) + late
                for seconds, late in zip(usual, planted(step, rank), strict=True)
            ]
            # Half of it while its part of a step is timed.
            wait = sum(waits(step, rank, draw) for _ in range(shares[rank]))
            each[2] += wait / 2
            rows.append((*each, wait))
            whole = max(whole, sum(each) + wait / 2 + 0.005)
        for pace, each in zip(worlds, rows, strict=True):
            pace._take((*each, whole))
            pace._steps += 1
        heard = sum(pace.numbers(torch.zeros(1)) for pace in worlds).tolist()
        worlds[0].hear(heard)
        for slow in worlds[0].judge(step, "rank {}".format):
            told.append((step, slow.rank, slow.reason if slow.until is None else None, slow))
    return told


@pytest.mark.parametrize("shares", [(1, 1), (2, 2, 2), (3, 3, 2, 2, 2)])
@pytest.mark.parametrize("reason", ["data", "forward", "backward", "all"])
def test_a_slow_process_is_named_with_the_reason_within_20_steps_and_then_that_it_keeps_up(
    shares, reason
):
    late = {"data": (0.05, 0, 0), "forward": (0, 0.05, 0), "backward": (0, 0, 0.05)}
    late["all"] = tuple(share * shares[0] for share in USUAL)  # twice as slow
    who = 1 if len(shares) < 4 else 0

    def planted(step, rank):
        return late[reason] if rank == who and 40 <= step < 100 else (0, 0, 0)

    (named, rank, why, slow), (again, same, nothing, _) = judged(200, shares, planted, noise=0.1)
    assert (rank, why) == (who, reason) and (same, nothing) == (who, None)
    assert 40 < named < 60 and 100 < again < 120
    much = sum(late[reason])
    assert slow.seconds == pytest.approx(much, rel=0.25)
    step = shares[0] * sum(USUAL) + 0.005
    assert slow.faster == pytest.approx(much / step, rel=0.4)


def test_two_slow_processes_of_five_are_both_named():
    told = judged(60, (1,) * 5, lambda step, rank: (0, 0.02, 0) if rank in (1, 4) else (0, 0, 0))
    assert [(rank, why) for _, rank, why, _ in told] == [(1, "forward"), (4, "forward")]


def test_the_reason_is_told_again_when_it_is_another_one():
    told = judged(
        120, (1, 1), lambda s, r: (0, 0.05 * (s < 60), 0.05 * (s >= 60)) if r else (0,) * 3
    )
    assert [(rank, why) for _, rank, why, _ in told] == [(1, "forward"), (1, "backward")]
    assert told[0][3].until == told[1][0] == told[1][3].since


@pytest.mark.parametrize("shares", [(1, 1), (2, 2, 1), (1,) * 5])
@pytest.mark.parametrize("noise", [0.02, 1.0])
def test_an_even_run_names_nobody(shares, noise):
    assert judged(500, shares, noise=noise) == []


def test_a_process_that_is_slow_and_yet_no_later_than_the_others_is_not_named():
    """Of three shards it has one, the others have two: nobody waits for it."""
    shares = (2, 2, 1)
    late = (0, 0, 0.8 * sum(USUAL))
    assert judged(100, shares, lambda step, rank: late if rank == 2 else (0, 0, 0)) == []


def test_of_two_processes_the_slower_one_is_waited_for():
    assert middle([2, 1]) == 1 and middle([3, 1, 2]) == 2 and middle([4, 3, 2, 1]) == 2
    told = judged(60, (1, 1), lambda step, rank: (0, 0, 0.05) if rank == 0 else (0, 0, 0))
    assert [(rank, why) for _, rank, why, _ in told] == [(0, "backward")]


def slices(often, longest):
    """Waits for a core as they were recorded: some steps meet slices of others, some none."""
    return lambda draw: draw.uniform(0, longest) * (draw.random() < often)


BUSY, FREE, CROWDED = slices(0.8, 0.024), slices(0.1, 0.002), slices(0.7, 0.03)


@pytest.mark.parametrize("shares", [(1, 1), (2, 2, 2), (3, 3, 2, 2, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_a_core_that_is_shared_from_now_on_is_named_within_30_steps(shares, seed):
    """A busy process has its slices on it: single steps are uneven, all together are not."""

    def waits(step, rank, draw):
        return (BUSY if rank == 0 and 40 <= step < 400 else FREE)(draw)

    told = judged(500, shares, noise=0.1, seed=seed, waits=waits)
    (named, rank, why, slow), *between, (_, same, nothing, end) = told
    assert 40 < named < 70 and (rank, why, same, nothing) == (0, "core", 0, None)
    assert 0.003 < slow.seconds / shares[0] < 0.02 and 400 < end.until < 440
    assert {(rank, why) for _, rank, why, _ in between} <= {(0, "core"), (0, None)}


@pytest.mark.parametrize("shares", [(1, 1), (1, 1, 1), (2, 2, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_where_all_share_their_cores_with_others_alike_nobody_is_named(shares, seed):
    crowded = lambda step, rank, draw: CROWDED(draw)  # noqa: E731
    assert judged(1500, shares, noise=0.1, seed=seed, waits=crowded) == []


def test_a_host_that_waits_for_a_core_is_no_slow_gpu():
    """The device has work enough meanwhile: what counts there are its own events."""
    waits = lambda step, rank, draw: 0.01 * rank  # noqa: E731
    late = lambda step, rank: (0, 0, -0.005 * rank)  # noqa: E731 - that `judged` adds for a wait
    assert judged(100, (1, 1), late, waits=waits, device="cuda") == []
    assert [why for _, _, why, _ in judged(100, (1, 1), late, waits=waits)] == ["core"]


def test_waits_for_a_core_are_those_of_this_thread():
    wait = CoreWaits()
    before = wait()
    if not Path("/proc/thread-self/schedstat").exists():
        assert before == 0.0
        return
    time.sleep(0.05)  # asleep, it wants no core
    assert 0 <= before <= wait() < before + 0.05
    missing = CoreWaits()
    missing._file = -1
    assert missing() == 0.0


# --- what is timed -------------------------------------------------------------------------------


class Clock:
    """Goes on by what a test says."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    seconds = staticmethod(lambda begin, end: end - begin)
    known = staticmethod(lambda mark: True)


def test_a_steps_time_is_cut_where_the_others_are_waited_for():
    pace, clock = Pace(1, 2, torch.device("cpu")), Clock()
    pace.clock = clock
    pace._core_waits = iter(range(0, 10_000, 5)).__next__
    layers = [nn.Linear(2, 2) for _ in range(3)]
    pace.follow([p for layer in layers for p in layer.parameters()])

    def step():
        clock.now += 1  # data
        pace.lap()
        for last in (False, True):
            pace.lap()
            clock.now += 10  # forward
            pace.lap()
            x = torch.ones(1, 2)
            for layer in layers:
                x = layer(x)
            x.register_hook(lambda gradient: setattr(clock, "now", clock.now + 100))
            x.sum().backward()
            clock.now += 1000  # the others
            pace.shard_done(waits=last)
        clock.now += 10_000  # optimizer
        pace.asks()

    pace.asks(first=True)
    for _ in range(WARM_UP + WINDOW):
        step()
    mine = pace.numbers(torch.zeros(1)).view(2, NUMBERS)
    # The first shard adds up here alone, so all until it returns is its own.
    assert mine[0].tolist() == [0] * NUMBERS
    assert mine[1].tolist() == [1, 20, 1200, 5] * BLOCKS + [0, 0]
    assert len(pace._hooks) == 1  # of the parameter whose gradient is the last


def test_who_follows_other_parameters_lets_the_first_ones_go():
    """Else a run that unfreezes layers would mark each gradient twice, and more often later."""
    pace, clock = Pace(0, 2, torch.device("cpu")), Clock()
    pace.clock = clock
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    pace.follow(list(layers[1].parameters()))
    pace.follow([p for layer in layers for p in layer.parameters()])
    counts = [len(p._post_accumulate_grad_hooks) for layer in layers for p in layer.parameters()]
    assert counts == [1] * 4
    pace.let_go()
    assert not any(p._post_accumulate_grad_hooks for layer in layers for p in layer.parameters())


def test_a_process_alone_times_nothing_and_a_pause_is_no_step():
    alone = Pace(0, 1, torch.device("cpu"))
    alone.asks()
    assert alone._marks == []
    pace = Pace(0, 2, torch.device("cpu"))
    for _ in range(WARM_UP + 3):
        pace.asks(first=True)  # an epoch of one step, left by its end
        pace.lap()
        for _ in range(2):
            pace.lap()
        pace.shard_done(waits=False)
    assert not pace._begun
    pace.asks()
    assert pace._steps == 1


def test_events_of_a_gpu_that_are_not_over_wait_for_a_later_row(monkeypatch):
    """Nobody waits for the device: what it has not done yet is told with the next row."""
    pace, over = Pace(0, 2, torch.device("cuda")), SimpleNamespace(until=0)
    times = iter(range(10_000))
    pace.clock = SimpleNamespace(
        mark=lambda: next(times), seconds=lambda a, b: b - a, known=lambda mark: mark < over.until
    )
    pace.asks(first=True)
    for _ in range(WARM_UP + 2 * WINDOW):
        for _ in range(3):
            pace.lap()
        pace.shard_done(waits=False)
        pace.asks()
    assert not pace.numbers(torch.zeros(1)).any()
    over.until = 10_000
    assert not pace.numbers(torch.zeros(1)).any()  # the other's turn, too, is five steps later
    pace._steps += STEPS
    assert pace.numbers(torch.zeros(1)).any()


# --- real runs -----------------------------------------------------------------------------------

NET = """
import os, pathlib, time
import torch
from torch import nn

PLAN, WHO, LATE, EVEN = {plan!r}, {who}, {late}, {even}
READ, DONE = pathlib.Path.read_bytes, [0]


def late(what):
    here = any(a <= DONE[0] < b and what in kinds for kinds, a, b in PLAN)
    return LATE if here and int(os.environ["RANK"]) == WHO else 0.0


def slow_disk(path):
    time.sleep(late("data") / {pictures})
    return READ(path)


pathlib.Path.read_bytes = slow_disk


class Sleeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(EVEN + late("backward"))
        return gradient


class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.first, self.head = nn.Linear(3, 8), nn.Linear(8, num_classes)

    def forward(self, x):
        if not self.training:
            return self.head(self.first(x.mean((2, 3))))
        time.sleep(EVEN + late("forward"))
        x = self.head(Sleeps.apply(self.first(x.mean((2, 3)))))
        DONE[0] += 1
        return x
"""
LATE, EVEN = 0.1, 0.02
PLAN = [
    (("forward",), 25, 45), (("backward",), 70, 90), (("forward", "backward"), 115, 135),
    (("data",), 160, 190),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "who"), [(2, 0), (3, 2)])
def test_a_planted_delay_is_named_and_what_it_costs(tmp_path, processes, who):
    """A model and a disk that are slow on one process, one after the other, and even between."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=numpy.uint8)
    for place in range(96):
        folder = tmp_path / "photos" / f"c{place % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numpy.roll(pixels, place, 0)).save(folder / f"{place}.jpg")
    text = NET.format(plan=PLAN, who=who, late=LATE, even=EVEN, pictures=12 // processes)
    (tmp_path / "net.py").write_text(text)
    words = ["--model", "net.py:Net", "--dataset", "photos", "--image-size", "16", "--no-plots"]
    words += ["--batch-size", "12", "--max-steps", "215", "--eval-every", "100", "--threads", "1"]
    words += ["--log-every", "1", "--run-dir", "run", "--decode", "scaled"]
    done = train(words, tmp_path, processes)
    assert done.status == 0, done.out
    (life,) = json.loads((tmp_path / "run/status.json").read_text())["lives"]
    found = [slow for slow in life["slow"] if slow["seconds"] > LATE / 4]  # no noise of a machine
    assert [(s["rank"], s["reason"]) for s in found] == [
        (who, reason) for reason in ("forward", "backward", "all", "data")
    ], done.out
    for slow, (_, first, last) in zip(found, PLAN, strict=True):
        ahead = 5 if slow["reason"] == "data" else 0  # what is decoded already has to be used up
        assert first < slow["since"] <= first + 20 + ahead, slow
        assert last < slow["until"] <= last + 20 + ahead, slow
        # 0.1, not more: on a busy machine a step is longer.
        assert slow["where"].startswith(f"rank {who} on ") and slow["faster"] > 0.1
        assert done.out.count(slow_in_words({**slow, "until": None})) == 1, done.out
        assert done.out.count(f"{slow['where']} keeps up again since step {slow['until']}") == 1
        for told in (
            (tmp_path / "run/report.html").read_text(),
            " ".join(line for _, line in examine(tmp_path / "run")[0]),
        ):
            assert f"was slow from step {slow['since']} to {slow['until']}" in told
