"""Logical shards: dropout and batch norm that do not depend on the number of processes.

A step's global batch is cut into `shards` equal parts, a constant of the run. Each process computes
its own share of them, one forward and backward each; that is gradient accumulation, so the number
of processes may change later while the numbers stay (EasyScale, SC'23, calls it accuracy-consistent
elasticity). Whatever is drawn is seeded by (seed, step, shard); batch norm sees one shard; the
running statistics are those after shard 0.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import Node
from torch.nn.parallel import DistributedDataParallel as DDP

from config import BatchPlan
from distributed.generators import Generators
from distributed.pace import Pace
from models.state import as_real


def packed(tensors: list[Tensor]) -> dict[torch.dtype, Tensor]:
    """A copy of all the numbers, flat, one tensor per dtype: few launches, however many tensors."""
    kinds = dict.fromkeys(t.dtype for t in tensors)  # a set has no order to share
    return {kind: torch.cat([t.flatten() for t in tensors if t.dtype == kind]) for kind in kinds}


@torch.no_grad()
def unpack(copy: dict[torch.dtype, Tensor], tensors: list[Tensor]) -> None:
    """Give the tensors the numbers of a `packed` copy."""
    for kind, flat in copy.items():
        same = [t for t in tensors if t.dtype == kind]
        parts = flat.split([t.numel() for t in same])
        parts = [p.view(t.shape) for p, t in zip(parts, same, strict=True)]
        try:
            torch._foreach_copy_(same, parts)
        except RuntimeError:  # an expanded view, made by a forward, has no room for its numbers
            for tensor, part in zip(same, parts, strict=True):
                tensor.set_(part.clone())  # pyright: ignore[reportArgumentType] - a tensor will do


@dataclass(frozen=True)
class Nature:
    """What the trial step measured of a model and its shards have to know."""

    reentrant: bool = False  # a parameter's gradient arrives more than once in a backward
    reads_buffers: bool = True  # what training answers depends on them, as far as is known
    changing: tuple[str, ...] = ()  # buffers that training changes and that are not persistent


class EveryParameter(torch.autograd.Function):
    """A loss that hangs on all parameters, without a gradient for those that it did not use.

    DDP waits for each parameter of its model: without this, for ever for those that a branch of
    forward left out, on one process or on all. `find_unused_parameters` walks the graph instead.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)  # pyright: ignore[reportAttributeAccessIssue]  # the way torch has
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        count: int = ctx.count  # pyright: ignore[reportAttributeAccessIssue]
        return gradient, *(None,) * count


class Arrivals:
    """Counts how often each parameter's gradient arrives, as DDP's hooks would, in a backward.

    Under reentrant `torch.utils.checkpoint` a backward runs inside the backward, and the two of
    them bring one each; DDP refuses that.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.counts = [0] * len(parameters)
        self.nodes, self.handles = [], []
        for place, p in enumerate(parameters):
            view = cast(Node, p.view_as(p).grad_fn)
            node = cast(Node, view.next_functions[0][0])  # kept: it lives as long as it is held
            self.nodes.append(node)
            self.handles.append(node.register_hook(functools.partial(self._arrived, place)))

    def _arrived(self, place: int, *_: tuple) -> None:
        self.counts[place] += 1

    def take(self) -> bool:
        """Whether one arrived more than once; the counting ends."""
        for handle in self.handles:
            handle.remove()
        self.nodes.clear()
        return max(self.counts, default=0) > 1


class ExactSum:
    """The sum of all shards' gradients in whole multiples of 2**-44, as int64.

    Adding integers is exact, so nothing that only changes the order of the additions can change a
    bit: how the shards are spread over processes, nor how a ring or a tree adds the processes.
    A shard's number of 2**18 / shards and more, or none at all (NaN), might not fit; such shards
    are counted in one more integer, and where there was one, on any process, all gradients are NaN.
    Costs 8 bytes a parameter, and DDP's overlap of communication and computation.
    """

    GRID, MOST = 2.0**44, 2.0**18  # the whole sum stays below 2**62

    def __init__(self, parameters: list[nn.Parameter], shards: int):
        self.parameters = parameters
        views = [as_real(p) for p in parameters]
        self.most = self.MOST / shards
        # What gradients have: the weights' strides, where these leave no gaps.
        self.strides = [torch.empty_like(v, device="meta").stride() for v in views]
        self.sizes = [v.numel() for v in views]
        kinds = (v.dtype for v in views)
        self.dtype = functools.reduce(torch.promote_types, kinds, torch.float32)
        device = parameters[0].device if parameters else None
        self.total = torch.zeros(sum(self.sizes) + 1, dtype=torch.int64, device=device)
        self.block = 2**15 if self.total.device.type == "cpu" else 2**24  # in a core's cache

    @torch.no_grad()
    def add(self, scale: Tensor | float = 1.0) -> None:
        """Move this shard's gradients, which are `scale` times too large, into the sum."""
        lying = map(self._as_they_lie, self.parameters, self.strides)
        numbers = torch.cat(list(lying)).to(self.dtype)
        for p in self.parameters:
            p.grad = None
        lowest, highest = numbers.aminmax()  # NaN, if there is one
        most = self.most * scale
        self.total[-1].add_(~((lowest > -most) & (highest < most)))
        parts = zip(numbers.split(self.block), self.total[:-1].split(self.block), strict=True)
        for part, total in parts:
            total += (part * (self.GRID / scale)).round_().long()

    @staticmethod
    def _as_they_lie(p: nn.Parameter, stride: tuple[int, ...]) -> Tensor:
        """The gradient's numbers in the order of the memory, flat."""
        if p.grad is None:
            return as_real(p).new_zeros(as_real(p).numel())
        lies = as_real(p.grad)
        if lies.stride() != stride:
            kind = {"dtype": lies.dtype, "device": lies.device}
            lies = torch.empty_strided(lies.shape, stride, **kind).copy_(lies)
        return lies.as_strided((lies.numel(),), (1,))

    @torch.no_grad()
    def hand_out(self, processes: int, scale: Tensor | float = 1.0) -> None:
        """Add up the processes, and give every parameter its gradient, `scale` times too large."""
        if processes > 1:
            dist.all_reduce(self.total)
        unit = torch.full((), math.nan, dtype=self.dtype, device=self.total.device)
        unit = torch.where(self.total[-1] > 0, unit, scale / self.GRID)
        numbers = torch.empty(sum(self.sizes), dtype=self.dtype, device=self.total.device)
        parts = zip(numbers.split(self.block), self.total[:-1].split(self.block), strict=True)
        for part, total in parts:
            torch.mul(total, unit, out=part)
        parts = numbers.split(self.sizes)
        for p, stride, part in zip(self.parameters, self.strides, parts, strict=True):
            real = as_real(p)
            gradient = part.as_strided(real.shape, stride).to(real.dtype)
            p.grad = torch.view_as_complex(gradient) if p.is_complex() else gradient
        self.total.zero_()


