"""Every model of the table learns, equals its published twin, and says what is wrong with a name.

pytest tests/test_models.py              the small ones
pytest tests/test_models.py -m slow      the big ones
"""

import argparse
import copy
import http.server
import json
import math
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launches import SMALL, losses, python, train
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from config import parse
from models import MODELS, build_model, lookup, weights
from models.pooling import AdaptivePool, pooled_linear, without_deterministic_backward
from models.weights import freeze_backbone, head_prefixes, imagenet_reach, load_weights
from training.trial import refuse_other_shape

ROOT = Path(__file__).resolve().parents[1]
SLOW = {"vgg11", "vgg16", "inception_v3", "googlenet"}
CLASSIFIERS = [name for name, entry in MODELS.items() if entry.task == "classification"]


def marked(names: list[str]) -> list:
    return [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in names]


def seeded(name: str, num_classes: int = 10, image_size: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    size = image_size or max(32, MODELS[name].min_image_size if name in MODELS else 32)
    return build_model(name, num_classes=num_classes, image_size=size)


def images_for(name: str, n: int = 4) -> torch.Tensor:
    size = max(32, lookup(name).min_image_size)
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


# The laws of the table


@pytest.mark.parametrize("name", marked(CLASSIFIERS))
def test_a_fresh_model_knows_nothing_and_every_parameter_gets_a_gradient(name):
    model, images = seeded(name), images_for(name)
    outputs = model.train()(images)
    assert isinstance(outputs, tuple) == hasattr(model, "auxiliary_weight")
    if isinstance(outputs, tuple):
        assert type(outputs) is tuple and len(outputs) == 1 + len(model.auxiliary_heads)
    else:
        outputs = (outputs,)
    assert all(logits.shape == (4, 10) for logits in outputs)
    losses = [F.cross_entropy(logits, torch.arange(4)) for logits in outputs]
    assert all(abs(loss.item() - math.log(10)) < 1.0 for loss in losses), losses
    sum(losses).backward()
    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) >= 2
    for key, parameter in trainable.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    with torch.no_grad():
        assert model.eval()(images).shape == (4, 10)


@pytest.mark.parametrize("name", marked(list(MODELS)))
def test_the_same_seed_gives_the_same_weights(name):
    first, second = seeded(name).state_dict(), seeded(name).state_dict()
    assert all(torch.equal(second[key], value) for key, value in first.items())


@pytest.mark.parametrize("name", marked(CLASSIFIERS))
def test_the_minimum_image_size_of_the_table_is_enough_and_less_is_refused(name):
    entry = MODELS[name]
    with torch.device("meta"):
        model = build_model(name, num_classes=10, image_size=entry.min_image_size)
        model.train()(torch.zeros(2, 3, entry.min_image_size, entry.min_image_size))
    if entry.min_image_size > 1:
        with pytest.raises(UserError, match=f"needs at least {entry.min_image_size}; type --image"):
            build_model(name, num_classes=10, image_size=entry.min_image_size - 1)


def test_alexnet_cannot_do_with_less_than_its_minimum_image_size():
    with torch.device("meta"), pytest.raises(RuntimeError, match="too small"):
        build_model("alexnet", num_classes=10, image_size=63)(torch.zeros(2, 3, 62, 62))


def test_linear_regression_is_one_weight_and_one_bias():
    model = build_model("linear_regression", num_classes=1, image_size=1)
    weight, bias = model.state_dict().values()
    points = torch.randn(5, 1)
    assert torch.allclose(model(points), points * weight + bias)


def test_softmax_is_left_to_the_loss():
    for name in CLASSIFIERS:
        with torch.device("meta"):
            model = build_model(name, num_classes=10, image_size=96)
        assert not any(isinstance(m, (nn.Softmax, nn.LogSoftmax)) for m in model.modules()), name


def test_a_model_with_published_weights_has_a_recipe_for_them():
    for name, entry in MODELS.items():
        assert entry.finetune or not entry.pretrained, name
        assert entry.finetune.keys() <= entry.recipe.keys() | {"momentum", "label_smoothing"}, name


