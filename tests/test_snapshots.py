"""Snapshots in memory: a killed run goes on from its own, exactly, and from no other."""

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from launches import SMALL, Done, command, finish, newest, rows, same_weights, start, train
from refusals import refused
from torch import nn

from common.disk import read_json
from config import TrainConfig, parse
from distributed.checkpoint import Progress, capture, write_checkpoint
from optim import build_optimizer
from training import snapshots
from training.snapshots import Snapshots

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="they lie in /dev/shm")
USER = os.geteuid() if hasattr(os, "geteuid") else 0
FACTS = {"data": "a", "model": "b", "order": "c", "code": "d", "processes": "2"}
WORDS = ["--model", "full.py:Net", *SMALL, "--limit", "640", "--epochs", "3", "--augment", "crop"]
WORDS += ["--ema", "0.9", "--checkpoint-every", "7", "--snapshot-every", "3"]
IN_MEMORY = "from the snapshot in memory"


def left(memory: Path) -> list[str]:
    """The snapshots that lie there."""
    return sorted(path.name for path in memory.glob("lockstep-*/step-*"))


def pause_and_kill(step: int, rank: int = 0) -> str:
    """A kill that all which was begun before it has ended; others wait for that process."""
    return f"hang@step={step},rank={rank},seconds=2;kill@step={step},rank={rank}"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def resumed(done: Done) -> str:
    """The line of the start panel that says where a life went on."""
    return next((line for line in done.out.splitlines() if "resumed" in line), "")


# --- of whole runs -------------------------------------------------------------------------------


def test_a_run_killed_between_checkpoints_goes_on_from_memory_bit_for_bit(nets, tmp_path):
    """Killed beside a snapshot and inside one; a checkpoint that is newer; damage; the end."""
    env = {"LOCKSTEP_SHM": str(tmp_path)}
    whole = train([*WORDS, "--snapshot-every", "off", "--run-dir", "shm-whole"], nets, **env)
    assert whole.status == 0 and left(tmp_path) == [], whole.out
    words = [*WORDS, "--run-dir", "shm-broken"]

    def life(fault: str) -> Done:
        done = train(words, nets, LOCKSTEP_FAULT=fault, **env)
        assert done.status == (-9 if fault else 0), done.out
        return done

    first = life(pause_and_kill(5))
    assert "every 3 steps" in first.out and left(tmp_path) == ["step-000000003"], first.out
    home = next(tmp_path.glob("lockstep-*"))
    assert home.stat().st_mode & 0o777 == 0o700
    second = life("kill@point=snapshot:written,step=6")  # half of it is written
    assert "at step 3" in resumed(second) and IN_MEMORY in resumed(second), second.out
    third = life(pause_and_kill(14))
    assert "at step 3" in resumed(third) and IN_MEMORY in resumed(third), third.out
    assert left(tmp_path) == ["step-000000012"]  # and a checkpoint is of step 14
    fourth = life(pause_and_kill(20))
    assert "at step 14" in resumed(fourth) and "from the disk" in resumed(fourth), fourth.out
    flip(tmp_path / home.name / "step-000000018" / "optimizer.safetensors")
    fifth = life(pause_and_kill(22))
    assert "at step 14" in resumed(fifth), fifth.out
    assert "the snapshot of step 18 is not used: it is damaged" in fifth.out, fifth.out
    assert left(tmp_path) == ["step-000000018"] and newest(nets / "shm-broken").name[-2:] == "21"
    flip(newest(nets / "shm-broken") / "model.safetensors")  # the next one there is of step 14
    last = life("")
    assert "at step 18" in resumed(last) and IN_MEMORY in resumed(last), last.out
    assert left(tmp_path) == [] and list(tmp_path.glob("lockstep-*")) == []
    assert rows(nets / "shm-broken") == rows(nets / "shm-whole")
    assert same_weights(nets / "shm-whole", nets / "shm-broken") == []
    lives = read_json(nets / "shm-broken" / "status.json", {})["lives"]
    assert [life["step"] for life in lives] == [0, 3, 3, 14, 14, 18]


