"""Optimizers: the shape of each schedule, who decays, and updates that must not happen."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from refusals import refused
from torch import nn

from common.errors import UserError
from config import HINTS, TrainConfig, parse
from config.fields import OPTIMIZERS as TAKEN
from distributed.checkpoint import capture, restore
from distributed.shards import Guard
from optim import (
    WeightAverage,
    build_average,
    build_optimizer,
    lr_at,
    set_lr,
    start_state,
)
from optim.build import parameter_groups

SCHEDULES = ("constant", "cosine", "linear", "step", "exponential", "plateau")  # never rise
RISE = ("one_cycle", "cosine_restarts")
OPTIMIZERS = HINTS["optimizer"].metadata["choices"]  # all that can be named


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )


def test_each_name_makes_an_optimizer_of_its_own_which_has_what_it_is_said_to_take():
    made = {}
    for name, taken in TAKEN.items():
        config = TrainConfig(optimizer=name, momentum=0.123, betas="0.3,0.4", eps=0.5)
        if "nesterov" in taken:
            config = replace(config, nesterov=True)
        made[type(build_optimizer(net(), config))] = name
        (group, *_) = build_optimizer(net(), config).param_groups
        wanted = {"momentum": 0.123, "nesterov": True, "betas": (0.3, 0.4), "eps": 0.5}
        assert all(group[key] == wanted[key] for key in taken), name
    assert tuple(made.values()) == OPTIMIZERS


def gradients(model: nn.Module) -> None:
    model.zero_grad()
    torch.manual_seed(1)
    model(torch.randn(6, 3, 8, 8)).square().mean().backward()


def state(model: nn.Module, optimizer) -> list[torch.Tensor]:
    tensors = [p.detach() for p in model.parameters()]
    tensors += [v for p in model.parameters() for v in optimizer.state[p].values()]
    return [t.clone() for t in tensors]


def equal(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- the learning rate ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 17])
def test_a_schedule_starts_above_0_reaches_the_peak_once_warm_and_never_rises_again(
    schedule, warmup
):
    rates = [
        lr_at(step, peak=0.4, schedule=schedule, total_steps=200, warmup_steps=warmup)
        for step in range(200)
    ]
    assert 0 < rates[0] <= 0.4 and max(rates) == rates[warmup] == 0.4
    up, down = rates[: warmup + 1], rates[warmup:]
    assert all(a < b for a, b in pairwise(up))
    assert all(a >= b for a, b in pairwise(down))
    assert rates[-1] > 0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_what_falls_is_continuous_and_ends_near_0(schedule):
    rates = [lr_at(s, peak=1.0, schedule=schedule, total_steps=1000, warmup_steps=100)
             for s in range(1001)]  # fmt: skip
    assert max(abs(a - b) for a, b in pairwise(rates)) < 0.011
    assert rates[-2] < 0.002 and rates[1000] == pytest.approx(0, abs=1e-12)
    assert lr_at(5000, peak=1.0, schedule=schedule, total_steps=1000) == pytest.approx(0, abs=1e-9)


def test_steps_divide_by_ten_after_half_and_after_three_quarters():
    def at(step):
        return lr_at(step, peak=1.0, schedule="step", total_steps=100)

    assert [at(49), at(50), at(74), at(75), at(99)] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])
    assert lr_at(99, peak=1.0, schedule="constant", total_steps=100) == 1.0


def test_degenerate_lengths_give_finite_rates():
    for schedule in SCHEDULES + RISE:
        for total, warmup in ((1, 0), (1, 5), (3, 3), (0, 0)):
            for step in range(4):
                value = lr_at(
                    step, peak=1.0, schedule=schedule, total_steps=total, warmup_steps=warmup
                )
                assert 0 <= value <= 1


def test_one_cycle_is_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.4, total_steps=200, cycle_momentum=False
    )
    for step in range(200):
        mine = lr_at(step, peak=0.4, schedule="one_cycle", total_steps=200)
        assert mine == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step < 199:
            theirs.step()


def test_cosine_restarts_are_torchs_with_cycles_twice_as_long_each_time():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 20, 2)
    for step in range(140):
        mine = lr_at(step, peak=0.4, schedule="cosine_restarts", total_steps=140)
        if step not in (20, 60):  # there the old cycle ends and the new one begins
            assert mine == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_exponential_falls_by_the_same_factor_each_step_to_a_thousandth():
    rates = [lr_at(s, peak=0.4, schedule="exponential", total_steps=100) for s in range(101)]
    assert {round(b / a, 9) for a, b in pairwise(rates)} == {round(0.001**0.01, 9)}
    assert rates[100] == pytest.approx(0.0004)


# --- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_trainable_parameter_is_in_one_group_and_a_frozen_one_in_none(name):
    model = net()
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(model, TrainConfig(optimizer=name))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_biases_and_norms_do_not_decay_and_weights_do(name):
    model = net()
    config = TrainConfig(optimizer=name, weight_decay=0.3)
    decay = {
        id(p): group["weight_decay"]
        for group in build_optimizer(model, config).param_groups for p in group["params"]
    }  # fmt: skip
    for p in model.parameters():
        assert decay[id(p)] == (0.3 if p.ndim > 1 else 0.0)


def test_decay_alone_shrinks_weights_and_leaves_biases():
    for name in ("sgd", "adamw"):
        model = net()
        optimizer = build_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.5, lr=0.1))
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for old, p in zip(before, model.parameters(), strict=True):
            assert torch.allclose(p, old * (0.95 if p.ndim > 1 else 1.0))


def test_a_shared_parameter_is_updated_once():
    model = net()
    model.append(model[4])
    assert sum(len(g["params"]) for g in parameter_groups(model, 0.1)) == 6


def test_every_group_gets_the_rate_of_the_step_times_its_scale():
    optimizer = torch.optim.SGD([
        {"params": [nn.Parameter(torch.ones(2))], "lr_scale": 3.0},
        {"params": [nn.Parameter(torch.ones(2))]},
    ], lr=9.0)  # fmt: skip
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [1.5, 0.5]


# --- updates that must not happen ----------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_changes_nothing_at_the_first_or_a_later_step(name, momentum):
    model = net()
    config = TrainConfig(optimizer=name, momentum=momentum)
    optimizer = build_optimizer(model, config)
    assert not optimizer.state  # of weights that Accelerate may still put elsewhere
    start_state(optimizer)
    twin = copy.deepcopy(model)
    twin_optimizer = build_optimizer(twin, config)
    guard = Guard(torch.device("cpu"), optimizer, skip=True)
    for step in range(4):
        before = state(model, optimizer)
        gradients(model)
        bad = step in (0, 2)
        if bad:
            model[0].weight.grad[0, 0, 0, 0] = float("nan") if step else float("inf")
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        found = guard.check(norm, torch.zeros(()), step)
        optimizer.step()
        after = [p.detach() for p in model.parameters()]
        if bad:
            assert found == 1.0 and equal(after, before[:6])
            left = state(model, optimizer)
            new = [t for t in left if len(before) < len(left)][6:]  # AdamW's, made in its first
            assert equal(left, before) or (step == 0 and not any(t.any() for t in new))
        else:
            assert found == 0.0 and not equal(after, before[:6])
            gradients(twin)
            twin_optimizer.step()
    # As if the two bad updates had never been asked for.
    assert equal(state(model, optimizer), state(twin, twin_optimizer))


# --- optimizers of our own, and one's own ---------------------------------------------------------


def trained(model: nn.Module, optimizer, steps: int = 7) -> list[torch.Tensor]:
    for step in range(steps):
        set_lr(optimizer, 0.01 * (step + 1))
        gradients(model)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def in_groups(model: nn.Module, decay: float) -> list[dict]:
    return parameter_groups(model, decay)


def alike(ours, theirs) -> bool:
    # But for a bias before batch norm: its gradient is 0 but for roundings.
    pairs = [pair for place, pair in enumerate(zip(ours, theirs, strict=True)) if place != 1]
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)


def test_nadamw_and_rmsprop_are_torchs():
    for name, kind, more in (
        ("nadamw", torch.optim.NAdam, {"decoupled_weight_decay": True, "betas": (0.8, 0.95)}),
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.9}),
    ):
        ours, theirs = net(), net()
        betas = "0.8,0.95" if name == "nadamw" else None
        config = TrainConfig(optimizer=name, weight_decay=0.1, betas=betas, eps=1e-6)
        mine = trained(ours, build_optimizer(ours, config))
        assert alike(mine, trained(theirs, kind(in_groups(theirs, 0.1), eps=1e-6, **more)))


def plain(name: str, model: nn.Module, decay: float, steps: int = 7) -> list[torch.Tensor]:
    """Weight by weight, as the papers have it: the update of an optimizer for gradients()."""
    kept = [
        {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "z": p.detach().clone(), "s": 0.0}
        for p in model.parameters()
    ]
    high = 0.0
    for step in range(1, steps + 1):
        lr = 0.01 * step
        high = max(high, lr)
        gradients(model)
        for p, k in zip(model.parameters(), kept, strict=True):
            w, g, wd = p.detach().clone(), p.grad, decay if p.ndim > 1 else 0.0
            if name == "lion":
                u = (0.9 * k["m"] + 0.1 * g).sign()
                k["m"] = 0.99 * k["m"] + 0.01 * g
                w = w - lr * (u + wd * w)
            else:
                k["m"] = 0.9 * k["m"] + 0.1 * g
                k["v"] = 0.999 * k["v"] + 0.001 * g * g
                root = (k["v"] / (1 - 0.999**step)).sqrt()
            if name == "lamb":
                u = k["m"] / (1 - 0.9**step) / (root + 1e-4) + wd * w
                w = w - lr * (w.norm() / u.norm() if p.ndim > 1 else 1.0) * u
            if name == "schedule_free":
                u = g / (root + 1e-4) + wd * w
                k["s"] += high**2
                x, c = (w - 0.1 * k["z"]) / 0.9, high**2 / k["s"]
                k["z"] = k["z"] - lr * u
                w = 0.1 * k["z"] + 0.9 * ((1 - c) * x + c * k["z"])
            with torch.no_grad():
                p.copy_(w)
    if name == "schedule_free":
        return [
            (p.detach() - 0.1 * k["z"]) / 0.9 for p, k in zip(model.parameters(), kept, strict=True)
        ]
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", ["lion", "lamb", "schedule_free"])
def test_an_optimizer_in_rows_is_its_formula_weight_by_weight(name):
    ours, theirs = net(), net()
    optimizer = build_optimizer(ours, TrainConfig(optimizer=name, weight_decay=0.1, eps=1e-4))
    mine = trained(ours, optimizer)
    if name == "schedule_free":  # what is evaluated
        averaged = build_average(ours, TrainConfig(optimizer=name))
        averaged.follow(ours, optimizer)
        mine = [p.detach() for p in averaged.model.parameters()]
        assert not alike(mine, [p.detach() for p in ours.parameters()])
    assert alike(mine, plain(name, theirs, 0.1))


def test_nesterov_betas_eps_and_decay_reach_torch():
    model = net()
    sgd = build_optimizer(model, TrainConfig(nesterov=True, decay_all=True, weight_decay=0.1))
    assert all(g["nesterov"] and g["weight_decay"] == 0.1 for g in sgd.param_groups)
    adamw = build_optimizer(model, TrainConfig(optimizer="adamw", betas="0.9,0.95", eps=1e-6))
    assert {(g["betas"], g["eps"]) for g in adamw.param_groups} == {((0.9, 0.95), 1e-6)}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("--optimizer adamw --nesterov", "--nesterov: adamw has none; sgd"),
        ("--nesterov --momentum 0", "needs a --momentum"),
        ("--optimizer sgd --betas 0.9,0.95", "--betas: sgd has none; adamw"),
        ("--optimizer adamw --betas 0.9", "two numbers from 0 to below 1"),
        ("--optimizer lion --betas 0.9,1", "two numbers from 0 to below 1"),
        ("--optimizer muon --eps 1e-6", "--eps: muon has none"),
        ("--optimizer schedule_free --ema 0.9", "averages its weights itself"),
        ("--schedule one_cycle --warmup 1", "a rise of its own"),
        ("--optimizer adamv", "did you mean adamw.*FILE.py:Class"),
        ("--optimizer my.py:Opt", "--optimizer my.py:Opt: there is no file"),
        ("--loss focal --model linear_regression --sampler balanced", "--loss, --sampler: of"),
    ],
)  # fmt: skip
def test_settings_that_an_optimizer_lacks_are_a_sentence(words, match):
    with pytest.raises(UserError, match=match):
        parse(words.split())


OWN = """
import torch

