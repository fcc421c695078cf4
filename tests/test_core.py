"""The rooms in between: optimizer, task, checkpoint, guard, report, run folder."""

import io
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from launches import REPOSITORY
from rich.console import Console
from torch import nn
from torch.nn import functional as F

import run_dir
from config import parse
from distributed import faults
from distributed.checkpoint import (
    Progress,
    Writer,
    capture,
    copy_state,
    digest_of_manifest,
    newest_valid,
    prune,
    read_checkpoint,
    restore,
    sweep,
    verify,
    visible,
    write_checkpoint,
)  # fmt: skip
from distributed.shards import Guard
from distributed.stop import SIGNAL, STOP_FILE, TIME_LIMIT, StopVote
from errors import UserError
from optim import WeightAverage, build_optimizer, lr_at, parameter_groups
from report import Chrono, Report
from run_dir import RunDir
from tasks import Classification, Regression


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4))


def settings(*flags):
    return parse(["--model", "resnet18", *flags]).config


# --- optim -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step", "constant"])
def test_the_learning_rate_rises_reaches_its_peak_and_falls(schedule):
    rates = [
        lr_at(s, peak=0.4, schedule=schedule, total_steps=100, warmup_steps=10) for s in range(100)
    ]
    assert 0 < rates[0] < rates[5] < rates[10] == max(rates) == 0.4
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] < 0.01 or schedule == "constant"