@pytest.mark.slow
def test_a_stop_by_hand_leaves_no_snapshot_and_other_settings_use_none(nets, tmp_path):
    env, words = {"LOCKSTEP_SHM": str(tmp_path)}, [*WORDS, "--run-dir", "shm-stopped"]
    done = train(words, nets, LOCKSTEP_FAULT="term@step=8", **env)
    assert done.status == 75 and left(tmp_path) == [], done.out
    done = train(words, nets, LOCKSTEP_FAULT=pause_and_kill(13), **env)
    assert "at step 9" in resumed(done) and left(tmp_path) == ["step-000000012"], done.out
    other = [*words, "--lr", "0.002", "--allow-change", "lr", "--stop-after", "20"]
    done = train(other, nets, **env)
    assert done.status == 0 and "at step 9" in resumed(done), done.out
    assert "step 12 is not used: it was taken with other settings" in done.out, done.out
    done = train([*words, "--fresh"], nets, LOCKSTEP_FAULT=pause_and_kill(5), **env)
    assert left(tmp_path) == ["step-000000003"], done.out
    done = train([*words, "--fresh"], nets, **env)  # another run at the same place
    assert done.status == 0 and resumed(done) == "" and "not used" not in done.out, done.out
    assert left(tmp_path) == []


def on_two_nodes(folder: Path, words: list[str], **env: str) -> list[Done]:
    """A process on each of two nodes, whose memories are two folders."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in ("0", "1"):
        (folder / f"memory-{rank}").mkdir(exist_ok=True)
        place = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                 "GROUP_RANK": rank, "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port, "LOCKSTEP_SHM": str(folder / f"memory-{rank}")}  # fmt: skip
        started.append(start(command(words), folder, **place, **env))
    return [finish(*one) for one in started]


@pytest.mark.slow
def test_a_node_that_comes_new_gets_the_snapshot_from_a_peer(nets, tmp_path):
    words = ["--model", nets / "full.py:Net", *WORDS[2:], "--checkpoint-every", "100"]
    words = [str(word) for word in words]
    memories = [tmp_path / "memory-0", tmp_path / "memory-1"]
    for done in on_two_nodes(tmp_path, [*words, "--run-dir", "whole"]):
        assert done.status == 0, done.out
    again = [*words, "--run-dir", "broken"]
    for victim in (0, 1):
        fault = pause_and_kill(8 + 6 * victim, victim)
        ended = on_two_nodes(tmp_path, again, LOCKSTEP_FAULT=fault)
        assert all(done.status for done in ended), ended
        step = f"step-{6 + 6 * victim:09d}"
        assert [left(memory) for memory in memories] == [[step], [step]], ended[0].out
        shutil.rmtree(memories[1 - victim])  # another computer takes the place of that one
    done, other = on_two_nodes(tmp_path, again)
    assert (done.status, other.status) == (0, 0), (done.out, other.out)
    assert "at step 12" in resumed(done) and IN_MEMORY in resumed(done), done.out
    told = " ".join(done.out.replace("│", " ").split())
    assert "node 0 (" in told and "got it from node 1 (" in told, done.out
    assert [left(memory) for memory in memories] == [[], []]
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert same_weights(tmp_path / "whole", tmp_path / "broken") == []


# --- whose they are ------------------------------------------------------------------------------


def test_what_a_killed_run_left_is_removed_by_a_later_one_and_nothing_else_is(tmp_path):
    owner = subprocess.Popen(["sleep", "600"])

    def home(name: str, owner: str, mode: int = 0o700) -> Path:
        path = tmp_path / f"lockstep-{USER}-{name}"
        path.mkdir()
        path.chmod(mode)
        (path / "owner").write_text(owner)
        return path

    alive = snapshots.identity(owner.pid)
    boot, space, pid, began = alive.split()
    killed = home("killed-0", alive)
    later = home("later-0", f"{boot} {space} {os.getpid()} {began}")  # its number came again
    before = home("before-0", f"another-boot {space} {pid} {began}")
    beside = home("beside-0", f"{boot} pid:[1] {pid} {began}")  # of another container
    opened = home("opened-0", "", 0o755)
    os.utime(opened, (0, 0))
    own, young = home("own-0", ""), home("young-0", "")
    try:
        snapshots.remove_dead(tmp_path, "own")
        assert killed.exists() and not later.exists() and not before.exists()
    finally:
        owner.kill()
        owner.wait()
    snapshots.remove_dead(tmp_path, "own")
    assert not killed.exists()
    assert all(path.exists() for path in (beside, opened, own, young))
    os.utime(young, (0, 0))
    snapshots.remove_dead(tmp_path, "own")
    assert not young.exists() and own.exists()


@pytest.mark.skipif(USER != 0, reason="only root gives a folder away")
def test_a_folder_of_another_user_is_neither_read_nor_written(tmp_path):
    home = tmp_path / f"lockstep-{USER}-key-0"
    home.mkdir(mode=0o700)
    assert snapshots.homes(tmp_path, "key") == [home]
    os.chown(home, 12345, 12345)
    assert snapshots.homes(tmp_path, "key") == []
    os.chown(home, USER, USER)
    home.rename(tmp_path / "elsewhere")
    home.symlink_to(tmp_path / "elsewhere")
    assert snapshots.homes(tmp_path, "key") == []


# --- which are used ------------------------------------------------------------------------------


class Alone:
    """A world of one process, as far as snapshots ask."""

    def __init__(self, processes: int) -> None:
        self.num_processes, self.is_main = processes, True
        self.accelerator = type("A", (), {"is_local_main_process": True})
        self.device, self.stop = torch.device("cpu"), type("S", (), {"snapshot_every": None})()
        self.stop.snapshotted = lambda: None

    def main_decides(self, decide):
        return decide()

    def everyones(self, mine):
        return [mine]


class Small:
    """A learner of little weight."""

    def __init__(self) -> None:
        self.bare = nn.Linear(4, 2)
        self.parameters = list(self.bare.parameters())
        self.optimizer = type("O", (), {"optimizer": torch.optim.SGD(self.parameters)})
        self.averaged_model = self.scaler = None


def of_run(folder: Path, facts: dict, *flags: str, debug: bool = False, of: int = 1) -> Snapshots:
    """Those of a run that had lives from steps 0 and 20, and has 9 rows."""
    folder.mkdir(exist_ok=True)
    lives = [{"step": 0, "born": 1.5}, {"step": 20}]
    (folder / "status.json").write_text(json.dumps({"lives": lives}))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n' * 9)
    settings = parse(["--model", "my_cnn", "--dataset", "digits", *flags])
    actions = type("X", (), {"debug": debug})
    plan = type("P", (), {"config": settings.config, "folder": folder, "actions": actions})
    return Snapshots(plan, facts, Alone(of))


@pytest.mark.parametrize(
    ("step", "rows", "life", "facts", "flags", "why"),
    [
        (30, 9, 1, {}, [], ""),
        (30, 9, 1, {"processes": "7"}, ["--snapshot-every", "9s", "--keep", "4"], ""),
        (20, 9, 0, {}, [], ""),
        (21, 9, 0, {}, [], "a later life went on from before it"),
        (30, 10, 1, {}, [], "metrics.jsonl lacks its last rows"),
        (30, 9, 1, {"code": "z"}, [], "it was taken with other code"),
        (30, 9, 1, {"data": "z"}, [], "it was taken with other data"),
        (30, 9, 1, {}, ["--lr", "0.3"], "it was taken with other settings"),
    ],
)
def test_a_snapshot_of_another_history_or_another_run_is_not_used(
    tmp_path, monkeypatch, step, rows, life, facts, flags, why
):
    monkeypatch.setenv("LOCKSTEP_SHM", str(tmp_path))
    learner, told = Small(), []
    taken = of_run(tmp_path / "run", FACTS, "--snapshot-every", "5")
    assert taken.find(told.append) == 0 and told == []
    taken.begin(learner, Progress(step=15), told.append, told.append)
    assert taken.due(20) and not taken.due(21)
    home = tmp_path / f"lockstep-{USER}-{taken.run.key}-0"
    home.mkdir(mode=0o700)
    (home / "owner").write_text("")
    files = capture(learner.bare, build_optimizer(learner.bare, TrainConfig()))
    progress = Progress(step=step, metrics_rows=rows)
    write_checkpoint(home, files, progress, {**taken.facts, "life": life})
    later = of_run(tmp_path / "run", {**FACTS, **facts}, "--snapshot-every", "5", *flags)
    assert later.find(told.append) == (0 if why else step)
    assert [text for text in told if "not used" in text] == [
        f"{later._node()}: the snapshot of step {step} is not used: {why}" for _ in [0] if why
    ]
    if not why:
        assert later.fetch(told.append) == home / f"step-{step:09d}"
    elsewhere = of_run(tmp_path / "other", FACTS, "--snapshot-every", "5")  # a run of its own
    assert elsewhere.find(print) == 0 and elsewhere.run.key != taken.run.key
    later.begin(learner, Progress(step=19), print, print)
    assert left(tmp_path) == []  # newer than where the life went on: no later one may take it


def test_a_snapshot_taken_is_whole_owned_and_given_back(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_SHM", str(tmp_path))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    learner, told = Small(), []
    taken = of_run(tmp_path / "run", FACTS, "--snapshot-every", "1h")
    taken.find(print)
    taken.begin(learner, Progress(), told.append, told.append)
    assert taken.world.stop.snapshot_every == 3600
    before = tmp_path / f"lockstep-{USER}-{taken.run.key}-1"  # this node's number was another
    before.mkdir(mode=0o700)
    (before / "owner").write_text("another-boot pid:[1] 1 1")
    for step in (3, 4):
        taken.take(learner, Progress(step=step), 0.0)
        taken.wait()
    home = next(tmp_path.glob("lockstep-*-0"))
    assert not before.exists()
    assert left(tmp_path) == ["step-000000004"] and not snapshots.is_dead(home)
    assert snapshots.read_owner(home) == snapshots.identity(os.getpid())
    assert taken.world.stop.snapshot_every > 3600  # "began" long ago: it cost much
    assert len(told) == 1 and "a snapshot of" in told[0], told
    assert snapshots.in_memory(tmp_path / "run")[0].startswith("step 4: ")
    taken.forget()
    assert list(tmp_path.glob("lockstep-*")) == []


def test_where_a_snapshot_cannot_be_written_the_run_is_told_once_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_SHM", str(tmp_path))
    taken, told = of_run(tmp_path / "run", FACTS, "--snapshot-every", "2s"), []
    taken.find(print)
    taken.begin(Small(), Progress(), told.append, told.append)
    (tmp_path / f"lockstep-{USER}-{taken.run.key}-0").mkdir(mode=0o755)
    for step in (3, 4):
        taken.take(Small(), Progress(step=step), 0.0)
        taken.wait()
    assert left(tmp_path) == [] and len(told) == 1 and "somebody else's" in told[0], told
    assert taken.world.stop.snapshot_every is None


# --- where they are taken ------------------------------------------------------------------------


def test_where_a_restart_is_possible_they_are_taken_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_SHM", str(tmp_path))
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)

    def takes(*flags, **values) -> bool:
        flags = ("--run-dir", "run", *flags)
        return of_run(tmp_path / "run", FACTS, *flags, **values).takes

    assert not takes() and takes("--snapshot-every", "10s")
    assert not takes("--snapshot-every", "10s", debug=True)
    assert takes(of=2) and not takes("--snapshot-every", "off", of=2)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert takes()


@pytest.mark.parametrize(
    ("memory", "free", "told"),
    [("nowhere", 10**9, "no /dev/shm"), (".", 250, "three times"), (".", 10**9, "")],
)
def test_no_memory_for_three_is_told_and_none_are_taken(tmp_path, monkeypatch, memory, free, told):
    monkeypatch.setenv("LOCKSTEP_SHM", str(tmp_path / memory))
    monkeypatch.setattr(snapshots, "room", lambda root: free)
    taken = of_run(tmp_path / "run", FACTS, "--snapshot-every", "2s")
    taken.find(print)
    taken.begin(Small(), Progress(), print, print)
    assert taken.takes == (not told) and told in taken.in_words, taken.in_words
    assert taken.in_words.startswith("none: ") == bool(told)
    assert taken.world.stop.snapshot_every == (None if told else 2.0)


def test_room_is_what_the_tightest_control_group_leaves(tmp_path):
    def write(folder: Path, **values: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (folder / name.replace("__", ".")).write_text(value)

    job = tmp_path / "job_7"
    step = job / "step_0"
    write(step, memory__max="max", memory__current="70", memory__stat="anon 5\ninactive_file 3\n")
    assert snapshots.room_of_group(tmp_path, "/job_7/step_0") > 10**12
    write(job, memory__max="100", memory__current="80", memory__stat="anon 5\ninactive_file 30\n")
    assert snapshots.room_of_group(tmp_path, "/job_7/step_0") == 50
    old = tmp_path / "old"
    write(old / "a", memory__limit_in_bytes="90", memory__usage_in_bytes="60",
          memory__stat="inactive_file 1\ntotal_inactive_file 20\n")  # fmt: skip
    assert snapshots.room_of_group(old, "/a") == 50
    assert snapshots.room(Path("/dev/shm")) > 0


def test_a_wrong_cadence_is_refused(tmp_path):
    for value, code in (("0", "bad-value"), ("often", "bad-duration"), ("0s", "bad-duration")):
        with refused(code, match="--snapshot-every"):
            parse(["--snapshot-every", value])
    for value in ("auto", "off", "10s", "3"):
        assert parse(["--snapshot-every", value]).config.snapshot_every == value
