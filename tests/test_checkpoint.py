"""Checkpoints: whole or not there, verified before use, and never fewer than promised."""

import json
import os
import pickle
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from launches import python
from refusals import refused
from safetensors.torch import save_file
from torch import nn

from common.errors import UserError
from config import TrainConfig
from distributed import faults
from distributed.checkpoint import (
    FORMAT,
    MANIFEST,
    Progress,
    Writer,
    capture,
    digest_of_manifest,
    newest_valid,
    prune,
    read_checkpoint,
    restore,
    save_tensors,
    sweep,
    verify,
    visible,
    write_checkpoint,
)
from optim import WeightAverage, build_optimizer

REPOSITORY = str(Path(__file__).resolve().parent.parent)


@pytest.fixture(autouse=True)
def no_faults():
    yield
    faults.configure(0, 0)


def plan(monkeypatch, text: str) -> None:
    monkeypatch.setenv("LOCKSTEP_FAULT", text)
    faults.configure(0, 0)
    monkeypatch.delenv("LOCKSTEP_FAULT")


def small() -> dict:
    return {"model": {"w": torch.arange(50.0)}, "optimizer": {"w|momentum_buffer": torch.ones(50)}}


def write(folder: Path, *steps: int) -> list[Path]:
    return [write_checkpoint(folder, small(), Progress(step=s, seconds=s), {}) for s in steps]


def net(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )


def train(model, optimizer, steps=2) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(6, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer, average=None) -> list[torch.Tensor]:
    tensors = [*model.state_dict().values(), *(average.state_dict().values() if average else ())]
    for p in model.parameters():
        tensors += [torch.as_tensor(v) for _, v in sorted(optimizer.state[p].items())]
    return [t.detach().clone() for t in tensors]


