"""Logical shards: the same gradient and statistics however the shards are spread over processes."""

import contextlib
import math
import random

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from config import BatchPlan
from data.keyed_random import hash_integers
from distributed.generators import seed_dropout
from distributed.shards import ExactSum, Guard, Nature, Shards
from models import build_model

SIZE, CLASSES = 24, 5
ALONE = Nature(reads_buffers=False)  # nobody is there to whom buffers could be broadcast


class FakeAccelerator:
    """One of several processes, without the others: what it would hand to their sum."""

    def __init__(self, process_index=0, num_processes=1):
        self.process_index, self.num_processes = process_index, num_processes
        self.device, self.scaler = torch.device("cpu"), None
        several = num_processes > 1
        self.distributed_type = DistributedType.MULTI_CPU if several else DistributedType.NO

    def unwrap_model(self, model):
        model.no_sync = contextlib.nullcontext  # as DDP's
        return model


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, CLASSES)
    ).double()


def full() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.4), nn.Flatten(),
        nn.Linear(36, CLASSES),
    ).double()  # fmt: skip


def batch() -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.randn(SIZE, 3, 8, 8, generator=generator, dtype=torch.float64),
        "labels": torch.randint(CLASSES, (SIZE,), generator=generator),
        "indices": torch.arange(SIZE),
    }


def step(model, shards, processes=1, index=0, accelerator=None, bitwise=False, number=3):
    """One process's share of a step: (gradients, [loss of each shard], its Shards)."""
    accelerator = accelerator or FakeAccelerator(index, processes)
    plan = BatchPlan(SIZE, shards, processes)
    seed_of = lambda step, shard: hash_integers(7, step, shard)  # noqa: E731
    made = Shards(accelerator, model, plan, seed_of, bitwise, ALONE)
    shard, size = plan.shards_of(index), plan.micro_batch_size
    mine = {k: v[shard.start * size : shard.stop * size] for k, v in batch().items()}
    losses = []
    model.train()
    model.zero_grad()
    for part in made(mine, number):
        assert len(part["labels"]) == len(part["images"]) == SIZE // shards
        loss = F.cross_entropy(model(part["images"]), part["labels"], reduction="sum")
        (loss * made.scale).backward()
        losses.append(float(loss.detach()))
    return [p.grad.clone() for p in model.parameters()], losses, made


def spread(make, shards, processes):
    """The step on several processes, one after the other, their gradients averaged as by DDP."""
    results = [step(make(), shards, processes, index) for index in range(processes)]
    gradients = [sum(g) / processes for g in zip(*(r[0] for r in results), strict=True)]
    return gradients, [loss for r in results for loss in r[1]]


def close(a, b) -> bool:
    return all(torch.allclose(x, y, rtol=1e-10, atol=1e-12) for x, y in zip(a, b, strict=True))


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("bitwise", [False, True])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_without_batch_norm_and_dropout_the_gradient_is_that_of_the_whole_batch(shards, bitwise):
    model, data = plain(), batch()
    F.cross_entropy(model(data["images"]), data["labels"]).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    accelerator = Accelerator(cpu=True)
    gradients, losses, _ = step(plain(), shards, accelerator=accelerator, bitwise=bitwise)
    assert close(gradients, wanted) and len(losses) == shards


@pytest.mark.parametrize("make", [plain, full])
@pytest.mark.parametrize("shards", [4, 8])
def test_gradient_and_losses_do_not_depend_on_how_the_shards_are_spread(make, shards):
    wanted, losses = spread(make, shards, 1)
    for processes in range(2, shards + 1):
        gradients, their_losses = spread(make, shards, processes)
        assert close(gradients, wanted) and their_losses == losses


def test_with_batch_norm_and_dropout_the_number_of_shards_is_part_of_the_result():
    assert not close(spread(full, 2, 1)[0], spread(full, 4, 1)[0])


def test_the_shards_are_consecutive_slices_in_the_order_of_the_processes():
    seen = []
    for index in range(2):
        model = plain()
        plan = BatchPlan(SIZE, 4, 2)
        made = Shards(
            FakeAccelerator(index, 2), model, plan, lambda s, n: hash_integers(s, n), False
        )
        assert made.first == 2 * index
        mine = {"indices": torch.arange(SIZE)[12 * index : 12 * index + 12]}
        seen += [part["indices"].tolist() for part in made(mine, 0)]
    assert seen == [part.tolist() for part in torch.arange(SIZE).split(6)]