class Shards:
    """Hands out this process's shards of each step and makes the sum of all gradients.

    With bitwise=True the sum has the same bits on any number of processes: see ExactSum.
    Every trainable parameter gets a gradient, zero where no shard of any process used it, so that
    its momentum and weight decay go on however the shards are spread.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, plan: BatchPlan,
        seed_of: Callable[[int, int], int], bitwise: bool, nature: Nature = Nature(),
        weight: Callable[[Tensor], Tensor | None] | None = None, unit: float = 1.0,
        pace: Pace | None = None,
    ) -> None:  # fmt: skip
        self.accelerator = accelerator
        self.weight, self.unit = weight, unit  # what labels weigh together, in whole units
        self.model = model
        self.bare = accelerator.unwrap_model(model)
        self.plan = plan
        self.seed_of = seed_of  # (step, shard) -> an integer seed
        self.generators = Generators(accelerator.device, [self.bare])
        self.bitwise = bitwise
        self.mine = plan.shards_of(accelerator.process_index)
        self.first, self.count = self.mine.start, self.mine.stop - self.mine.start
        # A launcher brings DDP even where it starts one process.
        self.wrapped = accelerator.distributed_type != DistributedType.NO
        # DDP adds up the processes where neither an exact sum does nor a reentrant backward.
        self.by_ddp = self.wrapped and not (bitwise or nature.reentrant)
        self.last = True  # whether the shard that was handed out is the last one of the step
        # What a loss summed over a shard is multiplied by before backward: DDP divides by its
        # number of processes, and every image of the global batch weighs the same.
        self.divisor = accelerator.num_processes if self.by_ddp else 1
        self.scale: float | Tensor = self.divisor / plan.batch_size
        self.parameters = [p for p in self.bare.parameters() if p.requires_grad]
        # What the next forward reads is kept equal on all processes step by step; running
        # statistics, which training does not read, before each evaluation and each save.
        self.read_in_training = nature.reads_buffers and bool(self.buffers)
        self.pace = pace or Pace(0, 1, accelerator.device)
        if self.by_ddp:
            self.pace.follow(self.parameters)
        self.undoes = False  # whether undo_buffers puts the buffers from before a step back
        self.before: dict[torch.dtype, Tensor] = {}
        self.sum = ExactSum(self.parameters, plan.shards) if bitwise else None
        self.bad_number = "a number that is not finite"
        if self.sum is not None:
            self.bad_number += f" (or of {self.sum.most:,.0f} and more, with --bitwise)"

    @property
    def buffers(self) -> list[Tensor]:
        """Looked up each time: a module may put another tensor in a buffer's place."""
        return list(self.bare.buffers())

    def __call__(self, batch: dict, step: int) -> Iterator[dict]:
        """Yield the shards of this process: the loop runs forward and backward on each."""
        count, size = self.count, self.plan.micro_batch_size
        if self.weight is not None:
            self._weigh(self.weight(batch["labels"]))
        self.before = packed(self.buffers) if self.undoes or count > 1 else {}
        after_first: dict[torch.dtype, Tensor] = {}
        for index in range(count):
            self.last = index == count - 1
            if index > 0:
                unpack(self.before, self.buffers)
            self.generators.seed(self.seed_of(step, self.first + index))
            quiet = self.wrapped and not (self.by_ddp and self.last)
            sync = cast(DDP, self.model).no_sync() if quiet else contextlib.nullcontext()
            with sync:
                part = slice(index * size, (index + 1) * size)
                self.pace.lap()
                yield {name: values[part] for name, values in batch.items()}
            self.pace.shard_done(waits=self.by_ddp and self.last)
            if count > 1 and index == 0:
                after_first = packed(self.buffers)
            if self.sum is not None:
                self.sum.add(self._loss_scale())
        unpack(after_first, self.buffers)
        if self.sum is not None:
            self.sum.hand_out(self.accelerator.num_processes, self._loss_scale())
        self._fill_and_add()
        if self.read_in_training:
            self.broadcast_buffers()

    def _weigh(self, units: Tensor | None) -> None:
        """Where images weigh by their class, the step's loss is divided by what all of them weigh.

        A sum of integers: exactly the same on any number of processes.
        """
        if units is not None:
            if self.accelerator.num_processes > 1:
                dist.all_reduce(units)
            self.scale = self.divisor / (units.clamp(min=1).float() * self.unit)

    def weighed(self, loss: Tensor) -> Tensor:
        """The share in the step's loss of a loss that is summed over the shard handed out."""
        self.pace.lap()
        loss = loss * self.scale
        if self.by_ddp and self.last:
            return EveryParameter.apply(loss, *self.parameters)
        return loss

    def _fill_and_add(self) -> None:
        """Zero is the gradient of what nobody used; the sum that neither DDP nor ExactSum made."""
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.accelerator.num_processes > 1 and not (self.by_ddp or self.bitwise):
            gradients = [p.grad for p in self.parameters]
            copy = packed(gradients)
            for flat in copy.values():
                dist.all_reduce(as_real(flat))
            unpack(copy, gradients)

    def _loss_scale(self) -> Tensor | float:
        """What fp16 multiplies the loss by, a power of two: it divides out without rounding."""
        scaler = self.accelerator.scaler
        if scaler is None or self.sum is None:
            return 1.0
        return scaler.scale(torch.ones((), device=self.sum.total.device))

    def undo_buffers(self, found: Tensor) -> Tensor:
        """Where the update is left out (found = 1), what its step did to the buffers is too."""
        if self.undoes:
            now, bad = packed(self.buffers), found > 0
            kept = {k: torch.where(bad, self.before[k], now[k]) for k in self.before}
            unpack(kept, self.buffers)
        return found

    @torch.no_grad()
    def broadcast_buffers(self) -> None:
        """Rank 0's buffers on every process: before each evaluation and each save."""
        if self.accelerator.num_processes == 1:
            return
        copy = packed(self.buffers)
        for flat in copy.values():
            dist.broadcast(as_real(flat), src=0)
        unpack(copy, self.buffers)


