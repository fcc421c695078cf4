"""Parts of a model that train otherwise than the rest: stochastic depth, frozen parts, rates."""

import pytest
import torch
from launches import SMALL, losses, newest, rows, same_after_a_kill, same_weights, train
from safetensors.torch import load_file
from torch import nn

from common.errors import UserError
from config import TrainConfig, parse, unfreezing
from models import build_model
from models.freezing import Frozen
from models.resnet import stochastic_depth
from models.weights import depths, freeze
from optim import add_parameters, build_optimizer, set_lr, start_state

# Stochastic depth


def test_an_image_takes_the_shortcut_alone_and_the_mean_stays():
    torch.manual_seed(0)
    kept = stochastic_depth(torch.ones(4000, 2, 3, 3), 0.25)
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert all(len(image.unique()) == 1 for image in kept[:50])  # all of an image, or none
    assert kept.mean() == pytest.approx(1, abs=0.05)


def test_the_rate_grows_to_the_last_block_and_evaluation_has_none():
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=3, image_size=8, drop_path=0.7)
    rates = [block.drop_path for stage in (1, 2, 3, 4) for block in getattr(model, f"layer{stage}")]
    assert rates == pytest.approx([0.1 * n for n in range(8)])
    torch.manual_seed(0)
    plain = build_model("resnet18", num_classes=3, image_size=8)
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(model.eval()(images), plain.eval()(images))
    model.train()(images)
    assert not torch.equal(model.train()(images), model.train()(images))


def test_the_zoos_take_the_rate_where_they_have_one():
    from torchvision.ops import StochasticDepth

    for name in ("torchvision:convnext_tiny", "torchvision:efficientnet_b0"):
        with torch.device("meta"):
            model = build_model(name, num_classes=3, image_size=64, drop_path=0.4)
            off = build_model(name, num_classes=3, image_size=64, drop_path=0.0)
        rates = [m.p for m in model.modules() if isinstance(m, StochasticDepth)]
        assert rates[-1] == max(rates) == pytest.approx(0.4) and rates == sorted(rates), name
        assert not any(m.p for m in off.modules() if isinstance(m, StochasticDepth))


def test_timm_takes_the_rate_where_it_has_one():
    timm = pytest.importorskip("timm")
    model = build_model("timm:test_convnext", num_classes=3, image_size=64, drop_path=0.4)
    found = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert max(found) == pytest.approx(0.4)
    with pytest.raises(UserError, match="--drop-path: timm:vgg11 has no stochastic depth"):
        build_model("timm:vgg11", num_classes=3, image_size=64, drop_path=0.4)


@pytest.mark.parametrize("name", ["alexnet", "googlenet", "torchvision:squeezenet1_1"])
def test_a_model_without_stochastic_depth_says_who_has_it(name):
    with pytest.raises(
        UserError, match=f"--drop-path: .*{name}.* has no stochastic depth; resnet18"
    ):
        build_model(name, num_classes=3, image_size=96, drop_path=0.1)


# Rates by depth


@pytest.mark.parametrize(
    ("name", "size", "at"),
    [
        ("resnet18", 32, {"conv1.weight": 0, "bn1.bias": 0, "layer1.0.bn2.weight": 1,
                          "layer4.1.conv2.weight": 8, "fc.bias": 9}),
        ("alexnet", 64, {"features.0.weight": 0, "features.3.bias": 1, "classifier.6.weight": 7}),
        ("torchvision:vit_b_16", 32, {
            "class_token": 0, "encoder.pos_embedding": 0, "conv_proj.weight": 0,
            "encoder.layers.encoder_layer_0.mlp.0.weight": 1, "encoder.ln.weight": 12,
            "heads.head.weight": 13}),
    ],
)  # fmt: skip
def test_depth_is_counted_in_blocks_from_the_images_to_the_head(name, size, at):
    with torch.device("meta"):
        model = build_model(name, num_classes=3, image_size=size)
    found = depths(model, name, size)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert {key: found[key] for key in at} == at


class Backwards(nn.Module):
    """Made in the other order than it runs."""

    def __init__(self):
        super().__init__()
        self.head, self.body, self.stem = nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(192, 4)

    def forward(self, images):
        return self.head(self.body(self.stem(images.flatten(1))))