class Counts(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "seen": 0})
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["seen"] += 1
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["kept"] = state.get("kept", 1.0) * 0.9
                p.sub_(p.grad, alpha=group["lr"] * (1 + 1 / group["seen"] + state["kept"]))

class Keeps(Counts):
    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["names"] = ["a"]

class Closes(Counts):
    def step(self, closure):
        return closure()
"""


def test_an_optimizer_of_ones_own_waits_is_tried_and_goes_on_with_its_numbers(tmp_path):
    path = tmp_path / "my_optim.py"
    path.write_text(OWN)
    config = TrainConfig(optimizer=f"{path}:Counts", lr=0.1)
    model, other = net(), net()
    optimizer = build_optimizer(model, config)
    trained(model, optimizer, 3)
    files = capture(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.found_inf = torch.tensor(1.0)
    gradients(model)
    optimizer.step()
    assert equal(before, list(model.parameters()))
    theirs = build_optimizer(other, config)
    restore(files, other, theirs)
    assert [g["seen"] for g in theirs.param_groups] == [3, 3]
    assert theirs.state[other[0].weight] == {"count": 3, "kept": 0.9 * 0.9 * 0.9}
    assert equal(trained(model, optimizer, 2), trained(other, theirs, 2))
    for name, code, match in (
        ("Keeps", "optimizer-state", "keeps names; a checkpoint holds tensors and numbers"),
        ("Closes", "optimizer-fails", "without a closure"),
        ("Cunts", "unknown-class", "did you mean Counts"),
    ):
        with refused(code, match=match):
            build_optimizer(net(), TrainConfig(optimizer=f"{path}:{name}"))


# --- averaged weights ----------------------------------------------------------------------------


def test_the_average_is_decay_times_old_plus_the_rest_of_new():
    model = net()
    average = WeightAverage(model, 0.9, warms_up=False)
    expected = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p += step + 1
        average.update(model, step)
        expected = [
            0.9 * e + 0.1 * p.detach() for e, p in zip(expected, model.parameters(), strict=True)
        ]
    for mine, wanted in zip(average.model.parameters(), expected, strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-6, atol=1e-6)
    assert not any(p.requires_grad for p in average.model.parameters())
    assert not any(m.training for m in average.model.modules())


def test_an_average_forgets_where_the_weights_began_in_a_tenth_of_the_updates_made():
    model = nn.Linear(1, 1)
    average = WeightAverage(model, 0.9999)
    with torch.no_grad():
        model.weight.fill_(1.0), average.model.weight.fill_(0.0)  # the random start
    left, weights = 1.0, []
    for n in range(40):
        average.update(model, n)
        left *= min(0.9999, (1 + n) / (10 + n))
        weights.append(1 - float(average.model.weight.detach()))
        assert weights[-1] == pytest.approx(left, abs=1e-6)
    assert weights[0] == pytest.approx(0.1) and weights[20] < 1e-4


def test_a_skipped_update_averages_nothing():
    model = net()
    average = WeightAverage(model, 0.5, warms_up=False)
    before = [p.clone() for p in average.model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    average.update(model, 0, skipped=torch.tensor(1.0))
    assert equal(before, list(average.model.parameters()))
    average.update(model, 0, skipped=torch.tensor(0.0))
    assert all(
        torch.allclose(p, b + 0.5)
        for p, b in zip(average.model.parameters(), before, strict=True)
    )  # fmt: skip


def test_running_statistics_are_copied_not_averaged():
    model = net()
    average = WeightAverage(model, 0.9)
    model(torch.randn(8, 3, 8, 8))
    average.update(model, 0)
    assert torch.equal(average.model[1].running_mean, torch.zeros(4))
    average.copy_buffers(model)
    assert equal(list(average.model.buffers()), list(model.buffers()))
