"""Golden runs: no bit of them has moved, and one planted bit is seen, both ways."""

import copy
import json
import subprocess

import pytest
from launches import REPOSITORY

from bench import golden

# The program, but that one loss is one unit in the last place higher; no gradient moves.
PLANTED = """
import runpy
import sys

import torch
from torch.nn import functional

sys.path[0] = {tree!r}
calls = 0


def nudged(true):
    def loss_of(*values, **options):
        global calls
        loss = true(*values, **options)
        calls += loss.requires_grad
        if calls == 4 and loss.requires_grad:
            here = loss.detach()
            loss = loss + (torch.nextafter(here, torch.full_like(here, torch.inf)) - here)
        return loss

    return loss_of


functional.mse_loss = nudged(functional.mse_loss)
functional.cross_entropy = nudged(functional.cross_entropy)
runpy.run_path({tree!r} + "/train.py", run_name="__main__")
"""


def git(*words) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", REPOSITORY, *words], capture_output=True, text=True)


def test_values_are_stored_for_every_run_and_their_commit_is_in_the_history():
    stored = golden.read(golden.VALUES)
    assert stored, "python -m bench.golden --renew"
    for one in stored:
        assert list(one["runs"]) == list(golden.names())
        assert (golden.VALUES / golden.file_of(one["kind"])).is_file()
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("no clone with its whole history")
    assert git("merge-base", "--is-ancestor", stored[0]["commit"], "HEAD").returncode == 0


def test_a_difference_names_the_run_the_first_row_and_key_and_the_tensors(tmp_path):
    row = {"step": 1, "train/loss": 0.1, "lr": float("nan")}
    was = {"line on 1": {"rows": [row, {**row, "step": 2}], "tensors": {"w": ["aa", 2.0, 1.0]}}}
    golden.write(tmp_path / "x.json", "abc", {"machine": "x"}, was)
    stored = golden.read(tmp_path)[0]["runs"]
    assert golden.differences(stored, was) == []
    now = copy.deepcopy(was)
    now["line on 1"]["rows"][1]["train/loss"] = 0.10000000000000002
    now["line on 1"]["tensors"]["w"] = ["ab", 2.5, 1.0]
    row_said, tensors_said = golden.differences(stored, now)
    assert "line on 1: row 2 (step 2), train/loss: 0.1 -> 0.10000000000000002" in row_said
    assert "1 of 1 tensors: w (norm 2.0 by 5.00e-01" in tensors_said
    now = copy.deepcopy(was)
    del now["line on 1"]["rows"][1]
    assert golden.differences(stored, now) == ["line on 1: 2 rows -> 1 rows"]
    now["line on 1"] = {"rows": was["line on 1"]["rows"], "tensors": {}}
    assert golden.differences(stored, now) == ["line on 1: 1 of 1 tensors: w is no more"]
    assert golden.differences(stored, {"a": {}}) == [
        "line on 1: a run that is no more", "a: a new run",
    ]  # fmt: skip


def test_where_the_golden_commit_is_not_at_hand_a_sentence_says_so(tmp_path):
    with pytest.raises(golden.NotComparable, match=r"the golden commit 0000.* is not at hand: "):
        golden.take("0" * 40, tmp_path)


@pytest.mark.slow
def test_no_bit_of_the_golden_runs_has_moved(capsys):
    status = golden.main([])
    said = capsys.readouterr().out
    if status == 2:
        pytest.skip(said)
    assert status == 0, said


@pytest.mark.slow
def test_one_bit_of_one_loss_is_seen_in_stored_values_and_beside_the_golden_commit(
    tmp_path, capsys
):
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "train.py").write_text(PLANTED.format(tree=str(REPOSITORY)))
    runs = golden.names(["line on 1", "bitwise on 1"])
    with golden.Runner() as runner:
        kind, (values,) = runner.kind, runner.measure([REPOSITORY], runs)
    commit = git("rev-parse", "HEAD").stdout.strip() or 40 * "0"
    golden.write(tmp_path / "values" / golden.file_of(kind), commit, kind, values)
    command = ["--values", str(tmp_path / "values"), "--only", *runs]

    def compare(*more) -> tuple[int, str]:
        status = golden.main([*command, *more])
        return status, capsys.readouterr().out

    status, said = compare("--tree", str(planted))
    assert status == 1 and "against the stored values" in said
    assert "line on 1: row" in said and "bitwise on 1: row" in said and "train/loss" in said
    assert "tensors" not in said
    if git("status", "--porcelain").returncode:
        pytest.skip("no clone: nothing to take the golden commit from")
    status, said = compare("--tree", str(planted), "--beside")
    assert status == 1 and "beside the golden commit" in said
    assert "line on 1: row" in said and "bitwise on 1: row" in said
    # A kind that is not stored is compared beside the golden commit, too: the same bits there.
    stored = tmp_path / "values" / golden.file_of(kind)
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"kind": kind | {"cpu": "?"}}))
    status, said = compare()
    assert "this kind of machine is not in the stored values" in said
    assert status == 0, said