def test_depth_is_that_of_running_and_each_parameter_is_in_one_group():
    model = Backwards()
    found = depths(model, "own.py:Backwards", 8)
    assert [found[f"{part}.weight"] for part in ("stem", "body", "head")] == [0, 1, 2]
    for optimizer in ("sgd", "adamw", "lion"):
        config = TrainConfig(
            model="resnet18", image_size=16, optimizer=optimizer, layer_decay=0.5, lr=1.0
        )
        net = build_model("resnet18", num_classes=3, image_size=16)
        made = build_optimizer(net, config)
        set_lr(made, 0.1)
        rates = {p: group["lr"] for group in made.param_groups for p in group["params"]}
        assert sum(len(group["params"]) for group in made.param_groups) == len(rates)
        assert rates.keys() == set(net.parameters())
        assert rates[net.fc.weight] == 0.1 and rates[net.layer4[1].bn2.bias] == 0.05
        assert rates[net.conv1.weight] == pytest.approx(0.1 * 0.5**9)


# Frozen parts


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("layer1,stem", r"--freeze stem: no parameter .* its parts are conv1, bn1, layer1"),
        ("layer5", r"did you mean layer\d\?"),
        ("*", "nothing of resnet18 would train"),
    ],
)
def test_a_pattern_that_freezes_nothing_or_everything_is_a_sentence(what, says):
    model = build_model("resnet18", num_classes=3, image_size=8)
    with pytest.raises(UserError, match=says):
        freeze(model, what, "resnet18", 8)
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_frozen_as_a_whole_stays_in_evaluation_mode():
    model = build_model("resnet18", num_classes=3, image_size=8)
    freeze(model, "conv1,bn1,layer1,layer2.*.conv?.weight", "resnet18", 8)
    model.train()
    assert not any(m.training for m in (model.bn1, model.layer1[0].bn1, model.layer1[1]))
    assert model.layer2[0].bn1.training and model.layer3.training
    held = [k for k, p in model.named_parameters() if not p.requires_grad]
    assert "layer2.1.conv2.weight" in held and "layer2.1.bn2.weight" not in held


# Parts that are frozen at first


def test_unfreezing_is_a_function_of_the_epoch():
    model = build_model("resnet18", num_classes=3, image_size=8)
    plan = unfreezing("2:layer4,layer3.1.*,4:all")
    assert plan == [(1, ["layer4", "layer3.1.*"]), (3, ["all"])]
    frozen = Frozen(model, "backbone", plan, "resnet18", 8)
    assert not model.train().layer4.training
    assert [len(frozen.hold(model, epoch)) for epoch in (0, 1, 2, 3, 4)] == [0, 21, 0, 39, 0]
    for epoch in (3, 1, 1):  # also back
        frozen.hold(model, epoch)
        model.train()
        assert model.layer3.training and model.layer4.training and model.layer3[1].bn1.training
        assert model.layer3[0].bn1.training == model.conv1.training == (epoch == 3)
        held = {k for k, p in model.named_parameters() if not p.requires_grad}
        assert held == (set() if epoch == 3 else frozen.at(2)) and "layer4.0.bn1.bias" not in held


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("2:layr4", r"nothing that is frozen then has such a name \(did you mean layer4\?\)"),
        ("2:fc", "frozen are bn1, conv1, layer1"),
        ("2:all,3:layer4", "frozen are none"),
    ],
)
def test_an_unfreezing_of_nothing_is_a_sentence(plan, says):
    model = build_model("resnet18", num_classes=3, image_size=8)
    with pytest.raises(UserError, match=says):
        Frozen(model, "backbone", unfreezing(plan), "resnet18", 8)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lamb", "schedule_free", "muon"])
