"""How many operations the host hands to a GPU for each piece of a step, counted without a GPU.

Tensors are faked ("cuda", shapes and no memory), so this runs anywhere. Forward and backward are
the model's own affair and are not counted; neither are views, which the device never sees. A pass
over a list counts once. Whatever makes the host wait, or mixes devices, raises an error.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data.augment
from bench.measure import arguments_of, finish, table
from config import BatchPlan, TrainConfig
from data import operators
from data.augment import Augment
from data.loaders import Resident, evaluation_batch
from data.order import EvaluationBatchSampler, GlobalBatchSampler
from data.policy import KINDS
from distributed.shards import Guard, Shards
from models import build_model, lookup
from optim import WeightAverage, build_optimizer
from tasks import Classification
from tasks.evaluation import Evaluation

MODELS = ("speednet", "resnet18")
BATCH, SAMPLES, CLASSES = 128, 1000, 10
POLICIES = [f"crop|{name}" for name in operators.OPERATORS]
MIXES = {"": {}, ", mixup": {"mixup": 0.2}, ", cutmix": {"cutmix": 1.0}}
NOT_LAUNCHED = ("empty", "_unsafe_view", "detach", "alias", "lift_fresh", "prim::device", "is_same")


class Launches(TorchDispatchMode):
    """Counts what would be launched; AssertionError for a wait or for tensors of two devices."""

    def __init__(self, strict: bool = True):
        super().__init__()
        self.strict = strict
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: tuple, args: tuple = (), kwargs: dict | None = None
    ):
        name = func._schema.name.removeprefix("aten::")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # A 0-dim tensor of the CPU is a number among the arguments of a kernel.
        devices = {x.device.type for x in given if x.ndim or x.device.type == "cuda"}
        assert name != "_local_scalar_dense", "the host reads a number of the device: it waits"
        assert len(devices) < 2, f"{name} of tensors on {devices}"
        if name.startswith("_fused"):  # they ask for a driver even of fake tensors
            self.names.append(name)
            return None
        result = func(*args, **(kwargs or {}))
        made = {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
        assert made <= devices or not devices or not self.strict, (
            f"{name} copies from {devices} to {made}"
        )
        if not func.is_view and not name.startswith(NOT_LAUNCHED):
            self.names.append(name)
        return result


@contextlib.contextmanager
def fake_gpu() -> Iterator[torch.device]:
    """A device "cuda" whose tensors have shapes only; no constant of it outlives the block."""
    for alpha in (0.2, 1.0):
        data.augment.beta_table(alpha)  # made of real numbers
    rooms = vars(data.augment) | vars(operators)
    constants = [v for v in rooms.values() if hasattr(v, "cache_clear")]
    constants.remove(data.augment.beta_table)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield torch.device("cuda")
    finally:
        for function in constants:
            function.cache_clear()


def count(piece: Callable[[], object]) -> list[str]:
    """What `piece` launches when it is called for the second time: constants are there by then."""
    with Launches(strict=False):  # copies of constants are made once
        piece()
    with Launches() as launches:
        piece()
    return launches.names


def resident(device: torch.device, side: int = 32) -> Resident:
    images = torch.empty(SAMPLES, 3, side, side, dtype=torch.uint8, device=device)
    return Resident(images, torch.empty(SAMPLES, dtype=torch.int64, device=device))


def training_batch(device: torch.device) -> dict[str, Tensor]:
    return resident(device).__getitems__(
        next(iter(GlobalBatchSampler(SAMPLES, BATCH, 0, device=device)))
    )


def augmenting(
    kind: str, device: torch.device, mixup: float = 0.0, cutmix: float = 0.0
) -> list[str]:
    """One batch of training images, augmented and mixed; the choices of the epoch are there."""
    augment = Augment(
        kind, 32, (0.5,) * 3, (0.25,) * 3, 0, samples=SAMPLES, mixup=mixup, cutmix=cutmix
    )
    batch = training_batch(device)

    def piece() -> None:
        images = augment.train(batch["images"], batch["indices"], 3)
        if augment.mixup or augment.cutmix:
            augment.mix(images, batch["labels"], batch["indices"], 3, CLASSES)

    return count(piece)


def evaluating(device: torch.device, image_size: int, tta: int = 0) -> tuple[list[str], int]:
    """One batch of an evaluation beside the model's forward, and the batches of 10,000 images."""
    size = evaluation_batch(10_000, image_size, device)
    augment = Augment("none", image_size, (0.5,) * 3, (0.25,) * 3, 0, tta=tta)
    task, data = Classification(CLASSES), resident(device)
    found = Evaluation(task, 10_000, device)
    indices = next(iter(EvaluationBatchSampler(10_000, size, device)))
    logits = torch.empty(size, CLASSES, device=device, dtype=torch.bfloat16)

    def model(view: Tensor) -> Tensor:
        view.to(device).contiguous(memory_format=torch.channels_last)
        return logits

    def piece() -> None:
        batch = data.__getitems__(indices)
        answer = augment.vote(model, augment.evaluate(batch["images"]))
        found.add(answer, batch)

    return count(piece), -(-10_000 // size)


def model_on(device: torch.device, name: str, image_size: int = 32) -> nn.Module:
    """A model whose parameters have gradients, all of them fakes."""
    with unset_fake_temporarily():  # to fill fakes with starting weights takes long
        model = build_model(name, num_classes=CLASSES, image_size=image_size)
    for module in model.modules():
        for key, b in module.named_buffers(recurse=False):
            module._buffers[key] = torch.empty(b.shape, dtype=b.dtype, device=device)
        for key, p in module.named_parameters(recurse=False):
            last = p.ndim == 4 and lookup(name).channels_last
            layout = torch.channels_last if last else torch.contiguous_format
            fake = torch.empty(p.shape, device=device, memory_format=layout)
            made = module._parameters[key] = nn.Parameter(fake, p.requires_grad)
            if p.requires_grad:
                made.grad = torch.empty_like(fake)
    return model


def updating(device: torch.device, model: nn.Module, optimizer: str) -> list[str]:
    """One update of a model by an optimizer that may have to leave it out."""
    made = build_optimizer(model, TrainConfig(optimizer=optimizer))
    vars(made).update(found_inf=torch.zeros((), device=device), grad_scale=None)
    step = type(made).step  # without the optimizer's hooks for profilers
    for p in (p for group in made.param_groups for p in group["params"]):
        if optimizer == "adamw":
            made.state[p] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p),
            }  # fmt: skip
    return count(lambda: step(made))


