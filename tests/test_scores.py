"""Metrics of an evaluation against scikit-learn, and the same bits in every batching and spread."""

import json

import pytest
import torch
from launches import SMALL, rows, train
from refusals import refused
from sklearn import metrics as theirs

from report import page
from tasks import Classification, scores

CLASSES = 7


def sample(n=403, classes=CLASSES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator) ** 2 // classes  # uneven
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), labels] += 1.5
    return logits, labels


def counted(logits, labels, parts, classes=CLASSES):
    task = Classification(classes)
    counts = task.new_counts("cpu")
    for part in parts:
        weights = torch.ones(len(part), dtype=torch.int64)
        task.count(counts, logits[part], labels[part], weights)
    return task, counts


def test_precision_recall_f1_top5_and_the_area_are_scikit_learns():
    logits, labels = sample()
    task, counts = counted(logits, labels, [torch.arange(403)])
    found = task.results(counts)
    there = labels.unique().tolist()
    assert len(there) < CLASSES  # a class without images does not count
    told = {"labels": there, "average": "macro", "zero_division": 0}
    answers = logits.argmax(1)
    assert found["macro_precision"] == pytest.approx(
        theirs.precision_score(labels, answers, **told)
    )
    assert found["macro_f1"] == pytest.approx(theirs.f1_score(labels, answers, **told))
    assert found["balanced_accuracy"] == pytest.approx(theirs.recall_score(labels, answers, **told))
    top5 = theirs.top_k_accuracy_score(labels, logits, k=5, labels=list(range(CLASSES)))
    assert found["top5"] == pytest.approx(top5)
    rounded = (logits.log_softmax(1).exp() * 2**16).round()
    areas = [theirs.roc_auc_score(labels == c, rounded[:, c]) for c in there]
    assert found["auroc"] == pytest.approx(sum(areas) / len(areas), rel=1e-12)


def test_the_calibration_error_is_that_of_fifteen_bins():
    logits, labels = sample()
    task, counts = counted(logits, labels, [torch.arange(403)])
    found = task.results(counts)
    sure, right = logits.log_softmax(1).exp().max(1).values, logits.argmax(1) == labels
    error = 0.0
    for i in range(15):
        inside = (sure >= i / 15) & ((sure < (i + 1) / 15) | (i == 14))
        if inside.any():
            gap = abs(float(sure[inside].mean()) - float(right[inside].float().mean()))
            error += gap * int(inside.sum()) / 403
    assert found["ece"] == pytest.approx(error, abs=1e-5)
    assert sum(found["calibration"]["images"]) == 403
    assert sum(found["calibration"]["right"]) == int(right.sum())


def test_every_batching_and_spread_over_processes_comes_to_the_same_bits():
    logits, labels = sample()
    logits[5] = torch.nan
    task, whole = counted(logits, labels, [torch.arange(403)])
    for size in (1, 64, 100):
        order = torch.randperm(403, generator=torch.Generator().manual_seed(size))
        assert torch.equal(counted(logits, labels, order.split(size))[1], whole)
    halves = [counted(logits, labels, [part])[1] for part in torch.arange(403).split(202)]
    assert task.results(sum(halves)) == task.results(whole)


def test_padding_counts_for_nothing_and_degenerate_sets_have_numbers():
    logits, labels = sample()
    weights = (torch.arange(403) < 150).long()
    task = Classification(CLASSES)
    padded = task.new_counts("cpu")
    task.count(padded, logits, labels, weights)
    assert torch.equal(padded, counted(logits, labels, [torch.arange(150)])[1])
    one, counts = counted(logits[:1], labels[:1], [torch.arange(1)])
    assert one.results(counts)["auroc"] == 0.5


def test_what_is_counted_depends_on_the_number_of_classes_and_stays_small():
    def keys(classes):
        return {metric.key for metric in Classification(classes).metrics}

    assert {"top5", "auroc"} <= keys(5) and "top5" not in keys(4) and "auroc" not in keys(1)
    assert "auroc" not in keys(101) and {"ece", "macro_f1"} <= keys(10_000)
    assert scores.new_counts(10_000) == 60
    assert len(Classification(10_000).new_counts("cpu")) < 31_000
    logits, labels = sample(50, 3000)
    task, counts = counted(logits, labels, [torch.arange(50)], 3000)
    assert 0 < task.results(counts)["macro_f1"] <= 1


def test_a_run_shows_its_scores_and_chooses_by_one(nets):
    flags = ["--model", "plain.py:Net", *SMALL, "--limit", "300", "--epochs", "2"]
    done = train([*flags, "--select", "macro_f1", "--run-dir", "scored"], nets)
    assert done.status == 0, done.out
    for word in ("AUROC 0.", "calibration error 0.", "macro precision 0.", "F1", "top 5"):
        assert word in done.out, done.out
    values = [row["test/macro_f1"] for row in rows(nets / "scored") if "test/macro_f1" in row]
    summary = json.loads((nets / "scored" / "summary.json").read_text())
    assert summary["best/test/macro_f1"] == max(values)
    assert sum(summary["calibration"]["images"]) == 300
    made = page.build(nets / "scored")
    assert 'aria-label="right by confidence over the confidences' in made
    assert "AUROC, at the best</dt><dd>0." in made and ">F1<" in made
    done = train([*flags, "--select", "r2", "--run-dir", "refused"], nets)
    assert done.status == 2 and "--select r2" in done.out


def test_a_metric_that_is_not_counted_is_refused():
    task = Classification(3)
    assert "top5" not in [metric.key for metric in task.metrics]
    with refused("bad-value", match="--select"):
        from config import parse

        parse(["--select", "topfive"])
