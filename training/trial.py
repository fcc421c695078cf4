"""The trial step: a second instance of a model is tried before anything is written.

What a model does is measured, not believed: whether it can be trained, whether a shard's answer
follows from weights, buffers and images alone, whether an evaluation's does from one picture alone.
"""

import math
import re
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from common.errors import UserError
from config import TrainConfig
from data.keyed_random import hash_integers
from distributed.generators import Generators
from distributed.shards import Arrivals, EveryParameter, Nature
from distributed.watch import device_failed, out_of_memory
from distributed.world import World
from models import lookup
from models.own_file import about_channels, place_in
from models.pooling import without_deterministic_backward
from models.state import Plain, beside_state_dict, full_name, has_extra_state, twin
from tasks import Outputs, Task, split_outputs
from training.data import Data
from training.learner import inputs

MOST_IMAGES = 16  # enough to see a mistake and, on a CPU, to guess a step's time
PICTURES = 4  # that are evaluated
TRIAL = 104  # a stream of `hash_integers`, beside those of data/keyed_random.py
LONG = 5.0  # seconds of a forward and backward, after which nothing more is tried


@dataclass(frozen=True)
class Trial:
    """What forwards and backwards of a copy showed. `unused` parameters got no gradient in any.

    `hidden` names what makes the answer to a shard depend on the shards before it, `random` says
    that an evaluation draws, `neighbours` that an answer depends on the other pictures of its
    batch, `probabilities` that rows of the answer sum to 1.
    """

    seconds_per_image: float
    unused: tuple[str, ...] = ()
    nondeterministic: tuple[str, ...] = ()  # layers that --deterministic refuses on a GPU
    nature: Nature = field(default_factory=Nature)
    hidden: tuple[str, ...] = ()
    random: bool = False
    neighbours: bool = False
    probabilities: bool = False


class Tried:
    """A second instance with what its forwards are given; each call draws the same numbers."""

    def __init__(
        self, model: nn.Module, task: Task, data: Data,
        config: TrainConfig, world: World,
    ) -> None:  # fmt: skip
        self.model, self.task, self.data, self.config, self.world = model, task, data, config, world
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.generators = Generators(world.device, [model])
        self.channels_last = lookup(config.model).channels_last
        self.reentrant = False

    def batch(self, first: int, size: int) -> dict[str, Tensor]:
        indices = (torch.arange(size) + first) % len(self.data.train)
        return self.data.train.batch(indices.to(self.data.train.labels.device))

    def trains(self, batch: dict[str, Tensor]) -> Tensor:
        """A forward and backward: the numbers that it answered."""
        self.generators.seed(hash_integers(TRIAL))
        images = self.data.augment.train(batch["images"], batch["indices"], 0)
        images = inputs(images, self.world.device, self.channels_last)
        labels = batch["labels"].to(images.device)
        arrivals = Arrivals(self.parameters)
        with self.world.accelerator.autocast():
            answer = self.model.train()(images)
            refuse_other_shape(answer, len(labels), self.data, self.config.model)
            loss = self.task.loss(answer, labels)
        EveryParameter.apply(loss, *self.parameters).backward()
        self.reentrant = arrivals.take() or self.reentrant
        return torch.cat([split_outputs(answer)[0].detach().float().flatten(), loss.detach()[None]])

    @torch.no_grad()
    def evaluates(self, images: Tensor, draw: int = 0) -> Tensor:
        self.generators.seed(hash_integers(TRIAL, draw))
        images = inputs(self.data.augment.evaluate(images), self.world.device, self.channels_last)
        with self.world.accelerator.autocast():
            answer = self.model.eval()(images)
        refuse_other_shape(answer, len(images), self.data, self.config.model)
        return split_outputs(answer)[0].float()

    def same(self, one: Tensor, other: Tensor) -> bool:
        """Up to what the size of a batch and the place in memory change."""
        scale = one.abs().max().nan_to_num().clamp(min=1e-6)
        exact = self.config.mixed_precision == "no" and not one.is_cuda  # a GPU's floats have TF32
        near = 1e-4 if exact else 2e-2
        return torch.allclose(one / scale, other / scale, rtol=0, atol=near, equal_nan=True)


