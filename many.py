"""Many runs of one command, in turn or side by side: the rows of a sweep, seeds, folds.

Each row is the run that its own flags would start alone; it comes from a warm interpreter
(launch/preloaded.py), which imports the packages once and never looks for a GPU. What there is of
the rows stands in their folders and nowhere else, so the same command goes on with what is left.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from common.cpus import cpus
from common.disk import read_json, write_json
from common.text import pasted, printable
from config import Settings, parse
from config.rows import SWEEP, Row, Rows
from errors import USER_ERROR, UserError

if TYPE_CHECKING:
    from launch.preloaded import Launched
    from report.board import Board

    Process = Launched | subprocess.Popen
    Start = Callable[[list[str], Path, dict[str, str]], Process]

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HERE = Path(__file__).resolve().parent
LOOK_SECONDS = 0.2
INTERRUPTED = 130
LAST_LINES = 20  # of a row's output, among which its reason is


def hand_over(settings: Settings) -> None:
    """Where a command is several runs: make them and leave with their status."""
    if settings.rows is None:
        return
    try:
        status = run_all(settings.rows)
    except (UserError, OSError) as error:
        print(printable(error), file=sys.stderr)
        status = USER_ERROR
    raise SystemExit(status)


@dataclass
class Turn:
    """How far a row is; `state` is waits, runs, or what its status.json says of its end."""

    row: Row
    folder: Path
    state: str = "waits"
    reason: str = ""
    place: int = 0  # among those that run side by side: whose device it has
    seconds: float = 0.0  # that it has run, in this command
    began: float = 0.0

    @property
    def output(self) -> Path:
        """What its process says; not in its folder, which it must find empty."""
        return self.folder.with_name(f"{self.folder.name}.txt")

    def look(self) -> None:
        """What its folder says of its end."""
        status = read_json(self.folder / "status.json", {})
        self.state = str(status.get("status", "waits"))
        self.reason = str(status.get("reason") or "")
        if self.state == "running":  # of a life that was killed
            self.state = "waits"


def run_all(rows: Rows) -> int:
    """All rows that are not finished; the exit status: 75 if stopped, 1 if any failed."""
    from report.board import Board  # brings rich

    with entered(rows):
        turns = [Turn(row, rows.folder / row.name) for row in rows.rows]
        for turn in turns:
            turn.look()
        board = Board(rows.folder, turns)
        left = [turn for turn in turns if turn.state != "finished"]
        try:
            if left:
                print("loading torch ...", file=sys.stderr, flush=True)
                devices = devices_there()
                beside = min(rows.side_by_side or max(1, len(devices)), len(left))
                board.begin(disk_in_words(rows, left, beside), beside, devices)
                crew = Crew(rows, left, beside, devices, board)
                crew.work()
                if crew.asked > 1:
                    return INTERRUPTED
        finally:
            board.close()
        return board.end(pasted("train.py", *sys.argv[1:]))


@contextlib.contextmanager
def entered(rows: Rows) -> Iterator[None]:
    """The folder of all rows, with its sweep.json, for this process alone."""
    folder, told, lock = rows.folder, rows.told(), rows.folder / "lock"
    if not lock.exists():
        _refuse_foreign(folder)  # before a file of ours lies in it
    folder.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        if fcntl is not None:
            try:
                fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another process is making the runs of {folder}; wait for it, or name "
                    "another folder with --run-dir",
                    code="run-dir-in-use",
                ) from None
        _refuse_foreign(folder)  # what is there stays so only while we hold the lock
        _refuse_others(folder, told)
        write_json(folder / SWEEP, told)
        yield


def _refuse_foreign(folder: Path) -> None:
    if read_json(folder / SWEEP) is not None or not folder.is_dir():
        return
    if {path.name for path in folder.iterdir()} - {"lock"}:
        raise UserError(
            f"{folder} holds files that are no sweep; name another folder with --run-dir",
            code="run-dir-foreign",
        )


def _refuse_others(folder: Path, told: dict) -> None:
    if (old := read_json(folder / SWEEP)) is None:
        return
    kept, now = ([_own(row) for row in of.get("rows", [])] for of in (old, told))
    if old.get("base") != told["base"] or kept != now[: len(kept)]:
        raise UserError(
            f"{folder} holds other runs: {_difference(old, told)}; what was there can only "
            "be added to, as rows at the end. Name another folder with --run-dir",
            code="other-sweep",
        )


def _own(row: dict) -> tuple:
    """What a row has of its own: its words also name the folder, which may be typed otherwise."""
    return row.get("name"), row.get("values")


def _difference(old: dict, new: dict) -> str:
    if old.get("base") != new["base"]:
        return f"{' '.join(old.get('base', []))} was typed, now {' '.join(new['base'])}"
    there, now = ([row["name"] for row in of.get("rows", [])] for of in (old, new))
    gone = [name for name in there if name not in now]
    return f"{', '.join(gone[:3] or ['their order'])} is not as it was"


def devices_there() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may say for one process each; nothing without GPUs."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(number) for number in range(count)]


def disk_in_words(rows: Rows, left: list[Turn], beside: int) -> str:
    """About how much the rows need, and what there is. Warns by itself where it is too little."""
    models = {
        tuple(turn.row.values.get(name) for name in ("model", "image_size")): rows.words(turn.row)
        for turn in left
    }
    sizes = [size for words in models.values() if (size := _size(words))]
    if not sizes:
        return ""
    weights = sum(sizes) / len(sizes)
    checkpoint = 3 * weights  # weights and what an optimizer keeps, at most
    kept = (2 * weights + 3 * checkpoint) if rows.keep else weights
    need = len(left) * kept + beside * (2 * weights + 4 * checkpoint)
    free = shutil.disk_usage(rows.folder).free
    what = "weights and checkpoints" if rows.keep else "best weights only (--keep 3: checkpoints)"
    short = "TOO LITTLE: " if need > free else ""
    return f"{short}about {need / 1e9:.2g} GB of {free / 1e9:.3g} GB free; {what}"


def _size(words: list[str]) -> int:
    """Bytes of a row's weights, with a head of ten classes; 0 where it cannot be told."""
    import torch

    from models import build_from

    try:
        config = parse(words).config
        with torch.device("meta"):
            model = build_from(vars(config), 10)
    except Exception:  # a class of the user's that no tensor without numbers suits
        return 0
    return sum(4 * value.numel() for value in model.state_dict().values())


