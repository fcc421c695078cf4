"""Every generator that a forward may draw from, seeded for what it is about to compute.

A run keeps no random state: what is drawn follows from (seed, step, shard), in evaluation from the
seed and the place of the images among all, so on any number of processes the same is drawn.
"""

import random
from collections.abc import Iterable, Iterator

import numpy
import torch
from torch import nn

from data.keyed_random import hash_integers

# random.SystemRandom is none: it has no state and cannot repeat anything.
Owned = torch.Generator | random.Random | numpy.random.Generator | numpy.random.RandomState
Held = Owned | dict | list | tuple | set | nn.Module


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed torch's generators of CPU and device; a hundred times cheaper than torch.manual_seed."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


class Generators:
    """Those of torch, numpy and Python, and those that modules hold in their attributes.

    Nothing is put back after a step: a numpy state costs thirty times what a seed does, and nobody
    in this process but a model draws numbers that matter (a notebook gets its own back at the end).
    """

    def __init__(self, device: torch.device, models: Iterable[nn.Module]) -> None:
        self.device = device
        self.owned = [list(_held_by(model)) for model in models]

    def seed(self, seed: int) -> None:
        """Seed all of them; the copies of a generator that several models hold alike."""
        seed_dropout(seed, self.device)
        random.seed(seed)
        numpy.random.seed(seed & 0xFFFFFFFF)
        for owned in self.owned:
            for place, generator in enumerate(owned):
                _seed(generator, hash_integers(seed, place))


def _seed(generator: Owned, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, numpy.random.RandomState):
        generator.seed(seed & 0xFFFFFFFF)
    else:
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state


def _held_by(model: nn.Module) -> Iterator[Owned]:
    """The generators in attributes, lists, tuples and dicts of all modules, each once."""
    seen: set[int] = set()
    for module in model.modules():
        yield from _found_in(vars(module), seen)


def _found_in(value: Held, seen: set[int]) -> Iterator[Owned]:
    if isinstance(value, nn.Module | torch.Tensor) or id(value) in seen:
        return
    if isinstance(value, Owned):
        if not isinstance(value, random.SystemRandom):
            seen.add(id(value))
            yield value
    elif isinstance(value, dict | list | tuple | set):
        seen.add(id(value))
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _found_in(inner, seen)