def test_what_begins_later_has_groups_and_a_state_of_its_own(kind):
    """As if it were alone with an optimizer that begins then."""
    decay = 1.0 if kind == "muon" else 0.5
    config = TrainConfig(
        model="resnet18", image_size=8, optimizer=kind, layer_decay=decay, lr=0.01
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=3, image_size=8)
    frozen = Frozen(model, "layer1,layer2", [(1, ["all"])], "resnet18", 8)
    made = build_optimizer(model, config)
    start_state(made)

    def update(optimizer):
        for number, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.1 + number % 7) if p.requires_grad else None
        set_lr(optimizer, 0.01)
        optimizer.step()

    update(made)
    kept = {k: p.clone() for k, p in model.named_parameters()}
    fresh = set(frozen.hold(model, 1))
    before = [dict(group, params=list(group["params"])) for group in made.param_groups]
    add_parameters(made, model, config, fresh)
    for old, new in zip(before, made.param_groups, strict=False):
        assert [id(p) for p in old["params"]] == [id(p) for p in new["params"]]
    every = [p for group in made.param_groups for p in group["params"]]
    assert len(every) == len(set(every)) and set(every) == set(model.parameters())
    update(made)
    moved = {k: p.clone() for k, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.data.copy_(kept[name])
        p.requires_grad_(p in fresh)
    alone = build_optimizer(model, config)
    start_state(alone)
    update(alone)
    for name, p in model.named_parameters():
        assert torch.equal(p, moved[name]) == (p in fresh), name


# The laws

COMMON = [*SMALL, "--batch-size", "60", "--limit", "300", "--epochs", "2", "--shards", "2"]
COMMON += ["--bitwise", "--checkpoint-every", "4", "--augment", "crop"]
WAYS = {
    "frozen": "--model full.py:Net --freeze body.0,body.1 --loss focal --focal-gamma 1 "
    "--layer-decay 0.5",
    "unfrozen": "--model full.py:Net --freeze backbone --unfreeze 2:body.3,body.4,3:all --epochs 3 "
    "--optimizer adamw --lr 0.01 --layer-decay 0.5 --ema 0.9",
    "deep": "--model resnet18 --drop-path 0.5 --layer-decay 0.7 --optimizer adamw --lr 0.002",
}


@pytest.mark.parametrize(
    "way", ["frozen", "unfrozen", pytest.param("deep", marks=pytest.mark.slow)]
)
def test_the_same_run_on_two_processes_one_of_which_is_killed(nets, way):
    flags = [*COMMON, *WAYS[way].split()]  # 5 steps an epoch, saved after 4 and 8
    whole, broken = same_after_a_kill(nets, flags, way, step=9 if way == "unfrozen" else 7)
    assert "depths" in whole.out, whole.out
    if way == "frozen":
        kept = load_file(broken / "last.safetensors")
        assert not kept["body.1.running_mean"].any() and kept["body.1.weight"].eq(1).all()
        assert kept["body.4.running_mean"].any()

    if way == "unfrozen":
        assert "epoch 2 body.3,body.4 (1,200 parameters), epoch 3 all (240 parameters)" in whole.out
        for epoch, more in ((2, "1,200 more parameters train (body.3,body.4)"), (3, "240 more")):
            assert f"from epoch {epoch} on {more}" in whole.out, whole.out
        last = load_file(newest(broken) / "optimizer.safetensors")
        age = {k.partition("|")[0]: v.item() for k, v in last.items() if k.endswith("|step")}
        assert (age["body.8.weight"], age["body.3.weight"], age["body.0.bias"]) == (15, 10, 5)


@pytest.mark.slow
def test_where_ddp_adds_up_it_is_made_anew_and_a_stop_there_changes_no_bit(nets):
    flags = [f for f in COMMON if f != "--bitwise"] + WAYS["unfrozen"].split()
    flags += ["--checkpoint-every", "5"]  # at the end of an epoch, before it is evaluated
    runs = {}
    for name, processes, faults in (
        ("ddp-one", 1, ()), ("ddp-two", 2, ()),
        # on the step that ends epoch 1, in the first of epoch 2, before an evaluation
        ("ddp-broken", 2, ("kill@step=5,rank=1", "kill@step=6", "kill@point=evaluate,step=10", "")),
    ):  # fmt: skip
        for fault in faults or ("",):
            more = {"LOCKSTEP_FAULT": fault} if fault else {}
            done = train([*flags, "--run-dir", name], nets, processes, **more)
            assert (done.status == 0) == (not fault), done.out
        runs[name] = rows(nets / name)
    assert runs["ddp-two"] == runs["ddp-broken"]
    assert same_weights(nets / "ddp-two", nets / "ddp-broken") == []
    one, two = losses(nets / "ddp-one"), losses(nets / "ddp-two")
    assert one == pytest.approx(two, rel=1e-3)


def test_an_average_that_was_never_evaluated_has_measured_statistics(nets):
    flags = ["--model", "full.py:Net", *SMALL, "--limit", "300", "--optimizer", "schedule_free"]
    done = train([*flags, "--run-dir", "early-stop"], nets, LOCKSTEP_FAULT="term@step=2")
    assert done.status == 75, done.out
    assert load_file(nets / "early-stop" / "last.safetensors")["body.1.num_batches_tracked"] > 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--layer-decay 0.5 --optimizer muon", "muon has rates of its own"),
        ("--unfreeze 2:all", "nothing is frozen; say what with --freeze"),
        ("--freeze fc --unfreeze 1:all", "must be EPOCH:NAMES, as 3:layer4,5:all"),
        ("--freeze conv1 --unfreeze 2:bn1,2:all", "must be EPOCH:NAMES"),
        ("--freeze conv1 --unfreeze all", "must be EPOCH:NAMES"),
        ("--freeze conv1 --unfreeze 2:all --compile", "drop one"),
        ("--layer-decay 0", "must be at least 0.01"),
        ("--drop-path 1", "must be at most 0.95"),
    ],
)
def test_what_cannot_be_is_a_sentence(flags, says):
    with pytest.raises(UserError, match=says):
        parse(["--model", "resnet18", *flags.split()])
