"""predictions.csv: the best weights' answer to each picture, on any number of processes."""

import csv
import json

import pytest
import torch
from launches import SMALL, train

from tasks import Classification, Multilabel, Regression
from tasks.evaluation import Evaluation

NAMES = ["ant", "bee", "cow"]


def table(path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def answered(task, outputs, labels, processes: int) -> list[tuple[str, str]]:
    """As an evaluation of equal batches on so many processes, the last one padded."""
    parts = []
    for rank in range(processes):
        found = Evaluation(task, len(outputs), torch.device("cpu"))
        mine = torch.arange(rank, len(outputs) + 3, processes)
        indices = torch.where(mine < len(outputs), mine, -1)
        places = indices.clamp(min=0)
        batch = {"labels": labels[places], "indices": indices, "weights": (indices >= 0).long()}
        found.add(outputs[places], batch)
        parts.append(found)

    def together(counts, answers, kept):
        sums = [sum(p.counts for p in parts), sum(p.answers for p in parts)]
        return *sums, torch.stack([p.kept for p in parts])

    return task.answered(parts[0].results(together)["answers"], NAMES)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_image_has_its_answer_and_padding_none(processes):
    logits = torch.tensor([[9.0, 0, 0], [0, 0, 9], [0, 1, 0], [0, 9, 0], [torch.nan, 0, 0]])
    labels = torch.tensor([0, 0, 1, 2, 1])
    found = answered(Classification(3), logits, labels, processes)
    assert [name for name, _ in found] == ["ant", "cow", "bee", "bee", "cow"]  # NaN: wrong
    assert float(found[2][1]) == pytest.approx(float(logits[2].softmax(0)[1]), abs=1e-5)
    task = Multilabel(3)
    found = answered(task, logits[:4] - 0.5, torch.eye(3)[labels[:4]].long(), processes)
    assert found == [("ant", ""), ("cow", ""), ("bee", ""), ("bee", "")]
    numbers = torch.tensor([[0.0], [1.5], [-2.25]])
    found = answered(Regression(), numbers, numbers, processes)
    assert found == [("0", ""), ("1.5", ""), ("-2.25", "")]


def test_many_classes_at_once_and_none():
    task = Multilabel(70)
    names = [f"c{n}" for n in range(70)]
    room = task.new_answers(3, torch.device("cpu"))
    given = torch.zeros(2, 70, dtype=torch.int64)
    given[0, [0, 31, 32, 63, 69]] = 1
    answers = type("A", (), {"given": given, "sure": given.float()})
    room[:2] = task.as_integers(answers)
    assert task.answered(room, names) == [("c0|c31|c32|c63|c69", ""), ("", ""), ("", ""), ("", "")]


def test_a_run_leaves_the_answers_of_its_best_weights_and_any_number_of_processes_the_same(nets):
    words = ["--model", "plain.py:Net", *SMALL, "--limit", "200", "--epochs", "2", "--shards", "2"]
    words += ["--val-fraction", "0.2", "--bitwise", "--run-dir"]
    assert train([*words, "answers-1"], nets).status == 0
    assert train([*words, "answers-2"], nets, 2).status == 0
    found = table(nets / "answers-1/predictions.csv")
    assert found == table(nets / "answers-2/predictions.csv")
    summary = json.loads((nets / "answers-1/summary.json").read_text())
    test = [row for row in found if row["split"] == "test"]
    right = sum(row["class"] == row["predicted"] for row in test)
    assert {row["split"] for row in found} == {"val", "test"}
    assert right / len(test) == summary["best/test/accuracy"]
    assert all(0.1 <= float(row["confidence"]) <= 1 for row in found)
    done = train(["--resume", "answers-1", "--eval-only"], nets)
    assert done.status == 0 and "digits.csv" in done.out, done.out
    assert table(nets / "answers-1/evaluations/digits.csv") == found
