"""Everything that needs a GPU, row by row, within a time: `bash bench/gpu.sh [FOLDER]`.

The rows of a room (bench.gpu_checks, then bench.gpu_speed) share one process. A row that raises,
dies, hangs or spoils the device costs that process and no other row: a new one goes on with the
next. Whatever is found is printed and written at once, so a cut run still tells what it saw.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BUDGET = 480.0  # seconds of the whole; an H200 took 437 with less in some rows
REHEARSAL = 1800.0  # what a shared machine may make of less than five minutes
START = 90.0  # seconds for a process to import torch
LEAST = 5.0  # seconds left that are worth a start
SLOWER = 6  # times as long a row may take in a rehearsal
LOG_BYTES = 4_000_000
PASS, FAIL, FIGURE, LATE = "PASS", "FAIL", "figure", "not reached"


@dataclass(frozen=True)
class Row:
    """A function of a room: room.name(place) or room.name(place, case) yields what it finds."""

    room: str
    name: str
    seconds: float  # at most
    case: str = ""

    @property
    def title(self) -> str:
        return f"{self.name} {self.case}".strip()


@dataclass(frozen=True)
class Place:
    """Where a row is measured."""

    folder: Path  # of its own, removed at the end
    small: bool  # a rehearsal: any device, tiny sizes, times prove nothing
    until: float  # time.monotonic() at which it must be over


@dataclass(frozen=True)
class Found:
    """One line of a row: a figure, and whether it is as it must be (None: nothing to judge)."""

    what: str
    figure: str
    passed: bool | None = None
    numbers: dict = field(default_factory=dict)


CHECKS, SPEED = "bench.gpu_checks", "bench.gpu_speed"
ROWS = (
    Row(CHECKS, "card", 30),
    Row(CHECKS, "keyed", 20),
    Row(CHECKS, "exact", 90, "alexnet"),
    *(Row(CHECKS, "exact", 45, case) for case in ("resnet18", "fp16", "bitwise")),
    Row(CHECKS, "no_room", 25),
    Row(CHECKS, "googlenet", 20),
    Row(CHECKS, "children", 60),
    *(Row(CHECKS, "waits", 20, model) for model in ("alexnet", "resnet18", "speednet")),
    Row(CHECKS, "exact", 90, "compile"),
    Row(SPEED, "data", 60),
    *(Row(SPEED, "speed", 25, case) for case in
      ("resnet18", "resnet18 512", "speednet", "alexnet", "my_cnn")),
    *(Row(SPEED, "fp16", 20, model) for model in ("resnet18", "speednet")),
    Row(SPEED, "checkpoint", 25),
    Row(SPEED, "compiled", 75),
    Row(SPEED, "seeds", 200),
)  # fmt: skip


class Results:
    """What was found so far: on the screen, in gpu.json and in gpu.md, after each finding."""

    def __init__(self, rows: Sequence[Row], out: Path, command: str, show: Callable[[str], None]):
        self.out, self.show = out, show
        self.head = {"command": command, "date": time.strftime("%Y-%m-%d"), "seed": 0}
        self.rows = {
            row.title: {"verdict": LATE, "found": [], "seconds": 0.0, "problem": ""} for row in rows
        }
        self.write()

    def found(self, row: Row, found: dict) -> None:
        self.rows[row.title]["found"].append(found)
        if row.name == "card":
            self.head |= found["numbers"]
        verdict = {True: PASS, False: FAIL, None: ""}[found["passed"]]
        self.show(f"{row.title:18} {verdict:4} {found['what']}: {found['figure']}")
        self.write()

    def ended(self, row: Row, seconds: float, problem: str = "", late: bool = False) -> None:
        """The row is over; `late`: it was cut because the time of the whole was over."""
        entry = self.rows[row.title]
        passed = [found["passed"] for found in entry["found"]]
        verdict = LATE if late else PASS if any(passed) else FIGURE
        verdict = FAIL if False in passed or (problem and not late) else verdict
        entry.update(verdict=verdict, seconds=round(seconds, 1), problem=problem)
        words = f"{verdict} {problem}".strip()
        self.show(f"{row.title:18} = {words} ({seconds:.1f} s)")
        self.write()

    def markdown(self) -> str:
        words = ", ".join(f"{key} {value}" for key, value in self.head.items())
        lines = [words, "", "| row | figure | verdict |", "| --- | --- | --- |"]
        for title, entry in self.rows.items():
            words = {True: PASS, False: FAIL, None: "-"}
            cells = [(f["what"], f["figure"], words[f["passed"]]) for f in entry["found"]]
            if entry["problem"] or entry["verdict"] == LATE:
                cells.append(("", entry["problem"] or "the time was over", entry["verdict"]))
            for what, figure, verdict in cells:
                name = f"{title}: {what}" if what else title
                lines.append(f"| {name} | {figure} | {verdict} |".replace("\n", " "))
        counts = [e["verdict"] for e in self.rows.values()]
        words = ", ".join(f"{counts.count(v)} {v}" for v in (PASS, FAIL, FIGURE, LATE))
        return "\n".join([*lines, "", f"Rows: {words}.", ""])

    def write(self) -> None:
        content = json.dumps({**self.head, "rows": self.rows}, indent=1)
        for name, text in (("gpu.json", content), ("gpu.md", self.markdown())):
            partial = self.out / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.out / name)


class Worker:
    """A process that measures rows one after another and says what it finds, a line each."""

    def __init__(self, rows: Sequence[Row], place: Place, log: Path):
        self.log, self.read = log, log.stat().st_size if log.exists() else 0
        hears, says = os.pipe()
        words = [sys.executable, "-m", "bench.gpu", "--work", json.dumps([asdict(r) for r in rows])]
        words += ["--says", str(says), "--until", str(place.until), "--folder", str(place.folder)]
        words += ["--rehearse"] if place.small else []
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(place.folder / "compiled"),
        }  # fmt: skip
        if place.small:  # a CPU everywhere; no pool of compiling processes on two cores
            env |= {"CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                words, cwd=REPOSITORY, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                pass_fds=[says], start_new_session=True,
            )  # fmt: skip
        os.close(says)
        self.lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._listen, args=(hears,), daemon=True).start()

    def _listen(self, hears: int) -> None:
        with os.fdopen(hears, encoding="utf-8") as file:
            for line in file:
                self.lines.put(json.loads(line))
        self.lines.put({})

    def hear(self, until: float) -> dict:
        """The next thing it says; {} once it has ended; queue.Empty when `until` has come."""
        return self.lines.get(timeout=max(0.01, until - time.monotonic()))

    def last_words(self) -> str:
        """The end of what it printed since it was last asked."""
        with self.log.open("rb") as file:
            file.seek(self.read)
            text = file.read().decode(errors="replace")
        self.read = self.log.stat().st_size
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return " / ".join(lines[-3:])[-400:]

    def end(self, patience: float = 0.0) -> int:
        """With all that it started; it may take `patience` seconds to end by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def measured(
    rows: Sequence[Row],
    out: Path,
    *,
    budget: float = BUDGET,
    rehearse: bool = False,
    command: str = "bash bench/gpu.sh",
    show: Callable[[str], None] = lambda line: print(line, flush=True),
) -> dict[str, dict]:
    """Measure the rows, at most `budget` seconds in all; title -> verdict and findings."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.unlink(missing_ok=True)
    results = Results(rows, out, command, show)
    until = time.monotonic() + budget
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = Place(Path(folder), rehearse, until)
        for _, room in itertools.groupby(rows, lambda row: row.room):
            waiting = list(room)
            while waiting and until - time.monotonic() > LEAST:
                some_rows(waiting, place, log, results)
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.write_bytes(log.read_bytes()[-LOG_BYTES:])
    return results.rows


def some_rows(waiting: list[Row], place: Place, log: Path, results: Results) -> None:
    """Take rows off `waiting` until all are done or a process of theirs is spent."""
    worker = Worker(waiting, place, log)
    factor = SLOWER if place.small else 1
    began, limit, problem, late = time.monotonic(), START * factor, "", False
    while waiting:
        row = waiting[0]
        try:
            said = worker.hear(min(began + limit, place.until))
        except queue.Empty:
            late = time.monotonic() >= place.until
            problem = "cut: the time was over" if late else f"cut after {limit:.0f} s"
            break
        match said.get("say"):
            case "begins":
                began, limit = time.monotonic(), row.seconds * factor
            case "found":
                results.found(row, said["found"])
            case "ends":
                results.ended(row, time.monotonic() - began)
                waiting.pop(0)
                began, limit = time.monotonic(), START * factor
            case "raises":
                problem = said["problem"]
                break
            case _:
                problem = f"the process died with status {worker.end(5.0)}: {worker.last_words()}"
                break
    worker.end(0.0 if problem else 10.0)
    if problem:
        results.ended(waiting.pop(0), time.monotonic() - began, problem, late)


def work(rows: list[Row], says: int, place: Place) -> int:
    """Be the process: measure rows until one raises."""

    def say(**words: str | dict) -> None:
        os.write(says, (json.dumps(words) + "\n").encode())

    for number, row in enumerate(rows):
        own = place.folder / f"{os.getpid()}-{number}"
        own.mkdir(parents=True)
        say(say="begins")
        try:
            function = getattr(importlib.import_module(row.room), row.name)
            cases = (row.case,) if row.case else ()
            until = time.monotonic() + row.seconds * (SLOWER if place.small else 1)
            for found in function(Place(own, place.small, min(until, place.until)), *cases):
                say(say="found", found=asdict(found))
        except BaseException as error:
            traceback.print_exc()
            say(say="raises", problem=f"{type(error).__name__}: {error}"[:500])
            sys.stderr.flush()
            os._exit(1)  # what the row spoiled, above all a CUDA context, must not be used again
        say(say="ends")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", default="bench/results/gpu", help="where to write")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument("--rows", help="only these, with commas between: exact alexnet,waits ...")
    for name in ("--work", "--says", "--until", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        place = Place(Path(given.folder), given.rehearse, float(given.until))
        return work([Row(**row) for row in json.loads(given.work)], int(given.says), place)
    rows = ROWS
    if given.rows:
        wanted = given.rows.split(",")
        rows = [row for row in ROWS if row.title in wanted or row.name in wanted]
        if not rows:
            parser.error(f"no such rows; known: {', '.join(row.title for row in ROWS)}")
    command = ("REHEARSE=1 " if given.rehearse else "") + "bash bench/gpu.sh"
    budget = REHEARSAL if given.rehearse else BUDGET
    began = time.monotonic()
    found = measured(rows, Path(given.out), budget=budget, rehearse=given.rehearse, command=command)
    verdicts = {title: entry["verdict"] for title, entry in found.items()}
    late = [title for title, verdict in verdicts.items() if verdict == LATE]
    failed = [title for title, verdict in verdicts.items() if verdict == FAIL]
    print(f"\n{time.monotonic() - began:.0f} s; gpu.json, gpu.md and gpu.log in {given.out}")
    for words, titles in (("not reached", late), ("failed", failed)):
        if titles:
            print(f"{words}: {', '.join(titles)}")
    return int(bool(failed) or (given.rehearse and bool(late)))


if __name__ == "__main__":
    sys.exit(main())
