"""Stop anywhere, go on exactly: killed runs equal undisturbed ones, bit for bit."""

import json

import pytest
from launches import SMALL, losses, rows, same_weights, train

from distributed.checkpoint import digest_of_manifest

COMMON = [*SMALL, "--limit", "640", "--epochs", "3", "--augment", "crop", "--checkpoint-every", "7"]
VARIANTS = {
    "sgd-accumulate": ["--optimizer", "sgd", "--lr", "0.05", "--accumulate", "2"],
    "adamw-bf16-ema": [
        "--optimizer", "adamw", "--lr", "0.004", "--ema", "0.9", "--grad-clip", "1",
        "--mixed-precision", "bf16",
    ],
}  # fmt: skip


def told_of_epochs(out: str) -> list[str]:
    """The lines of the epochs, without the time that was left."""
    return [line.split("  ETA")[0] for line in out.splitlines() if line.startswith("epoch ")]


@pytest.mark.parametrize(
    "variant", ["sgd-accumulate", pytest.param("adamw-bf16-ema", marks=pytest.mark.slow)]
)
def test_a_run_killed_at_any_step_equals_the_undisturbed_one_bit_for_bit(nets, variant):
    arguments = ["--model", "full.py:Net", *COMMON, *VARIANTS[variant]]
    whole, broken = f"{variant}-whole", f"{variant}-broken"
    done = train([*arguments, "--run-dir", whole], nets, LOCKSTEP_RECORD=f"{whole}-record")
    assert done.status == 0, done.out
    last_epoch = told_of_epochs(done.out)[-1]
    for fault in ("kill@step=3", "kill@step=17", "kill@point=save:written,step=21", "term@step=24"):
        done = train([*arguments, "--run-dir", broken], nets, LOCKSTEP_FAULT=fault)
        assert done.status == (75 if "term" in fault else -9), done.out
    assert "stopped at step 25" in done.out
    done = train([*arguments, "--run-dir", broken], nets, LOCKSTEP_RECORD=f"{broken}-record")
    assert done.status == 0 and "at step 25" in done.out, done.out
    assert told_of_epochs(done.out) == [last_epoch]  # also of the steps of the lives before
    assert rows(nets / broken) == rows(nets / whole)
    assert same_weights(nets / whole, nets / broken) == []
    for name in ("model.safetensors", "last.safetensors"):
        assert (nets / whole / name).read_bytes() == (nets / broken / name).read_bytes()
    ours = (nets / f"{whole}-record" / "rank-0.jsonl").read_text().splitlines()
    theirs = (nets / f"{broken}-record" / "rank-0.jsonl").read_text().splitlines()
    assert theirs == ours[-len(theirs) :] and len(theirs) >= 5


@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_three_processes_one_of_them_killed_continue_bit_for_bit_and_the_victim_is_named(
    nets, victim
):
    # Three: a + b is b + a, so two processes cannot see in which order gradients are added.
    arguments = ["--model", "full.py:Net", *COMMON, "--optimizer", "sgd", "--lr", "0.05"]
    arguments += ["--batch-size", "60", "--log-every", "4"]  # the kill is in the middle of a row
    whole, broken = "three-whole", f"three-broken-{victim}"
    if not (nets / whole).exists():
        done = train([*arguments, "--run-dir", whole], nets, 3)
        assert done.status == 0, done.out
    done = train(
        [*arguments, "--run-dir", broken], nets, 3, LOCKSTEP_FAULT=f"kill@step=17,rank={victim}"
    )
    assert done.status != 0
    assert f"because rank {victim} on" in done.out and "died without a word" in done.out, done.out
    done = train([*arguments, "--run-dir", broken], nets, 3)
    assert done.status == 0, done.out
    assert rows(nets / broken) == rows(nets / whole)
    assert same_weights(nets / whole, nets / broken) == []


@pytest.mark.slow
def test_a_row_counts_the_steps_it_adds_up_also_where_a_run_is_made_longer(nets):
    arguments = ["--model", "plain.py:Net", *COMMON, "--log-every", "8", "--lr", "0"]
    for steps in ("12", "20"):
        done = train([*arguments, "--run-dir", "longer", "--stop-after", steps], nets)
        assert done.status == 0, done.out
    found = losses(nets / "longer")
    assert len(found) >= 4 and max(found) - min(found) < 0.2, found


