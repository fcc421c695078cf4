"""The order of samples: every epoch another, resumable at any step, the same for any processes."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from torch.utils.data import DataLoader

from config import BatchPlan
from data.image_set import ImageSet
from data.loaders import Resident, build_train_loader
from data.order import Balance, EvaluationBatchSampler, GlobalBatchSampler


def test_an_epoch_is_full_batches_of_different_samples():
    batches = list(GlobalBatchSampler(103, 10, seed=0))
    assert len(batches) == 10
    assert all(batch.shape == (10,) and batch.dtype == torch.int64 for batch in batches)
    seen = torch.cat(batches)
    assert len(seen.unique()) == 100 and seen.min() >= 0 and seen.max() < 103


def test_each_epoch_has_another_order_and_drops_other_samples():
    sampler = GlobalBatchSampler(103, 10, seed=0)
    seen = []
    for epoch in range(20):
        sampler.start(epoch, 0)
        seen.append(torch.cat(list(sampler)))
    assert not any(torch.equal(seen[0], other) for other in seen[1:])
    dropped = [set(range(103)) - set(order.tolist()) for order in seen]
    assert all(len(left) == 3 for left in dropped)
    assert len(set.union(*dropped)) > 20


def test_a_pass_from_a_middle_step_continues_where_the_whole_pass_would_be():
    whole = GlobalBatchSampler(100, 8, seed=3)
    whole.start(epoch=5, first_step=0)
    expected = list(whole)
    for first_step in (0, 1, 7, 12):
        resumed = GlobalBatchSampler(100, 8, seed=3)
        resumed.start(5, first_step)
        left = list(resumed)
        assert len(resumed) == len(left) == 12 - first_step
        assert all(torch.equal(a, b) for a, b in zip(left, expected[first_step:], strict=True))


def test_going_back_to_an_epoch_gives_its_order_again():
    sampler = GlobalBatchSampler(40, 8, seed=1)
    first = torch.cat(list(sampler))
    sampler.start(1, 0)
    assert not torch.equal(torch.cat(list(sampler)), first)
    sampler.start(0, 0)
    assert torch.equal(torch.cat(list(sampler)), first)


def test_the_samples_of_an_epoch_do_not_depend_on_the_batch_size():
    small, large = GlobalBatchSampler(64, 4, seed=1), GlobalBatchSampler(64, 32, seed=1)
    assert torch.equal(torch.cat(list(small)), torch.cat(list(large)))


def test_without_shuffling_samples_come_in_their_own_order():
    sampler = GlobalBatchSampler(10, 4, seed=0, shuffle=False)
    sampler.start(3, 1)
    assert [batch.tolist() for batch in sampler] == [[4, 5, 6, 7]]


def test_impossible_batches_and_steps_are_refused():
    for batch_size in (0, 11):
        with pytest.raises(ValueError, match=r"batch_size must be in 1\.\.10"):
            GlobalBatchSampler(10, batch_size, seed=0)
    for first_step in (-1, 3):
        with pytest.raises(ValueError, match=r"first_step must be in 0\.\.2"):
            GlobalBatchSampler(10, 5, seed=0).start(0, first_step)


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize(
    "sampler",
    [GlobalBatchSampler(50, 8, seed=2), EvaluationBatchSampler(50, 8)],
    ids=["training", "evaluation"],
)
def test_the_slices_of_all_processes_make_up_the_global_batch(sampler, num_processes):
    shards = [
        list(BatchSamplerShard(sampler, num_processes, index, split_batches=True))
        for index in range(num_processes)
    ]
    slices = zip(*shards, strict=True)
    for expected, parts in zip(sampler, slices, strict=True):
        assert {len(part) for part in parts} == {8 // num_processes}
        assert torch.equal(torch.cat(parts), expected)


def test_a_data_loader_hands_each_batch_to_the_data_set_in_one_piece():
    class Squares:
        def __getitem__(self, index):
            raise AssertionError("asked for a single sample")

        def __getitems__(self, indices):
            return indices, indices**2

    sampler = GlobalBatchSampler(20, 6, seed=0)
    loader = DataLoader(Squares(), batch_sampler=sampler, collate_fn=lambda batch: batch)
    sampler.start(2, 1)
    assert len(loader) == 2
    for (indices, squares), expected in zip(loader, sampler, strict=True):
        assert torch.equal(indices, expected) and torch.equal(squares, expected**2)


@pytest.mark.parametrize("processes", [2, 3, 4, 5, 7, 12])
def test_any_number_of_processes_gets_each_image_of_a_batch_once_and_no_padding(processes):
    """12 shards of 3 images, by Accelerate's slices of a padded batch."""
    plan = BatchPlan(36, 12, processes)
    images = ImageSet(torch.zeros(80, 3, 1, 1, dtype=torch.uint8), torch.arange(80))
    shares = [3 * count for count in plan.shares]
    cpu, found = torch.device("cpu"), []
    for rank in range(processes):
        loader, sampler = build_train_loader(images, 36, 5, cpu, shares=shares, process_index=rank)
        mine = prepare_data_loader(
            loader, cpu, processes, rank, split_batches=True, put_on_device=False
        )
        sampler.start(1, 1)
        (only,) = mine
        assert len(only["indices"]) == shares[rank] and only["weights"].eq(1).all()
        found.append(only["labels"])
    whole = GlobalBatchSampler(80, 36, 5)
    whole.start(1, 1)
    assert torch.equal(torch.cat(found), next(iter(whole)))
    assert sampler.fingerprint() == whole.fingerprint()


