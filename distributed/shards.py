"""Logical shards: dropout and batch norm that do not depend on the number of processes.

A step's global batch is cut into `shards` equal parts, a constant of the run. Each process computes
its own share of them, one forward and backward each; that is gradient accumulation, so the number
of processes may change later while the numbers stay (EasyScale, SC'23, calls it accuracy-consistent
elasticity). Dropout is seeded by (seed, step, shard); batch norm sees one shard; the running
statistics are those after shard 0.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from config import BatchPlan


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed torch's generators of CPU and device; a hundred times cheaper than torch.manual_seed."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


class Shards:
    """Hands out this process's shards of each step and makes the sum of all gradients.

    With bitwise=True every shard's gradient is kept apart and all are added in the order of the
    shards, so the sum has the same bits on any number of processes; it costs memory for
    `shards` gradients and gives up DDP's overlap of communication and computation.
    """

    def __init__(self, accelerator, model: nn.Module, plan: BatchPlan, seed_of, bitwise: bool):
        self.accelerator = accelerator
        self.model = model
        self.bare = accelerator.unwrap_model(model)
        self.plan = plan
        self.seed_of = seed_of  # (step, shard) -> an integer seed
        self.bitwise = bitwise
        self.first = accelerator.process_index * plan.shards_per_process
        # What a loss summed over a shard is multiplied by before backward: DDP divides by its
        # number of processes, and every image of the global batch weighs the same.
        ddp_divides = 1 if bitwise else accelerator.num_processes
        self.scale = ddp_divides / plan.batch_size
        self.parameters = [p for p in self.bare.parameters() if p.requires_grad]
        # Norm layers do not read their running statistics while training; other buffers may be
        # read by the next forward, so they are kept equal on all processes step by step.
        norms = {
            id(b) for m in self.bare.modules() if isinstance(m, _NormBase) for b in m.buffers()
        }
        self.read_in_training = any(id(b) not in norms for b in self.buffers)
        self.undoes = False  # whether undo_buffers puts the buffers from before a step back
        self.before: list[Tensor] = []

    @property
    def buffers(self) -> list[Tensor]:
        """Looked up each time: a module may put another tensor in a buffer's place."""
        return list(self.bare.buffers())

    def settle_buckets(self, loss_of_a_shard: Callable[[], Tensor]) -> None:
        """One backward for nothing, so that the first step of a life adds up like all others.

        DDP's first backward has one bucket in the order of registration; from the second on there
        are several, in the order in which gradients arrive. A ring of three and more processes adds
        in an order that depends on a number's place in its bucket: without this, the first step
        after a start had other bits than the same step of a run that was not interrupted.
        """
        if self.accelerator.num_processes == 1 or self.bitwise:  # bitwise: no sum of DDP's
            return
        before = [b.clone() for b in self.buffers]
        loss_of_a_shard().backward()
        for p in self.parameters:
            p.grad = None
        with torch.no_grad():
            for buffer, old in zip(self.buffers, before, strict=True):
                buffer.copy_(old)

    def __call__(self, batch: dict, step: int) -> Iterator[dict]:
        """Yield the shards of this process: the loop runs forward and backward on each."""
        count, size = self.plan.shards_per_process, self.plan.micro_batch_size
        self.before = [b.clone() for b in self.buffers] if self.undoes or count > 1 else []
        start = self.before if self.before and count > 1 else None
        after_first = None
        gradients = []
        for index in range(count):
            last = index == count - 1
            if start is not None and index > 0:
                torch._foreach_copy_(self.buffers, start)
            seed_dropout(self.seed_of(step, self.first + index), self.accelerator.device)
            quiet = self.bitwise or not last
            sync = self.accelerator.no_sync(self.model) if quiet else contextlib.nullcontext()
            with sync:
                part = slice(index * size, (index + 1) * size)
                yield {name: values[part] for name, values in batch.items()}
            if start is not None and index == 0:
                after_first = [b.clone() for b in self.buffers]
            if self.bitwise:
                gradients.append(self._take_gradients())
        if after_first is not None:
            torch._foreach_copy_(self.buffers, after_first)
        if self.bitwise:
            self._add_in_order(gradients)
        if self.read_in_training:
            self.broadcast_buffers()

    def undo_buffers(self, found: Tensor) -> Tensor:
        """Where the update is left out (found = 1), what its step did to the buffers is too."""
        if self.undoes:
            for now, old in zip(self.buffers, self.before, strict=True):
                now.copy_(torch.where(found > 0, old, now))
        return found

    def _take_gradients(self) -> Tensor:
        flat = torch.cat([
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters
        ])  # fmt: skip
        for p in self.parameters:
            p.grad = None
        return flat

    def _add_in_order(self, mine: list[Tensor]) -> None:
        everyone = mine
        if self.accelerator.num_processes > 1:
            stacked = torch.stack(mine)
            parts = [torch.empty_like(stacked) for _ in range(self.accelerator.num_processes)]
            dist.all_gather(parts, stacked)
            everyone = [flat for part in parts for flat in part]
        total = everyone[0].clone()
        for flat in everyone[1:]:
            total += flat
        sizes = [p.numel() for p in self.parameters]
        for p, flat in zip(self.parameters, total.split(sizes), strict=True):
            p.grad = torch.empty_like(p).copy_(flat.view(p.shape))

    @torch.no_grad()
    def broadcast_buffers(self) -> None:
        """Rank 0's buffers on every process: before each evaluation and each save."""
        if self.accelerator.num_processes == 1:
            return
        for kind in dict.fromkeys(b.dtype for b in self.buffers):  # a set has no order to share
            same = [b for b in self.buffers if b.dtype == kind]
            flat = torch.cat([b.flatten() for b in same])
            dist.broadcast(flat, src=0)
            for b, part in zip(same, flat.split([b.numel() for b in same]), strict=True):
                b.copy_(part.view(b.shape))


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
        self.state = torch.tensor([-1, 0, 0, -1], **kind)  # bad step, skipped, in a row, bad loss

    def check(self, norm: Tensor, losses: Tensor, step: int) -> Tensor:
        """1.0 (0-dim, on the device) where the update must not be made; tells the optimizer."""
        bad = ~torch.isfinite(norm)
        bad_step, skipped, in_a_row, bad_loss = self.state.unbind()
        here = (bad_loss < 0) & ~torch.isfinite(losses)
        found = bad if self.skip else bad | (bad_step >= 0)
        first, first_here = (
            torch.where(bad & (bad_step < 0), step, bad_step),
            torch.where(here, step, bad_loss),
        )
        if self.skip:  # a good update ends a streak: the next one has a first step of its own
            first, first_here = (torch.where(bad, at, -1) for at in (first, first_here))
        self.state = torch.stack([first, skipped + bad, (in_a_row + 1) * bad, first_here])
        found = found.float()
        self.optimizer.found_inf, self.optimizer.grad_scale = found, None
        return found

    def report(self) -> dict[str, int]:
        """First bad step (-1: none; with skip: of the latest streak), skipped updates, the latest
        in a row; one host sync.
        """
        bad_step, skipped, in_a_row, bad_loss = self.state.tolist()
        return {
            "bad_step": bad_step, "skipped": skipped, "in_a_row": in_a_row, "bad_loss": bad_loss
        }  # fmt: skip

    def must_stop(self, report: dict[str, int]) -> bool:
        if self.skip:
            return report["in_a_row"] >= self.most
        return report["bad_step"] >= 0