def try_model(
    model: nn.Module, task: Task, data: Data, config: TrainConfig,
    world: World, debug: bool, again: Callable[[], nn.Module] | None = None,
) -> Trial:  # fmt: skip
    """Forwards and backwards of a copy, or of what `again` builds where there can be none.

    Errors of a learner's model become sentences (UserError); `model` stays as it is.
    """
    try:
        second = twin(model)
    except UserError:
        if again is None:
            raise
        second = again()
    tried = Tried(second, task, data, config, world)
    size = data.batch.micro_batch_size
    if world.device.type != "cuda":  # a GPU takes as long for few images as for many
        size = min(size, MOST_IMAGES)
    trial = Trial(math.inf, nondeterministic=tuple(without_deterministic_backward(model)))
    try:
        trial = measured(tried, size, trial, debug)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        if debug or out_of_memory(error) or device_failed(error):
            raise
        if re.search("not have a deterministic implementation", str(error)):
            refused = ", ".join(trial.nondeterministic[:5])
            raise UserError(
                f"--model {config.model} --deterministic: {str(error).split()[0]} adds in an "
                f"order that changes ({refused or 'in its forward'}); AdaptivePool "
                "of models/pooling.py does not, or train without --deterministic",
                code="not-deterministic",
            ) from None
        shape = tuple(data.train.seen(torch.arange(size) % len(data.train)).shape)
        own = lookup(config.model).recipe.get("image_size", config.image_size)
        usual = f"--image-size {own} is its own; " if own != config.image_size else ""
        raise UserError(
            f"--model {config.model}: fails on {size} images {shape} at --image-size "
            f"{config.image_size}: {place_in(config.model, error)}"
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
            f"{about_channels(config.channels)}; {usual}"
            f"python -m models {config.model} --image-size {config.image_size} shows how far it "
            "comes, python train.py --debug with the same flags but --run-dir the traceback",
            code="model-fails",
        ) from None
    unused = [n for n, p in second.named_parameters() if p.requires_grad and p.grad is None]
    if unused and len(unused) == len(tried.parameters):
        raise UserError(
            f"--model {config.model}: no parameter gets a gradient; does forward use "
            "its layers, without .detach() or torch.no_grad()?",
            code="nothing-trains",
        )
    return replace(trial, unused=tuple(unused))


def measured(tried: Tried, size: int, trial: Trial, debug: bool) -> Trial:
    """Shards B, A, B from equal state, and four pictures that are evaluated in several ways."""
    model, world = tried.model, tried.world
    shard_b, shard_a = tried.batch(0, size), tried.batch(size, size)
    pictures = tried.batch(0, PICTURES)["images"]
    before, held, weights = kept_by(model), attributes(model), samples(model)
    answers, evaluated, changed = [], [], set()
    for shard in (shard_b,) if debug else (shard_b, shard_a):  # the first one also warms up
        began = time.monotonic()
        answers.append(tried.trains(shard))
        if answers[-1].is_cuda:
            torch.cuda.synchronize()
        took = time.monotonic() - began
        trial = replace(trial, seconds_per_image=min(took / size, trial.seconds_per_image))
        old, now = before.buffers, dict(model.named_buffers())
        changed |= {k for k, b in now.items() if k not in old or not torch.equal(b, old[k])}
        put_back(model, before)
        if took > LONG or debug:
            break
        evaluated.append(tried.evaluates(pictures))
    beside = beside_state_dict(model)
    nature = Nature(tried.reentrant, changing=tuple(sorted(changed & beside)))
    if len(evaluated) < 2:
        return replace(trial, nature=nature)
    held_now, answer, written = attributes(model), evaluated[1], samples(model)
    written = {k: text for k, text in written.items() if text != weights[k]}
    remembers = bool(written) or not tried.same(*evaluated)
    draws = not tried.same(answer, tried.evaluates(pictures, 1))
    neighbours = not draws and not alone(tried, pictures, answer)
    put_back(model, before, shifted=True)
    first, reads = answers[0], True
    try:
        reads = not tried.same(first, tried.trains(shard_b))
    except Exception:  # a forward may refuse such numbers: then it reads them
        if world.device.type != "cpu":
            raise
    if reads:
        put_back(model, before)
        remembers = not tried.same(first, tried.trains(shard_b)) or remembers
    hidden = ()
    if remembers:
        moved = [k for k in held_now if held.get(k, "") != held_now[k]]
        hidden = tuple(sorted([*moved, *written])) or ("something that forward keeps elsewhere",)
    tables = [n for n, b in model.named_buffers() if not _can_be_shifted(n, b)]
    rows = answer if answer.ndim == 2 and answer.shape[1] > 1 else answer.new_zeros(1, 1)
    sums_to_one = bool((rows >= 0).all() and ((rows.sum(1) - 1).abs() < 1e-3).all())
    return replace(
        trial, hidden=hidden, random=draws, probabilities=sums_to_one,
        neighbours=neighbours,
        nature=replace(nature, reads_buffers=bool(tables or (reads and now))),
    )  # fmt: skip


