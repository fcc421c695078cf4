"""Small things below everything: mistakes with a code, files that are whole, words for numbers."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from common import disk
from common.errors import UserError, all_of
from common.metric import METRICS
from common.text import counted, did_you_mean, file_name, seconds


def test_a_mistake_keeps_its_code_on_its_way():
    """Between processes it is pickled; several together are told as one."""
    error = UserError("no such model", code="unknown-model")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.code) == ("no such model", "unknown-model")
    both = all_of([error, UserError("no such flag", code="unknown-flag")])
    assert (str(both), both.code) == ("no such model\nno such flag", "unknown-model")


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path, sync):
    path = tmp_path / "file"
    path.write_text("old")
    with disk.whole(path, sync) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(RuntimeError), disk.whole(path, sync) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "new"


def test_threads_that_write_one_file_do_not_meet(tmp_path):
    path = tmp_path / "file"

    def write(letter):
        for _ in range(100):
            disk.write_text(path, letter * 10_000, sync=False)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, "abc"))  # raises what a thread met
    text = path.read_text()
    assert len(text) == 10_000 and len(set(text)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("damage", [b"", b"[]", b"7", b'{"a":', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_json_file_is_the_default(tmp_path, damage):
    path = tmp_path / "file.json"
    assert disk.read_json(path, {}) == {}
    path.write_bytes(damage)
    assert disk.read_json(path, {}) == {} and disk.read_json(path) is None


def test_words():
    assert seconds("1h30m") == seconds("1:30:00") == 5400
    with pytest.raises(UserError) as caught:
        seconds("soon")
    assert caught.value.code == "bad-duration"
    assert did_you_mean("alexnt", ["alexnet", "vgg"]) == " (did you mean alexnet?)"
    assert did_you_mean("zzz", ["alexnet"]) == ""
    assert [file_name(n) for n in ("a/b c", "net.py:Net", "user/set")] == ["b_c", "Net", "set"]


def test_one_thing_is_said_in_the_singular():
    said = [counted(n, thing) for n, thing in ((1, "epoch"), (0, "image"), (2000, "other class"))]
    assert said == ["1 epoch", "0 images", "2,000 other classes"]
    assert [counted(n, "process") for n in (1, 2)] == ["1 process", "2 processes"]


def test_a_loss_that_explodes_is_written_in_a_few_digits():
    accuracy, loss = (
        next(m for m in METRICS["classification"] if m.key == key) for key in ("accuracy", "loss")
    )
    assert loss.named(1.67e23) == "loss 1.67e+23" and loss.named(6869.25) == "loss 6,869"
    assert accuracy.named(0.5) == "accuracy 50.00 %"