# Equal to torchvision


@pytest.mark.parametrize("name", marked(["alexnet", "vgg11", "vgg16"]))
@pytest.mark.parametrize("size", [64, 100, 224])
def test_our_weights_are_torchvisions_and_give_the_same_logits(name, size):
    from torchvision.models import get_model

    ours, theirs = seeded(name).eval(), get_model(name, num_classes=10).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)


def test_resnet18_has_torchvisions_names_and_all_shapes_but_the_first():
    from torchvision.models import get_model

    ours = {k: v.shape for k, v in seeded("resnet18").state_dict().items()}
    theirs = {k: v.shape for k, v in get_model("resnet18", num_classes=10).state_dict().items()}
    assert list(ours) == list(theirs)
    assert [key for key in ours if ours[key] != theirs[key]] == ["conv1.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_models_with_auxiliary_heads_keep_torchvisions_keys(name):
    from torchvision.models import get_model

    theirs = get_model(name, weights=None, num_classes=10, aux_logits=True, init_weights=True)
    assert list(seeded(name).state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (6, 6), (7, 7), (13, 9), (14, 6), (15, 31)])
@pytest.mark.parametrize("size", [1, 6, 7])
def test_adaptive_pool_equals_torchs(shape, size):
    maps = torch.randn(2, 5, *shape, dtype=torch.float64, requires_grad=True)
    ours, theirs = AdaptivePool(size)(maps), nn.AdaptiveAvgPool2d(size)(maps)
    assert torch.allclose(ours, theirs, atol=1e-6)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weight).sum(), maps)[0] for y in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 5), (7, 7), (9, 8)])
def test_a_linear_layer_after_pooling_gives_the_same_in_its_cheaper_order(shape):
    pool, linear = AdaptivePool(7), nn.Linear(5 * 49, 4).double()
    maps = torch.randn(2, 5, *shape, dtype=torch.float64, requires_grad=True)
    cheap, plain = pooled_linear(maps, pool, linear), linear(pool(maps).flatten(1))
    assert torch.allclose(cheap, plain, atol=1e-12)
    for one, two in zip(
        *(torch.autograd.grad(y.square().sum(), [maps, *linear.parameters()])
          for y in (cheap, plain)), strict=True,
    ):  # fmt: skip
        assert torch.allclose(one, two, atol=1e-11)


def test_adaptive_pool_does_nothing_when_the_size_matches():
    maps = torch.randn(2, 5, 6, 6)
    assert AdaptivePool(6)(maps) is maps


# No backward that differs from time to time on a GPU. A meta tensor takes the path of a GPU's.

ONE_OF_EACH_FAMILY = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet",
    "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small",
    "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5",
    "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vit_b_16", "wide_resnet50_2",
]  # fmt: skip
WITHOUT_DETERMINISTIC_FORM = re.compile(
    "_adaptive_avg_pool2d|adaptive_max_pool|avg_pool3d|max_unpool|upsample_|grid_sampler|"
    "reflection_pad|replication_pad"
)


def backward_of(model: nn.Module, images: torch.Tensor) -> set[str]:
    """The operations of one backward pass that torch has in no deterministic form for a GPU."""
    seen = set()

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            seen.add(str(operation))
            return operation(*args, **(kwargs or {}))

    answer = model.train()(images)
    loss = sum(logits.sum() for logits in (answer if isinstance(answer, tuple) else (answer,)))
    with Listen():
        loss.backward()
    assert any("backward" in name for name in seen)
    return set(filter(WITHOUT_DETERMINISTIC_FORM.search, seen))


