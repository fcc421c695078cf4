"""The owners of a run, each alone: schedule, world, plan, logbook, checkpoints, learner."""

import gc
import json
import signal
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from refusals import refused
from torch import nn

import train as loop
from common.errors import NumbersGoneBad, UserError
from config import BatchPlan, TrainConfig, parse
from distributed.checkpoint import Progress
from distributed.pace import Slow
from distributed.world import World
from optim import build_optimizer, lr_at
from report import logbook
from report.logbook import Logbook
from tasks import Classification
from training.checkpoints import Checkpoints
from training.learner import Learner, NotFinite
from training.observer import Observer
from training.plan import Plan, decide
from training.run_dir import PASSING
from training.schedule import build_schedule, doubts
from training.trial import Trial

FACTS = {"data": "a", "model": "b", "order": "c", "code": "d"}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def made(*flags: str):
        given = ["--model", "my_cnn", "--dataset", "digits", "--threads", "1", *flags]
        return parse(given)

    yield made
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


# --- schedule -------------------------------------------------------------------------------------


def schedule(per_epoch: int = 7, **values):
    return build_schedule(TrainConfig(**values), per_epoch)


def test_a_run_is_as_long_as_its_epochs_or_as_its_steps_where_they_are_given():
    assert schedule(epochs=3).last_step == 21
    assert schedule(epochs=3, max_steps=5).last_step == 5
    assert schedule(epochs=3, max_steps=50).last_step == 50
    both = build_schedule(TrainConfig(epochs=3, max_steps=50), 7, epochs_bind=True)
    assert both.last_step == both.total_steps == 21
    assert build_schedule(TrainConfig(epochs=3), 7, dry_run=True).last_step == 1


def test_each_epoch_is_evaluated_once_and_so_is_the_end_whatever_its_length():
    plan, seen, progress = schedule(epochs=5, max_steps=30, eval_every=2), [], Progress()
    while not plan.over(progress):
        if plan.evaluates(progress):
            seen.append(progress.step)
            progress.evaluated = progress.step
        else:
            progress.count_step()
    assert seen == [14, 28, 30]


def test_a_kill_between_the_last_step_and_its_evaluation_leaves_the_evaluation_due():
    assert schedule(epochs=2).evaluates(Progress(step=14, evaluated=7))
    assert not schedule(epochs=2).over(Progress(step=14, evaluated=7))
    assert schedule(epochs=2).over(Progress(step=14, evaluated=14))


def test_rows_and_checkpoints_come_by_steps_and_a_row_at_each_epochs_end():
    plan = schedule(epochs=2, log_every=3, checkpoint_every="5")
    assert [s for s in range(1, 15) if plan.logs(s)] == [3, 6, 7, 9, 12, 14]
    assert [s for s in range(1, 15) if plan.saves(s)] == [5, 10]
    assert [s for s in range(1, 15) if schedule(checkpoint_every="epoch").saves(s)] == [7, 14]
    assert not any(schedule(checkpoint_every="5m").saves(s) for s in range(1, 15))


def test_the_rate_ends_with_max_steps_and_a_look_with_stop_after_bends_nothing():
    whole, part = schedule(epochs=4), build_schedule(TrainConfig(epochs=4), 7, stop_after=3)
    assert [whole.lr(s) for s in range(28)] == [part.lr(s) for s in range(28)]
    assert part.last_step == 3 and part.stops_early and not whole.stops_early
    assert whole.lr(0) == TrainConfig.lr and whole.lr(27) < 0.01 * TrainConfig.lr
    for steps in (10, 40):
        made = schedule(epochs=4, max_steps=steps)
        assert made.last_step == steps and made.lr(steps - 1) < 0.03 * TrainConfig.lr
        assert [made.lr(s) for s in range(steps)] == [
            lr_at(s, peak=TrainConfig.lr, schedule="cosine", total_steps=steps)
            for s in range(steps)
        ]