def test_a_shards_dropout_depends_on_step_and_shard_and_not_on_what_was_drawn_before():
    def masks(step, index, processes):
        torch.rand(index + 3)  # another past
        drop = nn.Dropout(0.5)
        plan = BatchPlan(SIZE, 4, processes)
        made = Shards(
            FakeAccelerator(index, processes), drop, plan, lambda s, n: hash_integers(s, n), False
        )
        return [drop(torch.ones(64)) for _ in made({"indices": torch.arange(24)}, step)]

    first = masks(0, 0, 1)
    assert equal(first, masks(0, 0, 2) + masks(0, 1, 2))
    assert len({tuple(mask.tolist()) for mask in first + masks(1, 0, 1)}) == 8


@pytest.mark.parametrize("bitwise", [False, True])
def test_running_statistics_are_those_after_shard_0(bitwise):
    data, alone = batch(), full()
    seed_dropout(hash_integers(7, 3, 0), torch.device("cpu"))
    alone.train()(data["images"][:6])
    for processes in (1, 2):
        model = full()
        step(model, 4, processes, 0, bitwise=bitwise and processes == 1)
        assert equal(model.buffers(), alone.buffers()), processes
        assert model[1].num_batches_tracked == 1


def test_a_buffer_that_forward_replaces_is_put_back_too():
    class Replacing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 64, CLASSES).double()
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.linear(x.flatten(1))

    model = Replacing()
    step(model, 4, 1, 0)
    assert model.calls == 1


def test_a_buffer_that_forward_reads_is_the_same_for_every_shard():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 64, CLASSES).double()
            self.register_buffer("calls", torch.ones((), dtype=torch.float64))

        def forward(self, x):
            self.calls += 1
            return self.linear(x.flatten(1)) * self.calls

    torch.manual_seed(0)
    one = Counting()
    state = {k: v.clone() for k, v in one.state_dict().items()}

    def make():
        model = Counting()
        model.load_state_dict(state)
        return model

    wanted, losses = spread(make, 4, 1)
    gradients, their_losses = spread_without_broadcast(make, 4, 2)
    assert close(gradients, wanted) and losses == their_losses


def spread_without_broadcast(make, shards, processes):
    """Like `spread`; the others that rank 0 would tell its buffers are not there."""
    original = Shards.broadcast_buffers
    Shards.broadcast_buffers = lambda self: None
    try:
        return spread(make, shards, processes)
    finally:
        Shards.broadcast_buffers = original


def some_weights() -> list[nn.Parameter]:
    """A filter in channels_last, a transposed matrix, a vector that no shard uses, a scalar."""
    filters = torch.zeros(8, 4, 3, 3).to(memory_format=torch.channels_last)
    shapes = (filters, torch.zeros(5, 7).t(), torch.zeros(6), torch.zeros(()))
    return [nn.Parameter(t) for t in shapes]


def some_gradients(shards: int) -> list[list[torch.Tensor | None]]:
    """For each shard, numbers of 1e-12 to 1e3 in the weights' shapes, row by row in memory."""
    torch.manual_seed(2)
    weights = some_weights()

    def numbers(p):
        return torch.randn(p.shape) * 10.0 ** torch.empty(p.shape).uniform_(-12, 3)

    return [[None if p.ndim == 1 else numbers(p) for p in weights] for _ in range(shards)]


def exact_sum(gradients, processes: list[list[int]], monkeypatch, scale=1.0):
    """The gradients that the first process gets, where each adds the shards listed for it."""
    sums = []
    for mine in processes:
        weights = some_weights()
        sums.append(ExactSum(weights, len(gradients)))
        for shard in mine:
            for p, g in zip(weights, gradients[shard], strict=True):
                p.grad = g if g is None else g.clone() * scale
            sums[-1].add(scale)
    others = [s.total for s in sums[1:]]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(sum(others)))
    sums[0].hand_out(len(sums), scale)
    return [p.grad for p in sums[0].parameters]


