"""What the measurements share: windows of a loop that start on a word, medians, tables, JSON."""

import argparse
import ctypes
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median

import torch

from distributed.accelerator import M_MMAP_MAX, M_TOP_PAD, M_TRIM_THRESHOLD

REPOSITORY = Path(__file__).resolve().parent.parent
WORD = "BENCH "  # what a measured process says begins with this; the rest is its ordinary output


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peaks() -> dict[str, float]:
    """Largest memory so far, in MiB: of this process, and what torch held of the GPU (else 0)."""
    import resource  # not on Windows

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    host /= 2**20 if sys.platform == "darwin" else 2**10
    return {"host_mb": host, "device_mb": device / 2**20}


class Gate:
    """Lets a loop run in windows of `warm` untimed and `steps` timed steps, each upon a "go".

    Between windows the loop stands still, so that the processes of a comparison take turns on a
    machine whose load changes. `parts` are seconds of a window by name, filled by `count`.
    """

    def __init__(self, steps: int, warm: int, batch_size: int, rest: float = 0.0):
        self.steps, self.warm, self.batch_size = steps, warm, batch_size
        self.rest = rest  # seconds after a window in which workers may still be at work
        self.parts: dict[str, float] = {}
        self._left = 0  # of the window; 0 between windows
        self._began = 0.0

    def through(self, batches: Iterable) -> Iterator:
        for batch in batches:
            if self._left == 0:
                self._stand()
            if self._left == self.steps:
                synchronize()
                self.parts.clear()
                self._began = time.perf_counter()
            self._left -= 1
            yield batch
            if self._left == 0:
                synchronize()
                took = time.perf_counter() - self._began
                per_step = {name: 1e3 * s / self.steps for name, s in self.parts.items()}
                speed = self.steps * self.batch_size / took
                say(speed=speed, milliseconds=per_step, **peaks())

    def _stand(self) -> None:
        time.sleep(self.rest)
        say(ready=True)
        if sys.stdin.readline().strip() != "go":
            raise SystemExit(0)
        self._left = self.warm + self.steps

    def count(self, part: str, seconds: float) -> None:
        """So long a part of a step took; for CPUs, which do not run ahead."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds


def say(**values: float | dict[str, float]) -> None:
    print(WORD + json.dumps(values), flush=True)


class Arm:
    """One process of a comparison, from its start to `close`; first of all, wait until `ready`."""

    def __init__(self, words: list[str], **environment: str):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        env = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
        self.process = subprocess.Popen(
            words, cwd=REPOSITORY, env=env, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def ready(self) -> "Arm":
        """Wait until it stands at its first window; SystemExit with its words where it ended."""
        self.hear()
        return self

    def hear(self) -> dict:
        ordinary = []
        for line in self.stdout:
            if line.startswith(WORD):
                return json.loads(line.removeprefix(WORD))
            ordinary.append(line)
        self.log.seek(0)
        raise SystemExit("".join(ordinary[-20:]) + self.log.read()[-3000:])

    def window(self) -> dict:
        """Run one window and return what was measured."""
        self.stdin.write("go\n")
        self.stdin.flush()
        result = self.hear()
        self.hear()  # it stands again
        return result

    def close(self) -> None:
        self.stdin.close()
        for _ in self.stdout:
            pass
        self.process.wait()
        self.log.close()


def take_turns(arms: dict[str, Arm], rounds: int) -> dict[str, list[dict]]:
    """A window of each arm per round, each round in another order: no arm has one neighbour."""
    results = {name: [] for name in arms}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(arms), len(arms)):
            results[name].append(arms[name].window())
    return results


def compare(functions: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round, in turned order; a first round warms up."""
    series: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            synchronize()
            began = time.perf_counter()
            functions[name]()
            synchronize()
            if turn:
                series[name].append(time.perf_counter() - began)
    return series


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratio(one: list[float], other: list[float]) -> dict[str, float]:
    """Of two series measured in the same rounds, round by round."""
    return spread([a / b for a, b in zip(one, other, strict=True)])


def shown(values: dict[str, float], digits: int = 2) -> str:
    """`1.02 (0.97-1.05)`: median and range."""
    return f"{values['median']:.{digits}f} ({values['low']:.{digits}f}-{values['high']:.{digits}f})"


def machine() -> dict[str, str]:
    """What was measured on, in words that name no machine."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else '?'} "
        device += f"{platform.machine()} cores"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"device": device, "date": time.strftime("%Y-%m-%d"), **versions}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def finish(parser_arguments: argparse.Namespace, results: dict) -> None:
    """Write the JSON file, if one was asked for."""
    if parser_arguments.json:
        own = ("--json", parser_arguments.json, f"--json={parser_arguments.json}")
        words = [word for word in sys.argv[1:] if word not in own]
        command = shlex.join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *words])
        content = {"command": command, "machine": machine(), "results": results}
        Path(parser_arguments.json).write_text(json.dumps(content, indent=1), encoding="utf-8")


def arguments_of(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a measurement: its first docstring line, and --json."""
    parser = argparse.ArgumentParser(description=doc and doc.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the numbers here too")
    return parser


def give_memory_back() -> None:
    """Malloc as glibc begins, which undoes keep_freed_memory."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 2**16)
    mallopt(M_TRIM_THRESHOLD, 2**17)
    mallopt(M_TOP_PAD, 2**17)
