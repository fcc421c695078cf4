"""speednet, muon, votes, cached features: the fast ways compute what the slow ones do."""

import json
import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from launches import CLEAN, REPOSITORY, losses, newest, same_weights, train
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from config import TrainConfig
from data.augment import Augment
from data.loaders import place
from data.sources import ImageSet
from distributed.checkpoint import capture, restore
from models import MODELS, build_model
from optim import Muon, build_optimizer
from optim.muon import orthogonal

MUON = TrainConfig(optimizer="muon", lr=0.02, momentum=0.6)


def speednet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("speednet", num_classes=10, image_size=32)


def correlated_images(n: int = 200) -> torch.Tensor:
    """Smooth pictures with correlated colours, about mean 0 and variance 1."""
    torch.manual_seed(1)
    noise = torch.randn(n, 3, 34, 34)
    smooth = F.avg_pool2d(noise + 2 * noise[:, :1], 3, stride=1)
    return smooth / smooth.std()


def two_steps(model: nn.Module, optimizer, images: torch.Tensor) -> None:
    for _ in range(2):
        loss = F.cross_entropy(model(images), torch.arange(len(images)) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_newton_schulz_brings_all_singular_values_near_one_and_keeps_the_directions():
    torch.manual_seed(0)
    for shape in ((64, 216), (216, 64), (256, 2304)):
        matrix = torch.randn(shape) * 37
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        for steps in (3, 5):
            answer = orthogonal(matrix, steps)
            assert answer.shape == matrix.shape
            values = torch.linalg.svdvals(answer)
            assert values.min() > 0.6 and values.max() < 1.25
            inner = u.T @ answer @ v.T  # the same singular vectors
            assert (inner - inner.diagonal().diag()).abs().max() < 1e-3


def test_the_length_of_a_gradient_does_not_matter_to_muon():
    moved = []
    for scale in (1.0, 1e4):
        conv = nn.Conv2d(3, 8, 3, bias=False)
        nn.init.zeros_(conv.weight)
        optimizer = Muon([{"params": [conv.weight], "orthogonal": True}], 0.1, 0.6)
        torch.manual_seed(0)
        conv.weight.grad = scale * torch.randn_like(conv.weight)
        optimizer.step()
        moved.append(conv.weight.detach())
    assert torch.allclose(*moved, atol=1e-5)
    assert abs(torch.linalg.matrix_norm(moved[0].flatten(1), 2) - 0.1) < 0.03


def test_the_rest_of_a_model_takes_the_nesterov_steps_of_torch_sgd():
    torch.manual_seed(0)
    one, two = nn.Linear(4, 3), nn.Linear(4, 3)
    two.load_state_dict(one.state_dict())
    config = TrainConfig(optimizer="muon", lr=0.1, momentum=0.8, weight_decay=0.01)
    mine = build_optimizer(one, config)
    theirs = torch.optim.SGD(
        [{"params": [two.weight]}, {"params": [two.bias], "weight_decay": 0.0}],
        lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01,
    )  # fmt: skip
    for _ in range(3):
        x = torch.randn(5, 4)
        for model, optimizer in ((one, mine), (two, theirs)):
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            optimizer.step()
    assert torch.allclose(one.weight, two.weight, atol=1e-6)
    assert torch.allclose(one.bias, two.bias, atol=1e-6)


def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_momentum():
    model = speednet().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, MUON)
    two_steps(model, optimizer, correlated_images(8))
    before = capture(model, optimizer)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None
    optimizer.step()
    after = capture(model, optimizer)
    for part in ("model", "optimizer"):
        assert all(torch.equal(before[part][k], after[part][k]) for k in before[part])
    optimizer.found_inf = torch.zeros(())
    two_steps(model, optimizer, correlated_images(8))
    assert not torch.equal(model.head.weight, after["model"]["head.weight"])


def test_each_group_has_its_own_rate_below_the_runs_rate():
    from optim import set_lr

    optimizer = build_optimizer(speednet(), TrainConfig(**MODELS["speednet"].recipe))
    set_lr(optimizer, 0.12)  # half of the recipe's 0.24: half way
    filters, biases, head = optimizer.param_groups
    assert filters["lr"] == 0.12 and abs(biases["lr"] - 0.053 * 2000 / 2) < 1e-9
    # The public recipe shrinks by 2e-6 x batch a step at full rate, wherever SGD is at work.
    for group in (biases, head):
        assert abs(2 * group["lr"] * group["weight_decay"] - 0.004) < 1e-9