def guarding(device: torch.device, skip: bool = True) -> list[str]:
    guard = Guard(device, cast(Optimizer, SimpleNamespace()), skip)
    norm, losses = (torch.zeros((), device=device) for _ in range(2))
    return count(lambda: guard.check(norm, losses, 5))


def undoing(device: torch.device, model: nn.Module) -> list[str]:
    """The buffers of a model put back where a step is left out, with the copy made before it."""
    alone = SimpleNamespace(
        unwrap_model=lambda model: model, process_index=0, num_processes=1,
        distributed_type=DistributedType.NO,
        device=torch.device("cpu"),  # whose generator is seeded for dropout
    )  # fmt: skip
    plan = BatchPlan(batch_size=BATCH, num_processes=1, shards=1)
    shards = Shards(cast(Accelerator, alone), model, plan, lambda step, shard: 0, False)
    shards.undoes = True
    batch, found = training_batch(device), torch.zeros((), device=device)

    for p in model.parameters():
        p.grad = torch.empty_like(p)  # a backward's

    def piece() -> None:
        for _ in shards(batch, 0):
            pass
        shards.undo_buffers(found)

    return count(piece)


def averaging(device: torch.device, model: nn.Module) -> list[str]:
    skipped = torch.zeros((), device=device)
    average = WeightAverage(nn.Identity(), 0.99)  # which copies its model: no fakes
    average.model = model
    return count(lambda: average.update(model, 99, skipped))


def losing(device: torch.device, soft: bool = False) -> list[str]:
    """The loss of a batch and the right answers, and their sums kept on the device."""
    task, sums = Classification(CLASSES), torch.zeros(1, device=device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    logits = torch.empty(BATCH, CLASSES, device=device, dtype=torch.bfloat16)
    labels = training_batch(device)["labels"]
    labels = torch.empty(BATCH, CLASSES, device=device) if soft else labels

    def piece() -> None:
        sums[0] += task.loss(logits, labels)
        right.add_(task.right(logits, labels))

    return count(piece)


def measure() -> dict[str, dict[str, int]]:
    """Launches of each piece, by group and name."""
    with fake_gpu() as device:
        step = {
            f"{kind}{words}": len(augmenting(kind, device, **mix))
            for kind in (*KINDS, *POLICIES)
            for words, mix in MIXES.items()
        }
        data, batch = resident(device), torch.empty(BATCH, dtype=torch.int64, device=device)
        step["the batch"] = len(count(lambda: data.__getitems__(batch)))
        step["loss"] = len(losing(device))
        step["guard"] = len(guarding(device))
        models = {name: model_on(device, name) for name in MODELS}
        update = {
            f"{name}: {word}": len(pieces)
            for name, model in models.items()
            for word, pieces in (
                *((o, updating(device, model, o)) for o in ("sgd", "adamw", "muon")),
                ("average", averaging(device, model)),
                ("buffers undone", undoing(device, model)),
            )
        }
        evaluation = {}
        for size in (32, 224):
            for tta in (0, 2):
                pieces, batches = evaluating(device, size, tta)
                evaluation[f"{size} px, tta {tta}: a batch"] = len(pieces)
                evaluation[f"{size} px, tta {tta}: 10,000 images"] = len(pieces) * batches
    return {"a step": step, "an update": update, "an evaluation": evaluation}


def markdown(results: dict) -> str:
    rows = [
        [f"{group}, {name}", number]
        for group, numbers in results.items()
        for name, number in numbers.items()
    ]
    return table(["beside forward and backward", "launches"], rows)


def main() -> int:
    arguments = arguments_of(__doc__).parse_args()
    results = measure()
    print(markdown(results))
    finish(arguments, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