def equal(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def warnings_of(folder):
    told = []
    found = newest_valid(folder, told.append)
    return found, told


# --- back and forth ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_was_saved_is_what_is_loaded_and_training_goes_on_alike(tmp_path, name, layout):
    def build(seed):
        model = net(seed).to(memory_format=layout)
        model.register_buffer("scale", torch.randn(3, 5).bfloat16())
        return model, build_optimizer(model, TrainConfig(optimizer=name))

    model, optimizer = build(0)
    average = WeightAverage(model, 0.9).model
    train(model, optimizer)
    progress = Progress(step=7, evaluated=5, best=0.25, best_metrics={"confusion": [[1]]}, sums=[3])
    files = capture(model, optimizer, average)
    path = write_checkpoint(tmp_path, files, progress, {"data": "x"})

    other, other_optimizer = build(1)
    other_average = WeightAverage(other, 0.9).model
    (found, manifest), told = warnings_of(tmp_path)
    assert found == path and manifest["facts"] == {"data": "x"} and told == []
    loaded, again = read_checkpoint(found)
    assert again == progress
    restore(loaded, other, other_optimizer, other_average)
    ours = everything(model, optimizer, average)
    assert equal(everything(other, other_optimizer, other_average), ours)
    for p in other.parameters():
        for value in other_optimizer.state[p].values():
            if torch.is_tensor(value) and value.shape == p.shape:
                assert value.stride() == p.stride()
    train(model, optimizer)
    train(other, other_optimizer)
    assert equal(everything(model, optimizer), everything(other, other_optimizer))


def test_captured_state_is_a_copy_that_training_does_not_touch():
    model = net()
    optimizer = build_optimizer(model, TrainConfig())
    files = capture(model, optimizer)
    before = {k: v.clone() for k, v in files["model"].items()}
    train(model, optimizer)
    assert equal(before.values(), files["model"].values())
    assert not equal(before.values(), model.state_dict().values())


def test_an_optimizer_without_state_saves_and_loads(tmp_path):
    model = net()
    optimizer = build_optimizer(model, TrainConfig(momentum=0.0))
    write_checkpoint(tmp_path, capture(model, optimizer), Progress(step=1), {})
    files, _ = read_checkpoint(warnings_of(tmp_path)[0][0])
    restore(files, model, optimizer)


def test_files_are_readable_by_colleagues(tmp_path):
    (path,) = write(tmp_path, 1)
    save_tensors(tmp_path / "model.safetensors", {"w": torch.ones(2)})
    for file in (*path.glob("*.safetensors"), tmp_path / "model.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o644
    assert not list(tmp_path.glob("*.partial"))


# --- kill -9 at every point of a save ------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("point", ["begin", "written", "manifest", "renamed", "pruned"])
def test_a_kill_at_any_point_of_a_save_leaves_the_newest_valid_and_not_older_than_told(
    tmp_path, monkeypatch, point, same_step
):
    acknowledged = tmp_path / "told"
    folder = tmp_path / "checkpoints"
    if (child := os.fork()) == 0:  # saves 1, 2, 3, 4 (or 3 again), and dies in the last
        try:
            for step in (1, 2, 3):
                writer = Writer(
                    folder, 2, lambda told, step=step: acknowledged.write_text(f"{step}")
                )
                writer.start(small(), Progress(step=step), {})
                writer.wait()
            plan(monkeypatch, f"kill@point=save:{point}")
            writer.start(small(), Progress(step=3 if same_step else 4, evaluated=1), {})
            writer.wait()
        finally:
            os._exit(9)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert acknowledged.read_text() == "3"
    sweep(folder)
    (path, _), told = warnings_of(folder)
    _, progress = read_checkpoint(path)
    assert told == [] and progress.step >= 3
    assert all(p.name[5:].isdigit() for p in folder.iterdir())
    for path in visible(folder):
        verify(path)


def test_a_kill_between_the_two_renames_of_the_same_step_is_undone_by_the_sweep(tmp_path):
    (path,) = write(tmp_path, 5)
    path.rename(path.with_name(path.name + ".replaced"))
    shutil.copytree(tmp_path / (path.name + ".replaced"), tmp_path / (path.name + ".partial"))
    sweep(tmp_path)
    assert warnings_of(tmp_path)[0][0] == path and [p.name for p in tmp_path.iterdir()] == [
        path.name
    ]


def test_the_same_step_saved_twice_is_the_later_one(tmp_path):
    for evaluated in (0, 5):
        write_checkpoint(tmp_path, small(), Progress(step=5, evaluated=evaluated), {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000005"]
    assert read_checkpoint(tmp_path / "step-000000005")[1].evaluated == 5


# --- damage --------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 3),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "empty": lambda file: os.truncate(file, 0),
    "first byte": lambda file: flip(file, 0),
    "last byte": lambda file: flip(file, -1),
    "missing": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "progress.json", MANIFEST]
)
def test_damage_is_found_told_with_file_and_reason_and_the_one_before_is_used(
    tmp_path, name, damage
):
    old, new = write(tmp_path, 10, 20)
    DAMAGE[damage](new / name)
    (path, _), told = warnings_of(tmp_path)
    assert path == old and len(told) == 1
    assert "step-000000020 is damaged" in told[0] and name in told[0]


def test_a_flip_of_any_byte_of_the_manifest_is_found(tmp_path):
    (path,) = write(tmp_path, 10)
    intact = (path / MANIFEST).read_bytes()
    for place in range(len(intact)):
        (path / MANIFEST).write_bytes(intact)
        flip(path / MANIFEST, place)
        if not json_equal(path / MANIFEST, intact):
            with pytest.raises(ValueError, match="damaged"):
                verify(path)


def json_equal(path: Path, text: bytes) -> bool:
    """Whether a flipped byte was white space between the words."""
    try:
        return json.loads(path.read_bytes()) == json.loads(text)
    except ValueError:
        return False


@pytest.mark.parametrize(
    "text", ["{}", "[]", "1", '{"format": 1}', '{"format": "x", "files": {}}',
             '{"format": 1, "files": []}', '{"format": 1, "files": {}}',
             '{"format": 1, "files": {"model.safetensors": 3}}'],
)  # fmt: skip
def test_a_manifest_that_says_nothing_vouches_for_nothing(tmp_path, text):
    old, new = write(tmp_path, 10, 20)
    (new / MANIFEST).write_text(text)
    (path, _), told = warnings_of(tmp_path)
    assert path == old and len(told) == 1


def test_a_manifest_cannot_point_outside(tmp_path):
    (path,) = write(tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["../outside"] = {"bytes": 1, "blake2b": "x"}
    (tmp_path / "outside").write_text("x")
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="missing"):
        verify(path)


def test_when_all_are_damaged_nothing_starts_over_silently(tmp_path):
    for path in write(tmp_path, 10, 20):
        flip(path / "model.safetensors", -1)
    told = []
    with refused(
        "no-whole-checkpoint", match=r"none of the 2 checkpoints .* start over with --fresh"
    ):
        newest_valid(tmp_path, told.append)
    assert len(told) == 2
    (tmp_path / "one").mkdir()
    (one,) = write(tmp_path / "one", 10)
    flip(one / "model.safetensors", -1)
    with refused("no-whole-checkpoint", match="the only checkpoint in .* is not whole; start"):
        newest_valid(tmp_path / "one", told.append)
    assert newest_valid(tmp_path / "empty", told.append) is None


def sign(path: Path, manifest: dict) -> None:
    """A manifest changed by hand, with the right checksum of itself."""
    manifest = manifest | {"self": digest_of_manifest(manifest)}
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_a_newer_format_is_refused_with_both_numbers_and_an_older_one_loads(tmp_path):
    (path,) = write(tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    sign(path, manifest | {"format": FORMAT + 1})
    with refused("checkpoint-too-new", match=rf"format {FORMAT + 1}, this one reads {FORMAT}"):
        newest_valid(tmp_path, print)
    sign(path, manifest | {"format": 1, "a later key": 3})
    progress = json.loads((path / "progress.json").read_text())
    assert newest_valid(tmp_path, print)[0] == path
    del progress["sums"]  # a progress written before a field existed, or after one more did
    (path / "progress.json").write_text(json.dumps(progress | {"unknown": 1}))
    assert read_checkpoint(path)[1].step == 1


def test_stray_files_are_ignored_and_interrupted_saves_swept(tmp_path):
    (path,) = write(tmp_path, 3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-000000009").write_text("a file")
    (tmp_path / "step-000000012.partial").mkdir()
    (tmp_path / "step-000000001.removed").mkdir()
    (path / "junk.safetensors").write_bytes(b"not listed in the manifest")
    assert warnings_of(tmp_path)[0][0] == path
    files, _ = read_checkpoint(path)
    assert set(files) == {"model", "optimizer"}
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        path.name, "notes", "step-notes", "step-000000009"
    }  # fmt: skip


# --- keeping -------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_never_fewer(tmp_path):
    for step in range(1, 8):
        write(tmp_path, step)
        prune(tmp_path, 3)
        assert [int(p.name[5:]) for p in visible(tmp_path)] == list(range(step, 0, -1))[:3]
    assert all(p.name[5:].isdigit() for p in tmp_path.iterdir())


def test_a_failed_save_prunes_nothing_is_told_and_the_next_one_works(tmp_path, monkeypatch):
    told = []
    writer = Writer(tmp_path, 2, told.append)
    write(tmp_path, 1, 2, 3)
    plan(monkeypatch, "enospc@point=save:written")
    writer.start(small(), Progress(step=4), {})
    writer.wait()
    assert "checkpoint not saved: needs 0 MB" in writer.error and str(tmp_path) in writer.error
    assert "the previous one stays" in told[-1]
    assert [int(p.name[5:]) for p in visible(tmp_path)] == [3, 2, 1]
    assert len(list(tmp_path.iterdir())) == 3
    faults.configure(0, 0)
    writer.start(small(), Progress(step=4), {})
    writer.wait()
    assert writer.error == "" and "saved step-000000004" in told[-1]
    assert [int(p.name[5:]) for p in visible(tmp_path)] == [4, 3]


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_disk_that_is_really_full_leaves_the_old_checkpoint_and_no_remains(tmp_path):
    write(tmp_path, 1)
    script = f"""
import resource, signal, sys, torch
sys.path.insert(0, {REPOSITORY!r})
from pathlib import Path
from distributed.checkpoint import Progress, Writer
folder = Path({str(tmp_path)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
writer = Writer(folder, 2, lambda told: None)
big = {{"model": {{"w": torch.ones(50_000)}}, "optimizer": {{}}}}
writer.start(big, Progress(step=2), {{}})
writer.wait()
print(writer.error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert [p.name for p in folder.iterdir()] == ["step-000000001"]
writer.start(big, Progress(step=3), {{}})
writer.wait()
assert writer.error == "", writer.error
"""
    (tmp_path.parent / "limited.py").write_text(script)
    done = python(tmp_path.parent / "limited.py")
    assert done.returncode == 0, done.stderr
    assert "checkpoint not saved" in done.stdout and "the previous one stays" in done.stdout
    assert [int(p.name[5:]) for p in visible(tmp_path)] == [3, 1]


def test_damaged_checkpoints_of_a_later_step_never_push_out_a_whole_one(tmp_path):
    for path in write(tmp_path, 10, 20, 25, 30)[1:]:
        flip(path / "model.safetensors", -1)
    assert warnings_of(tmp_path)[0][0].name == "step-000000010"
    writer = Writer(tmp_path, 2, lambda told: None)
    writer.start(small(), Progress(step=15), {})  # the run went back to 10 and trained on
    writer.wait()
    assert writer.error == ""
    path, _ = warnings_of(tmp_path)[0]
    assert path.name == "step-000000015"


def test_where_there_is_no_memory_for_a_thread_a_save_is_made_without_one(tmp_path, monkeypatch):
    """It was waited for until the process was ended from outside: a thread that never began."""
    none = RuntimeError("can't start new thread")
    monkeypatch.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(none))
    writer = Writer(tmp_path, 2, lambda told: None)
    writer.start(small(), Progress(step=3), {})
    writer.wait(60)
    assert not writer.busy() and [p.name for p in tmp_path.iterdir()] == ["step-000000003"]


def test_a_save_begins_no_thread(tmp_path, monkeypatch):
    """One that begins while memory has run out may die unseen: who began it waited for ever."""
    where, threads = [], threading.active_count()
    writer = Writer(tmp_path, 2, lambda told: where.append(threading.current_thread().name))
    monkeypatch.setattr(threading.Thread, "start", lambda _: pytest.fail("a thread begins"))
    for step in (3, 4):
        writer.start(small(), Progress(step=step), {})
        writer.wait(60)
    assert where == ["checkpoint-writer"] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000003", "step-000000004"]
    writer.end()
    assert threading.active_count() == threads and not writer.busy()


def test_who_is_told_of_a_save_and_fails_puts_no_later_one_into_a_step(tmp_path, monkeypatch):
    told, where = [], []

    def fails(words: str) -> None:
        where.append(threading.current_thread().name)
        raise MemoryError(words)

    monkeypatch.setattr(threading, "excepthook", told.append)
    writer = Writer(tmp_path, 2, fails)
    for step in (3, 4):
        writer.start(small(), Progress(step=step), {})
        writer.wait(60)
    writer.end()
    assert where == ["checkpoint-writer"] * 2 and not writer.error, "both are on the disk"
    assert [one.exc_type for one in told] == [MemoryError] * 2


def test_a_wait_that_an_interrupt_cuts_short_leaves_no_thread_behind(tmp_path, monkeypatch):
    """In a notebook, whose process goes on."""
    goes_on, threads = threading.Event(), threading.active_count()
    writer = Writer(tmp_path, 2, lambda told: goes_on.wait(60))
    writer.start(small(), Progress(step=3), {})
    monkeypatch.setattr(writer._idle, "wait", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        writer.end()
    goes_on.set()
    writer._thread.join(10)
    assert threading.active_count() == threads
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000003"]


def test_an_interpreter_ends_only_when_its_save_is_whole(tmp_path):
    script = f"""
import sys, time, torch
sys.path.insert(0, {REPOSITORY!r})
from pathlib import Path
from distributed import checkpoint
from distributed.checkpoint import Progress, Writer
quick = checkpoint.write_checkpoint
checkpoint.write_checkpoint = lambda *a: (time.sleep(1.5), quick(*a))[1]
writer = Writer(Path({str(tmp_path / "saves")!r}), 2, lambda told: None)
writer.start({{"model": {{"w": torch.ones(5)}}, "optimizer": {{}}}}, Progress(step=2), {{}})
"""
    (tmp_path / "saves").mkdir()
    (tmp_path / "ends.py").write_text(script)
    done = python(tmp_path / "ends.py")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "saves").iterdir()] == ["step-000000002"]


def test_a_writer_keeps_the_progress_of_the_moment_it_was_given(tmp_path):
    progress = Progress(step=3)
    writer = Writer(tmp_path, 2, lambda told: None)
    writer.start(small(), progress, {})
    progress.step = 99
    writer.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000003"]


# --- what does not fit ---------------------------------------------------------------------------


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_changed():
    model = net()
    optimizer = build_optimizer(model, TrainConfig())
    train(model, optimizer)
    files = capture(model, optimizer)
    others = {
        "shape": nn.Sequential(*list(net())[:4], nn.Linear(144, 6)),
        "more": nn.Sequential(*net(), nn.Linear(5, 5)),
        "fewer": nn.Sequential(*list(net())[:4]),
    }
    for name, other in others.items():
        other_optimizer = build_optimizer(other, TrainConfig())
        before = everything(other, other_optimizer)
        with refused("checkpoint-of-other-model", match="belongs to another model"):
            restore(files, other, other_optimizer)
        assert equal(everything(other, other_optimizer), before), name


def test_an_average_that_was_not_saved_is_refused_before_anything_is_changed():
    model = net()
    optimizer = build_optimizer(model, TrainConfig())
    train(model, optimizer)
    files = capture(model, optimizer)
    other = net(1)
    other_optimizer = build_optimizer(other, TrainConfig())
    average = WeightAverage(other, 0.9).model
    before = everything(other, other_optimizer, average)
    with refused("checkpoint-without-average"):
        restore(files, other, other_optimizer, average)
    assert equal(everything(other, other_optimizer, average), before)


@pytest.mark.parametrize(("old", "new"), [("sgd", "adamw"), ("adamw", "sgd"), ("muon", "adamw")])
def test_the_state_of_another_optimizer_is_refused_or_left_out_but_never_half_used(old, new):
    model = net()
    optimizer = build_optimizer(model, TrainConfig(optimizer=old))
    train(model, optimizer)
    files = capture(model, optimizer)
    other = build_optimizer(model, TrainConfig(optimizer=new))
    try:
        restore(files, model, other)
    except UserError as error:
        assert "--weights runs/NAME" in str(error)  # how what was learned goes on
        return
    train(model, other)


# --- strangers' files ----------------------------------------------------------------------------


class Trap:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_pickle_under_our_names_is_never_executed(tmp_path):
    marker = tmp_path / "executed"
    trap = pickle.dumps(Trap(marker))
    folder = tmp_path / "checkpoints"
    for name in ("model.safetensors", "optimizer.safetensors", "progress.json", MANIFEST):
        (path,) = write(folder, 1)
        (path / name).write_bytes(trap)
        with pytest.raises(UserError):
            newest_valid(folder, print)
        if name != MANIFEST:  # the stranger mended the manifest too
            vouch(path)
            with pytest.raises(Exception, match=r".") as caught:
                read_checkpoint(newest_valid(folder, print)[0])
            assert not isinstance(caught.value, pickle.PickleError)
    assert not marker.exists()
    pickle.loads(trap)
    assert marker.exists()  # the trap works


def vouch(path: Path) -> None:
    """Write a manifest that fits whatever lies there."""
    from distributed.checkpoint import digest_of

    files = {
        p.name: {"bytes": p.stat().st_size, "blake2b": digest_of(p)}
        for p in path.iterdir() if p.name != MANIFEST
    }  # fmt: skip
    sign(path, {"format": FORMAT, "step": 1, "facts": {}, "files": files})


def test_a_vouched_checkpoint_with_the_wrong_tensors_is_a_sentence(tmp_path):
    (path,) = write(tmp_path, 1)
    save_file({"other": torch.ones(3)}, path / "model.safetensors")
    save_file({"|SGD": torch.ones(1)}, path / "optimizer.safetensors")
    vouch(path)
    model = net()
    optimizer = build_optimizer(model, TrainConfig())
    files, _ = read_checkpoint(newest_valid(tmp_path, print)[0])
    with refused("checkpoint-of-other-model"):
        restore(files, model, optimizer)
