"""What is seen of many runs while they are made: one panel in a terminal, else a line an end."""

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from common.errors import FAILED, FINISHED, STOPPED
from common.text import counted, duration, printable
from report.page import Files, is_number
from report.reader import Reader
from report.screen import Report

SECONDS_BETWEEN_LOOKS = 2.0
EARLY = 0.05  # of a run, before which nothing is said of the time it takes


class Seen(Protocol):
    """A run among many, as the board needs it."""

    folder: Path
    state: str
    reason: str
    seconds: float


@dataclass
class Board:
    """Looks at the folders of many runs; keeps nothing that does not stand there."""

    folder: Path
    runs: Sequence[Seen]
    screen: Report = field(default_factory=Report)
    beside: int = 1
    _live: Live | None = None
    _looked: float = 0.0
    _took: list[float] = field(default_factory=list)  # seconds of runs that ended well
    _best: dict[Path, tuple[float, str, bool]] = field(default_factory=dict)
    _readers: dict[Path, Reader] = field(default_factory=dict)

    def begin(self, disk: str, beside: int, devices: Sequence[str]) -> None:
        """Before the first one starts: how many, where, what they take."""
        self.beside = beside
        there = Counter(run.state for run in self.runs)
        done = f", {there['finished']} are finished already" if there["finished"] else ""
        where = counted(len(devices), "GPU") if devices else "the CPU"
        rows = [
            ("runs", f"{len(self.runs)}{done}"),
            ("at a time", f"{beside}, on {where}"),
            ("folder", str(self.folder)),
        ]
        self.screen.start_panel("many runs", [*rows, *[("disk", disk)] * bool(disk)], [])
        for run in self.runs:
            if run.state == "finished":
                self._note_best(run)
        if self.screen.has_bar:
            self._live = Live(console=self.screen.console, refresh_per_second=2, transient=True)
            self._live.start()
        self.tick()

    def started(self, run: Seen) -> None:
        if self._live is None:
            self.screen.show(f"{run.folder.name}  started")

    def ended(self, run: Seen) -> None:
        if run.state == "finished":
            self._took.append(run.seconds)
            self._note_best(run)
        if self._live is None:
            best = self._best.get(run.folder)
            words = best[1] if best and run.state == "finished" else run.reason
            self.screen.show(f"{run.folder.name}  {run.state}  {words}  {self.headline()}")

    def tick(self) -> None:
        """From time to time, as often as it is called: the panel anew."""
        if self._live is None or time.monotonic() - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        table = Table.grid(padding=(0, 2))
        for run in self.runs:
            if run.state == "runs":
                part = self._done(run)
                self._note_best(run)
                best = self._best.get(run.folder)
                words = f"{100 * part:.0f} %", best[1] if best else "", duration(run.seconds)
                table.add_row(Text(printable(run.folder.name), style="cyan"), *words)
        text = Text(self.headline())
        self._live.update(Panel(Group(text, table), title="many runs", title_align="left"))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def headline(self) -> str:
        """`3 of 12 done, 2 run, 1 failed; best 98.59 % (004-lr0.1); about 12m left`."""
        there = Counter(run.state for run in self.runs)
        words = [f"{there['finished']} of {len(self.runs)} done"]
        words += [f"{there[s]} {w}" for s, w in (("runs", "run"), ("failed", "failed")) if there[s]]
        parts = [", ".join(words)]
        if self._best:
            higher = next(iter(self._best.values()))[2]
            pick = max if higher else min
            folder, (_, shown, _) = pick(self._best.items(), key=lambda item: item[1][0])
            parts.append(f"best {shown} ({printable(folder.name)})")
        if left := self.left():
            parts.append(f"about {duration(left)} left")
        return "; ".join(parts)

    def left(self) -> float:
        """Seconds that the rest takes, by what has been seen of others; 0 where nothing was."""
        running = [run for run in self.runs if run.state == "runs"]
        parts = [self._done(run) for run in running]
        guesses = [run.seconds / p for run, p in zip(running, parts, strict=True) if p > EARLY]
        each = self._took or guesses
        if not each:
            return 0.0
        mean = sum(each) / len(each)
        waiting = sum(run.state == "waits" for run in self.runs)
        return mean * (waiting + sum(1 - part for part in parts)) / self.beside

    def _note_best(self, run: Seen) -> None:
        with contextlib.suppress(Exception):  # a file of a run that is just being written
            files = self._files(run)
            value = files.best[0].get(f"test/{files.deciding.key}")
            if is_number(value):
                metric = files.deciding
                self._best[run.folder] = value, metric.show(value), metric.higher_is_better

    def _done(self, run: Seen) -> float:
        """How much of a run is done, 0 to 1, by its rows and its configuration."""
        with contextlib.suppress(Exception):  # a file of a run that is just being written
            files = self._files(run)
            config, row = files.config["config"], files.rows[-1]
            if config.get("max_steps"):
                return min(1.0, row["step"] / config["max_steps"])
            evaluated = len(files.points(f"test/{files.deciding.key}"))
            return min(1.0, evaluated * config["eval_every"] / config["epochs"])
        return 0.0

    def _files(self, run: Seen) -> Files:
        """What a run's files say: of its rows only the new ones are read."""
        reader = self._readers.setdefault(run.folder, Reader(run.folder))
        return Files(run.folder, reader.rows())

    def end(self, again: str) -> int:
        """What became of all, what failed and why; the exit status."""
        there = Counter(run.state for run in self.runs)
        failed = [run for run in self.runs if run.state == "failed"]
        rows = [("runs", self.headline())]
        rows += [("failed", f"{run.folder.name}: {run.reason}") for run in failed]
        if there["finished"]:
            from report.compare import write_comparison

            try:
                rows.append(("page", str(write_comparison([self.folder], self.screen))))
            except Exception as error:  # a page is worth no failed run
                self.screen.warn(f"no comparison: {type(error).__name__}: {error}")
        rows.append(("folder", str(self.folder)))
        open_ = len(self.runs) - there["finished"] - len(failed)
        commands = [("again", again)] if failed or open_ else []
        title = "stopped" if open_ else "failed in part" if failed else "finished"
        self.screen.end_panel(title, rows, good=not (failed or open_), commands=commands)
        return STOPPED if open_ else FAILED if failed else FINISHED
