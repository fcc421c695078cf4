"""Who starts a row: an interpreter that is warm, or a cold one where a fork will not do."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from config import Settings, parse

if TYPE_CHECKING:
    from launch.preloaded import Launched

    Process = Launched | subprocess.Popen
    Start = Callable[[list[str], Path, dict[str, str]], Process]

TRAIN = str(Path(__file__).resolve().parent.parent / "train.py")


def has_threads(words: list[str], folder: Path) -> bool:
    """Whether the number of threads, which decides a CPU's bits, is settled for a row."""
    if (folder / "config.json").is_file():
        return True
    settings = understood(words)
    return settings is None or settings.asked("threads")


def understood(words: list[str]) -> Settings | None:
    """The settings of a row, files and all; None where its own process will say what is wrong."""
    try:
        return parse(words)
    except UserError:
        return None


@contextlib.contextmanager
def warm_interpreter() -> Iterator["Start"]:
    """A function that starts a row; on leaving, rows that still run end, however we end."""
    if not hasattr(os, "fork"):  # Windows: each row imports for itself
        yield _cold
        return
    from launch.preloaded import Interpreter

    # Without this a look for GPUs while packages are imported would spoil CUDA for all forks.
    environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    with Interpreter(environment) as interpreter:

        def start(words: list[str], output: Path, environment: dict[str, str]) -> "Process":
            settings = understood(words)
            if settings and settings.config.compile:  # its workers start from what no fork is
                return _cold(words, output, environment)
            script = [TRAIN, *words]
            return interpreter.start(script, Path.cwd(), output.absolute(), environment=environment)

        yield start


def _cold(words: list[str], output: Path, environment: dict[str, str]) -> "Process":
    with output.open("w") as file:
        return subprocess.Popen(
            [sys.executable, TRAIN, *words], env=environment,
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
