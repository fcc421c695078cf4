"""Keyed random numbers: published answers, the same bits everywhere, streams that never meet."""

import pytest
import torch

from data.keyed_random import (
    AUGMENT,
    FLIP,
    MIX,
    ORDER,
    SPLIT,
    hash_integers,
    permutation,
    philox,
    uniforms,
)

# The known-answer vectors of the Random123 library: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The definition in integers of any size, without wrap-around or tensors."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        high0, low0 = divmod(a * 0xD2511F53, 2**32)
        high1, low1 = divmod(c * 0xCD9E8D57, 2**32)
        a, b, c, d = high1 ^ b ^ k, low1, high0 ^ d ^ m, low0
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    words = philox(*(torch.tensor([word]) for word in words_of(counter)), *words_of(key))
    assert [int(word) for word in words] == words_of(answer)
    assert plain_philox(words_of(counter), words_of(key)) == words_of(answer)


def test_philox_equals_its_definition_in_plain_integers_on_arbitrary_counters():
    counters = [[hash_integers(row, column) % 2**32 for column in range(4)] for row in range(200)]
    key = [0xDEADBEEF, 0x80000001]
    words = torch.stack(philox(*torch.tensor(counters).T, *key), dim=1)
    assert words.tolist() == [plain_philox(counter, key) for counter in counters]


def test_uniforms_are_24_bits_of_the_words_at_sample_block_epoch_stream():
    seed = 0x0123456789ABCDEF
    drawn = uniforms(seed, 7, torch.tensor([3, 2**31 + 5]), 6, stream=MIX)
    for row, sample in zip(drawn.tolist(), [3, 2**31 + 5], strict=True):
        blocks = [plain_philox([sample, b, 7, MIX], [0x89ABCDEF, 0x01234567]) for b in (0, 1)]
        words = blocks[0] + blocks[1]
        assert row == [(word >> 8) * 2**-24 for word in words[:6]]


def test_the_draws_of_a_sample_depend_neither_on_its_batch_nor_on_how_many_are_drawn():
    batch = uniforms(1, 2, torch.arange(100), 11)
    some = torch.tensor([70, 3, 3, 99])
    assert torch.equal(uniforms(1, 2, some, 11), batch[some])
    assert torch.equal(uniforms(1, 2, some, 5), batch[some, :5])


def test_seeds_epochs_and_streams_all_give_other_numbers():
    keys = [
        (seed, epoch, stream) for seed in (0, 1, 2**32) for epoch in (0, 1) for stream in (0, 1)
    ]
    draws = [uniforms(s, e, torch.arange(50), 4, stream) for s, e, stream in keys]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert (one == other).float().mean() < 0.05
    assert len({AUGMENT, FLIP, MIX, ORDER, SPLIT}) == 5


def test_uniforms_look_uniform_and_unrelated():
    drawn = uniforms(5, 0, torch.arange(20_000), 4)
    assert drawn.dtype == torch.float32 and drawn.min() >= 0 and drawn.max() < 1
    numbers = drawn.double().flatten()
    assert abs(numbers.mean() - 0.5) < 5 * (1 / 12 / len(numbers)) ** 0.5
    assert abs(numbers.var() - 1 / 12) < 0.002
    counts = torch.histc(drawn, bins=256, min=0, max=1)
    expected = len(numbers) / 256
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5
    neighbours = [drawn, uniforms(5, 1, torch.arange(20_000), 4)[:, [0]], drawn.roll(1, 0)]
    correlations = torch.corrcoef(torch.cat(neighbours, dim=1).T).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / 20_000**0.5


@pytest.mark.slow
def test_uniforms_have_the_same_bits_when_compiled():
    compiled = torch.compile(uniforms)
    samples = torch.arange(0, 10**9, 10**7)
    for epoch in (0, 1, 2, 300):  # from the second value on, epoch is symbolic
        assert torch.equal(compiled(9, epoch, samples, 9), uniforms(9, epoch, samples, 9))


def test_a_permutation_holds_every_index_once_and_changes_with_epoch_seed_and_stream():
    orders = [
        permutation(seed, epoch, 1000, stream)
        for seed in (0, 1)
        for epoch in (0, 1)
        for stream in (ORDER, SPLIT)
    ]
    for i, order in enumerate(orders):
        assert torch.equal(order.sort().values, torch.arange(1000))
        assert all((order == other).float().mean() < 0.05 for other in orders[:i])
    assert torch.equal(permutation(0, 0, 1000, ORDER), orders[0])


def test_a_permutation_is_the_order_of_the_keys_computed_without_tensors():
    keys = [plain_philox([index, 0, 4, ORDER], [11, 0]) for index in range(100)]
    expected = sorted(range(100), key=lambda i: (keys[i][0] << 30) | (keys[i][1] >> 2))
    assert permutation(11, 4, 100, ORDER).tolist() == expected


def test_the_order_of_a_seed_is_not_the_next_epochs_of_the_seed_before():
    assert not torch.equal(permutation(42, 1, 100, ORDER), permutation(43, 0, 100, ORDER))


def test_every_place_of_a_permutation_is_equally_likely():
    orders = torch.stack([permutation(0, epoch, 8, ORDER) for epoch in range(1000)])
    counts = torch.stack([torch.bincount(place, minlength=8) for place in orders.T])
    assert ((counts - 125.0) ** 2 / 125).sum() < 49 + 6 * (2 * 49) ** 0.5


def test_mix_is_63_bits_that_differ_by_value_order_and_length():
    tuples = [(a, b) for a in range(-20, 20) for b in range(40)] + [(a,) for a in range(40)]
    mixed = {hash_integers(*integers) for integers in tuples}
    assert len(mixed) == len(tuples)
    assert all(0 <= value < 2**63 for value in mixed)
    assert hash_integers(1, 2) != hash_integers(2, 1) and hash_integers(0) != hash_integers(0, 0)
    bits = [sum(value >> bit & 1 for value in mixed) / len(mixed) for bit in range(63)]
    assert min(bits) > 0.4 and max(bits) < 0.6
