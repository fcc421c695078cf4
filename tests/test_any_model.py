"""Whatever a model is made of, its run is the same on any number of processes."""

import contextlib
import json
import random
import threading
from types import SimpleNamespace

import numpy
import pytest
import torch
from launches import Done, python, rows, same_weights, train
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import predict
from common.errors import UserError
from data.loaders import Resident
from distributed.checksums import checksum
from distributed.generators import Generators
from distributed.shards import Arrivals, EveryParameter
from models import build_model
from models.state import whole_state
from models.weights import freeze_backbone, head_prefixes
from tasks import Classification
from training import trial

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


def test_a_launcher_of_one_process_trains_as_no_launcher_does(folder):
    """It brings DDP, which wants a gradient of every parameter, where one process has none."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, world in (("plain", {}), ("launched", alone)):
        words = ["--model", f"{folder}/nets.py:Net", *SHORT, "--run-dir", name]
        done = train([*words, *OPTIMIZERS["adamw"]], folder, **world)
        assert done.status == 0, done.out
    launched = weights(folder, "launched")
    for key, value in weights(folder, "plain").items():
        assert torch.allclose(value, launched[key], rtol=1e-3, atol=1e-5), key


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


@pytest.mark.slow
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


# --- what the trial step measures -----------------------------------------------------------------


class Small(nn.Module):
    """A linear net on images of 8 pixels, with something before its head."""

    def __init__(self, before=None, after=None):
        super().__init__()
        self.head, self.before, self.after = nn.Linear(192, 10), before, after

    def forward(self, images):
        x = images if self.before is None else self.before(images)
        x = self.head(x.flatten(1))
        return x if self.after is None else self.after(x)


class ReadingNorm(nn.BatchNorm2d):
    """Normalises by its running statistics while it trains, too."""

    def forward(self, x):
        super().forward(x)
        return x - self.running_mean.view(1, -1, 1, 1)


class Counting(nn.Module):
    def __init__(self, as_buffer=False):
        super().__init__()
        self.calls = 0
        if as_buffer:
            del self.calls
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return x * (1 + 0.1 * self.calls)


class FirstBatch(nn.Module):
    """Learns its scale from the first batch that it sees, as ActNorm does."""

    def __init__(self):
        super().__init__()
        self.scale, self.ready = nn.Parameter(torch.ones(())), False

    def forward(self, x):
        if self.training and not self.ready:
            self.scale.data, self.ready = 1 / x.std().detach(), True
        return x * self.scale


class Remembering(nn.Module):
    """What it keeps of training is read in evaluation alone."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(())

    def forward(self, x):
        if self.training:
            self.mean = 0.5 * self.mean + x.detach().mean()
        return x if self.training else x - self.mean


class Saving(Counting):
    """Keeps its count where a checkpoint finds it."""

    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, state):
        self.calls = state


def trial_of(model: nn.Module, size: int = 16) -> trial.Trial:
    torch.manual_seed(0)
    images = Resident(torch.randn(100, 3, 8, 8), torch.arange(100) % 10)
    data = SimpleNamespace(
        train=images, batch=SimpleNamespace(micro_batch_size=size), classes=range(10),
        augment=SimpleNamespace(train=lambda images, *_: images, evaluate=lambda images: images),
        source=SimpleNamespace(task="classification", name="x"),
    )  # fmt: skip
    there = SimpleNamespace(autocast=contextlib.nullcontext)
    world = SimpleNamespace(device=torch.device("cpu"), accelerator=there)
    config = SimpleNamespace(model="my_cnn", image_size=8, mixed_precision="no")
    before = {k: v.clone() for k, v in whole_state(model).items()}
    found = trial.try_model(model, Classification(10), data, config, world, debug=False)
    assert all(torch.equal(v, before[k]) for k, v in whole_state(model).items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    return found


def untracked() -> nn.Module:
    return nn.BatchNorm2d(3, track_running_stats=False)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (None, None, {}),
        (nn.BatchNorm2d(3), None, {}),
        (nn.Dropout(0.5), None, {}),
        (untracked(), None, {"neighbours": True}),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), untracked(), nn.Upsample(8)), None,
         {"neighbours": True}),
        (F.dropout, None, {"random": True}),
        (None, nn.Softmax(1), {"probabilities": True}),
        (None, nn.LogSoftmax(1), {}),
        (Counting(), None, {"hidden": ("before.calls",)}),
        (Saving(), None, {}),
        (FirstBatch(), None, {"hidden": ("before.ready", "before.scale")}),
        (Remembering(), None, {"hidden": ("before.mean",)}),
        (ReadingNorm(3), None, {"reads": True}),
        (Counting(as_buffer=True), None, {"reads": True}),
        (None, lambda x: {"features": x, "logits": x}, {}),
        (None, lambda x: SimpleNamespace(logits=x), {}),
        (None, lambda x: (x, x), {}),
    ],
    ids=map(str, range(17)),
)  # fmt: skip
def test_what_a_model_does_is_measured(before, after, says):
    found = trial_of(Small(before, after))
    usual = {"neighbours": False, "random": False, "probabilities": False, "hidden": ()}
    reads = says.get("reads", False)
    assert {name: getattr(found, name) for name in usual} | {"reads": reads} == usual | {
        "reads": reads
    } | says
    assert found.nature.reads_buffers == reads


