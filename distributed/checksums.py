"""Do all processes still hold the same numbers? Integer checksums, compared in one sum."""

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import NumbersGoneBad
from models.state import as_real

ODD = 0x9E3779B1  # modulo 2**32, as all sums here
WIDTH = {"cpu": 2**14, "cuda": 2**22}  # numbers of a row: in a core's cache, or few launches


def checksum(tensor: Tensor) -> Tensor:
    """An int64 (0-dim, on the device) of the bits of all numbers and of their order.

    A polynomial in an odd number with the rows as coefficients, then its places weighed: one pass.
    """
    numbers = as_real(tensor.detach()).contiguous().view(-1)
    size = numbers.element_size()
    bits = numbers.view(torch.int8 if size == 1 else torch.int16 if size == 2 else torch.int32)
    width = WIDTH.get(bits.device.type, WIDTH["cpu"])
    rows = list(bits.split(width))
    total = torch.zeros(min(width, len(bits)), dtype=torch.int32, device=bits.device)
    for row in rows:
        if len(row) < len(total):  # the last one
            total.mul_(ODD - 2**32)[: len(row)].add_(row)
        else:
            torch.add(row, total, alpha=ODD - 2**32, out=total)
    place = torch.arange(len(total), dtype=torch.int32, device=bits.device) * 2 + 1
    return (total * place).sum()


def sample(tensor: Tensor) -> Tensor:
    """The bits of a few of its numbers."""
    tensor = as_real(tensor.detach())
    numbers = tensor.reshape(-1) if tensor.ndim < 2 else tensor.flatten(1)[0]
    return numbers[:: max(1, len(numbers) // 16)].double().view(torch.int64)


def refuse_difference(whole: dict[str, Tensor], sampled: dict[str, Tensor]) -> None:
    """NumbersGoneBad on every process where one of them holds other numbers than the others.

    Of `sampled` a few numbers are compared: what an update is made of shows in the weights the
    next time. The first tensor that differs is named. A host wait.
    """
    parts = [checksum(tensor)[None] for tensor in whole.values()]
    parts += [sample(tensor) for tensor in sampled.values()]
    names = [name for name, part in zip([*whole, *sampled], parts, strict=True) for _ in part]
    mine = torch.cat(parts)
    both = torch.cat([mine, ~mine])  # the largest, and the complement of the smallest
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    largest, smallest = both[: len(mine)], ~both[len(mine) :]
    differs = (largest != smallest).tolist()
    if any(differs):
        raise NumbersGoneBad(
            f"the processes have drifted apart: {names[differs.index(True)]} is not the same on "
            "all of them; a forward that changes parameters, or a device that computes otherwise "
            "than the others, does that. The last checkpoint is from before it was noticed"
        )
