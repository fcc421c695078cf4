"""`python -m report doctor`: what happened to a run, and what to type."""

import json
import os

from launches import SMALL, newest, python, train


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
