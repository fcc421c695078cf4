"""Windows and macOS, as far as Linux can play them: what POSIX alone has is hidden, and spawned."""

import json
import os
import re
import subprocess
import sys

import pytest
from launches import CLEAN, REPOSITORY, SMALL, TRAIN, losses, train
from test_pack import make
from test_photographs import NET

MODULES = ("fcntl", "resource", "termios", "tty", "pty", "grp", "pwd", "syslog")
SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGSTOP", "SIGALRM", "SIGCHLD", "SIGPIPE")
CALLS = ("fork", "killpg", "getpgid", "setsid", "getuid", "geteuid", "uname", "statvfs", "sysconf",
         "sched_getaffinity", "getloadavg", "mkfifo", "nice", "pread", "pwrite",
         "posix_fallocate", "posix_fadvise")  # fmt: skip
PRELUDE = f"""
import multiprocessing, os, runpy, shutil, signal, sys
import accelerate, psutil, torch  # they see that this is Linux, and rely on it
multiprocessing.set_start_method("spawn")
usage = shutil.disk_usage(os.curdir)  # Windows has it, by a call of its own
shutil.disk_usage = lambda _: usage
for name in {MODULES}:
    sys.modules[name] = None
for name in {SIGNALS}:
    vars(signal).pop(name, None)
for name in {CALLS}:
    vars(os).pop(name, None)
sys.path.insert(0, {str(REPOSITORY)!r})
sys.argv = sys.argv[1:]
"""
PROGRAM = PRELUDE + "runpy.run_path(sys.argv[0], run_name='__main__')"

pytestmark = pytest.mark.slow


def python(code: str, *words, cwd, **more: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in CLEAN} | more
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


def test_every_module_can_be_imported(tmp_path):
    rooms = ("data", "distributed", "models")
    files = [
        *REPOSITORY.glob("*.py"),
        *(f for room in rooms for f in (REPOSITORY / room).glob("*")),
    ]
    names = [
        ".".join(f.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for f in files
        if f.suffix == ".py"
    ]
    assert len(names) > 30
    done = python(PRELUDE + "for name in sys.argv[1:]: __import__(name)", "", *names, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_training_is_the_same_and_goes_on(nets, tmp_path):
    arguments = ["--model", nets / "full.py:Net", *SMALL, "--limit", "256", "--epochs", "2"]
    here = train([*arguments, "--run-dir", "here"], tmp_path)
    assert here.status == 0, here.out
    words = [TRAIN, *arguments, "--run-dir", "there"]
    stopped = python(PROGRAM, *words, "--max-time", "1s", cwd=tmp_path)
    assert stopped.returncode == 75, stopped.stderr
    # What it says to type would else stop there again, before the first step.
    assert "the start alone took" in stopped.stdout, stopped.stdout
    assert re.search("--resume there --max-time [1-9][0-9]*m ", stopped.stdout), stopped.stdout
    done = python(PROGRAM, *words, "--max-time", "10m", cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert json.loads((tmp_path / "there" / "status.json").read_text())["status"] == "finished"
    assert losses(tmp_path / "there") == losses(tmp_path / "here")


def test_photographs_are_the_same_and_go_on(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    make(tmp_path / "photographs", 60)
    arguments = ["--model", "net.py:Net", "--dataset", "photographs", "--image-size", "16"]
    arguments += ["--batch-size", "8", "--epochs", "2", "--threads", "1", "--no-plots"]
    arguments += ["--log-every", "1", "--checkpoint-every", "2"]
    here = train([*arguments, "--run-dir", "here"], tmp_path, LOCKSTEP_CACHE=str(tmp_path / "a"))
    assert here.status == 0, here.out
    # A cache of its own: the lock files of one system are locks to another one.
    nowhere = {"LOCKSTEP_CACHE": str(tmp_path / "b"), "LOCKSTEP_SHM": str(tmp_path / "nowhere")}
    words = [TRAIN, *arguments, "--run-dir", "there"]
    lives = ((["--stop-after", "3"], "20GB", 0, "a pack: decoded pixels"),
             ([], "0", 0, "decoded from their files"))  # fmt: skip
    for more, room, status, home in lives:
        life = python(PROGRAM, *words, *more, cwd=tmp_path, LOCKSTEP_CACHE_SIZE=room, **nowhere)
        assert life.returncode == status and "Traceback" not in life.stderr, life.stderr
        assert home in " ".join(life.stdout.replace("│", " ").split()), life.stdout
    assert losses(tmp_path / "there") == losses(tmp_path / "here")


def test_debug_runs(nets, tmp_path):
    words = [TRAIN, "--model", nets / "plain.py:Net", *SMALL, "--debug"]
    done = python(PROGRAM, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs").glob("debug-digits-1/status.json"))


def test_a_spawned_worker_that_imports_train_as_its_main_module_does_nothing_else(tmp_path):
    code = PRELUDE + (
        f"main = sys.modules['__main__']; main.__file__ = {TRAIN!r}; main.__spec__ = None\n"
        "worker = multiprocessing.Process(target=print, args=('alive',))\n"
        "worker.start(); worker.join(); sys.exit(worker.exitcode)"
    )
    done = python(code, TRAIN, "--no-such-option", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