class Guard:
    """Notices numbers that are not finite before they reach the weights, without a host sync.

    Gradients are the same on every process once they are summed, so all processes see the same.
    The optimizer gets the finding as `found_inf` (the name of torch's fused optimizers) and leaves
    the weights alone; the host hears of it when it reads `report`.
    """

    def __init__(
        self, device: torch.device, optimizer: torch.optim.Optimizer, skip: bool, most: int = 10
    ):
        self.optimizer = optimizer
        self.skip, self.most = skip, most  # updates left out in a row, at most
        kind = {"dtype": torch.int64, "device": device}
        self.first = torch.tensor([-1, -1], **kind)  # bad step, bad loss
        self.skipped = torch.tensor([0, 0], **kind)  # in all, in a row

    def check(self, norm: Tensor, losses: Tensor, step: int) -> Tensor:
        """1.0 (0-dim, on the device) where the update must not be made; tells the optimizer."""
        both = torch.stack([norm, losses.to(norm.dtype)])
        bad = (both - both) != 0  # NaN is not 0: few launches, which isfinite has not
        new = bad & (self.first < 0)
        self.first = torch.where(new, step, self.first)
        if self.skip:  # a good update ends a streak: the next one has a first step of its own
            self.first = torch.where(bad[0], self.first, -1)
        self.skipped += bad[0]
        self.skipped[1].mul_(bad[0])
        found = (self.first[0] >= 0).float()  # without skip: from the first bad one on
        # As torch's gradient scaler tells its fused optimizers.
        self.optimizer.found_inf = found  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
        return found

    def report(self) -> dict[str, int]:
        """The first bad step, updates left out in all and in a row, the first bad loss.

        -1 is none; with skip the first is that of the latest streak. One host sync.
        """
        bad_step, bad_loss, skipped, in_a_row = torch.cat([self.first, self.skipped]).tolist()
        return {
            "bad_step": bad_step, "skipped": skipped, "in_a_row": in_a_row, "bad_loss": bad_loss
        }  # fmt: skip

    def must_stop(self, report: dict[str, int]) -> bool:
        if self.skip:
            return report["in_a_row"] >= self.most
        return report["bad_step"] >= 0
