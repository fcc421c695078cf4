"""Stop requests through real processes: all save one agreed step, and nothing is orphaned."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from launches import (
    SMALL,
    TRAIN,
    begun,
    children_with,
    command,
    finish,
    newest,
    rows,
    same_weights,
    start,
    train,
    wait_for,
)  # fmt: skip
from slurm_cluster import free_ports

from common.disk import read_json
from distributed.checkpoint import visible

LONG = ["--model", "full.py:Net", *SMALL, "--epochs", "400", "--checkpoint-every", "1000"]


def slow(value):
    """The same law once more, for the full run."""
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.slow)


def begin(nets, name, processes=1, launcher="", extra=(), **environment):
    """A run that would take minutes, once it has made a few steps."""
    arguments = [*LONG, "--run-dir", name, *extra]
    process, log = start(command(arguments, processes, launcher), nets, **environment)
    wait_for(begun(nets / name), process, log)
    return process, log


def stopped(nets, name, reason) -> int:
    """The step a stopped run saved, after checking what it left."""
    status = json.loads((nets / name / "status.json").read_text())
    assert status["status"] == "stopped" and reason in status["reason"], status
    assert newest(nets / name).name == f"step-{status['step']:09d}"
    assert children_with(name) == []
    return status["step"]


@pytest.mark.parametrize(
    "name", ["SIGTERM", "SIGHUP", slow("SIGINT"), slow("SIGUSR1"), slow("SIGUSR2")]
)
def test_each_signal_saves_and_exits_75_at_once_and_twice_is_once(nets, name):
    process, log = begin(nets, f"signal-{name}")
    process.send_signal(getattr(signal, name))
    process.send_signal(getattr(signal, name))
    done = finish(process, log, 60)
    assert done.status == 75 and "Traceback" not in done.out, done.out
    step = stopped(nets, f"signal-{name}", name)
    assert f"stopped at step {step}" in done.out
    assert f"train.py --resume signal-{name}" in done.last_lines


def test_a_stop_file_ends_two_processes_at_the_same_step_and_they_go_on_exactly(nets):
    process, log = begin(nets, "stop-file", 2)
    (nets / "stop-file" / "STOP").touch()
    done = finish(process, log, 90)
    step = stopped(nets, "stop-file", "STOP file")
    assert f"stopped at step {step}" in done.out
    limit = str(step + 12)
    done = train(["--resume", "stop-file", "--stop-after", limit], nets, 2)
    assert done.status == 0, done.out
    whole = [*LONG, "--run-dir", "unstopped", "--stop-after", limit]
    assert train(whole, nets, 2).status == 0
    assert rows(nets / "stop-file") == rows(nets / "unstopped")
    assert same_weights(nets / "stop-file", nets / "unstopped") == []


@pytest.mark.parametrize("launcher", ["python", slow("torchrun"), slow("accelerate")])
def test_one_rank_that_hears_a_signal_is_enough(nets, launcher):
    name = f"one-rank-{launcher}"
    process, log = start(
        command([*LONG, "--run-dir", name], 2, launcher), nets,
        LOCKSTEP_FAULT="usr1@step=9,rank=1",
    )  # fmt: skip
    finish(process, log, 120)
    stopped(nets, name, "a stop signal")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_torchrun_reaches_all_ranks(nets, name):
    process, log = begin(nets, f"agent-{name}", 2, "torchrun")
    process.send_signal(getattr(signal, name))
    finish(process, log, 90)
    stopped(nets, f"agent-{name}", name)


@pytest.mark.parametrize("processes, name", [(1, "SIGKILL"), (2, "SIGKILL"), (1, "SIGTERM")])
@pytest.mark.slow
def test_a_trainer_whose_launcher_was_killed_saves_and_ends(nets, processes, name):
    sent, name = getattr(signal, name), f"orphan-{processes}-{name}"
    process, _ = begin(nets, name, processes, "accelerate")
    os.kill(process.pid, sent)  # one process: accelerate dies of TERM, and tells nobody
    process.wait()
    end = time.monotonic() + 60
    while children_with(name) and time.monotonic() < end:
        time.sleep(0.2)
    stopped(nets, name, "the launcher is gone")


@pytest.mark.slow
def test_where_one_of_two_agents_is_killed_the_other_goes_on_with_its_own_processes(nets):
    """It waited five minutes for the dead one to say that it was done, and called the run done."""
    (port,), name = free_ports(1), "one-agent"
    words = [*LONG, "--run-dir", name, "--shards", "4"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--rdzv-id", name]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    launch += ["--local-addr", "127.0.0.1", "--max-restarts", "2", "--rdzv-conf"]
    limits = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3"
    head, other = (
        start([*launch, f"is_host={is_host},{limits}", TRAIN, *words], nets,
              TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        for is_host in (1, 0)
    )  # fmt: skip

    def trained(life: int) -> bool:
        status = read_json(nets / name / "status.json", {})
        return status.get("life") == life and status["step"] > status["resumed_at"]

    wait_for(lambda: trained(0), *head)
    other[0].kill()
    wait_for(lambda: trained(1), *head)
    (nets / name / "STOP").touch()
    assert finish(*head, 90).status == 0
    told = head[1].read_text() + finish(*other, 60).out
    assert "by itself, on the nodes whose launcher is there" in " ".join(told.split()), told
    assert stopped(nets, name, "STOP file") > read_json(nets / name / "status.json")["resumed_at"]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while it imports", "when it waits", "when it is told to stop"])
def test_a_process_whose_launcher_died_before_its_peer_came_waits_for_nobody(nets, when):
    """An agent is killed; its process would else stand there until the limit of the meeting.

    Or it is told to stop, and its peer, which was told earlier, is gone.
    """
    (port,), name = free_ports(1), f"alone-{when.replace(' ', '-')}"
    agent = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
    words = [sys.executable, "-c", agent, sys.executable, TRAIN, *LONG, "--run-dir", name]
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "x"}
    process, log = start(words, nets, **place)

    def listens() -> bool:
        with socket.socket() as knock:
            return knock.connect_ex(("127.0.0.1", port)) == 0

    end = time.monotonic() + 120
    ready = listens if when.startswith("when") else lambda: len(children_with(name)) == 2
    while not ready() and time.monotonic() < end:
        time.sleep(0.1)
    if when == "while it imports":
        time.sleep(1.0)
    if when == "when it is told to stop":
        (trainer,) = psutil.Process(process.pid).children()
        trainer.terminate()
    else:
        process.kill()
        process.wait()
    end = time.monotonic() + 60
    while children_with(name) and time.monotonic() < end:
        time.sleep(0.2)
    assert children_with(name) == []
    what = "told to stop" if when == "when it is told to stop" else "the launcher is gone"
    assert f"{what} before its processes had met" in log.read_text()
    assert not (nets / name).exists()


def test_the_time_limit_stops_a_run_that_can_go_on(nets):
    done = train([*LONG, "--run-dir", "limited", "--max-time", "8s"], nets)
    assert done.status == 75, done.out
    stopped(nets, "limited", "--max-time")


@pytest.mark.parametrize("point", ["evaluate", "start", slow("save:written"), slow("data")])
def test_a_stop_is_honoured_in_every_phase(nets, point):
    name = f"phase-{point.replace(':', '-')}"
    arguments = [*LONG, "--run-dir", name, "--limit", "640", "--checkpoint-every", "10"]
    done = train(arguments, nets, LOCKSTEP_FAULT=f"term@point={point}")
    assert done.status == 75, done.out
    step = stopped(nets, name, "SIGTERM")
    assert step <= 21
    if point == "evaluate":  # the broken-off evaluation leaves no row and is redone
        assert not any("test/loss" in r for r in rows(nets / name))
        done = train(["--resume", name, "--stop-after", str(step)], nets)
        assert done.status == 0 and sum("test/loss" in r for r in rows(nets / name)) == 1


@pytest.mark.slow
def test_ctrl_c_twice_at_a_terminal_ends_a_slow_save_and_the_one_before_stays_whole(nets):
    pty = pytest.importorskip("pty", reason="there are no pseudo terminals here")
    ours, theirs = pty.openpty()
    arguments = [*LONG, "--run-dir", "impatient", "--checkpoint-every", "10"]
    process, log = start(
        command(arguments), nets, stdin=theirs,
        LOCKSTEP_FAULT="hang@point=save:written,seconds=600,step=20",
    )  # fmt: skip
    wait_for(begun(nets / "impatient", 25), process, log)
    process.send_signal(signal.SIGINT)  # saves once more, behind the save that hangs
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3)
    process.send_signal(signal.SIGINT)
    done = finish(process, log, 30)
    os.close(ours)
    os.close(theirs)
    assert done.status == 130 and "Traceback" not in done.out, done.out
    assert json.loads((nets / "impatient" / "status.json").read_text())["status"] == "failed"
    assert visible(nets / "impatient" / "checkpoints")[0].name == "step-000000010"
    done = train([*arguments, "--stop-after", "30"], nets)
    assert done.status == 0 and "at step 10" in done.out, done.out


@pytest.mark.slow
def test_a_job_that_is_requeued_advises_no_second_one_and_tells_of_no_failure(nets):
    """Its script says so in the STOP file; else the advice is the line for sbatch."""
    place = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "LOCKSTEP_PORT": "1",
             "LOCKSTEP_LOG": "/logs/77.log", "COLUMNS": "200"}  # fmt: skip
    for text, told, not_told in (
        ("requeue\n", "job 77 asks SLURM to requeue it", "sbatch"),
        ("", "launch/slurm.sbatch --resume job-", "requeue"),
    ):
        name = f"job-{len(text)}"
        process, log = begin(nets, name, **place)
        (nets / name / "STOP").write_text(text)
        done = finish(process, log, 60)
        assert done.status == 75 and told in done.out and not_told not in done.out, done.out
        assert "77, start 1, log /logs/77.log" in done.out
        stopped(nets, name, "time limit or a preemption" if text else "STOP file")
