"""Runs Python programs many times from one interpreter that has imported the packages once.

Importing torch and scikit-learn costs a tiny run most of its time; a fork of an interpreter that
has them costs nothing. Of the program itself nothing is imported before the fork: each process
becomes `python SCRIPT FLAGS` or `python -m MODULE FLAGS`, with the environment, the output and the
session of its own that a launch would have given it. Several processes get an agent of their own,
which does what torchrun's does: it holds the store and gives each its place, passes a signal on,
ends the others when one fails, and leaves with 1.

What one interpreter cannot vary is the same for all: numbers of threads read at its start, and the
seed of str's hashes; and it does not free its modules at the end. `python launch/preloaded.py`
prints what of this machine decides bits, as one line of JSON; then it starts a job for each line it
reads, and prints a line when it has started and one when it has ended. When its input ends, it ends
what still runs. `Interpreter` speaks to it.
"""

import atexit
import contextlib
import ctypes
import gc
import hashlib
import importlib
import io
import itertools
import json
import os
import platform
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from importlib import metadata
from pathlib import Path
from types import FrameType

PACKAGES = ("torch", "torch._dynamo", "torch.distributed", "accelerate", "sklearn.datasets", "rich")
PACKAGES += ("torchvision", "matplotlib.figure", "matplotlib.backends.backend_agg", "jinja2")
PACKAGES += ("datasets",)  # Accelerate asks for it where it is installed
DECIDING = ("torch", "numpy", "accelerate", "scikit-learn")  # whose versions may move a bit
PR_SET_PDEATHSIG = 1  # of Linux's prctl
PATIENCE = 30  # seconds that ranks have after TERM, as torchrun gives them
SWITCHES = ("ATEN_", "DNNL_", "GLIBC_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "OPENBLAS_", "TORCH_")


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    return ""


def kind() -> dict[str, str]:
    """What decides the bits of a run beside the program; where one differs, they may differ."""
    import torch

    facts = {name: metadata.version(name) for name in DECIDING}
    facts |= {"python": "{}.{}".format(*sys.version_info), "libc": " ".join(platform.libc_ver())}
    facts |= {"system": platform.system(), "machine": platform.machine(), "threads": "1"}
    facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    # The versions of oneDNN and MKL, the compiler and its options.
    facts["build"] = digest(torch.__config__.show())
    first = read("/proc/cpuinfo").partition("\n\n")[0].splitlines()
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
    facts["cpu"] = cpu.get("model name", platform.processor())
    names = ("vendor_id", "cpu family", "model", "stepping")
    facts["cpu number"] = " ".join(cpu.get(name, "") for name in names)
    facts["cpu flags"] = digest(cpu.get("flags", cpu.get("Features", "")))
    facts["cpus"] = str(os.cpu_count())
    # By the size of the caches libraries cut their products, and so their sums, into blocks.
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    facts["caches"] = " ".join(read(str(path)) for path in caches)
    for name in sorted(os.environ):
        if name.startswith(SWITCHES):
            facts[name] = os.environ[name]
    return facts


# --- in the interpreter --------------------------------------------------------------------------


def become(job: dict, place: dict[str, str]) -> None:
    """Turn this process into a fresh `python WORDS`; its end is this process's end."""
    import numpy

    numpy.random.seed()  # else all forks would draw the same where a fresh process draws anything
    os.environ.clear()
    os.environ.update(job["environment"] | place)
    if place:  # torchrun starts its ranks with -u
        for name, number in (("stdout", 1), ("stderr", 2)):
            raw, was = open(number, "wb", buffering=0, closefd=False), getattr(sys, name)  # noqa: SIM115
            setattr(sys, name, io.TextIOWrapper(raw, was.encoding, was.errors, write_through=True))
    first, *flags = job["words"]
    try:
        if first == "-m":
            module, *flags = flags
            sys.argv, sys.path[0] = [module, *flags], str(Path.cwd())
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [first, *flags], str(Path(first).parent)
            runpy.run_path(first, run_name="__main__")
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
        if not isinstance(leaving.code, int | None):
            print(leaving.code, file=sys.stderr)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    # As an interpreter ends, but that it frees what was preloaded: that costs more than a run.
    threading._shutdown()  # noqa: SLF001 # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()  # noqa: SLF001
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status & 255)


