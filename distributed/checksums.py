"""Do all processes still hold the same numbers? Integer checksums, compared in one sum."""

import torch
import torch.distributed as dist
from torch import Tensor

from errors import NumbersGoneBad

WIDTH = 4096  # numbers of a row; column and row sums together see the order
ODD = 0x9E3779B97F4A7C15 - 2**64  # spreads what differs in one place over all bits
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """An int64 (0-dim, on the device) of the bits of all numbers and of their order."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    numbers = tensor.detach().contiguous().flatten()
    bits = numbers.view(INTEGERS[numbers.element_size()])
    rows = len(bits) // WIDTH
    table, rest = bits[: rows * WIDTH].view(rows, WIDTH), bits[rows * WIDTH :]
    place = torch.arange(max(rows, WIDTH), device=bits.device) * 2 + 1
    total = (table.sum(0) * place[:WIDTH]).sum() * ODD + (table.sum(1) * place[:rows]).sum()
    return total * ODD + (rest * place[: len(rest)]).sum()


def refuse_difference(tensors: dict[str, Tensor]) -> None:
    """NumbersGoneBad on every process where one of them holds other numbers than the others.

    The first tensor that differs is named. A host wait.
    """
    mine = torch.stack([checksum(tensor) for tensor in tensors.values()])
    both = torch.cat([mine, ~mine])  # the largest, and the complement of the smallest
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    largest, smallest = both[: len(mine)], ~both[len(mine) :]
    differs = (largest != smallest).tolist()
    if any(differs):
        name = list(tensors)[differs.index(True)]
        raise NumbersGoneBad(
            f"the processes have drifted apart: {name} is not the same on all of them "
            f"({sum(differs)} of {len(differs)} tensors differ); a forward that changes "
            "parameters, or a device that computes otherwise than the others, does that. "
            "The last checkpoint is from before it was noticed"
        )