def test_an_answer_without_logits_says_what_was_answered():
    for answer, says in (({"out": 1}, "a dict"), (SimpleNamespace(), "SimpleNamespace")):
        with pytest.raises(UserError, match=f"answers a.*{says}.*as `logits`") as error:
            trial_of(Small(None, lambda x, answer=answer: answer))
        assert error.value.code == "no-logits"


def test_a_model_that_python_cannot_copy_is_a_sentence_and_a_run_builds_it_again():
    class Locked(Small):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    with pytest.raises(UserError, match="lock") as error:
        trial_of(Locked())
    assert error.value.code == "no-second-instance"


def test_the_head_is_the_last_layer_to_run_in_whatever_order_init_made_them(folder):
    (folder / "turned.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes=10):\n"
        "        super().__init__()\n"
        "        self.scale = nn.Parameter(nn.init.ones_(nn.Linear(1, 1).weight)[0])\n"
        "        self.head = nn.Linear(12, num_classes)\n"
        "        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(2))\n"
        "    def forward(self, x):\n"
        "        return self.scale * self.head(self.body(x).flatten(1))\n"
    )
    name = f"{folder}/turned.py:Net"
    model = build_model(name, num_classes=5, image_size=8)
    assert head_prefixes(model, name, 8) == ("head.",)
    freeze_backbone(model, name, 8)
    assert [k for k, p in model.named_parameters() if p.requires_grad] == [
        "head.weight", "head.bias",
    ]  # fmt: skip


COUNTS = """
from torch import nn

class Counts(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.head, self.calls = nn.Linear(192, num_classes), 0

    def forward(self, images):
        self.calls += self.training
        return self.head(images.flatten(1)) * (1 + 0.01 * self.calls)
"""


@pytest.mark.slow
def test_state_that_a_model_hides_is_told_kept_with_the_run_and_compared(folder):
    (folder / "counts.py").write_text(COUNTS)
    words = ["--model", f"{folder}/counts.py:Counts", *SHORT, "--max-steps", "2"]
    for name, count in (("counts-1", 1), ("counts-1b", 1), ("counts-2", 2)):
        done = train([*words, "--run-dir", name], folder, count)
        assert done.status == 0 and "keeps state of its own (calls)" in done.out, done.out

    def same(other: str) -> tuple[int, str]:
        done = python("-m", "bench.same", folder / "counts-1", folder / other)
        return done.returncode, done.stdout

    assert same("counts-2") == (1, "processes: 1 and 2, and the model hides calls\n")
    status, told = same("counts-1b")
    assert status == 0 and "on this number of processes only: the model hides calls" in told


# --- what a model holds is saved, and is the same on all processes --------------------------------

