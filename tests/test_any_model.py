"""Whatever a model is made of, its run is the same on any number of processes."""

import random

import numpy
import pytest
import torch
from launches import Done, rows, same_weights, train
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from distributed.generators import Generators
from distributed.shards import Arrivals, EveryParameter

NETS = '''
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

class Net(nn.Module):
    """Blocks left out by chance, one by a seldom coin, one never used; some checkpointed."""
    reentrant = False

    def __init__(self, num_classes=10):
        super().__init__()
        self.first = nn.Linear(192, 24)
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        self.seldom, self.never = nn.Linear(24, 24), nn.Linear(24, 24)
        self.head = nn.Linear(24, num_classes)

    def forward(self, images):
        x = self.first(images.flatten(1)).relu()
        for number, block in enumerate(self.blocks):
            if self.training and torch.rand(()) < 0.5:
                continue
            if number % 2:
                x = x + checkpoint(lambda x: block(x).tanh(), x, use_reentrant=self.reentrant)
            else:
                x = x + block(x).tanh()
        if self.training and torch.rand(()) < 0.1:
            x = x + self.seldom(x)
        return self.head(x)

class Reentrant(Net):
    reentrant = True
'''
SHORT = ["--dataset", "digits", "--weights", "none", "--image-size", "8", "--batch-size", "48"]
SHORT += ["--shards", "12", "--epochs", "2", "--max-steps", "12", "--threads", "1", "--no-plots"]
SHORT += ["--limit", "480", "--augment", "none", "--schedule", "constant"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("any")
    (made / "nets.py").write_text(NETS)
    return made


def run(folder, name: str, model: str, *flags: str, processes: int = 1) -> Done:
    words = ["--model", f"{folder}/nets.py:{model}", *SHORT, "--run-dir", name, *flags]
    return train(words, folder, processes)


def weights(folder, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "last.safetensors")


OPTIMIZERS = {
    "adamw": ["--optimizer", "adamw", "--lr", "0.01", "--weight-decay", "0.1"],
    "momentum": ["--optimizer", "sgd", "--lr", "0.1", "--momentum", "0.9"],
}
SLOW = [(3, "momentum", "Net"), (3, "momentum", "Reentrant"), (4, "adamw", "Reentrant")]
SLOW += [(4, "adamw", "Net"), (2, "momentum", "Net"), (2, "adamw", "Reentrant")]


@pytest.mark.parametrize(
    ("processes", "optimizer", "model"),
    [
        (2, "adamw", "Net"),
        (2, "momentum", "Reentrant"),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW),
    ],
)
def test_what_a_branch_leaves_out_trains_alike_on_any_number_of_processes(
    folder, processes, optimizer, model
):
    found = {}
    for count in (1, processes):
        for way in ([], ["--bitwise"]):
            name = f"{model}-{optimizer}-{count}{''.join(way)}"
            if not (folder / name).exists():
                flags = [*OPTIMIZERS[optimizer], *way]
                done = run(folder, name, model, *flags, processes=count)
                assert done.status == 0, done.out
                assert "got no gradient when it was tried" in done.out
            found[count, bool(way)] = weights(folder, name)
    plain, exact = found[1, False], found[1, True]
    for key, value in plain.items():
        assert torch.allclose(value, found[processes, False][key], rtol=1e-3, atol=1e-5), key
        assert torch.allclose(value, exact[key], rtol=1e-3, atol=1e-5), key
        assert torch.equal(exact[key], found[processes, True][key]), key


def test_a_parameter_that_nobody_used_decays_and_keeps_its_momentum(folder):
    """As with a gradient of zero, not as with none: AdamW shrinks what forward never uses."""
    flags = [*OPTIMIZERS["adamw"], "--warmup", "0"]
    for name, steps in (("short", "1"), ("long", "6")):
        done = run(folder, name, "Net", *flags, "--max-steps", steps)
        assert done.status == 0, done.out
    short, long = (weights(folder, name)["never.weight"] for name in ("short", "long"))
    assert torch.allclose(long, short * (1 - 0.01 * 0.1) ** 5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_gradient_that_arrives_twice_in_a_backward_is_noticed(reentrant):
    layer, other = nn.Linear(3, 3), nn.Linear(3, 3)
    parameters = [*layer.parameters(), *other.parameters()]
    arrivals = Arrivals(parameters)
    x = checkpoint(layer, torch.ones(2, 3, requires_grad=True), use_reentrant=reentrant)
    EveryParameter.apply(x.sum(), *parameters).backward()
    assert arrivals.counts == [1 + reentrant] * 2 + [1] * 2 and arrivals.take() == reentrant
    assert other.weight.grad is None


DRAWING = '''
import random, numpy, torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    """Draws from everywhere while it trains, and with F.dropout also when it is evaluated."""
    def __init__(self, num_classes=10):
        super().__init__()
        self.first, self.head = nn.Linear(192, 24), nn.Linear(24, num_classes)
        self.own = torch.Generator()
        self.others = [{"python": random.Random()}, (numpy.random.default_rng(),)]
        with torch.no_grad():
            self.first.weight *= random.random() + numpy.random.rand()

    def forward(self, images):
        x = self.first(images.flatten(1)).relu()
        if self.training:
            x = x * (0.5 + random.random()) * (0.5 + numpy.random.rand())
            x = x + torch.rand(24, generator=self.own) + self.others[0]["python"].gauss(0, 1)
            x = x * self.others[1][0].normal(1, 0.1)
        return self.head(F.dropout(x))
'''


def test_what_a_forward_draws_follows_from_seed_step_and_shard_whoever_it_draws_from(folder):
    (folder / "nets.py").write_text(NETS + DRAWING.replace("Net", "Drawing"))
    for name, count in (("drawn-1", 1), ("drawn-2", 2)):
        done = run(folder, name, "Drawing", "--bitwise", "--log-every", "1", processes=count)
        assert done.status == 0, done.out
    words = ["--model", f"{folder}/nets.py:Drawing", *SHORT, "--bitwise", "--log-every", "1"]
    done = train([*words, "--run-dir", "drawn-3"], folder, LOCKSTEP_FAULT="term@step=7")
    assert done.status == 75, done.out
    done = train(["--resume", "drawn-3"], folder)
    assert done.status == 0, done.out
    for name in ("drawn-2", "drawn-3"):
        assert rows(folder / name) == rows(folder / "drawn-1"), name
        assert same_weights(folder / name, folder / "drawn-1") == [], name
    told = rows(folder / "drawn-1")[-1]["test/accuracy"]
    again = train(["--resume", "drawn-1", "--eval-only"], folder)
    assert again.status == 0 and told > 0


def test_generators_that_are_seeded_alike_draw_alike_and_each_its_own(monkeypatch):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = {"a": [random.Random(), torch.Generator()], "b": numpy.random.default_rng()}
            self.twice = self.held["a"][0]
            self.old, self.real = numpy.random.RandomState(), random.SystemRandom()

    def draw(holder):
        (first, second), third = holder.held["a"], holder.held["b"]
        mine = [first.random(), torch.rand((), generator=second).item(), third.random()]
        return [
            *mine,
            holder.old.rand(),
            random.random(),
            numpy.random.rand(),
            torch.rand(()).item(),
        ]

    found = []
    for seed in (7, 7, 8):
        holder = nn.Sequential(Holder())
        Generators(torch.device("cpu"), [holder]).seed(seed)
        found.append(draw(holder[0]))
    assert found[0] == found[1] and not set(found[0]) & set(found[2]) and len(set(found[0])) == 7
