"""Faults injected into real processes: nothing is lost, and the right one is blamed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from launches import (
    SMALL,
    begun,
    command,
    finish,
    newest,
    rows,
    same_weights,
    start,
    train,
    wait_for,
)

from common.disk import read_json

RUN = ["--model", "plain.py:Net", *SMALL, "--limit", "640", "--epochs", "3"]


@pytest.mark.parametrize("launcher", ["python", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_an_exception_in_one_rank_is_the_last_thing_told(nets, launcher):
    began, name = time.monotonic(), f"raise-{launcher}"
    done = train([*RUN, "--run-dir", name], nets, 2, launcher, LOCKSTEP_FAULT="raise@step=5,rank=1")
    assert done.status != 0 and time.monotonic() - began < 90
    assert "rank 1 on" in done.out and "planned fault at step, step 5" in done.out
    assert (nets / name / "crash" / "rank-1.txt").read_text().count("Traceback") >= 1
    assert "Traceback" not in done.out.split("torch/distributed/elastic")[0]
    assert json.loads((nets / name / "status.json").read_text())["status"] == "failed"


def test_a_rank_that_leaves_early_with_status_0_is_named_and_the_run_is_not_finished(nets):
    done = train([*RUN, "--run-dir", "early"], nets, 2, LOCKSTEP_FAULT="exit0@step=5,rank=1")
    assert "because rank 1 on" in done.out, done.out
    assert json.loads((nets / "early" / "status.json").read_text())["status"] == "failed"


def test_out_of_memory_says_what_to_try(nets):
    done = train([*RUN, "--run-dir", "oom"], nets, LOCKSTEP_FAULT="oom@step=5")
    assert done.status == 1 and "--accumulate" in done.last_lines


@pytest.mark.parametrize("processes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_number_gone_bad_stops_all_before_the_update_and_names_step_and_samples(nets, processes):
    name = f"nan-{processes}"
    arguments = [*RUN, "--run-dir", name, "--checkpoint-every", "6", "--batch-size", "60"]
    done = train(arguments, nets, processes, LOCKSTEP_FAULT="nan@point=backward,step=6")
    assert done.status == 1
    assert "at step 6" in done.out and "--grad-clip 1" in done.out and "fp16" not in done.out
    found = json.loads((nets / name / "crash" / "nonfinite.json").read_text())
    assert found["step"] == 6 and len(found["indices"]) == 60
    assert newest(nets / name).name == "step-000000006"
    done = train(arguments, nets, processes)
    assert done.status == 0 and "at step 6" in done.out, done.out
    if processes > 1:  # and goes on as if nothing had been
        done = train([*arguments, "--run-dir", f"{name}-whole"], nets, processes)
        assert done.status == 0, done.out
        assert rows(nets / name) == rows(nets / f"{name}-whole")
        assert same_weights(nets / name, nets / f"{name}-whole") == []


@pytest.mark.slow
def test_a_gradient_too_large_for_exact_sums_on_one_process_stops_all_at_the_same_step(nets):
    (nets / "large.py").write_text(
        "import os\nfrom torch import nn\nfrom full import Net as Full\n\n\n"
        "class Net(Full):\n"
        "    calls = 0\n\n"
        "    def forward(self, images):\n"
        "        logits = super().forward(images)\n"
        "        self.calls += self.training\n"
        "        if logits.requires_grad and os.environ['RANK'] == '1' and self.calls == 6:\n"
        "            logits.register_hook(lambda gradient: gradient * 1e9)\n"
        "        return logits\n"
    )
    arguments = [*RUN, "--model", "large.py:Net", "--bitwise", "--run-dir", "large"]
    done = train(arguments, nets, 2)
    assert done.status == 1 and "not finite (or of 131,072 and more, with --bitwise)" in done.out
    assert "in the gradient at step" in done.out, done.out
    found = json.loads((nets / "large" / "crash" / "nonfinite.json").read_text())
    assert 4 <= found["step"] <= 6 and found["ranks"] == []


def test_skipping_leaves_the_weights_alone_counts_and_goes_on(nets):
    arguments = [*RUN, "--on-nonfinite", "skip", "--run-dir", "skip"]
    done = train(arguments, nets, LOCKSTEP_FAULT="nan@point=backward,step=0")
    assert done.status == 0, done.out
    assert json.loads((nets / "skip" / "summary.json").read_text())["skipped_updates"] == 1
    done = train(
        [*RUN, "--on-nonfinite", "skip", "--run-dir", "always"], nets,
        LOCKSTEP_FAULT="nan@point=backward",
    )  # fmt: skip
    assert done.status == 1 and "not finite" in done.out


def test_a_second_job_in_the_same_folder_is_refused_and_the_first_unharmed(nets):
    arguments = [*RUN, "--run-dir", "shared", "--epochs", "200"]
    process, log = start(command(arguments), nets)
    wait_for(lambda: (nets / "shared" / "metrics.jsonl").exists(), process, log)
    second = train(arguments, nets)
    assert second.status == 2 and f"process {process.pid} on" in second.out, second.out
    assert process.poll() is None
    process.kill()
    process.wait()
    third = train(["--resume", "shared", "--stop-after", "3"], nets)
    assert third.status == 0, third.out


def test_a_full_disk_keeps_the_old_checkpoint_and_training_goes_on(nets):
    fault = "enospc@point=save:written,step=8"
    done = train(
        [*RUN, "--run-dir", "full", "--checkpoint-every", "4"], nets, LOCKSTEP_FAULT=fault
    )  # fmt: skip
    assert done.status == 0 and "checkpoint not saved" in done.out, done.out
    names = [p.name for p in (nets / "full" / "checkpoints").iterdir()]
    assert "step-000000008" not in names and not [n for n in names if "partial" in n]
    assert json.loads((nets / "full" / "status.json").read_text())["last_save_error"] == ""


@pytest.mark.slow
def test_two_processes_end_together_when_no_save_succeeds(nets):
    done = train(
        [*RUN, "--run-dir", "nowhere"], nets, 2, LOCKSTEP_FAULT="enospc@point=save:written",
        LOCKSTEP_TIMEOUT="60",
    )  # fmt: skip
    assert "ended without its last checkpoint" in done.out and "Timed out" not in done.out
    assert json.loads((nets / "nowhere" / "status.json").read_text())["status"] == "failed"
    assert (nets / "nowhere" / "last.safetensors").exists()


@pytest.mark.slow
def test_a_process_that_was_suspended_goes_on(nets):
    arguments = [*RUN, "--run-dir", "asleep", "--epochs", "400"]
    process, log = start(command(arguments), nets, LOCKSTEP_STALL="4")
    wait_for(begun(nets / "asleep", 5), process, log)
    process.send_signal(signal.SIGSTOP)
    time.sleep(10)
    process.send_signal(signal.SIGCONT)
    wait_for(begun(nets / "asleep", len(rows(nets / "asleep")) + 200), process, log)
    process.terminate()
    assert finish(process, log, 60).status == 75


@pytest.mark.slow
def test_a_last_save_that_fails_is_said_in_message_and_status(nets):
    code = (
        "import resource, signal, os, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    words = [sys.executable, "-c", code, *command([*RUN, "--run-dir", "limit"])]
    done = finish(*start(words, nets))
    assert done.status == 1 and "ended without its last checkpoint" in done.out, done.out
    status = json.loads((nets / "limit" / "status.json").read_text())
    assert status["status"] == "failed" and "not saved" in status["reason"]


@pytest.mark.slow
def test_a_frozen_or_stuck_process_is_named_not_the_one_that_waits(nets):
    for action, words in (("hang", "rank 1 on"), ("stop", "is frozen")):
        process, log = start(
            command([*RUN, "--run-dir", action], 2), nets, LOCKSTEP_STALL="8",
            LOCKSTEP_FAULT=f"{action}@step=6,rank=1,seconds=600",
        )  # fmt: skip
        done = finish(process, log, 150)
        assert done.status != 0 and words in done.out, done.out
        assert "rank 1" in done.out and list((nets / action / "crash").glob("rank-*.txt"))
        (life,) = read_json(nets / action / "status.json")["lives"]
        assert life["seconds"]["still"] > 8, life  # they were no steps


@contextlib.contextmanager
def read_only(folder):
    """A folder nobody may write to: for root, who may write everywhere, by a mount of its own."""
    if os.geteuid():
        folder.chmod(0o500)
        yield
        folder.chmod(0o700)
        return
    for way in (["--bind", str(folder)], ["-o", "remount,bind,ro"]):
        done = subprocess.run(["mount", *way, str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"root may write everywhere, and cannot mount here: {done.stderr}")
    yield
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_read_only_folder_fails_before_the_first_batch(nets):
    (nets / "locked").mkdir()
    with read_only(nets / "locked"):
        done = train([*RUN, "--run-dir", "locked"], nets)
    assert done.status == 2 and "cannot be written" in done.out, done.out
    assert "step 1" not in done.out and "Traceback" not in done.out


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_holds_nobody_up_and_nothing_is_lost(nets):
    arguments = [*RUN, "--run-dir", "later", "--epochs", "4000", "--checkpoint-every", "20"]
    process, log = start(command(arguments), nets)
    checkpoints = nets / "later" / "checkpoints"
    wait_for(lambda: len(list(checkpoints.glob("step-*0"))) > 1, process, log)
    with read_only(checkpoints):
        wait_for(lambda: "checkpoint not saved" in log.read_text(), process, log)
        kept = newest(nets / "later").name
        wait_for(lambda: len(rows(nets / "later")) > int(kept[5:]) + 60, process, log)
    wait_for(lambda: newest(nets / "later").name > kept, process, log)
    process.terminate()
    done = finish(process, log, 60)
    assert done.status == 75 and "Traceback" not in done.out, done.out
    steps = [r["step"] for r in rows(nets / "later") if "train/loss" in r]
    assert steps == list(range(1, len(steps) + 1))
    assert newest(nets / "later").name == f"step-{steps[-1]:09d}"


@pytest.mark.slow
def test_memory_that_is_really_gone_says_what_to_try_and_the_checkpoint_stays(nets):
    code = (
        "import resource, os, sys; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30));"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    (nets / "greedy.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.head = nn.LazyLinear(num_classes)\n"
        "        self.calls = 0\n\n"
        "    def forward(self, images):\n"
        "        self.calls += 1\n"
        "        if self.calls > 9:\n"
        "            torch.ones(6 << 30)\n"
        "        return self.head(images.flatten(1))\n"
    )
    arguments = [*RUN, "--model", "greedy.py:Net", "--run-dir", "greedy"]
    arguments += ["--checkpoint-every", "4"]
    words = [sys.executable, "-c", code, *command(arguments)]
    done = finish(*start(words, nets))
    assert done.status == 1 and "--accumulate" in done.last_lines, done.out
    assert newest(nets / "greedy").name >= "step-000000004"


@pytest.mark.slow
def test_restarts_end_when_the_same_step_fails_twice_in_a_row(nets):
    arguments = [*RUN, "--run-dir", "again", "--checkpoint-every", "4"]
    for life in range(2):
        done = train(
            arguments, nets, LOCKSTEP_FAULT="raise@step=7",
            TORCHELASTIC_RESTART_COUNT=str(life),
        )  # fmt: skip
        assert done.status == 1 and "planned fault" in done.out, done.out
    done = train(arguments, nets, TORCHELASTIC_RESTART_COUNT="2")
    assert done.status == 2 and "step 7 failed twice in a row" in done.out, done.out
    status = json.loads((nets / "again" / "status.json").read_text())
    assert status["status"] == "failed" and "planned fault" in status["reason"]
    assert train(arguments, nets).status == 0  # by hand it goes on


def test_the_metrics_have_each_step_once_after_a_crash(nets):
    arguments = [*RUN, "--run-dir", "once", "--checkpoint-every", "5"]
    train(arguments, nets, LOCKSTEP_FAULT="kill@step=13")
    assert train(arguments, nets).status == 0
    steps = [r["step"] for r in rows(nets / "once") if "train/loss" in r]
    assert steps == list(range(1, 31))


def test_help_and_a_typo_answer_without_torch():
    for words in (["--help"], ["--modle", "x"]):
        script = f"import sys, runpy; sys.argv = ['train.py', *{words!r}]\n"
        script += "try: runpy.run_path('train.py', run_name='__main__')\n"
        script += "except SystemExit: pass\nassert 'torch' not in sys.modules"
        from launches import REPOSITORY

        done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True)
        assert done.returncode == 0, done.stderr