def test_muon_goes_on_bit_for_bit_after_capture_and_restore():
    images = correlated_images(8)
    whole = speednet().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(whole, MUON)
    two_steps(whole, optimizer, images)
    saved = capture(whole, optimizer)
    two_steps(whole, optimizer, images)

    resumed = speednet(seed=9).to(memory_format=torch.channels_last)
    other = build_optimizer(resumed, MUON)
    restore(saved, resumed, other)
    two_steps(resumed, other, images)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_whitening_makes_the_covariance_of_patches_nearly_the_identity():
    model, images = speednet(), correlated_images()
    model.start_from_data(images)
    with torch.no_grad():
        maps = model.whiten(images)  # (n, 24, 31, 31)
    one, other = maps.transpose(0, 1).flatten(1).chunk(2)
    assert torch.equal(one, -other) or torch.allclose(one, -other, atol=1e-4)
    covariance = torch.cov(one)
    variances = torch.linalg.eigvalsh(torch.cov(patches_of(images)))
    expected = (variances / (variances + 5e-4)).sort().values
    assert torch.allclose(covariance.diagonal().sort().values, expected, atol=0.02)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.02
    assert torch.allclose(covariance, torch.eye(12), atol=0.08)


def patches_of(images: torch.Tensor) -> torch.Tensor:
    return F.unfold(images, 2).transpose(0, 1).flatten(1)


def test_whitening_is_the_same_in_every_process():
    weights = []
    for seed in (0, 1):
        model = speednet(seed)
        model.start_from_data(correlated_images())
        weights.append(model.whiten.weight.detach())
    assert torch.equal(*weights)


def test_all_that_should_train_gets_a_gradient_and_the_rest_stays():
    model = speednet()
    model.start_from_data(correlated_images())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    two_steps(model, build_optimizer(model, MUON), correlated_images(16))
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {"whiten.weight"} | {
        f"groups.{group}.norm{n}.weight" for group in range(3) for n in (1, 2)
    }
    for name, p in model.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved == (name not in fixed), name
    assert not model.whiten.weight.requires_grad and model.whiten.weight.grad is None


def test_filters_of_speednet_keep_their_length():
    model = speednet()
    optimizer = build_optimizer(model, MUON)
    two_steps(model, optimizer, correlated_images(16))
    for group in model.groups:
        assert abs(float(group.conv2.weight.detach().norm()) - len(group.conv2.weight) ** 0.5) < 0.2


def augment(tta: int, **more) -> Augment:
    return Augment("none", 32, (0.5,) * 3, (0.25,) * 3, seed=0, tta=tta, **more)


def test_a_vote_does_not_care_which_side_of_the_mirror_an_image_is_on():
    model, images = speednet().eval(), correlated_images(6)
    for tta in (1, 2):
        vote = augment(tta).vote
        with torch.no_grad():
            straight, mirrored = vote(model, images), vote(model, images.flip(3))
        if tta == 1:
            assert torch.allclose(straight, mirrored, atol=1e-5)
        with torch.no_grad():
            assert not torch.allclose(straight, model(images), atol=1e-3)


def test_the_votes_of_an_image_are_those_of_the_written_out_average():
    model, images = speednet().eval(), correlated_images(6)
    wide = F.pad(images, (1, 1, 1, 1), mode="reflect")
    views = [(0.5, images), (0.25, wide[:, :, :-2, :-2]), (0.25, wide[:, :, 2:, 2:])]
    with torch.no_grad():
        expected = sum(w / 2 * (model(x) + model(x.flip(3))) for w, x in views)
        assert torch.allclose(augment(2).vote(model, images), expected, atol=1e-5)
        alone = torch.cat([augment(2).vote(model, image[None]) for image in images])
        assert torch.allclose(alone, expected, atol=1e-5)
        assert torch.equal(augment(0).vote(model, images), model(images))


def test_digits_are_never_mirrored_in_a_vote():
    model, images = speednet().eval(), correlated_images(2)
    with torch.no_grad():
        assert torch.equal(augment(1, no_flip=True).vote(model, images), model(images))


@pytest.mark.slow
def test_speednet_and_muon_stop_and_go_on_exactly(tmp_path):
    flags = ["--model", "speednet", "--dataset", "synthetic", "--limit", "64"]
    flags += ["--batch-size", "16", "--epochs", "2", "--lr", "0.05", "--threads", "1"]
    flags += ["--ema", "0.9", "--shards", "2", "--log-every", "1", "--no-plots"]
    assert train([*flags, "--run-dir", "whole"], tmp_path).status == 0
    stopped = train([*flags, "--run-dir", "parts"], tmp_path, LOCKSTEP_FAULT="term@step=5")
    assert "stopped at step" in stopped.out
    resumed = train([*flags, "--run-dir", "parts"], tmp_path)
    assert resumed.status == 0, resumed.out
    assert same_weights(tmp_path / "whole", tmp_path / "parts") == []
    on_two = train([*flags, "--run-dir", "two"], tmp_path, processes=2)
    assert on_two.status == 0, on_two.out
    # Muon turns rounding at zero gradients into steps of full length: near, not equal.
    pairs = zip(losses(tmp_path / "whole"), losses(tmp_path / "two"), strict=True)
    assert all(abs(a - b) < 0.02 * a for a, b in pairs)