@pytest.mark.slow
def test_what_a_run_began_with_is_not_needed_to_go_on_and_a_requeued_fresh_starts_nothing(nets):
    arguments = ["--model", "plain.py:Net", *SMALL, "--limit", "640", "--run-dir", "heir"]
    first = train([*arguments, "--epochs", "1", "--run-dir", "giver"], nets)
    assert first.status == 0, first.out
    weights = nets / "giver" / "model.safetensors"
    begin = [*arguments, "--weights", str(weights), "--fresh", "--epochs", "3"]
    done = train(begin, nets, LOCKSTEP_FAULT="term@step=15")
    assert done.status == 75, done.out
    weights.unlink()
    done = train(begin, nets, SLURM_RESTART_COUNT="1")
    assert done.status == 0 and "at step 1" in done.out, done.out
    assert [r["step"] for r in rows(nets / "heir") if "train/loss" in r] == list(range(1, 31))
    assert not (nets / "heir.old-1").exists()
    assert train(["--resume", "heir", "--eval-only"], nets).status == 0


@pytest.mark.slow
def test_a_run_continues_on_any_number_of_processes_up_to_its_shards(nets):
    arguments = ["--model", "plain.py:Net", *COMMON, "--shards", "4", "--optimizer", "sgd"]
    done = train([*arguments, "--run-dir", "elastic-whole"], nets)
    assert done.status == 0, done.out
    for processes, fault in ((3, "term@step=8,rank=2"), (1, "term@step=19"), (4, "")):
        done = train([*arguments, "--run-dir", "elastic"], nets, processes, LOCKSTEP_FAULT=fault)
        assert "finished" in done.out or "stopped at step" in done.out, done.out
    assert json.loads((nets / "elastic" / "status.json").read_text())["life"] == 2
    assert losses(nets / "elastic") == pytest.approx(losses(nets / "elastic-whole"), rel=1e-5)
    done = train(["--resume", "elastic", "--epochs", "4"], nets, 5)
    assert "5 processes cannot share 4 shards" in done.out and "at most 4 processes" in done.out


def test_a_finished_run_says_so_and_conflicting_flags_are_listed(nets):
    arguments = ["--model", "plain.py:Net", *SMALL, "--limit", "128", "--epochs", "1"]
    assert train([*arguments, "--run-dir", "done"], nets).status == 0
    before = rows(nets / "done")
    done = train(["--resume", "done"], nets)
    assert done.status == 0 and "this run is finished at step 2" in done.out
    assert rows(nets / "done") == before
    done = train(["--resume", "done", "--lr", "0.7", "--seed", "3"], nets)
    assert (
        done.status == 2 and "--lr 0.7 (the run has 0.001)" in done.out and "--seed 3" in done.out
    )
    longer = train(
        ["--resume", "done", "--epochs", "2", "--lr", "0.7", "--allow-change", "lr"], nets
    )
    assert longer.status == 0 and rows(nets / "done")[: len(before)] == before
    assert len(rows(nets / "done")) > len(before)


def test_changed_data_are_noticed_before_training_goes_on(nets):
    arguments = ["--model", "plain.py:Net", *SMALL, "--limit", "128", "--epochs", "2"]
    assert train([*arguments, "--run-dir", "data", "--stop-after", "2"], nets).status == 0
    manifest = sorted((nets / "data" / "checkpoints").glob("step-*"))[-1] / "MANIFEST.json"
    content = json.loads(manifest.read_text())
    content["facts"]["data"] = "0123456789abcdef"
    content["self"] = digest_of_manifest(content)
    manifest.write_text(json.dumps(content))
    done = train([*arguments, "--run-dir", "data"], nets)
    assert done.status == 2 and "the data are not those this run was trained on" in done.out


def test_damaged_checkpoints_are_skipped_with_the_reason_and_none_valid_is_an_error(nets):
    arguments = ["--model", "plain.py:Net", *SMALL, "--limit", "256", "--epochs", "3"]
    arguments += ["--checkpoint-every", "4", "--run-dir", "damaged"]
    assert train([*arguments, "--stop-after", "9"], nets).status == 0
    checkpoints = sorted((nets / "damaged" / "checkpoints").glob("step-*"))
    with (checkpoints[-1] / "model.safetensors").open("r+b") as file:
        file.seek(300)
        byte = file.read(1)
        file.seek(300)
        file.write(bytes([byte[0] ^ 1]))
    done = train(arguments, nets, LOCKSTEP_FAULT="kill@step=9")
    assert "checksum" in done.out and "at step 8" in done.out, done.out
    for path in (nets / "damaged" / "checkpoints").glob("step-*"):
        (path / "optimizer.safetensors").unlink()
    done = train(arguments, nets)
    assert done.status == 2 and "--fresh" in done.out and "Traceback" not in done.out
    done = train([*arguments, "--fresh"], nets)
    assert done.status == 0 and (nets / "damaged.old-1" / "config.json").exists()
