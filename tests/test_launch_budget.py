"""On a GPU the host hands out few operations and waits for none: counted on faked CUDA tensors.

And what a step under a gradient scaler leaves behind where one gradient is infinite.
"""

import ast
import copy
from itertools import pairwise

import pytest
import torch
from launches import REPOSITORY
from torch import nn

from bench import launches
from bench.launches import Launches, count, fake_gpu
from config import HINTS, TrainConfig
from data.augment import CROP_TRIES, Augment
from data.keyed_random import permutation, uniforms
from data.loaders import EVALUATION_BATCH, evaluation_batch
from data.operators import OPERATORS
from data.order import EvaluationBatchSampler, GlobalBatchSampler
from data.policy import KINDS
from distributed.shards import Guard, Shards, packed
from distributed.stop import StopVote
from optim import WeightAverage, build_optimizer
from tasks import Regression

OPTIMIZERS = HINTS["optimizer"].metadata["choices"]


@pytest.fixture
def device():
    with fake_gpu() as gpu:
        yield gpu


@pytest.fixture
def speednet(device) -> nn.Module:
    return launches.model_on(device, "speednet")


# --- the budget; each count also fails where devices mix or the host would wait ------------------


@pytest.mark.parametrize("mix", [{}, {"mixup": 0.2}, {"cutmix": 1.0}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_augments_and_mixes_in_forty_operations(device, kind, mix):
    assert 0 < len(launches.augmenting(kind, device, **mix)) <= 40


@pytest.mark.parametrize("name", OPERATORS)
def test_a_step_of_a_policy_has_its_budget(device, name):
    most = {"randaugment": 100, "trivialaugment": 64, "jitter": 58}.get(name, 14)
    plain = launches.augmenting("crop", device, cutmix=1.0)
    whole = launches.augmenting(f"crop|{name}", device, cutmix=1.0)
    assert len(plain) < len(whole) <= len(plain) + most


def test_loss_guard_and_average_are_few_operations(device, speednet):
    assert len(launches.losing(device)) <= 10 and len(launches.losing(device, soft=True)) <= 14
    for skip in (True, False):
        assert len(launches.guarding(device, skip)) <= 40
    assert len(launches.averaging(device, speednet)) <= 6
    assert launches.undoing(device, speednet)


@pytest.mark.parametrize(("name", "most"), [
    ("sgd", 6), ("adamw", 10), ("muon", 60), ("lion", 40), ("nadamw", 120), ("lamb", 80),
    ("rmsprop", 50), ("schedule_free", 120),
])  # fmt: skip
def test_an_optimizer_is_few_operations(device, speednet, name, most):
    assert 0 < len(launches.updating(device, speednet, name)) <= most


@pytest.mark.parametrize(
    ("image_size", "tta", "most"), [(32, 0, 1000), (32, 2, 1200), (224, 0, 2800)]
)
def test_an_evaluation_of_ten_thousand_images_is_few_operations(device, image_size, tta, most):
    names, batches = launches.evaluating(device, image_size, tta)
    assert 0 < len(names) * batches <= most


def test_batches_of_either_sampler_are_indexed_where_the_images_are(device):
    data = launches.resident(device)
    for sampler in (
        GlobalBatchSampler(launches.SAMPLES, 128, 0, device=device),
        EvaluationBatchSampler(launches.SAMPLES, 128, device=device),
    ):
        indices = next(iter(sampler))
        assert len(count(lambda indices=indices: data.__getitems__(indices))) <= 6


def test_a_regression_is_counted_on_the_device(device):
    task = Regression()
    counts, weights = task.new_counts(device), torch.ones(8, dtype=torch.int64, device=device)
    targets, kept = torch.empty(8, 1, device=device), task.new_examples(device)

    def piece() -> None:
        task.keep_examples(kept, task.count(counts, targets, targets, weights), targets, weights)

    assert count(piece)


def test_the_counter_notices_what_waits_and_what_mixes_devices(device):
    there, here = torch.empty(3, device=device), torch.empty(3)
    for bad in (
        lambda: there.sum().item(), lambda: bool(there.sum() > 0), lambda: there.cpu(),
        lambda: here.to(device), lambda: there.copy_(here),
    ):  # fmt: skip
        with pytest.raises(AssertionError), Launches():
            bad()
    with Launches() as seen:
        there[1:].add_(2).unflatten(0, (1, 2))
    assert seen.names == ["add_"]


def called(function: ast.FunctionDef) -> set[str]:
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {c.attr if isinstance(c, ast.Attribute) else f"{ast.unparse(c)}()" for c in calls}


STEP = {
    "train.py": {"train_step"},
    "training/learner.py": {"check_gradients", "inputs"},
    "distributed/shards.py": {"__call__", "check", "undo_buffers"},
    "data/augment.py": {
        "train",
        "mix",
        "_move",
        "_rows",
        "_cut",
        "_changed",
        "resized_crop",
        "cut_out",
    },
    "data/operators.py": {"change", "_apply_changes", "_jitter", "affine", "colour", "levelled"}
    | {"sharpen", "equalise", "hue", "blur", "_erase", "grey"},
    "optim/muon.py": {"step", "_update", "_update_together", "orthogonal_stacks"},
    "optim/average.py": {"update"},
}


@pytest.mark.parametrize("place", STEP)
def test_no_step_reads_a_number_from_the_device(place):
    tree = ast.parse((REPOSITORY / place).read_text(encoding="utf-8"))
    functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)]
    found = {f.name: called(f) for f in functions if f.name in STEP[place]}
    assert found.keys() == STEP[place]
    for name, calls in found.items():
        waits = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "float()", "bool()"}
        assert not calls & (waits | {"int()"}), f"{place}: {name}"