def test_accelerate_finds_nothing_to_reset_an_epoch_with():
    for sampler in (GlobalBatchSampler(8, 4, seed=0), EvaluationBatchSampler(8, 4)):
        assert not hasattr(sampler, "set_epoch") and not hasattr(sampler, "sampler")


@pytest.mark.parametrize("n", [1, 7, 8, 9, 50])
def test_an_evaluation_counts_each_sample_once_and_fills_up_with_minus_one(n):
    sampler = EvaluationBatchSampler(n, 8)
    batches = list(sampler)
    assert len(sampler) == len(batches)
    assert all(len(batch) == 8 for batch in batches)
    everything = torch.cat(batches)
    assert everything[everything >= 0].tolist() == list(range(n))
    assert everything[n:].eq(-1).all() and len(everything) - n < 8


# --- a balanced order -----------------------------------------------------------------------------

LABELS = torch.tensor([0] * 90 + [2] * 7 + [1] * 50 + [4] * 3)  # of class 3 there is none


def test_a_balanced_epoch_is_as_long_and_has_each_class_as_often_whatever_it_has_of_it():
    balance, extra = Balance(LABELS), set()
    for epoch in range(6):
        order = balance.order(0, epoch)
        assert order.dtype == torch.int64 and len(order) == len(order.unique()) == 150
        counts = LABELS[order % 150].bincount(minlength=5).tolist()
        assert counts[3] == 0 and {37, 38} == {*counts[:3], counts[4]} and sum(counts) == 150
        extra.add(tuple(counts))
        times = (order % 150).bincount(minlength=150)
        for label in (0, 1, 2, 4):
            seen = times[label == LABELS]
            assert seen.max() - seen.min() <= 1  # each image of a class about as often
    assert len(extra) > 1  # not always the same class has one more


def test_a_balanced_order_is_keyed_and_each_epoch_has_others_of_a_large_class():
    first, again = (Balance(LABELS).order(3, 7) for _ in range(2))
    assert torch.equal(first, again)
    others = [Balance(LABELS).order(*key) for key in ((3, 8), (4, 7))]
    assert not any(torch.equal(first, other) for other in others)
    large = [set(o[LABELS[o % 150] == 0].tolist()) for o in (first, others[0])]
    assert large[0] != large[1]


def test_a_balanced_pass_goes_on_in_its_middle_and_has_another_fingerprint():
    whole = GlobalBatchSampler(150, 20, 1, balance=Balance(LABELS))
    whole.start(2, 0)
    rest = GlobalBatchSampler(150, 20, 1, balance=Balance(LABELS))
    rest.start(2, 3)
    pairs = zip(list(whole)[3:], rest, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert whole.fingerprint() == rest.fingerprint()
    assert whole.fingerprint() != GlobalBatchSampler(150, 20, 1).fingerprint()


def test_a_repeated_image_is_the_same_image_under_another_index():
    data = Resident(torch.arange(150)[:, None], LABELS)
    data.repeats = True
    batch = data.__getitems__(torch.tensor([5, 155, 305, -1]))
    assert batch["images"][:, 0].tolist() == [5, 5, 5, 0]
    assert batch["indices"].tolist() == [5, 155, 305, -1]
    assert batch["weights"].tolist() == [1, 1, 1, 0]
    words = Balance(LABELS).in_words(list("abcde"))
    assert "37 places" in words and "3 images of e is seen 12.3 times" in words