def test_every_family_of_torchvision_is_in_the_list():
    from torchvision import models as zoo

    def family(name: str) -> str:
        return re.match("(vgg.*_bn|[a-z]+(_v[23]|_[xy]_)?)", name)[0].replace("vgg19", "vgg11")

    names = zoo.list_models(module=zoo)
    known = {family(name) for name in ONE_OF_EACH_FAMILY} | {"vgg13_bn", "vgg16_bn"}
    assert {family(name) for name in names} <= known


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CLASSIFIERS, *("torchvision:" + n for n in ONE_OF_EACH_FAMILY)])
def test_no_model_of_the_zoo_has_a_backward_that_deterministic_refuses(name):
    device = "cpu" if "regnet" in name else "meta"  # regnet copies while it is built
    size = 64 if device == "cpu" else max(224, lookup(name).min_image_size)
    with torch.device(device):
        model = build_model(name, num_classes=10, image_size=size)
        assert backward_of(model, torch.empty(2, 3, size, size)) == set()
    assert without_deterministic_backward(model) == []


def test_googlenet_trains_without_a_backward_that_deterministic_refuses():
    with torch.device("meta"):
        model = build_model("googlenet", num_classes=10, image_size=96)
        assert backward_of(model, torch.empty(2, 3, 96, 96)) == set()


@pytest.mark.parametrize(
    "name", ["googlenet", "alexnet", pytest.param("vgg11", marks=pytest.mark.slow)]
)
def test_what_replaces_torchvisions_pooling_gives_its_bits_on_a_cpu(name):
    from torchvision.models import get_model

    options = {"aux_logits": True, "init_weights": True, "transform_input": True}
    torch.manual_seed(0)
    theirs = get_model(
        name, weights=None, num_classes=10, **(options if name == "googlenet" else {})
    )
    torch.manual_seed(0)
    ours = build_model(f"torchvision:{name}", num_classes=10, image_size=96)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    images = torch.randn(2, 3, 96, 96)
    answers = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(1)
        out = model(images)
        out = tuple(out) if isinstance(out, tuple) else (out,)
        sum(logits.square().sum() for logits in out).backward()
        answers += [[*out, *(p.grad for p in model.parameters())]]
    assert all(map(torch.equal, *answers))


def test_layers_without_a_deterministic_backward_are_named():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(6), nn.Upsample(8))
    told = without_deterministic_backward(nn.Sequential(layers, nn.AdaptiveAvgPool2d(1)))
    assert told == ["0.1 (AdaptiveAvgPool2d)", "0.2 (Upsample)"]


# Names


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("alexnt", r"did you mean alexnet\?\); known: linear_regression, my_cnn, alexnet, vgg11"),
        ("xyzzy", "no such model; known"),
        ("torchvision:resnt50", r"did you mean resnet50\?"),
        ("nowhere/net.py:Net", "there is no file"),
    ],
)
def test_a_wrong_name_is_answered_with_what_would_work(name, says):
    with pytest.raises(UserError, match=says):
        lookup(name)


def test_any_classifier_of_torchvision_can_be_named():
    entry = lookup("torchvision:squeezenet1_1")
    assert entry.pretrained == "squeezenet1_1" and entry.recipe["image_size"] == 224
    model = build_model("torchvision:squeezenet1_1", num_classes=7, image_size=64)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert lookup("torchvision:googlenet") is MODELS["googlenet"]