def die_with(parent: int) -> None:
    """The system kills this process when its parent ends, however that ends (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended just before
        os._exit(1)


def redirect(job: dict) -> None:
    """A session, a folder and files of its own, as Popen would give it."""
    os.setsid()
    os.chdir(job["folder"])
    null = os.open(os.devnull, os.O_RDONLY)
    kinds = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    out = os.open(job["output"], kinds, 0o644)
    errors = os.open(job["errors"], kinds, 0o644) if job["errors"] else out
    for source, target in ((null, 0), (out, 1), (errors, 2)):
        os.dup2(source, target)
    for source in {null, out, errors}:
        os.close(source)


def places(count: int, port: int) -> list[dict[str, str]]:
    """What torchrun tells each rank of one node."""
    ours = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count}
    ours |= {"LOCAL_WORLD_SIZE": count, "ROLE_WORLD_SIZE": count, "GROUP_WORLD_SIZE": 1}
    ours |= {"GROUP_RANK": 0, "ROLE_NAME": "default", "TORCHELASTIC_RUN_ID": os.getpid()}
    ours |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    ours |= {"TORCHELASTIC_MAX_RESTARTS": 0}
    named = ("RANK", "LOCAL_RANK", "ROLE_RANK")
    found = [ours | dict.fromkeys(named, rank) for rank in range(count)]
    return [{name: str(value) for name, value in place.items()} for place in found]


def lead(job: dict) -> tuple[dict, dict[str, str]] | None:
    """Be the agent of several ranks and leave with their status; in a rank, return what to become.

    The ranks are forked before the store's threads exist; its port is bound and listens before.
    """
    door = socket.create_server(("127.0.0.1", 0))
    agent = os.getpid()
    ranks: set[int] = set()
    for place in places(job["processes"], door.getsockname()[1]):
        process = os.fork()
        if process == 0:
            die_with(agent)
            door.close()
            os.setsid()
            return job, place
        ranks.add(process)
    failed = False

    def tell_all(number: int) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)

    def stop(number: int, frame: FrameType | None = None) -> None:
        nonlocal failed
        failed = True
        tell_all(signal.SIGTERM)
        signal.alarm(PATIENCE)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, stop)
    signal.signal(signal.SIGALRM, lambda *_: tell_all(signal.SIGKILL))
    from torch.distributed import TCPStore

    address = door.getsockname()
    store = TCPStore(
        *address, is_master=True, wait_for_workers=False, master_listen_fd=door.detach()
    )
    while ranks:
        process, status = os.wait()
        ranks.discard(process)
        if status and not failed:
            stop(signal.SIGTERM)
    del store
    sys.stdout.flush()
    os._exit(int(failed))


def family(process: int) -> list[int]:
    """A process and its children."""
    return [*map(int, read(f"/proc/{process}/task/{process}/children").split()), process]


def say(**facts: float | dict[str, str]) -> None:
    os.write(1, (json.dumps(facts) + "\n").encode())


def serve() -> tuple[dict, dict[str, str]] | None:
    """Start what is asked for until nothing can be; in each forked process, what to become."""
    for name in PACKAGES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a fork must not copy every page
    say(kind=kind())
    gc.freeze()  # else each process walks all that was imported, again and again
    bell, ring = socket.socketpair()  # an ended child wakes the loop
    for end in (bell, ring):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ring.fileno(), warn_on_full_buffer=False)
    ours = os.getpid()
    running: dict[int, int] = {}  # process -> its job
    text = b""
    while True:
        ready, _, _ = select.select([0, bell], [], [])
        if bell in ready:
            bell.recv(4096)
        while running:
            process, status, usage = os.wait4(-1, os.WNOHANG)
            if process == 0:
                break
            seconds = usage.ru_utime + usage.ru_stime
            code = os.waitstatus_to_exitcode(status)
            say(job=running.pop(process), status=code, seconds=seconds)
        if 0 not in ready:
            continue
        piece = os.read(0, 65536)
        if not piece:
            break
        *lines, text = (text + piece).split(b"\n")
        for job in map(json.loads, lines):
            process = os.fork()
            if process == 0:
                die_with(ours)
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                bell.close()
                ring.close()
                redirect(job)
                return lead(job) if job["processes"] > 1 else (job, {})
            running[process] = job["job"]
            say(job=job["job"], process=process)
    signal.set_wakeup_fd(-1)
    for process in running:
        for one in family(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
    return None


# --- of those who speak to it --------------------------------------------------------------------


class Interpreter:
    """A running launch/preloaded.py: `kind` says what machine this is, `start` starts a program.

    What it started does not outlive it: `close` it, or use it with `with`.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        self._environment = environment
        self._text = b""
        self._said: deque[dict] = deque()
        self._launched: dict[int, Launched] = {}
        self._numbers = itertools.count()
        self._hear(None)
        self.kind: dict[str, str] = self._said.popleft()["kind"]

    def __enter__(self) -> "Interpreter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, and all that still runs."""
        self._stdin.close()
        self.process.wait()
        self._stdout.close()

    def start(
        self,
        words: list[str],
        folder: Path,
        output: Path,
        processes: int = 1,
        environment: dict[str, str] | None = None,
        errors: Path | None = None,
    ) -> "Launched":
        """Start `python WORDS`: a script or -m and a module, and its flags."""
        number = next(self._numbers)
        job = {"job": number, "words": words, "folder": str(folder), "output": str(output)}
        job |= {"processes": processes, "errors": str(errors) if errors else ""}
        job["environment"] = self._environment if environment is None else environment
        launched = self._launched[number] = Launched(self, words)
        self._stdin.write((json.dumps(job) + "\n").encode())
        while not launched.pid:
            self.listen(None)
        return launched

    def listen(self, seconds: float | None) -> None:
        """Hear of what has started or ended; wait for so long, or until there is something."""
        self._hear(seconds)
        while self._said:
            facts = self._said.popleft()
            launched = self._launched[facts["job"]]
            if "process" in facts:
                launched.pid = facts["process"]
            else:
                launched.returncode, launched.seconds = facts["status"], facts["seconds"]
                del self._launched[facts["job"]]

    def _hear(self, seconds: float | None) -> None:
        while not self._said and select.select([self._stdout], [], [], seconds)[0]:
            piece = self._stdout.read(65536)
            if not piece:
                raise RuntimeError("launch/preloaded.py has ended; it says why above")
            *lines, self._text = (self._text + piece).split(b"\n")
            self._said += map(json.loads, lines)


class Launched:
    """A process of an Interpreter, to be used like one of subprocess.Popen."""

    def __init__(self, interpreter: Interpreter, words: list[str]) -> None:
        self._interpreter, self.args = interpreter, words
        self.pid = 0
        self.returncode: int | None = None
        self.seconds = 0.0  # of the CPU, once it has ended

    def poll(self) -> int | None:
        if self.returncode is None:
            self._interpreter.listen(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            left = None if end is None else end - time.monotonic()
            if timeout is not None and left is not None and left < 0:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self._interpreter.listen(left)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    todo = serve()
    if todo is not None:
        become(*todo)
