"""Uniform numbers from (seed, epoch, sample, draw): no generator state anywhere.

A counter-based generator is a function: the same key and counter give the same bits on any device,
in any order, in any batch, so nothing has to be saved or restored. Philox4x32-10 of Salmon, Moraes,
Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC'11), in int64 tensor operations.
"""

import torch
from torch import Tensor

# One stream per purpose: draws of different streams never share a counter.
AUGMENT, FLIP, MIX, ORDER, SPLIT, SAMPLE, POLICY = range(7)

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def philox(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four int64 tensors of random 32-bit words, one each per counter (c0, c1, c2, c3).

    Counters are int64 tensors that hold uint32 values and broadcast; (k0, k1) is the uint32 key.
    """
    for _ in range(10):
        # The product wraps modulo 2**64 as the uint64 one would. Its low word is the next c1 (c3);
        # the high word that goes with it is masked away below, where the low word is used.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((product1 >> 32) ^ c1 ^ k0) & _MASK32
        c2 = ((product0 >> 32) ^ c3 ^ k1) & _MASK32
        c1, c3 = product1, product0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1 & _MASK32, c2, c3 & _MASK32


def _words(seed: int, epoch: int, samples: Tensor, blocks: int, stream: int) -> Tensor:
    """int64 (n, 4 * blocks) of 32-bit words; the counter is (sample, block, epoch, stream)."""
    block = torch.arange(blocks, device=samples.device)[None]
    words = philox(
        samples[:, None] & _MASK32,
        block,
        torch.full_like(block, epoch & _MASK32),
        torch.full_like(block, stream),
        seed & _MASK32,
        (seed >> 32) & _MASK32,
    )
    return torch.stack(words, dim=-1).flatten(1)


def uniforms(
    seed: int, epoch: int, samples: Tensor, draws: int, stream: int = AUGMENT
) -> Tensor:  # (n, draws)
    """float32 (n, draws) in [0, 1): row i depends on samples[i] alone, not on its batch.

    `samples` is int64 (n,); the result is on its device, the same bits on every device. A call
    costs about as much for one sample as for a hundred: draw once per batch.
    """
    words = _words(seed, epoch, samples, -(-draws // 4), stream)[:, :draws]
    return (words >> 8).float() * 2**-24  # 24 bits fit a float32, so this is exact


def permutation(
    seed: int, epoch: int, n: int, stream: int = ORDER, device: torch.device | str = "cpu"
) -> Tensor:  # (n,)
    """A random order of 0..n-1 as an int64 tensor, the same on any device, with any torch version.

    It is made where it will lie: on a GPU nobody waits for it.
    """
    words = _words(seed, epoch, torch.arange(n, device=device), 1, stream)
    # 62 bits: equal keys, which would favour the smaller index, are out of the question.
    return torch.argsort((words[:, 0] << 30) | (words[:, 1] >> 2), stable=True)


def hash_integers(*integers: int) -> int:
    """A 63-bit integer that looks unrelated for each tuple, e.g. to seed dropout from (seed, step).

    The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), chained over the integers.
    """
    state = 0
    for integer in integers:
        state = ((state ^ integer) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1
