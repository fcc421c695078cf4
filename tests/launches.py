"""Real launches of train.py: python, torchrun, accelerate launch; output in files, not pipes.

What is started here comes from one interpreter that has imported torch once (launch/preloaded.py),
a launcher that is named too: it starts its ranks itself, cold. What that interpreter cannot be is
started cold.
"""

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from launch.preloaded import Interpreter, Launched

REPOSITORY = Path(__file__).resolve().parent.parent
TRAIN = str(REPOSITORY / "train.py")
TIMEOUT = 900.0  # a launch takes 5 to 17 s on two quiet cores, and a proof is a dozen of them
CLEAN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCKSTEP_FAULT", "LOCKSTEP_RECORD")
# A machine with GPUs runs the laws as one without: several processes, CPU numbers. SEEN is what
# the tests marked gpu see again.
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}
SEEN = {name: os.environ.get(name) for name in HIDDEN}
SMALL = [
    "--dataset", "digits", "--image-size", "16", "--batch-size", "64", "--threads", "1",
    "--log-every", "1", "--no-plots",
]  # fmt: skip


@dataclass
class Done:
    status: int
    out: str

    @property
    def last_lines(self) -> str:
        return "\n".join(self.out.strip().splitlines()[-12:])


# Variables that a fork may be given; any other one that differs is read by an import, maybe.
LATE = (
    "COLUMNS",
    "LOCKSTEP_",
    "SLURM_",
    "SLURMD_",
    "TORCHELASTIC_RESTART_COUNT",
    "WANDB_",
    "PYTEST_",
)
LATE += ("PATH", "PYTEST_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_")
LATE += (
    "CUBLAS_",
    "CUDA_LAUNCH_BLOCKING",
    "HF_TOKEN",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",  # set where scikit-learn is imported
    "TORCHINDUCTOR_",
)  # the last: --compile is cold
ORDINARY: dict[str, str] = {}  # environment of the preloaded interpreter; conftest.py fills it
COUNTED = {"preloaded": 0, "cold": 0}  # launches; the last line of a session tells
DIFFERED: set[str] = set()  # variables for which some of them were cold
PRELOADED: list[tuple[list[str], Path]] = []  # what was started so, and its output


class Command(list):
    """An argument vector, on several processes torchrun's, that a fork may stand in for."""

    def __init__(self, words, processes: int = 1):
        """`python WORDS`: a script or -m and a module, and its flags."""
        self.words, self.processes = [str(word) for word in words], processes
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone"]
            start += ["--nproc-per-node", str(processes)]
        super().__init__([*start, *self.words])


def command(arguments, processes: int = 1, launcher: str = "python") -> Command:
    """How to run train.py: by the launcher that is named (torchrun, accelerate), or by none."""
    if launcher == "accelerate":
        many = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
        many += ["--mixed_precision", "no", "--num_cpu_threads_per_process", "1"]
        return Command(["-m", "accelerate.commands.launch", *many, TRAIN, *arguments])
    if launcher == "torchrun":
        return Command(Command([TRAIN, *arguments], processes)[1:])
    return Command([TRAIN, *arguments], processes)


def environment(**more: str) -> dict[str, str]:
    """What a launched process sees: no place of another launch, no GPU."""
    return {k: v for k, v in os.environ.items() if k not in CLEAN} | HIDDEN | more


@functools.cache
def interpreter() -> Interpreter:
    found = Interpreter(ORDINARY)
    atexit.register(found.close)
    return found


def can_be_preloaded(words: list[str], env: dict[str, str]) -> bool:
    """Whether a fork of the preloaded interpreter is what a cold start would be."""
    differs = {name for name in env.keys() | ORDINARY if env.get(name) != ORDINARY.get(name)}
    threads = {words[i + 1] for i, word in enumerate(words[:-1]) if word == "--threads"}
    early = [name for name in differs if not name.startswith(LATE)]
    can = hasattr(os, "fork") and not early and threads <= {"1"} and "--compile" not in words
    COUNTED["preloaded" if can else "cold"] += 1
    DIFFERED.update(early)
    return can


def start(
    words, cwd: Path, stdin: int = subprocess.DEVNULL, **more: str
) -> tuple[subprocess.Popen | Launched, Path]:
    """Start an argument vector in a session of its own; returns it and its output file."""
    log = cwd / f"output-{time.monotonic_ns()}.txt"
    log.touch()  # it can be read at once, whoever will write it
    texts, env = [str(w) for w in words], environment(**more)
    if isinstance(words, Command) and stdin == subprocess.DEVNULL and can_be_preloaded(texts, env):
        PRELOADED.append((texts, log))
        return interpreter().start(words.words, cwd, log, words.processes, env), log
    COUNTED["cold"] += not isinstance(words, Command)
    with log.open("w") as file:
        process = subprocess.Popen(
            texts, cwd=cwd, env=env, stdout=file, stderr=file, stdin=stdin, start_new_session=True
        )
    return process, log