EVERYTHING = """
import os, torch
from torch import nn

class Everything(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.body = nn.utils.weight_norm(nn.Linear(192, 24))
        self.turn = nn.Parameter(torch.randn(24, dtype=torch.complex64))
        self.head = nn.Linear(24, num_classes)
        self.register_buffer("mean", torch.zeros(192), persistent=False)
        self.register_buffer("table", torch.arange(24), persistent=False)
        self.register_buffer("scale", torch.full((1,), 0.5).expand(24))
        self.told = "new"

    def get_extra_state(self):
        return {"told": self.told, "numbers": torch.tensor([[1.5, 2.5]])}

    def set_extra_state(self, state):
        self.told = state["told"]
        assert state["numbers"].shape == (1, 2)

    def forward(self, images):
        x = images.flatten(1)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.told = "trained"
        x = self.body(x - self.mean).tanh()[:, self.table] * self.scale
        answer = self.head((x * self.turn).abs() + (x * self.turn).real)
        return answer if self.told == "trained" else answer * 0

class Drifting(nn.Linear):
    def __init__(self, num_classes=10):
        super().__init__(192, num_classes)

    def forward(self, images):
        if self.training and os.environ.get("RANK") == "1":
            self.bias.data[3] += 1e-6
        return super().forward(images.flatten(1))
"""


@pytest.mark.slow
def test_all_that_a_model_holds_is_saved_evaluated_predicted_with_and_shared(folder):
    (folder / "all.py").write_text(EVERYTHING)
    words = ["--model", f"{folder}/all.py:Everything", *SHORT, "--ema", "0.5", "--log-every", "1"]
    words += ["--max-steps", "20", "--lr", "0.02"]
    for name, count, way in (
        ("all-1", 1, ["--bitwise"]), ("all-2", 2, ["--bitwise"]), ("all-sum", 2, []),
        ("all-sgd", 1, ["--optimizer", "sgd", "--momentum", "0.9"]),
    ):  # fmt: skip
        done = train([*words, *way, "--run-dir", name], folder, count)
        assert done.status == 0, done.out
    stopped = [*words, "--bitwise", "--run-dir", "all-3"]
    assert train(stopped, folder, LOCKSTEP_FAULT="term@step=7").status == 75
    assert train(["--resume", "all-3"], folder, 2).status == 0
    for name in ("all-2", "all-3"):
        assert rows(folder / name) == rows(folder / "all-1"), name
        assert same_weights(folder / name, folder / "all-1") == [], name
    kept = weights(folder, "all-1")
    assert "mean" in kept and "table" not in kept and kept["turn"].is_complex()
    for key, value in weights(folder, "all-sum").items():
        assert torch.allclose(value, kept[key], rtol=1e-3, atol=1e-4), key
    best = json.loads((folder / "all-1/summary.json").read_text())["best/test/accuracy"]
    assert best > 0.3
    done = train(["--resume", "all-1", "--eval-only"], folder)
    assert f"accuracy {best:.6g}" in done.out, done.out
    model, _ = predict.load_run(folder / "all-1")
    assert model.told == "trained" and model.mean.any()


def test_processes_that_drift_apart_are_stopped_with_the_name_of_the_tensor(folder):
    (folder / "all.py").write_text(EVERYTHING)
    words = ["--model", f"{folder}/all.py:Drifting", *SHORT, "--run-dir", "drift"]
    done = train(words, folder, 2)
    assert done.status != 0
    assert "drifted apart: bias is not the same" in done.out and "Traceback" not in done.out
    assert json.loads((folder / "drift/status.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("size", [1, 7, 2**15, 2**15 + 1, 100_000])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64, torch.complex64])
def test_a_checksum_sees_each_number_and_its_place(size, kind):
    torch.manual_seed(0)
    numbers = (torch.randn(size) * 100).to(kind)
    found = checksum(numbers)
    assert found == checksum(numbers.clone()) and found.shape == ()
    for place in {0, size // 2, size - 1}:
        other = numbers.clone()
        other[place] += 1
        assert checksum(other) != found
    if size > 1:
        for a, b in ((0, 1), (0, size - 1), (size // 3, size // 2)):
            if a != b and numbers[a] != numbers[b]:
                other = numbers.clone()
                other[[a, b]] = numbers[[b, a]]
                assert checksum(other) != found


def test_what_cannot_be_saved_without_pickle_is_refused_by_name():
    class Odd(nn.Module):
        def get_extra_state(self):
            return {1, 2}

    with pytest.raises(UserError, match=r"0\.get_extra_state answers what cannot be saved.*set"):
        whole_state(nn.Sequential(Odd()))
