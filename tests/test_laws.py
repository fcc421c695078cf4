"""The laws through real processes: the same run anywhere, every test image once."""

import json

import pytest
from launches import SMALL, losses, rows, train

from training.recorder import read

LAW = ["--model", "plain.py:Net", "--dataset", "digits", "--image-size", "16", "--limit", "1000"]
LAW += ["--batch-size", "64", "--epochs", "2", "--stop-after", "24", "--augment", "crop"]
LAW += ["--lr", "0.05", "--optimizer", "sgd", "--shards", "4", "--threads", "1"]
LAW += ["--log-every", "1", "--no-plots"]


WAYS = ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def one(nets):
    """The run on one process; its folder is `one`, beside those of `two`."""
    made(nets, "one", 1, "python")
    return nets


@pytest.fixture(scope="module", params=WAYS)
def two(request, one):
    """The name of the same run on two processes, under a real torchrun or accelerate launch."""
    made(one, request.param, 2, request.param)
    return request.param


def made(nets, name, processes, launcher):
    done = train(
        [*LAW, "--run-dir", name, "--accumulate", 4 // processes],
        nets, processes, launcher, LOCKSTEP_RECORD=f"{name}-record",
    )  # fmt: skip
    assert done.status == 0, done.out


def test_two_processes_see_the_same_samples_pixels_and_losses_as_one(one, two):
    ours, updates = read(one / "one-record")
    theirs, their_updates = read(one / f"{two}-record")
    assert len(ours) == 24 * 4 and ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key]["indices"] == theirs[key]["indices"]
        assert ours[key]["pixels"] == theirs[key]["pixels"]
        assert theirs[key]["loss"] == pytest.approx(ours[key]["loss"], rel=2e-5)
    for step, row in updates.items():
        assert their_updates[step]["norm"] == pytest.approx(row["norm"], rel=1e-5)
    assert losses(one / two) == pytest.approx(losses(one / "one"), rel=1e-6)


def test_the_epoch_boundary_was_crossed_and_the_two_epochs_differ_in_order_and_pixels(one):
    shards, _ = read(one / "one-record")
    first = [shards[0, s]["indices"] for s in range(4)]
    second = [shards[15, s]["indices"] for s in range(4)]
    assert first != second
    seen = [i for step in range(15) for s in range(4) for i in shards[step, s]["indices"]]
    assert len(seen) == len(set(seen)) == 960


def test_every_test_image_counts_once_on_any_number_of_processes(one, two):
    def answers(name):
        return [r for r in rows(one / name) if "test/accuracy" in r]

    assert len(answers("one")) == 2
    for ours, theirs in zip(answers("one"), answers(two), strict=True):
        assert ours["test/accuracy"] == theirs["test/accuracy"]
        assert theirs["test/loss"] == pytest.approx(ours["test/loss"], rel=1e-6)
        assert (ours["test/accuracy"] * 355) == pytest.approx(round(ours["test/accuracy"] * 355))
    assert json.loads((one / two / "summary.json").read_text())["status"] == "stopped"


def test_101_evaluation_images_over_two_processes_count_101(nets):
    arguments = ["--model", "full.py:Net", "--dataset", "digits", "--image-size", "16"]
    arguments += ["--limit", "101", "--batch-size", "20", "--epochs", "1", "--ema", "0.9"]
    arguments += ["--threads", "1"]  # other numbers of threads round otherwise
    # with pictures, which the main process draws alone: the other one must not be waited for
    for processes, name in ((1, "counted-1"), (2, "counted-2")):
        done = train([*arguments, "--shards", "2", "--run-dir", name], nets, processes)
        assert done.status == 0, done.out
        progress = sorted((nets / name / "checkpoints").glob("step-*"))[-1] / "progress.json"
        last = json.loads(progress.read_text())["last"]
        assert last["images"] == 101
        assert sum(map(sum, last["confusion"])) == 101
    one, two = (rows(nets / name)[-1] for name in ("counted-1", "counted-2"))
    assert one["test/accuracy"] == two["test/accuracy"]
    assert one["test/loss"] == pytest.approx(two["test/loss"], rel=1e-5)


def test_processes_that_do_not_know_of_each_other_are_an_error(nets):
    done = train([*LAW, "--run-dir", "lonely"], nets, SLURM_NTASKS="2", SLURM_STEP_ID="0")
    assert done.status == 2
    assert "do not know of each other" in done.out and "Traceback" not in done.out


def test_a_user_error_is_one_sentence_on_two_processes(nets):
    done = train(["--model", "plain.py:Net", "--dataset", "cifar10", "--run-dir", "none"], nets, 2)
    assert done.status != 0
    assert done.out.count("CIFAR10_DIR") == 1 and not (nets / "none").exists()
    # What all of them meet is nobody's crash.
    given = ["--model", "plain.py:Net", *SMALL, "--run-dir", "counted-2", "--weights", "no.pth"]
    done = train([*given, "--fresh"], nets, 2)
    assert done.out.count("there is no such file") == 1, done.out
    assert not list((nets / "counted-2").glob("crash/*"))