def finish(process: subprocess.Popen | Launched, log: Path, timeout: float = TIMEOUT) -> Done:
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(
            f"still running after {timeout} s:\n{log.read_text()[-3000:]}"
        ) from None
    return Done(status, log.read_text())


def train(
    arguments, cwd: Path, processes: int = 1, launcher: str = "python", **environment
) -> Done:
    """Run train.py to its end."""
    return finish(
        *start(command(list(map(str, arguments)), processes, launcher), cwd, **environment)
    )


def linked_repository(folder: Path) -> Path:
    """The repository as a cluster's user has it, with a runs/ of its own, in a new folder."""
    folder.mkdir()
    for path in REPOSITORY.iterdir():
        if path.name == "launch":
            shutil.copytree(path, folder / "launch")
        elif path.name not in ("runs", ".git"):
            (folder / path.name).symlink_to(path)
    return folder


def python(*words, cwd: Path = REPOSITORY, **more: str) -> subprocess.CompletedProcess:
    """Run `python WORDS`, a script or -m and a module, to its end; its two outputs apart."""
    texts, env = [str(word) for word in words], environment(**more)
    if not can_be_preloaded(texts, env):
        return subprocess.run(
            [sys.executable, *texts], cwd=cwd, env=env, capture_output=True, text=True,
            timeout=TIMEOUT,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        process = interpreter().start(texts, cwd, out, environment=env, errors=errors)
        try:
            status = process.wait(TIMEOUT)
        finally:
            process.kill()
        return subprocess.CompletedProcess(texts, status, out.read_text(), errors.read_text())


def wait_for(
    condition, process: subprocess.Popen | Launched, log: Path, seconds: float = TIMEOUT
) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < end, f"never happened:\n{log.read_text()[-3000:]}"
        time.sleep(0.05)


def rows(folder: Path, timeless: bool = True) -> list[dict]:
    """metrics.jsonl, without what clock and machine decide."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if not (timeless and k.startswith(("speed/", "system/")))}
        for r in found
    ]


def begun(folder: Path, steps: int = 1):
    """Whether a run has written so many rows, to be asked again and again."""
    return lambda: (folder / "metrics.jsonl").exists() and len(rows(folder)) >= steps


def losses(folder: Path) -> list[float]:
    return [r["train/loss"] for r in rows(folder) if "train/loss" in r]


def newest(folder: Path) -> Path:
    """The newest visible checkpoint."""
    return sorted((folder / "checkpoints").glob("step-" + 9 * "[0-9]"))[-1]


def same_weights(a: Path, b: Path) -> list[str]:
    """Names of the state files in the newest checkpoints of two runs whose bytes differ."""
    names = [p.name for p in newest(a).glob("*.safetensors")]
    assert newest(a).name == newest(b).name and names
    return [n for n in names if (newest(a) / n).read_bytes() != (newest(b) / n).read_bytes()]


def same_after_a_kill(folder: Path, flags: list, name: str, step: int) -> tuple[Done, Path]:
    """The law: on one process = on two, of which one is killed at a step and the run resumed.

    The undisturbed run's output, and the folder of the disturbed one.
    """
    whole = train([*flags, "--run-dir", f"{name}-whole"], folder)
    assert whole.status == 0, whole.out
    broken = [*flags, "--run-dir", f"{name}-broken"]
    done = train(broken, folder, 2, LOCKSTEP_FAULT=f"kill@step={step},rank=1")
    assert done.status != 0 and "died without a word" in done.out, done.out
    done = train(broken, folder, 2)
    assert done.status == 0 and "resumed" in done.out, done.out
    assert rows(folder / f"{name}-whole") == rows(folder / f"{name}-broken")
    assert same_weights(folder / f"{name}-whole", folder / f"{name}-broken") == []
    return whole, folder / f"{name}-broken"


def children_with(name: str) -> list[int]:
    """Processes of this machine that were started with the argument `name`."""
    logs = {str(log) for words, log in PRELOADED if name in words}
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # A fork has its parent's command line, but the output of its launch.
            words = (path / "cmdline").read_bytes().split(b"\0")
            if name.encode() in words or str((path / "fd" / "1").readlink()) in logs:
                found.append(int(path.name))
    return found