class Crew:
    """Starts rows while there is room, hears of their ends, and stops them when it is asked to."""

    def __init__(
        self, rows: Rows, left: list[Turn], beside: int, devices: list[str], board: "Board"
    ) -> None:
        self.rows, self.left, self.beside, self.devices = rows, left, beside, devices
        self.board = board
        # Of so many as were asked for, however many are left: on a CPU the bits depend on it.
        self.share = min(rows.side_by_side or 1, len(rows.rows))
        self.running: dict[int, tuple[Turn, Process]] = {}  # by place
        self.asked = 0  # how often a signal asked to stop

    def work(self) -> None:
        """Until no row is left, or all have stopped."""
        waiting, told = iter(self.left), False
        handlers = {
            number: signal.signal(number, self._stop)
            for number in (signal.SIGINT, signal.SIGTERM, *_ALSO)
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN  # nohup
        }
        try:
            with warm_interpreter() as start:
                while self.asked < 2:
                    while not self.asked and len(self.running) < self.beside:
                        if (turn := next(waiting, None)) is None:
                            break
                        self._begin(turn, start)
                    if not self.running:
                        break
                    time.sleep(LOOK_SECONDS)
                    if self.asked and not told:
                        told = True  # once: a second signal is no other wish
                        for _, process in self.running.values():
                            process.terminate()
                    self._hear()
                    self.board.tick()
                for turn, process in self.running.values():
                    process.kill()
                    turn.look()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # A word only: a row may just be starting, or the interpreter be telling of one.
        self.asked += 1

    def _begin(self, turn: Turn, start: "Start") -> None:
        turn.place = next(n for n in range(self.beside) if n not in self.running)
        words, environment = self.rows.words(turn.row), dict(os.environ)
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[turn.place % len(self.devices)]
        elif self.share > 1 and not _has_threads(words, turn.folder):
            words += ["--threads", str(max(1, cpus() // self.share))]
        turn.state, turn.reason, turn.began = "runs", "", time.monotonic()
        self.running[turn.place] = turn, start(words, turn.output, environment)
        self.board.started(turn)

    def _hear(self) -> None:
        for place, (turn, process) in list(self.running.items()):
            turn.seconds = time.monotonic() - turn.began
            if (status := process.poll()) is None:
                continue
            del self.running[place]
            turn.look()
            if turn.state not in ("finished", "stopped") or status == USER_ERROR:
                turn.state = "stopped" if self.asked and status != USER_ERROR else "failed"
                if status == USER_ERROR or not turn.reason:  # else its status.json told
                    turn.reason = _last_words(turn.output, status)
            elif turn.state == "finished" and not self.rows.keep:
                shutil.rmtree(turn.folder / "checkpoints", ignore_errors=True)
                (turn.folder / "last.safetensors").unlink(missing_ok=True)
            self.board.ended(turn)


_ALSO = [
    getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]


def _has_threads(words: list[str], folder: Path) -> bool:
    """Whether the number of threads, which decides a CPU's bits, is settled for a row."""
    if (folder / "config.json").is_file():
        return True
    settings = _understood(words)
    return settings is None or settings.asked("threads")


def _understood(words: list[str]) -> Settings | None:
    """The settings of a row, files and all; None where its own process will say what is wrong."""
    try:
        return parse(words)
    except UserError:
        return None


def _last_words(output: Path, status: int) -> str:
    """Why a row ended, as far as it has said."""
    try:
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    said = [line.strip() for line in lines[-LAST_LINES:] if line.strip(" ╭╰─│╮╯")]
    if status < 0:
        return f"killed by signal {-status}, as when memory runs out"
    return said[-1] if said else f"exit status {status}"


# --- who starts them -----------------------------------------------------------------------------


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
            settings = _understood(words)
            if settings and settings.config.compile:  # its workers start from what no fork is
                return _cold(words, output, environment)
            script = [str(HERE / "train.py"), *words]
            return interpreter.start(script, Path.cwd(), output.absolute(), environment=environment)

        yield start


def _cold(words: list[str], output: Path, environment: dict[str, str]) -> "Process":
    with output.open("w") as file:
        return subprocess.Popen(
            [sys.executable, str(HERE / "train.py"), *words], env=environment,
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


if __name__ == "__main__":
    words = sys.argv[1:] or ["--sweep", "FILE.yaml"]
    print(f"many.py is no command; type {pasted('train.py', *words)}", file=sys.stderr)
    raise SystemExit(USER_ERROR)