def test_a_learners_model_learns_with_muon(nets):
    flags = ["--model", "plain.py:Net", "--dataset", "digits", "--image-size", "16"]
    flags += ["--optimizer", "muon", "--lr", "0.05", "--epochs", "3", "--threads", "1"]
    done = train([*flags, "--run-dir", "muon"], nets)
    assert done.status == 0, done.out
    assert losses(nets / "muon")[-1] < 0.4


def test_a_frozen_backbone_with_cached_features_ends_with_the_same_weights(nets):
    flags = ["--model", "full.py:Net", "--dataset", "digits", "--image-size", "16", "--plots"]
    flags += ["--freeze", "backbone", "--epochs", "2", "--threads", "1", "--ema", "0.9"]
    cached = train([*flags, "--run-dir", "cached"], nets)
    assert "features are computed once" in cached.out and "warning" not in cached.out, cached.out
    # Votes need images, so this one computes the features anew; digits have no mirror image.
    plain = train([*flags, "--run-dir", "uncached", "--tta", "1"], nets)
    assert plain.status == 0 and "features are computed once" not in plain.out
    for name in ("model.safetensors", "ema.safetensors"):
        one, two = (load_file(newest(nets / run) / name) for run in ("cached", "uncached"))
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], atol=1e-6, rtol=1e-5)
    one, two = (torch.tensor(losses(nets / run)) for run in ("cached", "uncached"))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    for picture in ("samples", "mistakes", "confusion"):
        assert (nets / "cached" / f"{picture}.png").exists()


FAULTS = """
import resource, sys, torch
from distributed.accelerator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(12):
    if step == 2:
        before = pages()
    a, b = torch.ones(12_000_000), torch.ones(9_000_000)  # 48 and 36 MB
    del a, b
print(pages() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's here")
@pytest.mark.slow
def test_a_step_on_the_cpu_uses_the_memory_that_the_step_before_freed():
    new_pages = [
        int(subprocess.check_output([sys.executable, "-c", FAULTS, word], cwd=REPOSITORY))
        for word in ("keep", "as it is")
    ]
    assert new_pages[0] < new_pages[1] / 20, new_pages


def test_data_stay_in_host_memory_where_the_device_has_no_room(monkeypatch):
    images = ImageSet(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.zeros(10).long())
    free = 3 * images.images.numel()  # the data may take less than a third of it
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    data, home = place(images, torch.device("cuda"))
    assert home.type == data.images.device.type == data.labels.device.type == "cpu"


RECOMPILED = """
import sys, train
from config import parse_or_exit
from report.ending import run_to_exit
status = run_to_exit(train.main, parse_or_exit(sys.argv[1:]))
from torch._dynamo.utils import counters
print("graphs", counters["stats"]["unique_graphs"], "breaks", sum(counters["graph_break"].values()))
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler: no g++")
def test_a_compiled_run_compiles_once_for_training_and_once_for_evaluation(nets):
    flags = ["--model", "full.py:Net", "--dataset", "digits", "--image-size", "16"]
    flags += ["--limit", "200"]
    flags += ["--epochs", "3", "--threads", "1", "--no-plots", "--log-every", "5"]
    plain = train([*flags, "--run-dir", "eager"], nets)
    assert plain.status == 0, plain.out
    # 200 images in batches of 64: a short last batch in evaluation, none in training.
    words = [sys.executable, "-c", RECOMPILED, *flags, "--compile", "--run-dir", "compiled"]
    env = {k: v for k, v in os.environ.items() if k not in CLEAN} | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(words, cwd=nets, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "graphs 2 breaks 0" in done.stdout and "compiling took" in done.stdout, done.stdout
    one, two = (torch.tensor(losses(nets / run)) for run in ("eager", "compiled"))
    assert len(one) == len(two) > 1
    accuracies = [json.loads((nets / run / "summary.json").read_text())["test/accuracy"]
                  for run in ("eager", "compiled")]  # fmt: skip
    assert abs(accuracies[0] - accuracies[1]) < 0.1