def test_naming_models_imports_no_torch():
    code = (
        "import sys, models; models.lookup('alexnet'); models.MODELS; "
        "sys.exit(bool({'torch', 'torchvision', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# A learner's own file

NET = """
from torch import nn
import layer_of_mine

class MyNet(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.fc = layer_of_mine.make(4, num_classes)

    def forward(self, images):
        return self.fc(self.features(images).mean(dim=(2, 3)))

class Picky(nn.Module):
    def __init__(self, num_classes, width, depth=3):
        super().__init__()

class Sized(nn.Linear):
    def __init__(self, image_size=1):
        super().__init__(image_size, 1)

class Bare(nn.Module):
    pass

class Plain:
    pass
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    tmp_path.joinpath("layer_of_mine.py").write_text("from torch.nn import Linear as make\n")
    path = tmp_path / "my_net.py"
    path.write_text(NET)
    return str(path)


def test_a_learners_own_module_is_built_from_its_file(own):
    before = list(sys.path)
    model = build_model(f"{own}:MyNet", num_classes=5, image_size=32)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    folder = str(Path(own).parent)
    assert sys.path == [*before, folder]  # last, for what its functions import later
    sys.path.remove(folder)
    assert lookup(f"{own}:MyNet").min_image_size == 1


ODD = """
import torch
from torch import nn


class Twice(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(self.conv, nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes))

    def forward(self, images):
        return self.body(images)


class Thousand(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.LazyLinear(1000))
"""


@pytest.mark.slow
def test_a_layer_under_two_names_is_kept_and_another_number_of_classes_is_refused(nets):
    (nets / "odd.py").write_text(ODD)
    run = [*SMALL, "--limit", "640", "--epochs", "1"]
    done = train(["--model", "odd.py:Twice", *run, "--run-dir", "twice"], nets)
    assert done.status == 0 and "warning" not in done.out, done.out
    assert "conv.weight" in load_file(nets / "twice" / "model.safetensors")
    done = train(["--model", "odd.py:Thousand", *run, "--run-dir", "thousand"], nets)
    assert done.status == 2 and "it must be (16, 10)" in done.out, done.out


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((4, 3, 1, 1), r"must be \(4, 3\); end forward with .flatten\(2\).mean\(2\)"),
        ((4, 3, 7), r"end forward with .flatten\(2\).mean\(2\)"),
        ((4, 5), "takes num_classes is given the number"),
        ((4, 5, 1, 1), "takes num_classes is given the number"),
        ((4,), "takes num_classes is given the number"),
    ],
)
def test_an_answer_of_another_shape_is_told_with_what_makes_it_one(shape, told):
    data = SimpleNamespace(classes=("a", "b", "c"), source=SimpleNamespace(name="pets"))
    with pytest.raises(UserError, match=told):
        refuse_other_shape(torch.zeros(shape), 4, cast(Any, data), "my.py:Net")


def test_a_file_in_another_encoding_and_a_layer_with_two_answers_are_no_trouble(tmp_path):
    file = tmp_path / "old.py"
    file.write_bytes(
        b"# -*- coding: latin-1 -*-\n# gr\xfcn\n"
        b"from torch import nn\n\n\n"
        b"class Net(nn.Module):\n"
        b"    def __init__(self):\n"
        b"        super().__init__()\n"
        b"        self.rows = nn.GRU(24, 5, batch_first=True)\n\n"
        b"    def forward(self, images):\n"
        b"        return self.rows(images.flatten(2).transpose(1, 2).flatten(1).view(-1, 8, 24))"
        b"[0][:, -1]\n"
    )
    shown = show(f"{file}:Net", "--image-size", "8", "--classes", "5")
    assert shown.returncode == 0 and "GRU" in shown.stdout, shown.stderr
    file.write_bytes(b"# gr\xfcn without a coding line\nclass Net: pass\n")
    with pytest.raises(UserError, match=r"old\.py"):
        build_model(f"{file}:Net", num_classes=5, image_size=8)


def test_layers_that_wait_for_their_sizes_get_them_before_anything_counts_parameters(tmp_path):
    file = tmp_path / "lazy.py"
    file.write_text(
        "from torch import nn\n\n\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__(nn.Flatten(), nn.LazyLinear(num_classes))\n"
    )
    model = build_model(f"{file}:Net", num_classes=5, image_size=8)
    assert model.training and [p.shape for p in model.parameters()] == [(5, 192), (5,)]


def test_a_learners_class_gets_what_its_init_takes_and_no_more(own):
    assert build_model(f"{own}:Sized", num_classes=5, image_size=9).in_features == 9
    assert not list(build_model(f"{own}:Bare", num_classes=5, image_size=9).children())


@pytest.mark.parametrize(
    ("class_name", "says"),
    [
        ("MyNett", r"no class MyNett in the file \(did you mean MyNet\?\); it has MyNet, Picky"),
        ("features", "no class features in the file; it has"),
        ("Plain", r"Plain is not an nn.Module; write class Plain\(nn.Module\)"),
        ("Picky", r"__init__ needs width, which nobody gives; write a default"),
    ],
)
def test_a_class_that_cannot_be_a_model_is_told_why(own, class_name, says):
    with pytest.raises(UserError, match=says):
        build_model(f"{own}:{class_name}", num_classes=5, image_size=32)


def test_a_file_without_a_class_name_is_answered_with_its_classes(own):
    with pytest.raises(UserError, match=r"name a class; it has MyNet, .*type .*my_net\.py:Class"):
        lookup(own)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("class Net:\n    def (", "line 2: .*mend the file"),
        ("x = 1\nimport no_such_package\nclass Net: ...", "line 2: .*No module named 'no_such_pac"),
        ("import sys\n\nsys.exit(3)\nclass Net: ...", "line 3: .*SystemExit: 3"),
    ],
)
def test_a_file_that_does_not_run_is_named_with_its_line(tmp_path, text, says):
    path = tmp_path / "net.py"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        build_model(f"{path}:Net", num_classes=5, image_size=32)


# Weights from a file


def small_net(num_classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("my_cnn", num_classes=num_classes, image_size=4)


@pytest.mark.parametrize(
    "form",
    [
        "plain",
        "ddp",
        "compiled",
        "both",
        "nested",
        "model",
        "safe",
        "tutorial",
        "lightning",
        "lightning net",
        "timm",
        "numpy",
    ],
)
def test_weights_come_back_from_every_usual_form_of_file(tmp_path, form):
    state, path = small_net(seed=1).state_dict(), tmp_path / "weights.pth"
    prefixes = {"ddp": "module.", "compiled": "_orig_mod.", "both": "module._orig_mod."}
    prefix = {**prefixes, "lightning": "model.", "lightning net": "net."}.get(form, "")
    saved = {prefix + key: value for key, value in state.items()}
    if form == "safe":
        from safetensors.torch import save_file

        path = tmp_path / "weights.safetensors"
        save_file(saved, path)
    elif form in ("nested", "model", "tutorial", "lightning", "lightning net", "timm", "numpy"):
        key = {"model": "model", "tutorial": "model_state_dict"}.get(form, "state_dict")
        more = {"args": argparse.Namespace(lr=0.1)} if form == "timm" else {}
        more |= {"best": np.float64(91.5), "epoch": np.int64(2)} if form == "numpy" else {}
        saved |= {"criterion.weight": torch.ones(2)} if form == "lightning net" else {}
        torch.save({key: saved, "epoch": 3, "optimizer_state_dict": {"a": 1}, **more}, path)
    else:
        torch.save(saved, path)
    model = small_net()
    assert "all 4 tensors" in load_weights(model, "my_cnn", str(path), 5)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_network_in_a_wrapper_is_found_from_either_side_and_told(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

    state = small_net(seed=1).state_dict()
    torch.save(state, tmp_path / "bare.pth")
    model = Wrapped()
    said = load_weights(model, "my_cnn", str(tmp_path / "bare.pth"), 5)
    assert "as the model's net.*" in said and "all 4 tensors" in said
    assert all(torch.equal(value, state[key]) for key, value in model.net.state_dict().items())
    one = {f"net.{key}": value for key, value in state.items()} | {"loss.weight": torch.ones(2)}
    torch.save(one, tmp_path / "one.ckpt")
    said = load_weights(small_net(), "my_cnn", str(tmp_path / "one.ckpt"), 5)
    assert "its net.* as the model; loss.weight left out" in said
    two = {f"{of}.{key}": value for of in ("student", "teacher") for key, value in state.items()}
    torch.save(two, tmp_path / "two.pth")  # which of them is meant is not for us to say
    with pytest.raises(UserError, match="not in the model: student"):
        load_weights(small_net(), "my_cnn", str(tmp_path / "two.pth"), 5)


def test_a_head_for_other_classes_stays_fresh_and_is_said(tmp_path):
    torch.save(small_net(num_classes=7, seed=1).state_dict(), tmp_path / "seven.pth")
    model, fresh, other = small_net(), small_net(), small_net(seed=1)
    said = load_weights(model, "my_cnn", str(tmp_path / "seven.pth"), 5)
    assert "they know 7 classes, so the head for 5 is new (fc)" in said
    assert torch.equal(model.fc.weight, fresh.fc.weight)
    assert torch.equal(model.conv.weight, other.conv.weight)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("conv.bias"), "missing: conv.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "not in the model: extra"),
        (lambda s: s.update({"conv.bias": torch.zeros(3)}), r"conv.bias \(3 in the file, 16 in"),
        (lambda s: s.update({"fc.weight": torch.zeros(5, 9)}), r"fc.weight \(5x9 in the file"),
        (lambda s: s.update({f"a{i}": torch.zeros(1) for i in range(9)}), "a0, a1, a2 and 6 more"),
    ],
)
def test_weights_that_do_not_fit_are_listed_and_change_nothing(tmp_path, change, says):
    state = small_net(seed=1).state_dict()
    change(state)
    torch.save(state, tmp_path / "odd.pth")
    model = small_net()
    with pytest.raises(UserError, match=says):
        load_weights(model, "my_cnn", str(tmp_path / "odd.pth"), 5)
    assert torch.equal(model.conv.weight, small_net().conv.weight)


def test_the_weights_of_a_run_bring_their_image_size_and_name_their_model(tmp_path):
    told = {"model": "my_cnn", "image_size": 48, "classes": ["a", "b"]}
    path, other = str(tmp_path / "run.safetensors"), str(tmp_path / "other.safetensors")
    state = build_model("my_cnn", num_classes=2, image_size=48).state_dict()
    save_file(state, path, {"lockstep": json.dumps(told)})
    save_file(state, other, {"lockstep": "{"})
    for words, size in (
        (["my_cnn", "--weights", path], 48),
        (["my_cnn", "--weights", path, "--image-size", "40"], 40),
        (["alexnet", "--weights", path], 224),  # which cannot do with 48
        *((["my_cnn", "--weights", x], 224) for x in (other, str(tmp_path), "none.pth", __file__)),
    ):
        assert parse(["--model", *words]).config.image_size == size, words
    with pytest.raises(UserError, match="was trained as --model my_cnn --image-size 48"):
        load_weights(small_net(), "resnet18", path, 5)


class Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_planted_in_a_weights_file_is_never_run(tmp_path, form):
    path, mark = tmp_path / "planted.pth", tmp_path / "executed"
    if form == "torch":
        torch.save({"state_dict": Trap(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(UserError, match=r"cannot be read: .* never run"):
        load_weights(small_net(), "my_cnn", str(path), 5)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists()  # the trap was a live one


def test_a_file_that_holds_no_weights_is_named(tmp_path):
    tmp_path.joinpath("cut.safetensors").write_bytes(b"\x10")
    torch.save([1, 2], tmp_path / "list.pth")
    for given, says in (
        ("cut.safetensors", "cannot be read: it is damaged"),
        ("list.pth", "no table of tensors by name"),
        ("none.pth", "there is no such file"),
        ("", "is a folder; type .*model.safetensors"),
    ):
        with pytest.raises(UserError, match=says):
            load_weights(small_net(), "my_cnn", str(tmp_path / given), 5)


# ImageNet weights


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache; its folder for files."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    return tmp_path / "hub/checkpoints"


def test_imagenet_weights_are_found_in_the_cache_and_keep_a_fresh_head(hub):
    name = "torchvision:squeezenet1_1"
    torch.manual_seed(1)
    published = build_model(name, num_classes=1000, image_size=64)
    torch.save(published.state_dict(), weights._imagenet_file(name))
    reachable, sentence = imagenet_reach(name)
    assert reachable and "cache" in sentence

    model = seeded(name, num_classes=10, image_size=64)
    said = load_weights(model, name, "imagenet", 10)
    assert "ImageNet weights" in said and "the head for 10 is new (classifier.1)" in said
    assert torch.equal(model.features[0].weight, published.features[0].weight)
    fresh = seeded(name, num_classes=10, image_size=64)
    assert torch.equal(model.classifier[1].weight, fresh.classifier[1].weight)

    whole = seeded(name, num_classes=1000, image_size=64)
    assert "all" in load_weights(whole, name, "imagenet", 1000)
    assert torch.equal(whole.classifier[1].weight, published.classifier[1].weight)


def test_imagenet_weights_out_of_reach_are_said_quietly(hub, monkeypatch, capfd):
    monkeypatch.setattr(weights, "REACH_SECONDS", 2.0)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections, never answers
        for variable in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{deaf.getsockname()[1]}")
        reachable, sentence = imagenet_reach("alexnet")
        assert not reachable and "no answer within 2 seconds" in sentence
    with pytest.raises(UserError, match=r"cannot be downloaded .*refused.*set HTTPS_PROXY"):
        load_weights(small_net(), "alexnet", "imagenet", 5)
    assert capfd.readouterr() == ("", "")


def test_imagenet_weights_are_downloaded_when_a_server_has_them(hub, tmp_path, monkeypatch):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *arguments) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    name = "torchvision:squeezenet1_1"
    published = build_model(name, num_classes=1000, image_size=64)
    torch.save(published.state_dict(), tmp_path / "tiny.pth")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/tiny.pth"
        monkeypatch.setattr(weights, "_imagenet_url", lambda name: url)
        assert imagenet_reach(name) == (
            True,
            f"ImageNet weights for {name} can be downloaded ({url})",
        )
        load_weights(seeded(name, image_size=64), name, "imagenet", 10)
        server.shutdown()
    assert (hub / "tiny.pth").is_file()


def test_a_model_without_imagenet_weights_says_so():
    assert imagenet_reach("my_cnn") == (False, "there are no ImageNet weights for my_cnn")
    with pytest.raises(UserError, match="no ImageNet weights for resnet18; torchvision:resnet18"):
        load_weights(small_net(), "resnet18", "imagenet", 5)


def test_the_lessons_corgi_has_its_name():
    classes = weights.imagenet_classes()
    assert len(classes) == 1000 and classes[263] == "Pembroke"


# Heads and frozen backbones


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("my_cnn", ("fc.",)),
        ("alexnet", ("classifier.6.",)),
        ("vgg16", ("classifier.6.",)),
        ("resnet18", ("fc.",)),
        ("googlenet", ("fc.", "aux1.fc2.", "aux2.fc2.")),
        ("inception_v3", ("fc.", "AuxLogits.fc.")),
        ("efficientnet_b0", ("classifier.1.",)),
        ("torchvision:squeezenet1_1", ("classifier.1.",)),
        ("torchvision:vit_b_16", ("heads.head.",)),
        ("torchvision:densenet121", ("classifier.",)),
        ("torchvision:swin_t", ("head.",)),
    ],
)
def test_the_heads_are_the_layers_with_one_row_per_class(name, heads):
    with torch.device("meta"):
        model = build_model(name, num_classes=10, image_size=224)
    assert head_prefixes(model, name) == heads
    state = model.state_dict()
    assert all(state[head + "weight"].shape[0] == 10 for head in heads)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_frozen_backbone_learns_nothing_and_stays_in_eval_mode(wrapped):
    model = seeded("efficientnet_b0")
    freeze_backbone(model, "efficientnet_b0")
    model = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    if wrapped:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        training = nn.parallel.DistributedDataParallel(model) if wrapped else model
        training.eval()
        training.train()
        images = images_for("efficientnet_b0")
        first, second = training(images), training(images)
        assert torch.equal(first, second)  # no dropout, no stochastic depth
        first.sum().backward()
    finally:
        if wrapped:
            dist.destroy_process_group()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    trained = {key for key, p in model.named_parameters() if p.grad is not None}
    assert trained == {"classifier.1.weight", "classifier.1.bias"}
    assert model.training and model.classifier[1].training
    assert not any(m.training for m in model.features.modules())


def test_a_learners_backbone_can_be_frozen_up_to_its_last_layer(own):
    model = build_model(f"{own}:MyNet", num_classes=5, image_size=32)
    freeze_backbone(model, own)
    model.train()
    assert [k for k, p in model.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]
    assert model.training and not model.features[1].training and not model.features[2].training


def test_freezing_everything_is_refused(own):
    for name in ("linear_regression", f"{own}:Sized"):
        model = build_model(name, num_classes=5, image_size=4)
        with pytest.raises(UserError, match=r"no layers besides its head, .* leave --freeze out"):
            freeze_backbone(model, name)
    with pytest.raises(UserError, match="nothing can learn"):
        freeze_backbone(nn.ReLU(), "relu")


# python -m models


def show(*arguments: str) -> subprocess.CompletedProcess:
    return python("-m", "models", *arguments)


def test_the_printed_table_names_every_model():
    shown = show()
    assert shown.returncode == 0, shown.stderr
    assert all(name in shown.stdout for name in MODELS)
    assert "57,044,810" in shown.stdout  # AlexNet's parameters for ten classes


def test_the_printed_layers_add_up_to_the_published_numbers():
    shown = show("alexnet", "--image-size", "224", "--classes", "1000")
    assert "61,100,840" in shown.stdout and "714,188,480" in shown.stdout
    assert "192 x 27 x 27" in shown.stdout


def test_a_wrong_name_on_the_command_line_is_one_sentence():
    shown = show("alexnt")
    assert shown.returncode == 2 and "did you mean alexnet?" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_of_a_model_that_fails_the_layers_before_are_printed_and_what_failed(tmp_path):
    (tmp_path / "own.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n"
        "    def __init__(self, num_classes=10):\n"
        "        super().__init__(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(5, num_classes))\n"
    )
    shown = show(f"{tmp_path / 'own.py'}:Net", "--image-size", "8")
    assert shown.returncode == 2 and "4 x 6 x 6" in shown.stdout and "│ 144" not in shown.stdout
    assert "in layer 2: mat1 and mat2 shapes cannot be multiplied (2x144 and 5x10)" in shown.stderr
    assert "Traceback" not in shown.stderr


# Training


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_trains_the_same_on_one_and_two_processes(name, tmp_path):
    data = "digits" if lookup(name).task == "classification" else "line"
    size = max(32, lookup(name).min_image_size)
    arguments = ["--model", name, "--dataset", data, "--weights", "none", "--image-size", size]
    arguments += ["--batch-size", "8", "--shards", "2", "--stop-after", "3", "--limit", "64"]
    arguments += ["--log-every", "1", "--threads", "1", "--no-plots"]
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = train([*arguments, "--run-dir", folder], tmp_path, processes)
        assert done.status == 0 and "got no gradient" not in done.out, done.out
        found.append(losses(folder))
        shutil.rmtree(folder)  # a checkpoint of VGG-16 with AdamW is 1.6 GB
    assert found[1] == pytest.approx(found[0], rel=1e-3) and len(set(found[0])) == 3


BROKEN = """from torch import nn
class Init(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear("4", num_classes)
class Forward(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(7, num_classes)
    def forward(self, images):
        return self.head(images.flatten(1))
"""


def test_an_error_in_a_learners_file_names_file_and_line_in_init_and_in_forward(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    with pytest.raises(UserError, match=r"__init__ fails: .*broken.py, line 5: TypeError"):
        build_model(f"{tmp_path}/broken.py:Init", num_classes=3, image_size=8)
    flags = ["--dataset", "digits", "--threads", "1", "--dry-run"]
    done = train(["--model", "broken.py:Forward", *flags], tmp_path)
    assert done.status == 2 and "broken.py, line 11: mat1 and mat2" in done.out, done.out


@pytest.mark.parametrize("name", ["resnet34", "hub:resnet34", "RegNet_y-400mf", "hub:resnet18"])
def test_a_model_of_another_library_is_answered_with_one_that_is_accepted(name):
    with pytest.raises(UserError, match=r"did you mean ") as e:
        lookup(name)
    meant = re.search(r"did you mean (\S+)\?", str(e.value))[1]
    assert lookup(meant) and meant.rpartition(":")[2][:6] == name.rpartition(":")[2][:6].lower()