@pytest.mark.parametrize(("batch", "per_epoch"), [(64, 22), (16, 90), (32, 45), (32, 60)])
def test_a_run_with_another_batch_or_other_data_goes_on_at_the_epochs_it_has_seen(batch, per_epoch):
    progress = Progress()
    progress.settle(32, 45)
    for _ in range(90 + 30):  # two epochs and two thirds
        progress.count_step(0.1)
    assert progress.images == 120 * 32
    progress.settle(batch, per_epoch)
    config = TrainConfig(epochs=4, warmup=0.5)
    plan, fresh = (build_schedule(config, per_epoch, ahead=n) for n in (progress.ahead, 0))
    epoch, step = plan.place(progress.step)
    assert epoch == 2 and 30 * 32 - batch < step * batch <= 30 * 32
    # What is left is what a run that always had this batch has left, at the same bits of the rate.
    virtual = epoch * per_epoch + step
    left = range(virtual, 4 * per_epoch)
    steps = [progress.step + place for place in range(len(left))]
    assert [plan.lr(s) for s in steps] == [fresh.lr(v) for v in left]
    assert plan.last_step == progress.step + len(left)
    assert plan.seen(plan.last_step) == 4 and plan.seen(progress.step) == virtual / per_epoch
    assert [plan.ends_epoch(s) for s in steps] == [fresh.ends_epoch(v) for v in left]
    before = progress.ahead
    progress.settle(batch, per_epoch)  # a life later
    assert progress.ahead == before and (before == 0) == ((batch, per_epoch) == (32, 45))


def test_what_is_odd_about_a_length_is_told():
    def told(progress=None, bound=False, ahead=0, **values):
        config, progress = TrainConfig(**values), progress or Progress()
        plan = build_schedule(config, 7, ahead=ahead, epochs_bind=bound)
        return " | ".join(doubts(config, plan, progress, bound))

    assert told(epochs=3) == told(epochs=3, warmup=1.0, ema=0.9) == ""
    assert "the warm-up of --warmup 5 (35 steps) is longer than the run" in told(
        epochs=3, warmup=5.0
    )
    assert "spans 1,000 updates, the run has 21" in told(epochs=3, ema=0.999)
    assert "--epochs 3 ends the run at step 21" in told(epochs=3, max_steps=50, bound=True)
    done = Progress(step=21, evaluated=21, lr=1e-4)
    assert "has seen 3 epochs, more than the 2 that are asked for" in told(done, epochs=2)
    assert "jumps up from 0.0001 to 0.025" in told(done, epochs=6)
    assert told(Progress(step=21, lr=schedule(epochs=6).lr(20)), epochs=6) == ""


def test_patience_ends_a_run_that_prints_no_better_value_and_a_plateau_lowers_its_rate():
    plan, progress = schedule(epochs=50, patience=5, schedule="plateau", plateau=2), Progress()
    metric, values = Classification.metrics[1], [0.5, 0.50004, 0.6, 0.6, 0.59, 0.60001, 0.4, 0.6]
    stale, rates = [], []
    for value in values:
        plan.judge(progress, metric.better_as_shown(value, progress.best))
        progress.best = max(progress.best or 0.0, value)
        stale.append(progress.stale)
        rates.append(plan.lr(0, progress.drops))
        progress.step = progress.evaluated = progress.step + 7
        assert plan.over(progress) == (progress.stale >= 5) == plan.gave_up(progress)
    assert stale == [0, 1, 0, 1, 2, 3, 4, 5]
    peak = TrainConfig.lr
    assert rates == pytest.approx([peak] * 4 + [peak / 10] * 2 + [peak / 100] * 2)
    assert not schedule(epochs=50).gave_up(progress)


def test_a_value_is_compared_as_it_is_printed():
    loss, accuracy = Classification.metrics[:2]
    assert accuracy.better_as_shown(0.50006, 0.5) and not accuracy.better_as_shown(0.50004, 0.5)
    assert loss.better_as_shown(0.12344, 0.12346) and not loss.better_as_shown(0.12341, 0.12344)
    assert loss.better_as_shown(5.0, None) and not loss.better_as_shown(float("nan"), 1.0)
    assert loss.better_as_shown(0.0, 0.5) and not accuracy.better_as_shown(0.0, 0.0)


# --- world ----------------------------------------------------------------------------------------


def test_a_world_gives_the_signals_back_after_a_run_and_after_a_mistake(settings):
    def handlers():
        return [signal.getsignal(getattr(signal, f"SIG{n}")) for n in ("TERM", "INT", "USR1")]

    before = handlers()
    with World(settings()) as world:
        assert handlers() != before and world.num_processes == 1
    assert handlers() == before
    with pytest.raises(UserError, match="no"), World(settings()):
        raise UserError("no")
    assert handlers() == before
    with refused("fp16-needs-gpu", match="fp16"):  # before the world is whole
        World(settings("--mixed-precision", "fp16"))
    assert handlers() == before


