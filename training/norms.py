"""Running statistics measured anew, for weights that nobody trained with: those of an average."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.keyed_random import SAMPLE, hash_integers, permutation
from distributed.generators import Generators
from distributed.shards import packed, unpack
from training.data import Data

if TYPE_CHECKING:
    from training.learner import Learner

BATCHES = 8  # of a shard's size, the same in every evaluation
MEASURE = 105  # a stream of `hash_integers`, beside those of data/keyed_random.py


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """Layers that keep running statistics, by name."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    return {name: m for name, m in found.items() if m.running_mean is not None}


@torch.no_grad()
def measure(model: nn.Module, learner: Learner, data: Data) -> None:
    """Give norm layers the mean statistics of a few keyed batches; nothing else changes.

    Every process computes the same, and the main process's numbers count.
    """
    norms = norms_of(model)
    if not norms:
        return
    size, n, home = data.batch.micro_batch_size, len(data.train), data.train.labels.device
    chosen = permutation(learner.seed, 0, n, SAMPLE, home)[: BATCHES * size]
    before = {k: b.clone() for k, b in model.named_buffers() if k.rpartition(".")[0] not in norms}
    generators = Generators(learner.device, [model])
    momenta = {name: norm.momentum for name, norm in norms.items()}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    model.train()
    for number, indices in enumerate(chosen[: max(size, len(chosen) // size * size)].split(size)):
        generators.seed(hash_integers(learner.seed, MEASURE, number))
        batch = data.train.batch(indices)
        images = data.augment.train(batch["images"], batch["indices"], 0)
        with learner.accelerator.autocast():
            model(learner.inputs(images))
    model.eval()
    for name, norm in norms.items():
        norm.momentum = momenta[name]
    for name, buffer in model.named_buffers():
        if name in before:
            buffer.copy_(before[name])
    if learner.accelerator.num_processes > 1:
        buffers = list(model.buffers())
        copy = packed(buffers)
        for flat in copy.values():
            dist.broadcast(flat, src=0)
        unpack(copy, buffers)