def test_an_exact_sum_has_no_order_and_rounds_each_shard_once(monkeypatch):
    shards, chance = 12, random.Random(3)
    gradients = some_gradients(shards)
    first = exact_sum(gradients, [list(range(shards))], monkeypatch)
    for processes in (1, 2, 3, 4, 12):
        order = chance.sample(range(shards), shards)
        cuts = sorted(chance.sample(range(1, shards), processes - 1))
        parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, shards], strict=True)]
        assert equal(exact_sum(gradients, parts, monkeypatch), first), parts
    for place, (p, found) in enumerate(zip(some_weights(), first, strict=True)):
        assert found.stride() == p.stride() and found.dtype == p.dtype
        if p.ndim == 1:  # what no shard used
            assert torch.equal(found, torch.zeros(6))
            continue
        wanted = sum(g[place].double() for g in gradients)
        error = (found.double() - wanted).abs()
        assert (error <= shards * 2.0**-45 + 2.0**-24 * wanted.abs()).all()


def test_an_exact_sum_is_the_same_whatever_fp16_multiplies_the_loss_by(monkeypatch):
    gradients = some_gradients(4)
    plain = exact_sum(gradients, [[0, 1], [2, 3]], monkeypatch)
    for scale in (torch.tensor(65536.0), torch.tensor(0.5)):
        scaled = exact_sum(gradients, [[0, 1], [2, 3]], monkeypatch, scale)
        assert equal([g / scale for g in scaled], plain)


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_an_exact_sum_holds_all_it_takes_and_what_it_cannot_take_is_nan_for_all(
    monkeypatch, shards
):
    most = torch.tensor(2.0**18 / shards)
    largest = torch.nextafter(most, torch.tensor(0.0))
    gradients = some_gradients(shards)
    for shard in gradients:
        shard[3] = -largest
    everyone = [[shard] for shard in range(shards)]
    found = exact_sum(gradients, everyone, monkeypatch)
    assert torch.allclose(found[3], torch.tensor(-(2.0**18)), rtol=1e-6)
    for bad in (most, -most, torch.tensor(math.inf), torch.tensor(math.nan)):
        gradients[-1][3] = bad  # the last process's: the first one hears of it by the sum alone
        found = exact_sum(gradients, everyone, monkeypatch)
        assert all(g.isnan().all() for g in found), bad


def test_bitwise_shards_hand_out_their_exact_sum_and_begin_anew_in_each_step():
    model = full()
    made = Shards(
        FakeAccelerator(), model, BatchPlan(SIZE, 8, 1), lambda s, n: hash_integers(s, n), True
    )
    steps = []
    for number in (3, 4, 3):
        for part in made(batch(), number):
            loss = F.cross_entropy(model(part["images"]), part["labels"], reduction="sum")
            (loss * made.scale).backward()
        steps.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert equal(steps[0], steps[2]) and not equal(steps[0], steps[1])


def test_fp16s_scaler_unscales_an_exact_sum_as_any_gradient_and_hears_of_what_does_not_fit():
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu")):
        accelerator, model = FakeAccelerator(), plain().float()
        accelerator.scaler = scaler
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        made = Shards(
            accelerator, model, BatchPlan(SIZE, 4, 1), lambda s, n: hash_integers(s, n), True
        )
        for part in made({**batch(), "images": batch()["images"].float()}, 0):
            loss = F.cross_entropy(model(part["images"]), part["labels"]) * made.scale
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        found.append([p.grad for p in model.parameters()])
    assert equal(*found)
    scaler.step(optimizer)
    scaler.update()
    for part in made({**batch(), "images": batch()["images"].float()}, 1):
        scaler.scale(model(part["images"]).sum() * 1e9).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32768


def test_bitwise_gives_gradients_the_memory_layout_of_their_weights_and_skips_frozen_ones():
    model = plain().to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    gradients = None
    made = Shards(FakeAccelerator(), model, BatchPlan(SIZE, 2, 1), lambda s, n: 0, True)
    for part in made(batch(), 0):
        F.cross_entropy(model(part["images"]), part["labels"]).backward()
    gradients = [p.grad for p in model.parameters()]
    assert gradients[0] is None
    for p in list(model.parameters())[1:]:
        assert p.grad.stride() == p.stride()