def test_a_mistake_keeps_its_code_on_its_way_to_all_processes(settings):
    def mistake():
        raise UserError("no", code="the-code")

    with World(settings()) as world:
        for way in (world.main_decides, world.all_or_none):
            with refused("the-code", match="^no$"):
                way(mistake)
            assert way(lambda: None) is None and way(lambda: 7) == 7


def test_what_was_entered_is_left_before_the_world_in_turn(settings):
    left = []

    class Part:
        def __init__(self, name: str):
            self.name = name

        def __enter__(self):
            return self

        def __exit__(self, kind, error, trace):
            left.append((self.name, kind))

    with pytest.raises(RuntimeError), World(settings()) as world:
        world.enter(Part("log")), world.enter(Part("checkpoints"))
        raise RuntimeError("x")
    assert left == [("checkpoints", RuntimeError), ("log", RuntimeError)]


# --- logbook and checkpoints ----------------------------------------------------------------------


def test_a_mistake_leaves_no_folder_and_a_failure_says_so_in_the_status(settings, tmp_path):
    for error, left in ((UserError("x"), False), (RuntimeError("broken"), True)):
        with pytest.raises(type(error)), World(settings("--run-dir", "run")) as world:
            world.enter(Logbook(decide(world), world))
            raise error
        assert (tmp_path / "run").exists() == left
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed" and "broken" in status["reason"]


def test_a_trial_writes_nothing(settings, tmp_path):
    with World(settings("--dry-run")) as world:
        log = world.enter(Logbook(decide(world), world))
        log.status(status="finished")
        assert log.run_folder is None
    assert list(tmp_path.iterdir()) == []


def test_the_best_so_far_is_in_the_status_after_an_evaluation_and_a_row_waits_for_no_disk(
    settings, tmp_path, monkeypatch
):
    """A row of training tells the status how far it is, which needs no fsync."""
    with World(settings("--run-dir", "run")) as world:
        log, written = world.enter(Logbook(decide(world), world)), []
        monkeypatch.setattr(log.folder, "status", lambda spent, **values: written.append(values))
        task, progress = Classification(3), Progress(step=7)
        data = SimpleNamespace(
            batch=BatchPlan(8, 1, 1),
            classes=["a", "b", "c"],
            chosen_on="test",
            waits=dict,
            test_loaders={},
        )
        plan = schedule(epochs=2)
        log.row({"train/loss": 1.5}, data, plan, progress)
        (row,) = written
        assert row["step"] == 7 and row.keys() <= PASSING
        result = {metric.key: 0.5 for metric in task.metrics} | {"images": 6}
        result["confusion"] = [[2, 0, 0]] * 3
        monkeypatch.setattr(logbook, "keep_predictions", lambda *_: None)
        answers = {"answers": task.new_answers(6, torch.device("cpu"))}
        assert log.evaluated({"test": result | answers}, task, data, plan, progress)
        assert {"best": 0.5} in [{"best": w.get("best")} for w in written]


def test_a_row_has_the_norm_of_the_gradients_before_clipping_in_the_same_read(
    settings, monkeypatch
):
    with World(settings("--grad-clip", "0.5")) as world:
        learner, reads, read = learner_of(world, grad_clip=0.5), [], torch.Tensor.tolist
        for p in learner.parameters:
            p.grad = torch.full_like(p, 2.0)
        learner.sums += torch.tensor([3.0, 5.0])
        learner.right += 4
        count = sum(p.numel() for p in learner.parameters)
        learner.check_gradients(0)
        monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t.shape) or read(t))
        row = learner.take_row(16)
        assert len(reads) == 1
    norm = pytest.approx(2 * count**0.5)
    assert row == {"train/loss": 0.5, "train/accuracy": 0.25, "train/grad_norm": norm}
    assert learner.parameters[0].grad.max() < 0.5