# --- the same numbers as before -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"alternating_flip": True, "cutout": 6}], ids=str)
def test_choices_made_once_an_epoch_are_those_made_batch_by_batch(kind, more, monkeypatch):
    monkeypatch.setattr("data.augment.CHUNK", 64)
    images = (uniforms(0, 0, torch.arange(48), 3 * 16 * 16) * 256).byte().view(48, 3, 16, 16)
    labels, order = torch.arange(48) % 10, permutation(0, 0, 200)[:48]
    for mixes in ({"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}):
        common = (kind, 16, (0.5,) * 3, (0.25,) * 3, 7)
        alone = Augment(*common, **more, **mixes)
        table = Augment(*common, **more, **mixes, samples=200)
        for epoch in (0, 1, 5, 0):
            one, other = (a.train(images, order, epoch) for a in (alone, table))
            assert torch.equal(one, other)
            one, other = (a.mix(one, labels, order, epoch, 10) for a in (alone, table))
            assert all(map(torch.equal, one, other))


def test_a_table_of_choices_is_small_and_made_once_an_epoch(monkeypatch):
    augment, calls = Augment("resized_crop", 32, (0.0,) * 3, (1.0,) * 3, 0, samples=1000), []
    original = augment.choices
    monkeypatch.setattr(
        augment, "choices", lambda *words: calls.append(words[1]) or original(*words)
    )
    augment.choices.__name__ = "choices"
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    for epoch in (0, 0, 0, 1, 1):
        augment.train(images, torch.arange(4), epoch)
    assert calls == [0, 1]
    (_, table) = augment._tables["choices"]
    assert table.numel() * table.element_size() <= 1000 * (5 + 2 * CROP_TRIES) * 4


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("hold_length", [True, False])
def test_muon_moves_all_filters_together_as_one_by_one(layout, hold_length):
    torch.manual_seed(0)
    model = nn.Sequential(  # equal shapes apart, more rows than columns, squares of two sizes
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 64, 1), nn.Conv2d(64, 300, 3),
        nn.Conv2d(8, 8, 3), nn.Linear(9, 5),
    ).to(memory_format=layout)  # fmt: skip
    config = TrainConfig(optimizer="muon", lr=0.02, momentum=0.6, weight_decay=0.1)
    twin = copy.deepcopy(model)
    one, all_ = build_optimizer(model, config), build_optimizer(twin, config)
    for optimizer in (one, all_):
        optimizer.param_groups[0]["hold_length"] = hold_length
    for step in range(4):
        all_.found_inf = torch.tensor(float(step == 2))
        before = [p.detach().clone() for p in twin.parameters()]
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = torch.full_like(p, torch.nan) if step == 2 else p.grad.clone()
        for group in all_.param_groups:
            with torch.no_grad():
                all_._update_together(list(group["params"]), group)
        if step == 2:
            assert all(map(torch.equal, before, twin.parameters()))
            continue
        one.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p - q).norm() <= 2e-6 * p.norm()
            mine, other = (o.state[x]["momentum_buffer"] for o, x in ((one, p), (all_, q)))
            assert torch.allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_an_evaluation_batch_is_as_large_as_memory_holds_easily():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    sizes = (32, 128, 224, 600)
    assert [evaluation_batch(10_000, s, cpu) for s in sizes] == [EVALUATION_BATCH, 128, 40, 8]
    assert [evaluation_batch(10_000, s, gpu) for s in sizes] == [1024, 1024, 320, 32]
    assert [evaluation_batch(n, 32, gpu) for n in (1, 128, 129, 1000)] == [128, 128, 256, 1024]


# --- rows by time ---------------------------------------------------------------------------------


def test_a_row_is_due_for_one_beat_once_its_time_is_over_and_not_before(monkeypatch):
    now, due = [1000.0], []
    monkeypatch.setattr("distributed.stop.time.monotonic", lambda: now[0])
    vote = StopVote()
    for row_every in (None, 0.5):
        vote.row_every = row_every
        for _ in range(40):
            now[0] += 0.1
            vote.poll()
            due.append(vote.row_agreed)
    assert not any(due[:40]) and not any(map(all, pairwise(due)))
    assert 5 <= sum(due[40:]) <= 8  # in four seconds


# --- one step under a gradient scaler -------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_infinite_gradient_under_a_scaler_changes_nothing_but_the_scale(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )
    optimizer = build_optimizer(model, TrainConfig(optimizer=name, momentum=0.9))
    average, scaler = WeightAverage(model, 0.9), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    guard = Guard(torch.device("cpu"), optimizer, skip=True)
    shards = object.__new__(Shards)
    shards.bare, shards.undoes = model, True

    def state() -> list[torch.Tensor]:
        kept = [*model.state_dict().values(), *average.model.state_dict().values()]
        kept += [v for p in model.parameters() for v in optimizer.state[p].values()]
        return [x.detach().clone() for x in kept]

    def step(bad: bool) -> None:
        shards.before = packed(shards.buffers)
        scaler.scale(model(torch.randn(6, 3, 8, 8)).square().mean()).backward()
        if bad:
            model[0].weight.grad[0, 0, 0, 0] = torch.inf
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        skipped = shards.undo_buffers(guard.check(norm, torch.zeros(()), 0))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update(model, 99, skipped)

    step(bad=False)
    before = state()
    step(bad=True)
    assert all(map(torch.equal, before, state()))
    assert scaler.get_scale() == 2.0**9
    assert not {"found_inf", "grad_scale"} & vars(optimizer).keys()
    step(bad=False)
    assert not all(map(torch.equal, before, state()))
