"""Real launches of train.py: python, torchrun, accelerate launch; output in files, not pipes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TRAIN = str(REPOSITORY / "train.py")
TIMEOUT = 240.0  # a launch takes 5 to 17 s on two quiet cores
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


def command(arguments, processes: int = 1, launcher: str = "") -> list[str]:
    if launcher == "accelerate":
        many = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
        start = [sys.executable, "-m", "accelerate.commands.launch", *many]
        return [
            *start,
            "--mixed_precision",
            "no",
            "--num_cpu_threads_per_process",
            "1",
            TRAIN,
            *arguments,
        ]
    if processes == 1:
        return [sys.executable, TRAIN, *arguments]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*start, "--nproc-per-node", str(processes), TRAIN, *arguments]


def environment(**more: str) -> dict[str, str]:
    """What a launched process sees: no place of another launch, no GPU."""
    return {k: v for k, v in os.environ.items() if k not in CLEAN} | HIDDEN | more


def start(
    words, cwd: Path, stdin: int = subprocess.DEVNULL, **more: str
) -> tuple[subprocess.Popen, Path]:
    """Start an argument vector in a session of its own; returns it and its output file."""
    log = cwd / f"output-{time.monotonic_ns()}.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(w) for w in words], cwd=cwd, env=environment(**more), stdout=file, stderr=file,
            stdin=stdin, start_new_session=True,
        )  # fmt: skip
    return process, log


def finish(process: subprocess.Popen, log: Path, timeout: float = TIMEOUT) -> Done:
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


def wait_for(condition, process: subprocess.Popen, log: Path, seconds: float = TIMEOUT) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < end, f"never happened:\n{log.read_text()[-3000:]}"
        time.sleep(0.05)


def rows(folder: Path, timeless: bool = True) -> list[dict]:
    """metrics.jsonl, without what a clock decides."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if not (timeless and k.startswith("speed/"))} for r in found
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


def children_with(name: str) -> list[int]:
    """Processes of this machine that were started with the argument `name`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if name.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found