def test_what_there_is_after_the_first_step_is_walked_by_no_collection(settings, monkeypatch):
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(1))
    with World(settings()) as world:
        assert [len(frozen) for _ in world.watched(range(3), Progress())] == [0, 1, 1]
        assert [len(frozen) for _ in world.watched(range(3), Progress())] == [1, 1, 1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("batches_come", [True, False])
def test_a_stop_between_rows_saves_nothing_after_a_bad_number(device, batches_come):
    """On a GPU numbers are read with a row alone; a save must not outrun them."""
    saved, progress = [], Progress()
    stop = SimpleNamespace(reason=0, row_agreed=False)

    def watched(batches, _):
        yield from batches[: 7 if batches_come else 2]
        stop.reason = 3

    world = SimpleNamespace(
        device=torch.device(device), stop=stop, watched=watched,
        beat=lambda step: setattr(stop, "reason", 3 if batches_come and step == 2 else 0),
    )  # fmt: skip
    learner = SimpleNamespace(
        model=nn.Linear(1, 1), optimizer=SimpleNamespace(param_groups=[]),
        shards=SimpleNamespace(bad_number="a number that is not finite"),
        config=SimpleNamespace(mixed_precision="no"),
        not_finite=lambda: NotFinite(1, []) if progress.step > 1 else None,
        unfreeze=lambda epoch: 0,
    )  # fmt: skip
    data = SimpleNamespace(rest_of_epoch=lambda *_: [{}] * 7, indices=lambda epoch, step: [step])
    checkpoints = SimpleNamespace(due=lambda *_: False, save=lambda *_: saved.append(1))
    log = SimpleNamespace(
        open_epoch=lambda *_: None, step=lambda *_: None, run_folder=None,
        screen=SimpleNamespace(note=None),
    )  # fmt: skip
    plan = schedule(epochs=2, log_every=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", lambda *_: None)
        with pytest.raises(NumbersGoneBad, match="at step 1"):
            loop.train_one_epoch(learner, data, plan, progress, checkpoints, log, world, Observer())
    assert progress.step == 2 and not saved


def learner_of(world: World, seed: int = 0, **values) -> Learner:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3))
    config = TrainConfig(model="my_cnn", optimizer="sgd", **values)
    prepared = world.accelerator.prepare(model, build_optimizer(model, config))
    frozen = SimpleNamespace(stages=())
    started = SimpleNamespace(task=Classification(3), trial=Trial(0.0), frozen=frozen)
    return Learner(*prepared, None, started, config, BatchPlan(8, 2, 1), world)


def test_what_was_saved_comes_back_in_a_new_life_with_its_loss_sums(settings, tmp_path):
    with World(settings("--checkpoint-every", "1")) as world:
        plan = Plan(world.settings, world.settings.config, tmp_path, goes_on=False)
        learner, progress = learner_of(world), Progress(step=4, summed=2)
        learner.sums += torch.tensor([1.5, 2.5])
        learner.right += 6
        args = (plan, FACTS, {}, world, lambda problem: None)
        with Checkpoints(*args) as checkpoints:
            checkpoints.save(learner, progress)
        other = learner_of(world, seed=1)
        with Checkpoints(*args) as checkpoints:
            found = checkpoints.resume(other, print, print)
        assert found.step == 4 and found.summed == 2
        assert other.summed() == ([1.5, 2.5], 6)
        row = other.take_row(8)
        assert (row["train/loss"], row["train/accuracy"]) == (0.5, 0.75)
        assert other.summed() == ([0, 0], 0)
        for name, tensor in learner.bare.state_dict().items():
            assert torch.equal(tensor, other.bare.state_dict()[name])
        args = (plan, {**FACTS, "data": "z"}, {}, world, lambda problem: None)
        with Checkpoints(*args) as checkpoints, pytest.raises(UserError, match="not those"):
            checkpoints.resume(other, print, print)


def test_saves_that_got_no_thread_of_their_own_are_told_once(settings, tmp_path, monkeypatch):
    """Steps wait for them: to begin with, nobody knew why they were slow."""
    where, told = tmp_path / "memory", []
    where.mkdir()
    monkeypatch.setenv("LOCKSTEP_SHM", str(where))
    with World(settings("--checkpoint-every", "1", "--snapshot-every", "1")) as world:
        plan = Plan(world.settings, world.settings.config, tmp_path, goes_on=False)
        learner, none = learner_of(world), RuntimeError("can't start new thread")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(none))
            checkpoints = Checkpoints(plan, FACTS, {}, world, lambda problem: None)
            with checkpoints:
                checkpoints.resume(learner, told.append, print)
                checkpoints.save(learner, Progress(step=4))
                checkpoints.save(learner, Progress(step=5))
    words = [text.partition(": ")[2] for text in told]
    assert len(words) == len(set(words)) and "no thread could be started" in told[0], told
    assert [text.rpartition(" ")[2] for text in told] == ["save", "snapshot"], told
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2


