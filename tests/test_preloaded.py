"""A fork of the preloaded interpreter is what a cold start would be, and dies as one."""

import json
import re
import signal
import subprocess
import time

import pytest
from launches import Command, children_with, environment, finish, start, wait_for

from distributed.watch import alive
from launch.preloaded import Interpreter, family

LOOK = """
import json, os, sys, threading
told = {"argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__,
        "cwd": os.getcwd(), "environment": dict(os.environ), "input": sys.stdin.read(),
        "session": os.getsid(0) == os.getpid(), "threads": threading.active_count(),
        "ours": sorted({"train", "config", "training", "distributed"} & set(sys.modules))}
print(json.dumps(told))
"""
# Each rank says that it lives, then acts as its own flag says.
RANK = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("told", flush=True), sys.exit(75)))
rank = os.environ["RANK"]
open(f"rank-{rank}", "w").write(str(os.getpid()))
while not os.path.exists("rank-" + str(1 - int(rank))):
    time.sleep(0.01)
match dict(word.split("=") for word in sys.argv[2:]).get(rank, "wait"):
    case "wait": time.sleep(600)
    case "kill": os.kill(os.getpid(), signal.SIGKILL)
    case status: sys.exit(int(status))
"""


def script(folder, text: str, name: str = "it.py"):
    (folder / name).write_text(text)
    return folder / name


def test_it_sees_what_a_cold_start_sees(tmp_path):
    words, told = Command([script(tmp_path, LOOK), "a b", "--c"]), []
    for one in (words, list(words)):
        done = finish(*start(one, tmp_path, LOCKSTEP_X="é"))
        assert done.status == 0, done.out
        told.append(json.loads(done.out))
        told[-1]["environment"].pop("LC_CTYPE", "")  # Python's own, where the locale is C
    assert told[0] == told[1]


@pytest.mark.parametrize(
    "text, status, said",
    [
        ("print('fine')", 0, r"fine\n"),
        ("import sys; sys.exit(75)", 75, ""),
        ("raise SystemExit('a word')", 1, r"a word\n"),
        ("1 / 0", 1, r"Traceback(.|\n)*ZeroDivisionError: .*\n"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import atexit; atexit.register(print, 'last')", 0, r"last\n"),
        (
            "import threading, time\n"
            "threading.Thread(target=lambda: (time.sleep(0.2), print('joined'))).start()",
            0,
            r"joined\n",
        ),
    ],
)
def test_it_ends_as_a_cold_start_ends(tmp_path, text, status, said):
    done = finish(*start(Command([script(tmp_path, text)]), tmp_path))
    assert done.status == status and re.fullmatch(said, done.out), done


def test_two_forks_draw_different_numbers(tmp_path):
    text = "import random, numpy; print(random.random(), numpy.random.rand())"
    words = Command([script(tmp_path, text)])
    one, two = (finish(*start(words, tmp_path)).out.split() for _ in range(2))
    assert one[0] != two[0] and one[1] != two[1]


def agent(tmp_path, *roles: str):
    """Two ranks with an agent, once both live."""
    folder = tmp_path / "-".join(["ranks", *roles])
    folder.mkdir()
    process, log = start(Command([script(folder, RANK), folder.name, *roles], 2), folder)
    wait_for(lambda: all((folder / f"rank-{rank}").exists() for rank in range(2)), process, log)
    return process, log, folder.name


@pytest.mark.parametrize("role", ["0=3", "1=kill"])
def test_an_agent_ends_the_others_when_a_rank_fails_and_leaves_with_1(tmp_path, role):
    process, log, name = agent(tmp_path, role)
    done = finish(process, log, 60)
    assert done.status == 1 and done.out.count("told") == 1, done.out
    assert children_with(name) == []


def test_an_agent_waits_for_all_and_leaves_with_0(tmp_path):
    process, log, name = agent(tmp_path, "0=0", "1=0")
    assert finish(process, log, 60).status == 0 and children_with(name) == []


def test_a_signal_to_the_agent_reaches_all(tmp_path):
    process, log, name = agent(tmp_path)
    assert len(children_with(name)) == 3
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    process.terminate()
    done = finish(process, log, 60)
    assert done.status == 1 and done.out.count("told") == 2 and children_with(name) == []


@pytest.mark.slow
def test_nothing_outlives_the_interpreter(tmp_path):
    with Interpreter(environment() | {"PYTHONPATH": ""}) as own:
        text = "import os, time; open(os.environ.get('RANK', 'alone'), 'w'); time.sleep(600)"
        words = [str(script(tmp_path, text))]
        alone = own.start(words, tmp_path, tmp_path / "one")
        pair = own.start(words, tmp_path, tmp_path / "two", 2)
        while not all((tmp_path / name).exists() for name in ("alone", "0", "1")):
            time.sleep(0.05)
        *ranks, _ = family(pair.pid)
        assert len(ranks) == 2
    end = time.monotonic() + 30
    while any(alive(process) for process in (alone.pid, pair.pid, *ranks)):
        assert time.monotonic() < end
        time.sleep(0.1)