def alone(tried: Tried, pictures: Tensor, together: Tensor) -> bool:
    """Whether a picture alone is answered as it is among others."""
    try:
        return tried.same(together[:1], tried.evaluates(pictures[:1]))
    except Exception:  # batch norm that has no statistics of its own refuses one picture
        if tried.world.device.type != "cpu":
            raise
        return False


@dataclass(frozen=True)
class Kept:
    """What a checkpoint has of a model beside its parameters."""

    buffers: dict[str, Tensor]
    extra: dict[str, Plain]  # by module, what get_extra_state answers


def kept_by(model: nn.Module) -> Kept:
    """Copies of all buffers, and of what get_extra_state answers."""
    extra = {
        path: deepcopy(module.get_extra_state())
        for path, module in model.named_modules()
        if has_extra_state(module)
    }
    return Kept({k: b.clone() for k, b in model.named_buffers()}, extra)


@torch.no_grad()
def put_back(model: nn.Module, before: Kept, shifted: bool = False) -> None:
    """All of before; shifted: buffers with other numbers, where none can be a place in a table."""
    for path, state in before.extra.items():
        model.get_submodule(path).set_extra_state(deepcopy(state))
    now = dict(model.named_buffers())
    for name, old in before.buffers.items():
        value = old * 2 + 1 if shifted and _can_be_shifted(name, old) else old
        try:
            now[name].copy_(value)
        except (KeyError, RuntimeError):  # forward made it another kind of tensor
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path).register_buffer(leaf, value.clone())


def _can_be_shifted(name: str, buffer: Tensor) -> bool:
    """An integer may be a place in a table; batch norm's count of batches is known to be none."""
    return buffer.is_floating_point() or name.endswith("num_batches_tracked")


def attributes(model: nn.Module) -> dict[str, str]:
    """What modules keep beside parameters and buffers, as text that can be compared."""
    torchs = vars(nn.Module())
    return {
        full_name(path, name): _text(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in torchs
    }


def samples(model: nn.Module) -> dict[str, str]:
    """A few numbers of each parameter: a forward that writes into one changes most of them."""
    found = {}
    for name, p in model.named_parameters():
        numbers = p.detach().contiguous().view(-1)
        found[name] = repr(numbers[:: max(1, len(numbers) // 16)].tolist())
    return found


def _text(value: Tensor | float | str | list | dict | tuple | None) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.detach().double().sum().item()!r}"
    return repr(value)[:10_000] if isinstance(value, bool | int | float | str | list | dict) else ""


def refuse_other_shape(answer: Outputs, size: int, data: Data, name: str) -> None:
    """A classifier answers (size, classes) logits: other classes would be counted as these."""
    logits = split_outputs(answer)[0]
    wanted = (size, len(data.classes))
    if not isinstance(logits, Tensor):
        raise UserError(
            f"--model {name}: answers a {type(answer).__name__}; it must be a tensor {wanted} of "
            "logits, a tuple that begins with one, or a dict or object that has one as `logits`",
            code="no-logits",
        )
    if data.classes and tuple(logits.shape) != wanted:
        per_place = logits.ndim > 2 and tuple(logits.shape[:2]) == wanted
        way = "end forward with .flatten(2).mean(2), the mean over all places"
        if not per_place:
            way = "a class whose __init__ takes num_classes is given the number"
        raise UserError(
            f"--model {name}: answers {tuple(logits.shape)} to {size} images, but "
            f"{data.source.name} has {wanted[1]} classes: it must be {wanted}; {way}",
            code="other-shape",
        )
