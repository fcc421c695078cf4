"""The run folder: whose it is, what stands in it, and what a crash may not spoil."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.disk import read_json, write_json, write_text
from common.errors import UserError
from training import run_dir
from training.run_dir import (
    STALE_SECONDS,
    RunDir,
    describe_environment,
    fresh_name,
    launch_command,
    set_aside,
)

REPOSITORY = str(Path(__file__).resolve().parent.parent)
HOLD = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from training.run_dir import RunDir
made = RunDir(Path(sys.argv[2]))
made.open()
if len(sys.argv) > 3 and os.fork() == 0:
    time.sleep(60)  # a worker that outlives its parent
    os._exit(0)
print("open", flush=True)
time.sleep(60)
"""
posix = pytest.mark.skipif(run_dir.fcntl is None, reason="needs POSIX locks")


@pytest.fixture
def hold():
    """Start processes that hold a folder's lock; returns a function folder -> process."""
    started = []

    def start(folder, *more):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, REPOSITORY, str(folder), *more],
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "open\n"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def opened(folder) -> RunDir:
    made = RunDir(folder)
    made.open()
    return made


# --- whose folder it is --------------------------------------------------------------------------


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds files that are no run \(thesis.tex"):
        opened(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_is_a_sentence(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        opened(tmp_path / "run")


@pytest.mark.parametrize("left", [["lock"], ["config.json", "lock"], ["slurm.log", "STOP"], [],
                                  ["crash"], ["crash", "train.log", "checkpoints"]])  # fmt: skip
def test_what_a_life_that_ended_early_left_is_ours(tmp_path, left):
    for name in left:
        if name in ("crash", "checkpoints"):
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_text("")
    opened(tmp_path).close()


@posix
def test_a_second_process_is_refused_with_host_process_and_time_and_may_enter_after_a_kill(
    tmp_path, hold
):
    process = hold(tmp_path)
    told = rf"in use by process {process.pid} on {socket.gethostname()} since \d{{4}}-\d\d-\d\d"
    with pytest.raises(UserError, match=told + ".*another --run-dir"):
        opened(tmp_path)
    assert process.poll() is None
    process.kill()
    process.wait()
    opened(tmp_path).close()


@posix
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_that_outlives_its_parent_does_not_hold_the_lock(tmp_path, hold):
    process = hold(tmp_path, "fork")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    opened(tmp_path).close()


@posix
def test_a_fresh_start_does_not_pull_the_folder_from_under_a_running_process(tmp_path, hold):
    folder = tmp_path / "run"
    process = hold(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"in use by process {process.pid}"):
        set_aside(folder)
    assert (folder / "config.json").exists() and len(list(tmp_path.iterdir())) == 1


def elsewhere(folder, age: float, **owner) -> None:
    """A lock as a process on another host leaves it."""
    lock = folder / "lock"
    lock.write_text(json.dumps({"host": "far", "pid": 1, "job": "", "since": "then"} | owner))
    os.utime(lock, (time.time() - age, time.time() - age))


def test_another_hosts_fresh_heartbeat_is_respected_and_a_stale_one_taken_over(tmp_path):
    elsewhere(tmp_path, 5)
    with pytest.raises(UserError, match="in use by process 1 on far since then"):
        opened(tmp_path)
    elsewhere(tmp_path, STALE_SECONDS + 5)
    made = opened(tmp_path)
    assert read_json(tmp_path / "lock")["host"] == socket.gethostname()
    made.close()


def test_another_host_that_released_the_lock_or_the_same_job_requeued_is_taken_over(
    tmp_path, monkeypatch
):
    elsewhere(tmp_path, 5, released=True)
    opened(tmp_path).close()
    elsewhere(tmp_path, 5, job="77")
    with pytest.raises(UserError, match=r"\(job 77\)"):
        opened(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    opened(tmp_path).close()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"host":'])
def test_a_damaged_lock_file_is_nobodys(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    made = opened(tmp_path)
    assert read_json(tmp_path / "lock")["pid"] == os.getpid()
    made.close()


def test_a_heartbeat_while_the_folder_is_closed_is_no_error(tmp_path):
    made = opened(tmp_path)
    made._lock.close()  # by the main thread, between two lines of a beat
    assert made.beat()


def test_a_heartbeat_keeps_the_lock_young(tmp_path):
    made = opened(tmp_path)
    os.utime(tmp_path / "lock", (1, 1))
    made.beat()
    assert time.time() - (tmp_path / "lock").stat().st_mtime < 30
    made.close()
    made.beat()


def test_without_posix_locks_it_still_works(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "fcntl", None)
    made = opened(tmp_path)
    made.status(status="running")
    made.append_metrics({"step": 1})
    made.close()
    again = opened(tmp_path)
    assert again.read_status() == {"status": "running"} and again.read_metrics() == [{"step": 1}]
    again.close()
    elsewhere(tmp_path, 5)
    with pytest.raises(UserError, match="in use by process 1 on far"):
        opened(tmp_path)


def test_without_posix_locks_a_living_process_of_this_host_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "fcntl", None)
    elsewhere(tmp_path, 5, host=socket.gethostname(), pid=os.getppid())
    with pytest.raises(UserError, match="in use by process"):
        opened(tmp_path)


# --- names, --fresh, giving up -------------------------------------------------------------------


def test_fresh_names_count_up_and_are_claimed(tmp_path):
    root = tmp_path / "runs"
    names = [fresh_name(root, "nets/my.py:Net", "org/cats & dogs").name for _ in range(3)]
    assert names == [f"Net-cats___dogs-{n}" for n in (1, 2, 3)]
    assert fresh_name(root, "torchvision:resnet18", "cifar10").name == "resnet18-cifar10-1"
    for name in ("..", "/", ".", "$(touch x)", "a\nb", "'"):
        made = fresh_name(root, name, name)
        assert made.parent == root and shlex.quote(made.name) == made.name


def test_fresh_sets_the_old_run_aside_and_deletes_nothing(tmp_path):
    folder = tmp_path / "run"
    assert set_aside(folder) is None
    for number in (1, 2):
        made = opened(folder)
        made.write_birth("{}", ["python"], {"life": number})
        made.close()
        aside = set_aside(folder)
        assert aside.name == f"run.old-{number}" and not folder.exists()
        assert read_json(aside / "environment.json") == {"life": number}
    folder.mkdir()
    (folder / "thesis.tex").touch()
    assert set_aside(folder) is None and (folder / "thesis.tex").exists()


def test_a_run_that_was_never_born_leaves_no_folder_and_a_born_one_stays(tmp_path):
    made = opened(tmp_path / "a")
    made.status(status="running")
    (tmp_path / "a" / "crash").mkdir()
    (tmp_path / "a" / "crash" / "heartbeat-0.json").write_text("{}")
    made.abandon()
    assert not (tmp_path / "a").exists()
    made = opened(tmp_path / "b")
    made.write_birth("{}", ["python"], {})
    made.status(status="running")
    made.abandon("the data are others")
    assert (tmp_path / "b" / "config.json").exists()
    assert made.read_status()["status"] == "failed"
    made.close()


def test_the_latest_link_follows_the_newest_and_never_replaces_a_real_folder(tmp_path):
    home = opened(tmp_path / "elsewhere")
    home.link_latest()
    home.close()
    assert not (tmp_path / "latest").is_symlink()  # only a folder called runs gets one
    tmp_path = tmp_path / "runs"
    for name in ("one", "two"):
        made = opened(tmp_path / name)
        made.link_latest()
        made.close()
        assert (tmp_path / "latest").resolve() == tmp_path / name
        assert str((tmp_path / "latest").readlink()) == name  # runs/ can be moved
    (tmp_path / "other" / "runs" / "latest").mkdir(parents=True)
    RunDir(tmp_path / "other" / "runs" / "x").link_latest()
    assert not (tmp_path / "other" / "runs" / "latest").is_symlink()


# --- files ---------------------------------------------------------------------------------------


def test_a_file_is_the_old_or_the_new_one_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "status.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert read_json(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["status.json"]
    assert read_json(tmp_path / "none", 7) == 7
    path.write_bytes(b"\xff{")
    assert read_json(path, 7) == 7


def test_metrics_are_cut_to_what_the_checkpoint_knew_and_continue_whole(tmp_path):
    made = RunDir(tmp_path)
    for step in range(1, 6):
        assert made.append_metrics({"step": step}) == ""
    made.keep_metrics(3)
    made.append_metrics({"step": 4})
    assert [row["step"] for row in made.read_metrics()] == [1, 2, 3, 4]
    made.keep_metrics(9)
    assert len(made.read_metrics()) == 4
    made.keep_metrics(0)
    assert made.read_metrics() == []


@pytest.mark.parametrize("kept", [2, 3])
def test_half_a_row_at_the_end_does_not_spoil_the_next_one(tmp_path, kept):
    made = RunDir(tmp_path)
    made.metrics_file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "tr')
    made.keep_metrics(kept)
    made.append_metrics({"step": 3})
    assert made.read_metrics() == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_rows_that_a_full_disk_refuses_wait_and_come_in_order(tmp_path):
    made = RunDir(tmp_path)
    made.append_metrics({"step": 1})
    intact = made.metrics_file
    made.metrics_file = tmp_path / "no" / "such" / "place"
    assert made.append_metrics({"step": 2}) != "" and made.append_metrics({"step": 3}) != ""
    made.metrics_file = intact
    assert made.append_metrics({"step": 4}) == ""
    assert [row["step"] for row in made.read_metrics()] == [1, 2, 3, 4]


def test_each_life_knows_when_it_began_and_how_the_one_before_it_ended(tmp_path):
    made = RunDir(tmp_path)
    made.begin_life(0, 0)
    made.status(status="stopped", reason="SIGTERM", step=7)
    made.begin_life(1, 7)
    made.status(step=9)  # and killed
    made.begin_life(2, 7)
    status = made.read_status()
    assert [(life["life"], life["step"]) for life in status["lives"]] == [(0, 0), (1, 7), (2, 7)]
    assert [life["after"] for life in status["lives"]] == [
        None,
        {"status": "stopped", "step": 7, "reason": "SIGTERM"},
        {"status": "running", "step": 9, "reason": ""},
    ]
    assert (status["status"], status["resumed_at"], status["reason"]) == ("running", 7, "")
    made.status(lives="damaged")
    made.begin_life(3, 7)
    assert len(made.read_status()["lives"]) == 1


def test_status_is_merged(tmp_path):
    made = RunDir(tmp_path)
    made.status(status="running", life=0)
    made.status(step=3)
    assert made.read_status() == {"status": "running", "life": 0, "step": 3}
    (tmp_path / "status.json").write_text("{")
    made.status(step=4)
    assert made.read_status() == {"step": 4}


HOSTILE = ["plain", "two words", "a'b", 'a"b', "$(touch planted)", "`touch planted`", "a\nb",
           "; touch planted", "*", "~", "\\", "-n", "", "é犬"]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="needs sh")
@pytest.mark.parametrize("processes", [1, 4])
def test_the_command_file_repeats_hostile_arguments_word_for_word(tmp_path, monkeypatch, processes):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    made = RunDir(tmp_path)
    made.write_birth("{}", launch_command(HOSTILE, processes), {})
    show = tmp_path / "bin" / ("python" if processes == 1 else "torchrun")
    show.parent.mkdir()
    show.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    show.chmod(0o755)
    path = f"{show.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", str(tmp_path / "command.sh")], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = json.loads(done.stdout)
    before = ["train.py"] if processes == 1 else ["--nproc-per-node", "4", "train.py"]
    assert words == before + HOSTILE
    assert not (tmp_path / "planted").exists()


def test_the_command_of_several_nodes_names_them(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = launch_command(["--lr", "1"], 6)
    assert words[:3] == ["sbatch", "--nodes=3", "--ntasks-per-node=2"] and words[-1] == "1"
    assert launch_command([], 6, gpus=True)[2] == "--gpus-per-node=2"


def test_no_secret_of_the_environment_is_written(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "PS1"):
        monkeypatch.setenv(name, "canary-8471")
    made = opened(tmp_path)
    facts = describe_environment({"devices": "CPU"})
    made.write_birth("{}", ["python", "train.py"], facts)
    made.status(status="running")
    made.close()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert "canary" not in path.read_text()
    assert facts["devices"] == "CPU" and facts["packages"]["torch"]
    assert len(facts["commit"]) in (0, 40)


def test_a_run_of_a_job_goes_on_as_a_job(monkeypatch):
    folder = Path("runs/slurm-70_1")
    assert run_dir.go_on(folder, 4, True) == "python train.py --resume runs/slurm-70_1"
    for name, value in {"SLURM_STEP_ID": "0", "LOCKSTEP_PORT": "1", "SLURM_ARRAY_JOB_ID": "70",
                        "SLURM_ARRAY_TASK_ID": "1", "LOCAL_WORLD_SIZE": "2"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    wanted = "sbatch --nodes=2 --gpus-per-node=2 launch/slurm.sbatch --resume runs/slurm-70_1"
    assert run_dir.go_on(folder, 4, True) == wanted and run_dir.job() == "70_1"


def test_what_was_not_committed_is_kept_with_the_run(tmp_path, monkeypatch):
    code = tmp_path / "code"
    (code / "training").mkdir(parents=True)
    (code / "net.py").write_text("width = 1\n")
    own = ["git", "-C", str(code), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "net.py"], ["commit", "-qm", "one"]):
        subprocess.run([*own, *words], check=True)
    monkeypatch.setattr(run_dir, "__file__", str(code / "training" / "run_dir.py"))
    for number, text in enumerate(("width = 1\n", "width = 2\n")):
        (code / "net.py").write_text(text)
        run = RunDir(tmp_path / f"run{number}")
        run.folder.mkdir()
        run.write_birth("{}", ["python"], run_dir.describe_environment({}))
    assert not (tmp_path / "run0" / "uncommitted.diff").exists()
    kept = tmp_path / "run1" / "uncommitted.diff"
    assert "+width = 2" in kept.read_text()
    (code / "net.py").write_text("width = 1\n")
    subprocess.run([*own, "apply", str(kept)], check=True)
    assert (code / "net.py").read_text() == "width = 2\n"