# --- numbers that are not finite -----------------------------------------------------------------


def guarded_steps(skip: bool, bad_at: set, steps=4):
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    guard, changed = Guard(torch.device("cpu"), optimizer, skip), []
    for number in range(steps):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), float("nan") if number in bad_at else 1.0)
        norm = torch.nn.utils.get_total_norm([weight.grad])
        losses = torch.tensor(float("inf") if number in bad_at else 1.0)
        guard.check(norm, losses, number)
        optimizer.step()
        changed.append(not torch.equal(before, weight.detach()))
    assert torch.isfinite(weight).all()
    return guard, changed


def test_in_stop_mode_no_update_is_made_from_the_first_bad_number_on():
    guard, changed = guarded_steps(False, {2}, 5)
    assert changed == [True, True, False, False, False]
    report = guard.report()
    assert guard.must_stop(report)
    assert report == {"bad_step": 2, "skipped": 1, "in_a_row": 0, "bad_loss": 2}
    guard, changed = guarded_steps(False, set())
    assert all(changed) and not guard.must_stop(guard.report())
    assert guard.report() == {"bad_step": -1, "skipped": 0, "in_a_row": 0, "bad_loss": -1}


def test_in_skip_mode_bad_updates_are_left_out_counted_and_too_many_in_a_row_stop():
    guard, changed = guarded_steps(True, {0, 2, 3}, 5)
    assert changed == [False, True, False, False, True]
    assert guard.report() == {"bad_step": -1, "skipped": 3, "in_a_row": 0, "bad_loss": -1}
    guard, _ = guarded_steps(True, {0, 2, 3})  # the first of the streak under way is to blame
    assert guard.report() == {"bad_step": 2, "skipped": 3, "in_a_row": 2, "bad_loss": 2}
    assert not guard.must_stop(guard.report())
    guard, _ = guarded_steps(True, set(range(1, 10)), 10)
    assert guard.report()["in_a_row"] == 9 and not guard.must_stop(guard.report())
    guard, _ = guarded_steps(True, set(range(1, 11)), 11)
    assert guard.must_stop(guard.report())


def test_a_bad_gradient_without_a_bad_loss_blames_no_loss():
    weight = nn.Parameter(torch.ones(3))
    guard = Guard(torch.device("cpu"), torch.optim.SGD([weight], lr=0.1, fused=True), False)
    guard.check(torch.tensor(float("nan")), torch.tensor(1.0), 4)
    assert guard.report() == {"bad_step": 4, "skipped": 1, "in_a_row": 1, "bad_loss": -1}


def test_a_step_whose_update_is_left_out_leaves_the_running_statistics_alone():
    for found in (0.0, 1.0):
        model = full()
        made = Shards(FakeAccelerator(), model, BatchPlan(SIZE, 2, 1), lambda *_: 5, False)
        made.undoes = True
        before = [b.clone() for b in model.buffers()]
        for part in made(batch(), 0):
            model(part["images"] * (float("nan") if found else 1.0))
        made.undo_buffers(torch.tensor(found))
        same = [torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True)]
        assert same == [bool(found)] * 3


# --- launches: on a GPU the host is the bottleneck ------------------------------------------------


class Launches(TorchDispatchMode):
    """Counts the kernels that a GPU would be given: operations that are no views."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name()
        if name.startswith("aten::") and not operation.is_view and "empty" not in name:
            self.names.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("skip", [True, False])
def test_guarding_a_step_and_undoing_its_buffers_are_few_launches_and_wait_for_nothing(skip):
    with FakeTensorMode():  # tensors of a GPU without numbers: .item() and bool() raise
        device = torch.device("cuda")
        model = build_model("resnet18", num_classes=10, image_size=32)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
        made = Shards(FakeAccelerator(), model, BatchPlan(8, 1, 1), lambda *_: 0, False)
        made.undoes = skip
        guard = Guard(device, torch.optim.SGD(model.parameters(), lr=0.1), skip)
        norm, losses = torch.empty(2, device=device).unbind()
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        with Launches() as launches:
            for _ in made({}, 0):
                pass
            made.undo_buffers(guard.check(norm, losses, 3))
    assert len(launches.names) <= (23 if skip else 11), " ".join(launches.names)
