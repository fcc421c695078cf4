"""`python -m report doctor`: what happened to a run, and what to type."""

from launches import SMALL, newest, python, train


def doctor(folder) -> tuple[int, str]:
    done = python("-m", "report", "doctor", folder)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


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
