"""`python -m report doctor`: what happened to a run, and what to type."""

import json
import os
import time

import pytest
from launches import SMALL, newest, python, train

from common.errors import UserError
from report.doctor import examine


def doctor(folder) -> tuple[int, str]:
    done = python("-m", "report", "doctor", folder)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_of_a_job_the_doctor_shows_number_log_and_state_and_what_sbatch_wants(tmp_path):
    """Where the job is in the queue again, nothing is to be typed: a second would be refused."""
    run, stub = tmp_path / "slurm-77_3", tmp_path / "squeue"
    run.mkdir()
    (run / "config.json").write_text("{}")
    typed = f"sbatch --nodes=2 --ntasks-per-node=1 launch/slurm.sbatch --resume {run}"
    told = {"status": "stopped", "step": 5, "job": "77_3", "log": "/logs/77.log", "go_on": typed}
    (run / "status.json").write_text(json.dumps(told))
    for state, advice, code in (("", typed.split()[0], 0), ("PENDING (BeginTime)", "nothing:", 0)):
        stub.write_text(f"#!/bin/bash\necho '{state}'\n")
        stub.chmod(0o755)
        place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COLUMNS": "300"}
        done = python("-m", "report", "doctor", run, **place)
        assert done.returncode == code, done.stderr
        assert "77_3: " in done.stdout and "/logs/77.log" in done.stdout
        assert f" {advice} " in done.stdout, done.stdout
        assert ("sbatch" in done.stdout) == (not state), done.stdout


def test_of_a_job_that_never_ran_the_doctor_tells_queue_and_last_words(tmp_path, monkeypatch):
    run, stub = tmp_path / "slurm-78", tmp_path / "squeue"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def answers(state: str) -> None:
        stub.write_text(f"#!/bin/bash\n{state}\n")
        stub.chmod(0o755)

    answers("exit 1")
    with pytest.raises(UserError, match="holds no run"):
        examine(run)
    answers("echo 'PENDING (Resources)'")
    rows, advice, well = examine(run)
    assert well and "waits for its turn" in advice
    assert dict(rows)["job"] == "78: PENDING (Resources)" and "no run yet" in dict(rows)["status"]
    answers("echo 'PENDING (JobHeldUser)'")
    assert examine(run)[1:] == ("scontrol release 78  # it is held", False)
    answers("echo 'RUNNING'")
    assert examine(run)[1:] == (f"tail -F {run}.log", True)
    answers("exit 1")
    (tmp_path / "slurm-78.log").write_text("lockstep: no.env failed\n")
    rows, advice, well = examine(run)
    assert not well and advice.startswith(f"less {run}.log")
    assert "never ran" in dict(rows)["status"] and dict(rows)["says"] == "lockstep: no.env failed"


def test_of_a_job_with_a_run_folder_of_its_own_name_the_doctor_finds_it(tmp_path):
    """Unless another job has that folder: then this one's last words count."""
    run, job = tmp_path / "mine", tmp_path / "runs" / "slurm-79"
    run.mkdir()
    job.parent.mkdir()
    job.with_name("slurm-79.log").write_text(
        "lockstep: job 79, start 1: 1 node x 1 process (n1), port 1234, run folder mine\nend\n"
    )
    (run / "config.json").write_text("{}")
    (run / "status.json").write_text(json.dumps({"status": "finished", "step": 5, "job": "79"}))
    rows, advice, well = examine(job)
    assert well and dict(rows)["folder"] == str(run) and "predict.py" in advice
    assert dict(rows)["status"] == "finished, step 5"
    (run / "status.json").write_text(json.dumps({"status": "finished", "step": 5, "job": "80"}))
    rows, advice, well = examine(job)
    assert not well and dict(rows)["folder"] == f"{run}, which job 80 has"
    assert "never ran" in dict(rows)["status"] and dict(rows)["says"] == "end"


def test_of_a_run_that_failed_while_it_started_the_doctor_tells_why(tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"status": "failed", "reason": "rank 1 died"}))
    (tmp_path / "crash").mkdir()
    (tmp_path / "crash" / "rank-1.txt").write_text("rank 1 on n1 failed at step 0\n")
    rows, advice, well = examine(tmp_path)
    assert not well and advice == "the same command again"
    assert dict(rows)["reason"] == "rank 1 died" and "rank 1 on n1" in dict(rows)["crash"]


def test_the_doctor_tells_finished_died_damaged_and_foreign_folders_apart(nets):
    arguments = ["--model", "plain.py:Net", *SMALL, "--limit", "256", "--epochs", "2"]
    arguments += ["--checkpoint-every", "3", "--run-dir", "ill"]
    train(arguments, nets, LOCKSTEP_FAULT="kill@step=7")
    status, said = doctor(nets / "ill")
    assert status == 1 and "died without a word" in said and "--resume" in said, said
    step = int(newest(nets / "ill").name[5:])  # 6, or 3 if the kill came while 6 was written
    assert f"step {step}: whole" in said
    (newest(nets / "ill") / "progress.json").write_text("{}")
    assert f"step {step}: damaged (progress.json has 2 bytes" in doctor(nets / "ill")[1]
    assert train([*arguments, "--fresh"], nets).status == 0
    status, said = doctor(nets / "ill")
    assert status == 0 and "finished, step 8" in said and "predict.py" in said
    status, said = doctor(nets)
    assert status == 2 and "holds no run" in said


@pytest.mark.parametrize(
    ("store", "says"),
    [("raw", "--stage FOLDER"), ("jpeg", "PACK --store raw"), (None, "(--store raw: no decoding")],
)
def test_a_run_that_waited_for_photographs_hears_what_helps(tmp_path, store, says):
    """The part is of the time in which steps were made, whatever else the run did."""
    run, data = tmp_path / "run", tmp_path / "data"
    for folder in (run, data):
        folder.mkdir()
    if store:
        (data / "begun.json").write_text(json.dumps({"store": store}))
    (run / "config.json").write_text(json.dumps({"config": {"dataset": str(data)}}))
    now = time.time()
    for waited, told in ((30, True), (2, False)):
        seconds = {"start": 100, "data": waited}
        life = {"born": now - 200, "until": now, "at": 10, "step": 0, "seconds": seconds}
        (run / "status.json").write_text(json.dumps({"status": "stopped", "lives": [life]}))
        lines = [words for name, words in examine(run)[0] if name == "images"]
        assert bool(lines) == told
        assert not told or (lines[0].startswith("30 % of the training time") and says in lines[0])
