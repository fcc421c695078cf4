"""Which sample stands where: the permutation of an epoch, the global batch of a step.

Batches are global: Accelerate (`split_batches=True`) gives each process its slice of every batch.
No class here may have a method called set_epoch: Accelerate would call it, with its own count.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from data.keyed_random import ORDER, permutation


class GlobalBatchSampler:
    """Full batches of training indices, int64 (batch_size,), from any step of any epoch on.

    The n % batch_size samples at the end of an epoch's order are left out; each epoch has others.
    With shuffle=False the order is 0, 1, 2, ... Raises ValueError if not one batch would be full.
    """

    drop_last = True

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 < batch_size <= n:
            raise ValueError(f"batch_size must be in 1..{n} (the number of samples): {batch_size}")
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.device = device
        self.steps_per_epoch = n // batch_size
        self._cached: tuple[int, Tensor] | None = None
        self.start(0, 0)

    def start(self, epoch: int, first_step: int = 0) -> None:
        """Make the next pass that of `epoch`, beginning with batch `first_step` of the epoch."""
        if not 0 <= first_step <= self.steps_per_epoch:
            raise ValueError(f"first_step must be in 0..{self.steps_per_epoch}: {first_step}")
        self.epoch, self.first_step = epoch, first_step

    def _order(self) -> Tensor:
        """The order of the whole epoch, made once per epoch (on a CPU a second per million)."""
        if self._cached is None or self._cached[0] != self.epoch:
            if self.shuffle:
                order = permutation(self.seed, self.epoch, self.n, ORDER, self.device)
            else:
                order = torch.arange(self.n, device=self.device)
            self._cached = (self.epoch, order)
        return self._cached[1]

    def fingerprint(self) -> str:
        """A hash of the first epoch's order and of how it is cut into batches."""
        order = permutation(self.seed, 0, self.n, ORDER) if self.shuffle else torch.arange(self.n)
        digest = hashlib.blake2b(order.numpy().tobytes(), digest_size=8)
        digest.update(str(self.batch_size).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.steps_per_epoch - self.first_step

    def __iter__(self) -> Iterator[Tensor]:
        order, size = self._order(), self.batch_size
        for step in range(self.first_step, self.steps_per_epoch):
            yield order[step * size : (step + 1) * size]


class EvaluationBatchSampler:
    """0..n-1 once each, in order, in full batches: the last one is filled up with index -1."""

    drop_last = False

    def __init__(self, n: int, batch_size: int, device: torch.device | str = "cpu") -> None:
        self.n, self.batch_size, self.device = n, batch_size, device

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        indices = torch.arange(len(self) * self.batch_size, device=self.device)
        indices[self.n :] = -1
        yield from indices.split(self.batch_size)
