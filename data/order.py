"""Which sample stands where: the permutation of an epoch, the global batch of a step.

Batches are global: Accelerate (`split_batches=True`) gives each process its slice of every batch.
No class here may have a method called set_epoch: Accelerate would call it, with its own count.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from data.keyed_random import ORDER, permutation

MORE, MIXED = 16, 17  # streams of a balanced order, beside those of keyed_random.py


class Balance:
    """The classes of n samples, and an order of n places in which each class has as many.

    A class of few samples repeats them, all about as often; of a class of many, each epoch has
    others. The k-th repetition of a sample is told apart by its index, which is k * n more: so what
    is drawn for it is another draw.
    """

    def __init__(self, labels: Tensor) -> None:
        counts = torch.bincount(labels)
        self.labels, self.n = labels, len(labels)
        self.present = counts.nonzero()[:, 0]
        self.counts = counts[self.present]
        self.starts = self.counts.cumsum(0) - self.counts

    def order(self, seed: int, epoch: int) -> Tensor:
        """int64 (n,), a function of seed, epoch and labels."""
        n, classes, device = self.n, len(self.present), self.labels.device
        shuffled = permutation(seed, epoch, n, ORDER, device)
        grouped = shuffled[self.labels[shuffled].argsort(stable=True)]
        lot = permutation(seed, epoch, classes, MORE, device)  # who has one more than n / classes
        places = n // classes + (lot < n % classes).long()
        which = torch.arange(classes, device=device).repeat_interleave(places, output_size=n)
        turn = torch.arange(n, device=device) - (places.cumsum(0) - places)[which]
        counts = self.counts[which]
        chosen = grouped[self.starts[which] + turn % counts] + n * (turn // counts)
        return chosen[permutation(seed, epoch, n, MIXED, device)]

    def in_words(self, classes: list[str]) -> str:
        """What the start panel says."""
        few, places = int(self.counts.argmin()), self.n // len(self.present)
        count = int(self.counts[few])
        return (
            f"balanced: {places:,} places an epoch for each of {len(self.present)} classes; each "
            f"of the {count:,} images of {classes[int(self.present[few])]} is seen "
            f"{places / count:.3g} times, of {self.n:,} images on average 1"
        )


class GlobalBatchSampler:
    """Full batches of training indices, int64 (batch_size,), from any step of any epoch on.

    The n % batch_size samples at the end of an epoch's order are left out; each epoch has others.
    `shares`: how many of a batch each process gets, in the order of processes. Accelerate cuts
    equal slices: where they differ each is filled up with index -1, which nobody has to load.
    With shuffle=False the order is 0, 1, 2, ...; with a balance it is that, whose indices may be
    n and more. Raises ValueError if not one batch would be full.
    """

    drop_last = True

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        device: torch.device | str = "cpu",
        balance: Balance | None = None,
        shares: Sequence[int] = (),
    ) -> None:
        if not 0 < batch_size <= n:
            raise ValueError(f"batch_size must be in 1..{n} (the number of samples): {batch_size}")
        self.n, self.images, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.shares = list(shares) or [batch_size]
        self.batch_size = max(self.shares) * len(self.shares)  # what Accelerate cuts: with padding
        self.device, self.balance = device, balance
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
            if self.balance is not None:
                order = self.balance.order(self.seed, self.epoch)
            elif self.shuffle:
                order = permutation(self.seed, self.epoch, self.n, ORDER, self.device)
            else:
                order = torch.arange(self.n, device=self.device)
            self._cached = (self.epoch, order)
        return self._cached[1]

    def fingerprint(self) -> str:
        """A hash of the first epoch's order and of how it is cut into batches."""
        order = permutation(self.seed, 0, self.n, ORDER) if self.shuffle else torch.arange(self.n)
        if self.balance is not None:
            order = self.balance.order(self.seed, 0).cpu()
        digest = hashlib.blake2b(order.numpy().tobytes(), digest_size=8)
        digest.update(str(self.images).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.steps_per_epoch - self.first_step

    def __iter__(self) -> Iterator[Tensor]:
        order, size, most = self._order(), self.images, max(self.shares)
        for step in range(self.first_step, self.steps_per_epoch):
            batch = order[step * size : (step + 1) * size]
            if self.batch_size > size:
                parts = batch.split(self.shares)
                batch = torch.cat([F.pad(p, (0, most - len(p)), value=-1) for p in parts])
            yield batch


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
