"""Losses and metrics: against plain computations, and the same in every order and batching."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common.confusion import dense, totals
from common.text import counted as say
from report import panels
from tasks import LARGEST_LOSS, LOSS_UNIT, Classification, Regression, build_task, never_found


def sample(n=203, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator) * 3
    return logits, torch.randint(classes, (n,), generator=generator)


def counted(task, logits, labels, parts, weights=None):
    counts = task.new_counts("cpu")
    weights = torch.ones(len(labels), dtype=torch.int64) if weights is None else weights
    for part in parts:
        task.count(counts, logits[part], labels[part], weights[part])
    return counts


def whole(labels):
    return [torch.arange(len(labels))]


# --- classification ------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_summed_also_for_soft_labels_and_half_precision(smoothing):
    logits, labels = sample()
    task = Classification(7, smoothing)
    wanted = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    assert task.loss(logits, labels) == wanted
    soft = F.one_hot(labels, 7).float()
    assert task.loss(logits, soft) == pytest.approx(float(wanted), rel=1e-5)
    half = task.loss(logits.bfloat16(), labels)
    assert half.dtype == torch.float32 and half == pytest.approx(float(wanted), rel=0.01)


def test_auxiliary_heads_weigh_what_the_model_says_in_training_and_nothing_in_evaluation():
    logits, labels = sample()
    other, _ = sample(seed=1)
    model = nn.Linear(1, 1)
    model.auxiliary_weight = 0.4
    task = build_task("classification", 7, 0.0, model)
    main, extra = (F.cross_entropy(x, labels, reduction="sum") for x in (logits, other))
    assert torch.allclose(task.loss((logits, other), labels), main + 0.4 * extra)
    assert torch.allclose(task.loss((logits, other, None), labels), main + 0.4 * extra)
    assert build_task("classification", 7, 0.0, nn.Linear(1, 1)).auxiliary == 0.3
    a, b = task.new_counts("cpu"), task.new_counts("cpu")
    weights = torch.ones(len(labels), dtype=torch.int64)
    task.count(a, (logits, other), labels, weights)
    task.count(b, logits, labels, weights)
    assert torch.equal(a, b)


def test_metrics_equal_a_plain_computation():
    logits, labels = sample()
    metrics = Classification(7).results(counted(Classification(7), logits, labels, whole(labels)))
    predicted = logits.argmax(1)
    top5 = (logits.topk(5).indices == labels[:, None]).any(1)
    matrix = [[int(((labels == t) & (predicted == p)).sum()) for p in range(7)] for t in range(7)]
    assert metrics["images"] == 203
    assert metrics["accuracy"] == int((predicted == labels).sum()) / 203
    assert metrics["top5"] == int(top5.sum()) / 203
    assert metrics["confusion"] == matrix
    assert metrics["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_every_order_batching_and_split_over_processes_counts_exactly_the_same():
    logits, labels = sample()
    task = Classification(7)
    wanted = counted(task, logits, labels, whole(labels))
    for size in (1, 2, 7, 64, 203):
        order = torch.randperm(203, generator=torch.Generator().manual_seed(size))
        assert torch.equal(counted(task, logits, labels, order.split(size)), wanted)
    halves = [counted(task, logits, labels, [part]) for part in torch.arange(203).split(102)]
    assert torch.equal(sum(halves), wanted)


def test_padding_counts_for_nothing():
    logits, labels = sample()
    weights = (torch.arange(203) < 150).long()
    task = Classification(7)
    padded = counted(task, logits, labels, whole(labels), weights)
    assert torch.equal(padded, counted(task, logits[:150], labels[:150], whole(labels[:150])))
    logits[150:] = float("nan")
    assert torch.equal(padded, counted(task, logits, labels, whole(labels), weights))


def test_ties_go_to_the_lower_class_in_accuracy_and_matrix_alike():
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [2.0, 2.0, 2.0]])
    labels = torch.tensor([0, 1, 2])
    metrics = Classification(3).results(counted(Classification(3), logits, labels, whole(labels)))
    assert metrics["accuracy"] == 1 / 3
    assert metrics["confusion"] == [[1, 0, 0], [1, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("row", [[float("nan")] * 3, [9.0, float("nan"), 0.0],
                                 [float("nan"), 9.0, 9.0]])  # fmt: skip
def test_logits_that_are_not_numbers_are_wrong_everywhere_and_the_loss_stays_finite(row):
    for label in range(3):
        logits, labels = torch.tensor([row, [9.0, 0.0, 0.0]]), torch.tensor([label, 0])
        task = Classification(3)
        metrics = task.results(counted(task, logits, labels, whole(labels)))
        assert metrics["accuracy"] == 0.5 and metrics["images"] == 2
        assert metrics["loss"] == pytest.approx(LARGEST_LOSS / 2, rel=1e-3)
        right = sum(metrics["confusion"][c][c] for c in range(3))
        assert right == 1 and sum(map(sum, metrics["confusion"])) == 2


def test_a_hopeless_but_finite_answer_has_a_finite_loss():
    logits, labels = torch.tensor([[0.0, -float("inf")], [1e30, 0.0]]), torch.tensor([1, 1])
    task = Classification(2)
    metrics = task.results(counted(task, logits, labels, whole(labels)))
    assert metrics["loss"] == LARGEST_LOSS and metrics["accuracy"] == 0


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_with_five_classes_or_fewer_every_image_is_among_the_first_five(classes):
    logits, labels = sample(50, classes)
    task = Classification(classes)
    assert task.results(counted(task, logits, labels, whole(labels)))["top5"] == 1.0


def test_millions_of_images_do_not_overflow():
    task = Classification(2)
    counts = task.new_counts("cpu")
    counts[:4] = torch.tensor([2**20 * 2**20 * 2**20, 0, 0, 2**20])
    assert task.results(counts)["loss"] == LARGEST_LOSS


# --- examples -------------------------------------------------------------------------------------


def test_right_answers_in_training_are_those_of_a_plain_search():
    logits, labels = sample()
    task, wanted = Classification(7), sum(map(int, logits.argmax(1) == labels))
    soft = 0.6 * torch.eye(7)[labels] + 0.4 * torch.eye(7)[labels.flip(0)]
    for outputs in (logits, (logits, logits.flip(0)), {"logits": logits}):
        for target in (labels, soft):
            assert int(task.right(outputs, target)) == wanted > 0
    assert Regression().right(logits[:, :1], logits[:, :1]) == 0 and not Regression.right_is


def shown(task, logits, labels, parts, processes=1):
    """The examples of an evaluation in such parts, dealt out to so many processes."""
    everyones = [task.new_examples("cpu") for _ in range(processes)]
    counts, weights = task.new_counts("cpu"), torch.ones(len(labels), dtype=torch.int64)
    for number, part in enumerate(parts):
        part = torch.cat([part, torch.tensor([0])])  # padding: the first sample once more
        indices = torch.cat([part[:-1], torch.tensor([-1])])
        answers = task.count(counts, logits[part], labels[part], weights[part])
        task.keep_examples(everyones[number % processes], answers, labels[part], indices)
    return task.examples(torch.stack(everyones))


def test_the_surest_mistakes_are_those_of_a_plain_search_spread_over_the_classes():
    logits, labels = sample()
    task = Classification(7)
    sure, answers = logits.softmax(1).max(1)
    wrong = [i for i in range(203) if answers[i] != labels[i]]
    wrong.sort(key=lambda i: -float(sure[i]))
    turns = {i: sum(labels[j] == labels[i] for j in wrong[: wrong.index(i)]) for i in wrong}
    wanted = sorted(wrong, key=lambda i: (turns[i], -float(sure[i])))[:32]
    found = shown(task, logits, labels, whole(labels))
    assert [e["index"] for e in found] == wanted
    for e in found:
        assert e["label"] == labels[e["index"]] and e["answer"] == answers[e["index"]]
        assert e["confidence"] == pytest.approx(float(sure[e["index"]]), abs=2**-19)
    first = [e["label"] for e in found[:7]]
    assert sorted(first) == list(range(7))


@pytest.mark.parametrize("name", ["classification", "regression"])
def test_every_order_batching_and_split_over_processes_shows_the_same_examples(name):
    logits, labels = sample()
    task = Classification(7) if name == "classification" else Regression()
    if name == "regression":
        logits, labels = logits[:, :1], labels.float()[:, None]
    else:
        logits[40:60] = logits[40]  # alike: the earlier one comes first
        logits[100:140] = torch.nan
    wanted = shown(task, logits, labels, whole(labels))
    assert wanted and len(wanted) == (32 if name == "classification" else 200)
    if name == "regression":
        assert [e["answer"] for e in wanted] == logits[:200, 0].tolist()
    for size in (1, 7, 64, 203):
        for processes in (1, 2, 3):
            order = torch.randperm(203, generator=torch.Generator().manual_seed(size))
            assert shown(task, logits, labels, order.split(size), processes) == wanted


def test_a_class_with_all_the_mistakes_does_not_fill_the_picture_and_none_are_none():
    labels = torch.zeros(100, dtype=torch.int64)
    logits = torch.zeros(100, 7)
    assert shown(Classification(7), logits, labels, whole(labels)) == []
    logits[:, 3] = 1 + torch.arange(100) / 1000
    found = shown(Classification(7), logits, labels, whole(labels))
    assert [e["index"] for e in found] == list(range(99, 91, -1))


# --- regression ----------------------------------------------------------------------------------


def test_a_shape_that_would_broadcast_is_an_error_in_training_and_evaluation():
    task, targets = Regression(), torch.zeros(8, 1)
    for wrong in (torch.zeros(8), torch.zeros(1, 8), torch.zeros(8, 2), torch.zeros(1, 1)):
        with pytest.raises(ValueError, match="broadcast"):
            task.loss(wrong, targets)
        with pytest.raises(ValueError, match="broadcast"):
            task.count(task.new_counts("cpu"), wrong, targets, torch.ones(8, dtype=torch.int64))


def test_squared_error_and_r2_equal_the_textbook_in_every_batching():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(101, 1, generator=generator) * 2 + 3
    predictions = targets + torch.randn(101, 1, generator=generator) * 0.5
    task = Regression()
    counts = counted(task, predictions, targets, whole(targets))
    metrics = task.results(counts)
    squares = ((predictions - targets) ** 2).sum()
    assert torch.allclose(task.loss(predictions, targets), squares)
    assert metrics["loss"] == pytest.approx(float(squares) / 101, rel=1e-5)
    spread = ((targets - targets.mean()) ** 2).sum()
    assert metrics["r2"] == pytest.approx(float(1 - squares / spread), rel=1e-4)
    assert task.results(counted(task, targets, targets, whole(targets)))["r2"] == 1.0
    for size in (1, 10, 100):
        order = torch.randperm(101, generator=generator)
        assert torch.equal(counted(task, predictions, targets, order.split(size)), counts)
    constant = torch.ones(5, 1)
    assert task.results(counted(task, constant, constant, whole(constant)))["r2"] == 0.0
    nan = torch.full((5, 1), float("nan"))
    assert task.results(counted(task, nan, constant, whole(constant)))["loss"] == LARGEST_LOSS
    assert task.doubts(metrics, []) == {}
    far = task.results(counted(task, targets * 1e6, targets, whole(targets)))
    told = task.doubts(far, [])["explodes"]
    assert far["loss"] > LARGEST_LOSS / 2 and "(an error counts 1,048,576 at most)" in told
    assert f"the mean costs {float(spread) / 101:.4g}: the steps are too large" in told


@pytest.mark.parametrize("classes", [30, 130, 2100])
def test_what_is_kept_of_many_classes_grows_with_the_mistakes_not_with_their_square(classes):
    """The same numbers in each form, and a matrix that comes back whole where there is one."""
    labels = torch.arange(300) % classes
    answers = torch.where(torch.arange(300) % 7 == 0, (labels + 1) % classes, labels)
    task, logits = Classification(classes), torch.nn.functional.one_hot(answers, classes) * 9.0
    metrics = task.results(counted(task, logits, labels, whole(labels)))
    counts = task.new_counts("cpu")
    names = [str(n) for n in range(classes)]
    assert metrics["accuracy"] == pytest.approx(257 / 300) and task.doubts(metrics, names) == {}
    assert len(json.dumps(metrics)) < 40 * (300 + classes) and counts.numel() <= 2000**2 + 4
    hits = [int(((labels == c) & (answers == c)).sum()) for c in range(classes)]
    there, taken = labels.bincount(minlength=classes), answers.bincount(minlength=classes)
    assert totals(metrics) == (there.tolist(), taken.tolist(), hits)
    shares = [hit / count for hit, count in zip(hits, there.tolist(), strict=True) if count]
    assert metrics["balanced_accuracy"] == pytest.approx(sum(shares) / len(shares))
    missed = [c for c in range(classes) if there[c] and not hits[c]]
    told = never_found(metrics, names)
    assert bool(told) == bool(missed)
    assert all(f"{c} ({say(int(there[c]), 'image')})" in told for c in missed[:5])
    if "confusion" in metrics:
        matrix = torch.tensor(dense(metrics["confusion"]))
        wanted = torch.zeros(classes, classes, dtype=torch.int64)
        wanted.index_put_((labels, answers), torch.ones_like(labels), accumulate=True)
        assert torch.equal(matrix, wanted)
    one = counted(task, logits[:1].expand(300, -1), labels, whole(labels))
    assert "one class" in task.doubts(task.results(one), names)


@pytest.mark.parametrize("classes", [130, 2100])
def test_of_many_classes_the_surest_mistakes_are_kept_in_room_that_does_not_grow(classes):
    """Nothing as large as classes times images is made, and the first of a class comes first."""
    logits, labels = sample(203, classes)
    task, made = Classification(classes), []
    assert task.new_examples("cpu").numel() == 512

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            made.extend(x.numel() for x in (found,) if torch.is_tensor(x))
            return found

    counts, kept = task.new_counts("cpu"), task.new_examples("cpu")
    found, answers = task.count(counts, logits, labels, torch.ones_like(labels)), logits.argmax(1)
    with Sizes():
        task.keep_examples(kept, found, labels, torch.arange(203))
    assert max(made) <= 2 * (256 + 203)
    sure = logits.softmax(1).amax(1)
    wrong = [i for i in sure.argsort(descending=True).tolist() if answers[i] != labels[i]]
    turns = {i: sum(bool(labels[j] == labels[i]) for j in wrong[:n]) for n, i in enumerate(wrong)}
    wanted = sorted(wrong, key=lambda i: (turns[i], -float(sure[i])))[:32]
    found = shown(task, logits, labels, whole(labels))
    assert [e["index"] for e in found] == wanted
    assert [e["label"] for e in found] == labels[wanted].tolist()
    assert [e["answer"] for e in found] == answers[wanted].tolist()
    for size, processes in ((7, 1), (64, 3)):
        order = torch.randperm(203, generator=torch.Generator().manual_seed(size))
        assert shown(task, logits, labels, order.split(size), processes) == found


def test_what_is_better():
    accuracy, loss = Classification(2).best, Regression().best
    assert accuracy.better(0.5, None) and accuracy.better(0.6, 0.5)
    assert not accuracy.better(0.5, 0.5) and not accuracy.better(0.4, 0.5)
    assert loss.better(0.4, 0.5) and not loss.better(0.5, 0.5)
    assert not accuracy.better(float("nan"), 0.5)


def test_classes_that_mirror_each_other_are_named_and_guessing_is_held_against_the_majority():
    def doubts(rows):
        task, matrix = Classification(len(rows)), torch.tensor(rows)
        names = ["up", "left", "right"]
        total = int(matrix.sum())
        counts = torch.tensor([int(1.2 * total / LOSS_UNIT), int(matrix.trace()), total, total])
        rest = task.new_counts("cpu")[4 + matrix.numel() :]
        return task.doubts(task.results(torch.cat([counts, matrix.flatten(), rest])), names)

    found = doubts([[30, 0, 0], [1, 14, 15], [0, 16, 14]])
    assert "left and right are taken for each other" in found["mirror"]
    assert "mirror" not in doubts([[30, 0, 0], [1, 27, 2], [0, 25, 5]])  # the one for the other
    assert "mirror" not in doubts([[10, 10, 10], [10, 10, 10], [10, 10, 10]])
    found = doubts([[60, 0, 0], [20, 0, 0], [20, 0, 0]])
    assert "60.0% right is hardly more than 60.0%, which always answering up" in found["guesses"]
    found = doubts([[0, 60, 0], [0, 20, 0], [0, 20, 0]])
    assert "20.0% right is less than 60.0%, which always answering up" in found["guesses"]


def epoch_shown(task: Classification, last: dict, no_flip: bool = False) -> tuple[str, dict]:
    """The line of an epoch of two classes, and the doubts that are warned of."""
    lines, doubts = [], {}
    screen = SimpleNamespace(epoch_line=lambda text, _: lines.append(text), warn_once=doubts.update)
    actions = SimpleNamespace(dry_run=False, debug=False)
    plan = SimpleNamespace(actions=actions, config=SimpleNamespace(augment="flip"))
    data = SimpleNamespace(classes=["left", "right"], augment=SimpleNamespace(no_flip=no_flip))
    data.source = SimpleNamespace(no_flip=False)  # the data set itself says nothing
    schedule = SimpleNamespace(epochs=9, trains=lambda _: True, over=lambda _: False)
    progress, row = SimpleNamespace(best=0.5, last=last), {"epoch": 9, "test/loss": 0.5}
    panels.show_epoch(
        screen, plan, task, data, schedule, progress, row, False, 0.0, False, {}
    )  # fmt: skip
    return lines[0], doubts


@pytest.mark.parametrize("no_flip", [False, True])
def test_nobody_is_told_to_leave_out_mirroring_who_has(no_flip):
    last = {"confusion": [[14, 16], [16, 14]], "loss": 0.5, "accuracy": 28 / 60}
    _, doubts = epoch_shown(Classification(2), last, no_flip)
    assert ("mirror" in doubts) is not no_flip


def test_the_best_of_a_metric_that_is_not_on_the_line_is_named():
    task, last = Classification(2), {"confusion": [[30, 0], [0, 30]], "loss": 0.1, "accuracy": 1.0}
    assert epoch_shown(task, last)[0].endswith("  best 50.00 %")
    task.best_is = "balanced_accuracy"
    assert epoch_shown(task, last)[0].endswith("  best balanced accuracy 50.00 %")
