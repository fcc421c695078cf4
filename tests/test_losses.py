"""Training losses: against torch and plain formulas, what images weigh, and losses of one's own."""

import re

import pytest
import torch
from launches import SMALL, losses, train
from refusals import refused
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from config import parse
from tasks.losses import WEIGHT_UNIT, Criterion, build_criterion, class_weights

CLASSES = 7


def sample(n=203, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, CLASSES, generator=generator) * 3
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return logits, labels, F.one_hot(labels, CLASSES).float()


def plain(name, logits, targets):
    """The loss of each image, by its formula, from soft labels."""
    if name == "bce":
        p = logits.double().sigmoid()
        return -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1)
    p = logits.double().softmax(1)
    return -(targets * (1 - p) ** (2 if name == "focal" else 0) * p.log()).sum(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["cross_entropy", "bce", "focal"])
def test_a_loss_is_its_formula_summed_for_hard_soft_and_smoothed_labels(name, smoothing):
    logits, labels, soft = sample()
    mixed = 0.3 * soft + 0.7 * soft.flip(0)
    for given, targets in ((labels, soft), (soft, soft), (mixed, mixed)):
        smooth = targets * (1 - smoothing) + smoothing / CLASSES
        wanted = plain(name, logits, smooth).sum()
        assert float(Criterion(name, smoothing)(logits, given)) == pytest.approx(
            float(wanted), rel=1e-5
        )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_the_focal_loss_takes_the_gamma_it_is_given(gamma):
    logits, labels, targets = sample()
    p = logits.double().softmax(1)
    wanted = -(targets * (1 - p) ** gamma * p.log()).sum()
    found = build_criterion("focal", 0.0, CLASSES, None, False, focus=gamma)(logits, labels)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    with pytest.raises(UserError, match="--focal-gamma: --loss bce has none"):
        parse(["--model", "my_cnn", "--loss", "bce", "--focal-gamma", "3"])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["cross_entropy", "bce", "focal"])
def test_images_that_do_not_count_add_nothing_and_shards_add_up(name, weighted):
    logits, labels, _ = sample()
    weights = torch.linspace(0.2, 3, CLASSES) if weighted else None
    criterion = Criterion(name, 0.1, weights=weights)
    whole = criterion(logits, labels)
    bad = labels.clone()
    bad[100:] = -100
    assert torch.allclose(criterion(logits, bad), criterion(logits[:100], labels[:100]))
    parts = [criterion(x, y) for x, y in zip(logits.split(50), labels.split(50), strict=True)]
    assert torch.allclose(sum(parts), whole)
    if weighted:
        totals = [criterion.total(part) for part in labels.split(50)]
        assert sum(totals) == criterion.total(labels)
        assert criterion.total(bad) == criterion.total(labels[:100])


def test_a_weighted_loss_over_its_weights_is_torchs_and_a_mixed_image_weighs_its_mixture():
    logits, labels, soft = sample()
    weights = class_weights("0.5,1,2,3,1,1,9", labels, list("abcdefg"))
    criterion = Criterion(weights=weights)
    total = float(criterion.total(labels)) * WEIGHT_UNIT
    wanted = F.cross_entropy(logits, labels, weight=weights.float())
    assert float(criterion(logits, labels)) / total == pytest.approx(float(wanted), rel=1e-5)
    mixed = 0.3 * soft + 0.7 * soft.flip(0)
    each = mixed @ weights.float()
    wanted = (each * F.cross_entropy(logits, mixed, reduction="none")).sum()
    assert float(criterion(logits, mixed)) == pytest.approx(float(wanted), rel=1e-5)
    assert float(each.sum()) == pytest.approx(total, rel=1e-5)  # a permutation: the same sum


def test_balanced_weights_give_each_class_the_same_sum_and_an_image_one_on_average():
    labels = torch.tensor([0] * 90 + [1] * 9 + [3])
    weights = class_weights("balanced", labels, list("abcd"))
    sums = weights * torch.bincount(labels, minlength=4)
    assert sums[[0, 1, 3]].tolist() == pytest.approx([100 / 3] * 3) and sums[2] == 0
    assert float(weights[labels].mean()) == pytest.approx(1.0)
    assert class_weights("none", labels, list("abcd")) is None
    with refused("class-weights", match="2 numbers for 4 classes.*a, b, c, d; or balanced"):
        class_weights("1,2", labels, list("abcd"))


