"""The best belongs to what it was measured on, and its weights are those on the disk."""

import re
from types import SimpleNamespace

import pytest
import torch
from launches import SMALL, rows, same_weights, train
from test_pack import make

from common.errors import UserError
from config import parse
from data.sources import load_source
from distributed.checkpoint import card_of
from tasks import Classification, Regression, balanced_accuracy, never_found
from training.best import terms
from training.data import build_data

RUN = ["--model", "full.py:Net", *SMALL, "--limit", "640", "--lr", "0.01", "--schedule", "constant"]


def value_of(out: str, metric: str = "accuracy") -> float:
    """What --eval-only printed of the test images."""
    return float(re.search(rf"test +\d+ images: .*\b{metric} ([0-9.]+)", out)[1])


def test_what_chooses_is_a_metric_with_its_own_direction():
    confusion = [[95, 0, 0], [5, 0, 0], [0, 0, 0]]
    assert balanced_accuracy({"confusion": confusion}) == 0.5
    told = never_found({"confusion": confusion}, ["common", "rare", "none"])
    assert "none of class rare (5 images); --select" in told
    assert never_found({"confusion": [[1, 0], [0, 1]]}, ["a", "b"]) == ""
    assert "--select" not in never_found({"confusion": [[4, 0], [4, 0]]}, ["a", "b"])
    task = Classification(3)
    counts = torch.tensor([300 * 2**20, 95, 100, 100, 95, 0, 0, 5, 0, 0, 0, 0, 0])
    rest = task.new_counts("cpu")[len(counts) :]
    results = task.results(torch.cat([counts, rest]))
    for name, value in (("accuracy", 0.95), ("loss", 3.0), ("balanced_accuracy", 0.5)):
        task.best_is = name
        assert results[task.best_is] == value
        assert task.best.better(0.2, 0.4) == (name == "loss") != task.best.better(0.4, 0.2)
    task = Regression()
    assert task.best.key == "loss" and task.best.better(0.2, 0.4)
    task.best_is = "r2"
    assert task.best.better(0.4, 0.2)


@pytest.mark.parametrize(
    "words", ["--select r2", "--model linear_regression --select accuracy", "--select nothing"]
)
def test_a_metric_that_is_not_measured_is_refused(words):
    with pytest.raises(UserError, match="--select"):
        parse(["--model", "my_cnn", *words.split()])


@pytest.mark.parametrize(
    "flags", ["--eval-size 48", "--eval-resize 300", "--resize pad", "--interpolation bicubic",
              "--normalize 0.5/0.5", "--decode scaled", "--image-size 40", "--tta 1"],
)  # fmt: skip
def test_what_an_evaluation_sees_is_among_the_terms(flags):
    """With --allow-change eval_size an old best of other pixels would stand for ever."""
    data = SimpleNamespace(
        chosen_on="test", classes=["a", "b"], excluded_from_evaluation=lambda: []
    )

    def of(words):
        plan = SimpleNamespace(config=parse(["--model", "my_cnn", *words]).config)
        checkpoints = SimpleNamespace(plan=plan, facts={"data": "d"})
        return terms(checkpoints, data, Classification(2))

    assert of([]) == of(["--lr", "0.5"]) != of(flags.split())


def test_pictures_excluded_from_the_evaluation_are_among_the_terms(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    source = load_source(str(make(tmp_path / "photographs", 30)))
    settings = parse(["--model", "my_cnn", "--image-size", "16", "--batch-size", "4"])
    data = build_data(settings, source, torch.device("cpu"), 1, 0)
    checkpoints = SimpleNamespace(plan=SimpleNamespace(config=settings.config), facts={"data": "d"})
    found = []
    for places in ([], source.train.places[:2].tolist(), source.test.places[:1].tolist()):
        source.train.photos.damage.excluded = frozenset(places)
        found.append(terms(checkpoints, data, Classification(2)))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("ema", ["0", pytest.param("0.9", marks=pytest.mark.slow)])
def test_on_other_terms_the_best_is_measured_again_and_training_does_not_notice(nets, ema):
    one, other = f"terms-{ema}", f"terms-plain-{ema}"
    for name in (one, other):
        done = train([*RUN, "--ema", ema, "--run-dir", name, "--epochs", "2"], nets)
        assert done.status == 0, done.out
    step = card_of(nets / one / "model.safetensors")["step"]
    again = train(["--resume", one, "--eval-only", "--tta", "2"], nets)
    value = value_of(again.out)
    done = train(["--resume", one, "--tta", "2", "--epochs", "3"], nets)
    told = " ".join(done.out.split())
    assert f"step {step}) was measured on another tta: now it is {value:.4f}" in told, done.out
    last = [row["test/accuracy"] for row in rows(nets / one) if "test/accuracy" in row][-1]
    assert f"best {100 * max(value, last):.2f} %" in told
    done = train(["--resume", other, "--epochs", "3"], nets)
    assert done.status == 0 and "measured on another" not in done.out
    assert same_weights(nets / one, nets / other) == []
    done = train(["--resume", one, "--select", "loss", "--epochs", "4"], nets)
    assert "measured on another metric" in " ".join(done.out.split()), done.out
    done = train(["--resume", other, "--limit", "320", "--allow-change", "limit"], nets)
    assert "measured on another limit" in " ".join(done.out.split()), done.out
    assert "were trained on" not in done.out
    words = ["--val-fraction", "0.2", "--allow-change", "val_fraction"]
    told = " ".join(train(["--resume", other, *words, "--epochs", "4"], nets).out.split())
    assert "measured on another split" in told, told
    assert told.count("validation images were trained on before this life") == 1
    assert "were trained on" not in train(["--resume", other, "--epochs", "5"], nets).out


@pytest.mark.slow
def test_a_best_whose_weights_are_gone_is_dropped_and_there_is_a_new_one(nets):
    assert train([*RUN, "--run-dir", "lost", "--epochs", "2"], nets).status == 0
    best = nets / "lost" / "model.safetensors"
    best.unlink()
    done = train(["--resume", "lost", "--epochs", "3", "--lr", "0", "--allow-change", "lr"], nets)
    assert done.status == 0 and "is dropped: its weights are gone" in " ".join(done.out.split())
    assert card_of(best)["step"] == 30
    first = card_of(best)
    assert train([*RUN, "--run-dir", "older", "--epochs", "1"], nets).status == 0
    best.write_bytes((nets / "older" / "model.safetensors").read_bytes())
    done = train(["--resume", "lost", "--epochs", "4"], nets)
    told = " ".join(done.out.split())
    assert f"step {first['step']}) is not on the disk; the best there is of step 10" in told, told