def test_each_trainable_parameter_is_in_one_group_and_biases_and_norms_do_not_decay():
    model = net()
    model[0].weight.requires_grad_(False)
    decayed, kept = parameter_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == ["5.weight"]
    assert sorted(names[id(p)] for p in kept["params"]) == [
        "0.bias",
        "1.bias",
        "1.weight",
        "5.bias",
    ]
    assert kept["weight_decay"] == 0


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_bad_gradient_leaves_the_weights_alone_even_at_the_first_step(name):
    model = net()
    optimizer = build_optimizer(model, settings("--optimizer", name))
    guard = Guard(torch.device("cpu"), optimizer, skip=True)
    before = [p.clone() for p in model.parameters()]

    def step(value: float, number: int) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        guard.check(norm, torch.tensor(1.0), number)
        optimizer.step()

    step(math.nan, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    step(0.1, 1)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(before[0], next(model.parameters()))
    assert guard.report() == {"bad_step": 0, "skipped": 1, "in_a_row": 0, "bad_loss": -1}
    assert not guard.must_stop(guard.report())


def test_in_stop_mode_the_guard_holds_the_weights_from_the_first_bad_step_on():
    model = net()
    optimizer = build_optimizer(model, settings())
    guard = Guard(torch.device("cpu"), optimizer, skip=False)
    assert guard.check(torch.tensor(math.inf), torch.tensor(1.0), 7) == 1
    assert guard.check(torch.tensor(1.0), torch.tensor(1.0), 8) == 1
    assert guard.report()["bad_step"] == 7 and guard.must_stop(guard.report())


def test_the_average_follows_its_formula_and_a_skipped_update_averages_nothing():
    model = net()
    average = WeightAverage(model, 0.9)
    old = [p.clone() for p in average.model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    average.update(model, torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(old, average.model.parameters(), strict=True))
    average.update(model)
    for a, b in zip(old, average.model.parameters(), strict=True):
        torch.testing.assert_close(b, a + 0.1)


# --- tasks -----------------------------------------------------------------------------------


def test_counts_are_exact_in_any_batching_and_padding_weighs_nothing():
    torch.manual_seed(1)
    logits, labels = torch.randn(101, 10), torch.randint(10, (101,))
    task = Classification(10)

    def counted(size: int, padding: int) -> torch.Tensor:
        counts = task.new_counts("cpu")
        for part in torch.arange(101).split(size):
            picked = torch.cat([part, part[:1].repeat(padding)])
            weights = torch.cat([torch.ones(len(part)), torch.zeros(padding)]).long()
            task.count(counts, logits[picked], labels[picked], weights)
        return counts

    whole = counted(101, 0)
    assert torch.equal(whole, counted(7, 3)) and torch.equal(whole, counted(64, 1))
    metrics = task.metrics(whole)
    assert metrics["images"] == 101
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).sum().item()
    assert metrics["top5"] * 101 == pytest.approx(top5)
    assert metrics["accuracy"] * 101 == pytest.approx((logits.argmax(1) == labels).sum().item())
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    confusion = torch.tensor(metrics["confusion"])
    assert confusion.diag().sum() == whole[1] and confusion.sum() == 101


def test_answers_that_are_not_numbers_are_wrong_and_keep_the_loss_finite():
    task = Classification(3)
    counts = task.new_counts("cpu")
    task.count(counts, torch.full((2, 3), math.nan), torch.tensor([0, 1]), torch.ones(2).long())
    metrics = task.metrics(counts)
    assert metrics["accuracy"] == 0 and math.isfinite(metrics["loss"])


def test_auxiliary_heads_weigh_what_the_model_says():
    task, labels = Classification(3, auxiliary=0.4), torch.tensor([0, 2])
    main, extra = torch.randn(2, 3), torch.randn(2, 3)
    expected = F.cross_entropy(main, labels, reduction="sum")
    expected += 0.4 * F.cross_entropy(extra, labels, reduction="sum")
    torch.testing.assert_close(task.loss((main, extra), labels), expected)


def test_a_target_whose_shape_would_broadcast_is_an_error():
    with pytest.raises(ValueError, match=r"\(30,\) where the targets are \(30, 1\)"):
        Regression().loss(torch.zeros(30), torch.zeros(30, 1))


# --- checkpoints -----------------------------------------------------------------------------


def trained(name: str = "sgd", channels_last: bool = False):
    model = net()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, settings("--optimizer", name))
    F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, name, channels_last):
    model, optimizer = trained(name, channels_last)
    progress = Progress(step=12, best=0.5, sums=[1.5, 2.25])
    path = write_checkpoint(tmp_path, capture(model, optimizer), progress, {"data": "x"})
    assert verify(path)["facts"] == {"data": "x"}
    files, read = read_checkpoint(path)
    assert read == progress
    other = net().to(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    fresh = build_optimizer(other, settings("--optimizer", name))
    restore(files, other, fresh)
    for step in range(2):
        torch.manual_seed(step)
        images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
        for m, o in ((model, optimizer), (other, fresh)):
            m.zero_grad()
            F.cross_entropy(m(images), labels).backward()
            o.step()
    for (key, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


POINTS = ["save:begin", "save:written", "save:manifest", "save:renamed", "save:pruned"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_point_of_a_save_the_newest_visible_checkpoint_is_whole(tmp_path, point):
    torch.set_num_threads(1)  # a forked child has only the thread that forked
    files = capture(*trained())
    write_checkpoint(tmp_path, files, Progress(step=5), {})
    child = os.fork()
    if child == 0:
        os.environ["LOCKSTEP_FAULT"] = f"kill@point={point}"
        faults.configure(0, 0)
        write_checkpoint(tmp_path, files, Progress(step=9), {})
        prune(tmp_path, 2)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    sweep(tmp_path)
    path, _ = newest_valid(tmp_path, pytest.fail)
    assert int(path.name[5:]) == (9 if point in ("save:renamed", "save:pruned") else 5)
    assert [p for p in tmp_path.iterdir() if "." in p.name] == []


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest", "empty manifest"])
def test_a_damaged_checkpoint_is_skipped_with_the_reason(tmp_path, damage):
    files = capture(*trained())
    for step in (3, 6):
        write_checkpoint(tmp_path, files, Progress(step=step), {})
    victim = visible(tmp_path)[0] / (
        "MANIFEST.json" if "manifest" in damage else "model.safetensors"
    )
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    if damage in ("missing", "manifest"):
        victim.unlink()
    else:
        victim.write_bytes(
            b"" if damage == "empty manifest" else content[: None if damage == "flip" else 99]
        )
    said = []
    path, _ = newest_valid(tmp_path, said.append)
    assert path.name.endswith("3") and len(said) == 1 and "step-000000006 is damaged" in said[0]


def test_all_damaged_is_an_error_and_a_newer_format_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, capture(*trained()), Progress(step=3), {})
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["format"] = 99
    manifest["self"] = digest_of_manifest(manifest)
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"newer version \(format 99, this one reads 1\)"):
        newest_valid(tmp_path, pytest.fail)
    (path / "MANIFEST.json").write_text("{}")
    with pytest.raises(UserError, match="--fresh"):
        newest_valid(tmp_path, lambda told: None)
    assert newest_valid(tmp_path / "none", pytest.fail) is None


def test_a_full_disk_keeps_the_old_checkpoint_and_the_next_save_works(tmp_path, monkeypatch):
    files, said = capture(*trained()), []
    writer = Writer(tmp_path, 2, said.append)
    writer.start(files, Progress(step=1), {})
    writer.wait()
    monkeypatch.setenv("LOCKSTEP_FAULT", "enospc@point=save:written,step=2")
    faults.configure(0, 0)
    writer.start(files, Progress(step=2), {})
    writer.wait()
    assert "checkpoint not saved: needs" in writer.error and "MB free" in writer.error
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]
    writer.start(files, Progress(step=3), {})
    writer.wait()
    monkeypatch.delenv("LOCKSTEP_FAULT")
    faults.configure(0, 0)
    assert writer.error == "" and len(visible(tmp_path)) == 2


def test_a_checkpoint_of_another_model_changes_nothing():
    model, other = net(), nn.Linear(2, 2)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(UserError, match="belongs to another model"):
        copy_state(other, model.state_dict(), "model")
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


# --- stops, report, run folder ---------------------------------------------------------------


def test_stop_requests_of_one_process(tmp_path):
    stop = StopVote()
    stop._last_vote = 0
    assert stop.poll() == 0
    stop.stop_file = tmp_path / "STOP"
    stop.stop_file.touch()
    stop._last_vote = 0
    assert stop.poll() == STOP_FILE and "STOP file" in stop.why(STOP_FILE)
    late = StopVote()
    late.deadline, late._last_vote = time.monotonic() - 1, 0
    assert late.poll() == TIME_LIMIT
    late._on_signal(signal.SIGTERM, None)
    late._on_signal(signal.SIGTERM, None)
    assert late.poll() == SIGNAL and late.why(SIGNAL) == "a stop signal (SIGTERM)"