# --- what a person is told while it trains --------------------------------------------------------


def test_a_time_limit_says_once_at_which_step_and_rate_it_will_stop_and_only_where_it_does():
    told = []
    plan = schedule(epochs=10)
    log = SimpleNamespace(
        plan=SimpleNamespace(config=SimpleNamespace(max_time="20s")),
        world=SimpleNamespace(stop=SimpleNamespace(deadline=time.monotonic() + 20.5)),
        clock=SimpleNamespace(left=lambda steps: 1.0 * steps, steps=12),
        screen=SimpleNamespace(warn_once=lambda doubts: told.append(doubts["time limit"])),
    )
    Logbook._tell_time_limit(log, plan, Progress(step=12))
    assert "--max-time 20s will stop the run near step 32 of 70" in told[0]
    assert f"at a learning rate of {plan.lr(32):.3g}" in told[0]
    Logbook._tell_time_limit(log, plan, Progress(step=60))  # 10 steps are left, 20 have time
    assert len(told) == 1


def test_the_means_of_an_epoch_weigh_each_row_by_its_steps():
    log = SimpleNamespace(_epoch=[(3, {"train/loss": 1.0}), (1, {"train/loss": 2.0})])
    assert Logbook._epoch_means(log) == {"train/loss": 1.25}
    assert Logbook._epoch_means(SimpleNamespace(_epoch=[])) == {}


def test_other_work_on_a_core_which_comes_and_goes_is_told_twice_and_another_reason_each_time():
    told, judged = [], []
    log = SimpleNamespace(
        _shared_cores=Counter(),
        ledger=SimpleNamespace(slow=[]),
        screen=SimpleNamespace(warn=told.append, show=told.append),
        world=SimpleNamespace(
            is_main=True,
            watch=SimpleNamespace(where=None),
            pace=SimpleNamespace(judge=lambda *_: judged, history=lambda: ["kept"]),
        ),
    )
    for reason in ["core"] * 4 + ["data"] * 3:
        for until in (None, 9):
            judged[:] = [Slow(1, "rank 1", reason, 0.01, 0.5, 5, until)]
            Logbook._tell_slow(log, 5)
    assert [line.startswith("rank 1 keeps up again") for line in told] == [False, True] * 5
    assert ["comes and goes" in line for line in told].index(True) == 2
    assert sum("comes and goes" in line for line in told) == 1 and log.ledger.slow == ["kept"]


def test_an_epochs_line_tells_of_all_of_it_whichever_life_trained_it():
    numbers = [{"train/loss": 1.0}, {"train/loss": 2.0}]
    rows = [
        {"step": 7, "train/loss": 9.0, "lr": 1.0},  # of the epoch before
        {"step": 7, "test/loss": 9.0},
        *({"step": step, **told, "lr": 1.0} for step, told in zip((9, 10), numbers, strict=True)),
        {"step": 12, "train/loss": 9.0},  # of a life that was killed; not in the checkpoint
    ]
    log = SimpleNamespace(
        folder=SimpleNamespace(read_metrics=lambda: rows), _epoch=[], _row_step=11
    )
    Logbook._remember(log, 7, 11)
    assert log._epoch == [(2, numbers[0]), (1, numbers[1])]
    assert log._row_step == 10  # what the checkpoint has of step 11 comes with the next row


def test_no_bar_is_drawn_over_a_debuggers_prompt(settings, monkeypatch):
    screens = []

    def report(**options):
        screens.append(SimpleNamespace(has_bar=True, shout=lambda *a: None, warn=lambda *a: None))
        return screens[-1]

    monkeypatch.setattr("report.logbook.Report", report)
    for flags in (["--debug"], []):
        with World(settings(*flags)) as world:
            Logbook(Plan(world.settings, world.settings.config, None, goes_on=False), world)
    assert [screen.has_bar for screen in screens] == [False, True]
