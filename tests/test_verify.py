"""bench.verify and bench.same: the proof holds for the models, and it catches planted faults."""

import re

import pytest
from launches import SMALL, python, rows, same_weights, train

# The convolutions, the pooling and the dropout of the table's; of the linear layers, which have
# nine tenths of the weights and are saved again and again, a small part.
NARROW = """
from torch import nn

from models.alexnet import AlexNet
from models.vgg import COLUMN_A, VGG


def narrow(model, features, num_classes):
    linear = [layer for layer in model.classifier if isinstance(layer, nn.Linear)]
    for layer, (before, after) in zip(
        linear, [(features, 64), (64, 64), (64, num_classes)], strict=True
    ):
        place = list(model.classifier).index(layer)
        model.classifier[place] = nn.Linear(before, after)


class Alex(AlexNet):
    def __init__(self, num_classes=10):
        super().__init__(num_classes)
        narrow(self, 256 * 6 * 6, num_classes)


class Vgg11(VGG):
    def __init__(self, num_classes=10):
        super().__init__(COLUMN_A, num_classes)
        narrow(self, 512 * 7 * 7, num_classes)
"""


def verify(*arguments) -> tuple[int, str]:
    done = python("-m", "bench.verify", *arguments)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("model", ["Alex", "resnet18", "Vgg11"])
def test_one_two_and_four_processes_are_the_same_run(model, tmp_path):
    size = ["--image-size", "64"] if model == "Alex" else []
    if model != "resnet18":
        (tmp_path / "narrow.py").write_text(NARROW)
        model = f"{tmp_path}/narrow.py:{model}"
    status, said = verify("--model", model, "--processes", "1,2,4", "--steps", "3", *size)
    assert status == 0 and said.count("verdict: the same run") == 2, said


@pytest.mark.slow
def test_batch_norm_dropout_and_auxiliary_heads_together_are_the_same_run():
    arguments = ["--model", "inception_v3", "--image-size", "75", "--processes", "2"]
    status, said = verify(*arguments, "--steps", "2")
    assert status == 0 and said.count("verdict: the same run") == 1, said


@pytest.mark.slow
def test_planted_faults_are_caught_named_and_exceed_the_control_tenfold(nets):
    plants = {
        "seed": "augmentation: other pixels",
        "skip": "data: other samples",
        "schedule": "forward:",
        "batchnorm": "different models",
        "buffers": "different models",
    }
    model = ["--model", nets / "full.py:Net", "--image-size", "16"]
    status, said = verify(*model, "--processes", "2", "--steps", "5", "--plant", ",".join(plants))
    assert status == 1
    verdicts = re.findall(r"verdict: (.*)", said)
    multiples = [float(x) for x in re.findall(r"multiple of the control: ([\d.]+)", said)]
    for (plant, words), verdict, multiple in zip(plants.items(), verdicts, multiples, strict=True):
        assert words in verdict, (plant, said)
        assert multiple >= 10, (plant, said)


@pytest.mark.slow
def test_bitwise_runs_are_equal_bit_for_bit_on_any_number_of_processes_and_across_them(nets):
    arguments = ["--model", "full.py:Net", *SMALL, "--limit", "640", "--epochs", "2", "--bitwise"]
    arguments += ["--batch-size", "60", "--shards", "12", "--augment", "crop"]
    arguments += ["--optimizer", "sgd", "--lr", "0.05", "--momentum", "0.9"]
    arguments += ["--ema", "0.9"]
    for processes in (1, 5):
        done = train([*arguments, "--run-dir", f"bits-{processes}"], nets, processes)
        assert done.status == 0, done.out
    # ... and a run that moves from seven processes to four and to three amid its epochs.
    for processes, fault in ((7, "term@step=4,rank=3"), (4, "term@step=9,rank=1"), (3, "")):
        done = train([*arguments, "--run-dir", "bits-moved"], nets, processes, LOCKSTEP_FAULT=fault)
        assert "finished" in done.out or "stopped at step" in done.out, done.out
    for other in ("bits-5", "bits-moved"):
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
