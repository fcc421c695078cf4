"""bench.verify and bench.same: the proof holds for the models, and it catches planted faults."""

import re
import subprocess
import sys

import pytest
from launches import REPOSITORY, SMALL, python, rows, same_weights, train


def verify(*arguments) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.verify", *map(str, arguments)], cwd=REPOSITORY,
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("model", ["alexnet", "resnet18", "vgg11"])
def test_one_two_and_four_processes_are_the_same_run(model):
    size = ["--image-size", "64"] if model == "alexnet" else []
    status, said = verify("--model", model, "--processes", "1,2,4", "--steps", "4", *size)
    assert status == 0 and said.count("verdict: the same run") == 2, said


@pytest.mark.slow
def test_batch_norm_dropout_and_auxiliary_heads_together_are_the_same_run():
    arguments = ["--model", "inception_v3", "--image-size", "75", "--processes", "2"]
    status, said = verify(*arguments, "--steps", "2")
    assert status == 0 and said.count("verdict: the same run") == 1, said


@pytest.mark.slow
def test_planted_faults_are_caught_named_and_exceed_the_control_tenfold():
    plants = {
        "seed": "augmentation: other pixels",
        "skip": "data: other samples",
        "schedule": "forward:",
        "batchnorm": "different models",
        "buffers": "different models",
    }
    status, said = verify(
        "--model", "resnet18", "--processes", "2", "--steps", "5", "--plant", ",".join(plants)
    )
    assert status == 1
    verdicts = re.findall(r"verdict: (.*)", said)
    multiples = [float(x) for x in re.findall(r"multiple of the control: ([\d.]+)", said)]
    for (plant, words), verdict, multiple in zip(plants.items(), verdicts, multiples, strict=True):
        assert words in verdict, (plant, said)
        assert multiple >= 10, (plant, said)


@pytest.mark.slow
def test_bitwise_runs_are_equal_bit_for_bit_on_one_to_four_processes_and_across_them(nets):
    arguments = ["--model", "full.py:Net", *SMALL, "--limit", "640", "--epochs", "2", "--bitwise"]
    arguments += ["--batch-size", "60", "--shards", "12", "--augment", "crop"]
    arguments += ["--optimizer", "sgd", "--lr", "0.05", "--momentum", "0.9"]
    arguments += ["--ema", "0.9"]
    for processes in (1, 3):
        done = train([*arguments, "--run-dir", f"bits-{processes}"], nets, processes)
        assert done.status == 0, done.out
    # ... and a run that moves from four processes to two and to one in the middle of its epochs.
    for processes, fault in ((4, "term@step=4,rank=3"), (2, "term@step=9,rank=1"), (1, "")):
        done = train([*arguments, "--run-dir", "bits-moved"], nets, processes, LOCKSTEP_FAULT=fault)
        assert "finished" in done.out or "stopped at step" in done.out, done.out
    for other in ("bits-3", "bits-moved"):
        assert rows(nets / other) == rows(nets / "bits-1")
        assert same_weights(nets / "bits-1", nets / other) == []


def test_a_command_says_whether_two_runs_are_the_same_experiment(nets):
    arguments = ["--model", "plain.py:Net", *SMALL, "--limit", "128", "--stop-after", "1"]
    for name, extra in (("x", []), ("y", ["--keep", "5"]), ("z", ["--seed", "7"])):
        assert train([*arguments, *extra, "--run-dir", f"same-{name}"], nets).status == 0

    def same(one, two):
        return python("-m", "bench.same", nets / one, nets / two)

    assert same("same-x", "same-y").returncode == 0
    told = same("same-x", "same-z")
    assert told.returncode == 1
    assert "--seed: 0 and 7" in told.stdout and "another order of the samples" in told.stdout
    assert "architecture" not in told.stdout