def test_the_screen_shows_strangers_names_as_they_are_and_no_control_characters(tmp_path):
    screen = io.StringIO()
    report = Report(console=Console(file=screen, width=100))
    report.attach(tmp_path)
    report.class_table(["[red]cat[/red]", "d\x1b[31mog"], [[3, 1], [0, 4]])
    report.warn("bad\x07 name")
    report.start_panel("x", [("model", "alexnet")], [("lr", "0.1", "flag")])
    report.close()
    for text in (screen.getvalue(), (tmp_path / "train.log").read_text()):
        assert "[red]cat[/red]" in text and "75.00 %" in text and "0.1  (flag)" in text
        assert "\x1b" not in text and "\x07" not in text


def test_speed_and_time_left_come_from_the_clock_without_warm_up_and_pauses():
    now = [0.0]
    chrono = Chrono(clock=lambda: now[0])
    for step in range(12):
        now[0] += 5.0 if step < 2 else 0.5  # compile, then steady
        chrono.step()
    assert chrono.left(10) == pytest.approx(5.0)
    chrono.speed(64)
    now[0] += 1.0
    chrono.pause(1.0)
    now[0] += 0.5
    chrono.step()
    assert chrono.speed(64) == pytest.approx(128)


def test_a_foreign_folder_is_refused_and_nothing_in_it_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds files that are no run \(thesis.tex"):
        RunDir(tmp_path).open()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_left_by_a_life_that_was_killed_at_its_start_is_ours(tmp_path):
    first = RunDir(tmp_path / "run")
    first.open()
    (tmp_path / "run" / "crash").mkdir()
    first._lock.close()
    RunDir(tmp_path / "run").open()


HOLD = "import sys, time, run_dir, pathlib; r = run_dir.RunDir(pathlib.Path(sys.argv[1])); r.open()"


@pytest.mark.skipif(run_dir.fcntl is None, reason="this system has no POSIX locks")
def test_one_job_a_folder_and_a_dead_ones_lock_is_free_at_once(tmp_path):
    words = [sys.executable, "-c", f"{HOLD}; print('held', flush=True); time.sleep(60)"]
    holder = subprocess.Popen(
        [*words, str(tmp_path / "run")], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on .* since 20"):
        RunDir(tmp_path / "run").open()
    holder.kill()
    holder.wait()
    RunDir(tmp_path / "run").open()


def test_a_living_job_on_another_host_is_refused_a_silent_one_and_the_same_job_are_not(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    lock = tmp_path / "lock"
    owner = {"host": "elsewhere", "pid": 1, "job": "77", "since": "now"}
    lock.write_text(json.dumps(owner))
    with pytest.raises(UserError, match="on elsewhere since now"):
        RunDir(tmp_path).open()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    RunDir(tmp_path).open()
    assert json.loads(lock.read_text())["host"] == socket.gethostname()
    monkeypatch.delenv("SLURM_JOB_ID")
    lock.write_text(json.dumps(owner))
    os.utime(lock, (1, 1))
    RunDir(tmp_path).open()


def test_without_posix_parts_a_run_folder_works(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "fcntl", None)
    monkeypatch.delattr(signal, "SIGUSR1", raising=False)
    monkeypatch.delattr(signal, "SIGUSR2", raising=False)
    old = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    folder = RunDir(tmp_path / "run")
    folder.open()
    StopVote().install()
    for number, handler in old.items():
        signal.signal(number, handler)
    folder.status(status="running")
    folder.close()
    assert folder.read_status() == {"status": "running"}


def test_rows_are_cut_back_whole_and_wait_in_memory_while_the_disk_is_full(tmp_path, monkeypatch):
    folder = RunDir(tmp_path)
    for step in range(5):
        assert folder.append_metrics({"step": step}) == ""
    folder.keep_metrics(3)
    real = type(folder.metrics_file).open

    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(folder.metrics_file), "open", full)
    assert "No space left" in folder.append_metrics({"step": 3})
    monkeypatch.setattr(type(folder.metrics_file), "open", real)
    assert folder.append_metrics({"step": 4}) == ""
    assert [row["step"] for row in folder.read_metrics()] == [0, 1, 2, 3, 4]


def test_the_command_that_repeats_a_run_survives_hostile_words(tmp_path):
    folder = RunDir(tmp_path)
    words = ["printf", "%s\\n", "a b", "$(touch hacked)", "'; rm x", "two\nlines"]
    folder.write_birth("{}", words, {})
    done = subprocess.run(["sh", "command.sh"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "".join(w + "\n" for w in words[2:])
    assert not (tmp_path / "hacked").exists()


def test_the_environment_file_holds_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary-1")
    monkeypatch.setenv("HF_TOKEN", "canary-2")
    assert "canary" not in json.dumps(run_dir.describe_environment({}))