@pytest.mark.parametrize(
    ("words", "code", "match"),
    [
        ("--loss cros_entropy", "bad-value", "did you mean cross_entropy.*FILE.py:Class"),
        ("--loss no.py:Loss", "no-model-file", "--loss no.py:Loss: there is no file"),
        ("--class-weights 1,0", "bad-value", "a number above 0"),
        ("--class-weights much", "bad-value", "none, balanced, or a number"),
        ("--model linear_regression --loss focal --class-weights balanced", "contradiction",
         "--loss, --class-weights: of classes"),
    ],
)  # fmt: skip
def test_what_is_no_loss_and_no_weight_is_a_sentence(words, code, match):
    with refused(code, match=match):
        parse(words.split())


OWN = """
import torch
from torch import nn
from torch.nn import functional as F

class Each(nn.Module):
    def __init__(self, num_classes, power=2):
        super().__init__()
        self.num_classes, self.power = num_classes, power
    def forward(self, logits, labels):
        return self.power * F.cross_entropy(logits, labels, reduction="none")

class Mean(nn.CrossEntropyLoss):
    pass

class Learns(Each):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.weight = nn.Parameter(torch.ones(1))

class HardOnly(Each):
    def forward(self, logits, labels):
        return F.nll_loss(logits.log_softmax(1), labels, reduction="none")

class NoModule:
    pass
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my_loss.py"
    path.write_text(OWN)
    return path


def test_a_loss_of_ones_own_is_made_with_the_number_of_classes_and_weighed_like_any(own):
    logits, labels, _ = sample()
    weights = torch.linspace(0.2, 3, CLASSES)
    criterion = build_criterion(f"{own}:Each", 0.0, CLASSES, weights, mixes=True)
    wanted = 2 * Criterion(weights=weights)(logits, labels)
    assert torch.allclose(criterion(logits, labels), wanted)
    for name, mixes, code, match in (
        ("Mean", False, "loss-not-per-image", 'loss of each, .2,.*reduction="none"'),
        ("HardOnly", True, "loss-fails", "for --mixup or --cutmix"),
        ("Learns", False, "loss-has-parameters", "nobody would train"),
        ("NoModule", False, "not-a-module", "write class NoModule.nn.Module"),
        ("Eech", False, "unknown-class", "--loss .*did you mean Each"),
    ):
        with refused(code, match=match):
            build_criterion(f"{own}:{name}", 0.0, CLASSES, None, mixes)
    build_criterion(f"{own}:HardOnly", 0.0, CLASSES, None, mixes=False)
    with refused("contradiction", match="--label-smoothing"):
        parse(["--loss", f"{own}:Each", "--label-smoothing", "0.1"])


def test_a_run_tells_its_loss_and_keeps_its_code_and_resumes_with_that_alone(nets, own):
    flags = ["--model", "plain.py:Net", *SMALL, "--limit", "200", "--epochs", "1"]
    flags += ["--loss", f"{own}:Each", "--class-weights", "balanced", "--run-dir", "own-loss"]
    done = train(flags, nets)
    assert done.status == 0, done.out
    assert "my_loss.py:Each" in re.sub(r"[│\s]", "", done.out)  # a long path is broken
    assert "class weights" in done.out and "largest" in done.out
    kept = {path.name for path in (nets / "own-loss" / "code").iterdir()}
    assert {"plain.py", "my_loss.py"} <= kept
    own.write_text(OWN.replace("power=2", "power=3"))
    done = train([*flags, "--epochs", "2"], nets)
    assert done.status == 2 and "my_loss.py" in done.out and "--allow-change code" in done.out
    own.unlink()
    done = train(["--resume", "own-loss", "--epochs", "2"], nets)
    assert done.status == 2 and "code/my_loss.py:Each --allow-change loss" in done.out, done.out
    done = train(["--resume", "own-loss", "--eval-only"], nets)
    assert done.status == 0, done.out
    assert len(losses(nets / "own-loss")) == 3


def test_a_module_that_only_weighs_moves_with_its_device():
    weights = torch.ones(CLASSES)
    assert isinstance(Criterion(weights=weights), nn.Module)
    assert [name for name, _ in Criterion(weights=weights).named_buffers()] == ["units"]
