"""Everything a person sees on the screen: in a terminal a live bar, in a file plain lines."""

import contextlib
import errno
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from common.confusion import totals
from common.metric import LOSS, Metric
from common.streams import in_cell, lost_words
from common.text import duration, percent, printable

CHATTY = ("accelerate", "torch.distributed", "PIL", "matplotlib")
MOST_CLASSES = 100  # in a table on the screen
WORTH_TELLING = 0.05  # the share of a step that waits for photographs
SECONDS_BETWEEN_LINES = 5.0  # in a file; every row is in metrics.jsonl anyway


class Report:
    """Speaks for the main process; on the others every method is silent.

    Where there is no bar, `rows` are told as lines within an epoch too. A notebook has a bar where
    ipywidgets is there.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None, rows: bool = True):
        self.enabled, self.rows = enabled, rows
        self.console = console or Console(
            highlight=False, width=None if sys.stdout and sys.stdout.isatty() else 100
        )
        stream = self.console.file
        with contextlib.suppress(AttributeError, ValueError):  # a console that has no such letters
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
        self.in_terminal = self.console.is_terminal and not in_cell()
        self.has_bar = self.in_terminal or (
            self.console.is_jupyter and find_spec("ipywidgets") is not None
        )
        self.log: Console | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)  # of the bar
        self._last_line = -SECONDS_BETWEEN_LINES
        self._warned: set[str] = set()
        self._told_of_loss = False

    def attach(self, folder: Path) -> None:
        """From now on also into the run's train.log, as plain lines."""
        if self.enabled:
            file = (folder / "train.log").open("a", encoding="utf-8")
            self.log = Console(
                file=file, width=100, no_color=True, highlight=False,
                force_jupyter=False,  # in a notebook a console forgets its file
            )  # fmt: skip

    def show(self, thing: RenderableType, style: str | None = None, to_copy: bool = True) -> None:
        """Print text or a rich table; text is never read as markup.

        What nobody copies is broken between words on a terminal that is too narrow for it.
        """
        if not self.enabled:
            return
        line = isinstance(thing, str)  # a line is never broken: it can be searched and copied
        if line:
            thing = Text("\n".join(map(printable, thing.split("\n"))), style=style or "")
        self.console.print(thing, soft_wrap=line and (to_copy or not self.in_terminal))
        if self.log is not None:
            with contextlib.suppress(OSError):  # a full disk must not end the run
                self.log.print(thing, soft_wrap=line)
                self.log.file.flush()
        if not self._told_of_loss and (why := lost_words()):
            self._told_of_loss = True
            place = ": the run goes on and train.log in the run folder has every word"
            text = f"stdout cannot be written ({why}){place if self.log else ''}"
            if self.log or why != os.strerror(errno.EPIPE):  # a look at a run has no more to say
                print(text, file=sys.stderr, flush=True)
                self.warn(text)

    def note(self, text: str) -> None:
        """A line, where there is something to say."""
        if text:
            self.show(text)

    def warn(self, text: str) -> None:
        self.show(f"warning: {printable(text)}", "bold yellow")

    def warn_once(self, doubts: dict[str, str]) -> None:
        """Warnings that each evaluation would repeat: only those whose word is new."""
        for word, message in doubts.items():
            if word not in self._warned:
                self.warn(message)
        self._warned |= doubts.keys()

    def shout(self, title: str, text: str) -> None:
        """A warning no one can miss."""
        self.show(
            Panel(Text(printable(text)), title=Text(printable(title)), border_style="bold yellow")
        )

    def start_panel(self, title: str, rows: list[tuple[str, str]], settings: list[tuple]) -> None:
        """What will run: facts, then each setting that is no default, with its origin."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column(overflow="fold")  # a long path is broken, not cut
        for name, value in rows:
            table.add_row(Text(printable(name)), Text(printable(value)))
        if settings:
            table.add_row("", "")
            for name, value, origin in settings:
                words = Text(printable(value)).append(f"  ({printable(origin)})", style="dim")
                table.add_row(Text(printable(name), style="cyan"), words)
        self.show(
            Panel(
                table,
                title=Text(printable(title)),
                title_align="left",
                border_style="blue",
                expand=False,
            )
        )

    # --- while it runs --------------------------------------------------------------------------

    def open_bar(self, total: int, done: int, epoch: str) -> None:
        if not (self.enabled and self.has_bar):
            return
        self.close_bar()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"), console=self.console, transient=True,
            refresh_per_second=4,
        )  # fmt: skip
        self._task = self._bar.add_task(epoch, total=total, completed=done, line="")
        self._bar.start()

    def advance(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def train_line(self, row: dict, total_steps: int, eta: float) -> None:
        """One metrics row of training: beside the bar in a terminal, a plain line in a file."""
        waited = row.get("data/wait", 0.0)
        waits = f"  {100 * waited:.0f} % waiting for images" if waited > WORTH_TELLING else ""
        words = (
            f"{LOSS.named(row['train/loss'])}  lr {row['lr']:.3g}  "
            f"{row['speed/images_per_second']:,.0f} img/s{waits}"
        )
        words += f"  ETA {duration(eta)}" if eta else ""  # not known from the first steps
        if self._bar is not None:
            self._bar.update(self._task, line=words)
        now = time.monotonic()
        if self.has_bar or not self.rows or now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        self.show(f"  step {row['step']}/{total_steps}  {words}")

    def epoch_line(self, text: str, better: bool) -> None:
        self.close_bar()
        self.show(text, "green" if better else None, to_copy=False)

    # --- at the end -----------------------------------------------------------------------------

    def class_table(self, classes: list[str], confusion: list[list[int]], when: str = "") -> None:
        """Accuracy, precision and F1 per class, and what each is most often taken for."""
        few = len(classes) <= MOST_CLASSES
        shown = "test images per class" if few else f"the {MOST_CLASSES} classes least often right"
        table = Table(title=f"{shown} {when}".strip(), title_justify="left")
        table.add_column("class")
        for name in ("images", "right", "accuracy", "precision", "F1"):
            table.add_column(name, justify="right")
        guessed = totals({"confusion": confusion})[1]
        table.add_column("most often taken for")
        lines = list(enumerate(confusion))
        if not few:
            there = [(i, row) for i, row in lines if any(row)]
            lines = sorted(there, key=lambda line: line[1][line[0]] / sum(line[1]))[:MOST_CLASSES]
        for index, row in lines:
            total, right = sum(row), row[index]
            others = [(count, other) for other, count in enumerate(row) if other != index and count]
            taken = max(others, default=None, key=lambda pair: pair[0])
            table.add_row(
                Text(printable(classes[index])), str(total), str(right),
                percent(right / total) if total else "-",
                percent(right / guessed[index]) if guessed[index] else "-",
                f"{2 * right / max(1, total + guessed[index]):.3f}",
                Text(f"{printable(classes[taken[1]])} ({taken[0]})" if taken else ""),
            )  # fmt: skip
        self.show(table)

    def class_numbers(
        self, classes: list[str], metrics: Sequence[Metric], values: dict[str, list], when: str = ""
    ) -> None:
        """The metrics of each class, of many classes those that are lowest by the second metric."""
        few = len(classes) <= MOST_CLASSES
        shown = "test images per class" if few else f"the {MOST_CLASSES} classes least well known"
        table = Table(title=f"{shown} {when}".strip(), title_justify="left")
        table.add_column("class")
        for metric in metrics:
            table.add_column(metric.title, justify="right")
        places = list(range(len(classes)))
        if not few:
            deciding = values[metrics[1].key]
            there = [place for place in places if deciding[place] is not None]
            places = sorted(there, key=lambda place: deciding[place])[:MOST_CLASSES]
        for place in places:
            cells = [(metric, values[metric.key][place]) for metric in metrics]
            words = ["-" if value is None else metric.show(value) for metric, value in cells]
            table.add_row(Text(printable(classes[place])), *words)
        self.show(table)

    def predictions(self, results: Mapping[str, Sequence[tuple[str, int, float]]]) -> None:
        """What predict.py found: a picture a block, the likeliest class first, and its number."""
        if not results:
            return
        table = Table()
        for name in ("picture", "class"):
            table.add_column(name, overflow="fold")  # whole on a narrow terminal, too
        for name in ("number", "confidence"):
            table.add_column(name, justify="right", no_wrap=True)
        for path, found in results.items():
            if not found:
                table.add_row(Text(printable(path)), Text("none", style="dim"), "", "")
            for rank, (name, index, confidence) in enumerate(found):
                first = Text(printable(path)) if rank == 0 else ""
                style = "bold" if rank == 0 else "dim"
                words = Text(printable(name), style=style)
                table.add_row(first, words, str(index), percent(confidence))
            table.add_section()
        self.show(table)

    def end_panel(
        self,
        title: str,
        rows: list[tuple[str, str]],
        good: bool,
        commands: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Rows in a frame; of commands those that it would break stand below, to be pasted."""
        names = max([len(name) for name, _ in [*rows, *commands]], default=0)
        room = min(self.console.width, 100) - names - 6
        below = [(name, line) for name, line in commands if cell_len(printable(line)) > room]
        rows = [*rows, *(pair for pair in commands if pair not in below)]
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(Text(printable(name)), Text(printable(value)))
        style = "green" if good else "yellow"
        self.show(
            Panel(
                table,
                title=Text(printable(title)),
                title_align="left",
                border_style=style,
                expand=False,
            )
        )
        for name, line in below:
            self.show(f"{name}  {line}")

    def close(self) -> None:
        self.close_bar()
        if self.log is not None:
            with contextlib.suppress(OSError):
                self.log.file.close()
            self.log = None


def on_stderr() -> Report:
    """For a bar beside what is printed."""
    return Report(console=Console(stderr=True, highlight=False))


class SpeedMeter:
    """Images per second and time left; the first steps (warm-up, compile) do not count."""

    WARMUP_STEPS = 2

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.steps = 0
        self._began: float | None = None
        self._mark = clock()
        self._window, self.timed = 0, 0.0
        self._ends = [self._mark]  # of the beginning, the first and the second step

    def step(self) -> None:
        self.steps += 1
        self._window += 1
        if self.steps <= 2:
            self._ends.append(self.clock())
        if self.steps == self.WARMUP_STEPS:
            self._began = self.clock()

    def speed(self, batch_size: int) -> float:
        """Images per second since the last call."""
        now = self.clock()
        self.timed = now - self._mark  # seconds, of the speed that was told last
        value = self._window * batch_size / max(self.timed, 1e-9)
        self._mark, self._window = now, 0
        return value

    def leave_out_compiling(self) -> float:
        """After the second step: the seconds by which the first was longer; not in the speed."""
        begin, first, second = self._ends
        seconds = max(0.0, (first - begin) - (second - first))
        if self._window == 2:  # else a row was written between them
            self._mark += seconds
        return seconds

    def pause(self, seconds: float) -> None:
        """Leave out what was no training: evaluation, saving."""
        self._mark += seconds
        if len(self._ends) < 3:
            self._ends = [end + seconds for end in self._ends]
        if self._began is not None:
            self._began += seconds

    def left(self, steps: int) -> float:
        """Seconds that so many further steps take at the speed so far; 0 where unknown."""
        timed = self.steps - self.WARMUP_STEPS
        if self._began is None or timed < 1:
            return 0.0
        return (self.clock() - self._began) / timed * steps


def quiet_libraries() -> None:
    """Third-party chatter that tells a user nothing."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*")


@contextlib.contextmanager
def quieted() -> Iterator[None]:
    """Within, third-party chatter is off; afterwards levels and filters are what they were."""
    levels = {name: logging.getLogger(name).level for name in CHATTY}
    with warnings.catch_warnings():
        quiet_libraries()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def show_tracebacks() -> None:
    """From now on a traceback shows code and local variables, of a model's own file: for --debug.

    Of what calls it only the places: their variables, whole data sets among them, are thousands of
    lines in front of the one that counts. Of a tensor its shape, there only: a debugger may follow.
    """
    import torch
    from rich.traceback import install

    def in_short(tensor: torch.Tensor) -> str:
        return f"tensor {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"

    def in_few_lines(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        usual = torch.Tensor.__repr__
        torch.Tensor.__repr__ = in_short  # pyright: ignore[reportAttributeAccessIssue]
        try:
            shown(kind, error, trace)
        finally:
            torch.Tensor.__repr__ = usual

    home = Path(__file__).resolve().parent.parent
    ours = [f for f in home.iterdir() if (f / "__init__.py").is_file()]
    ours += [home / "train.py", home / "launch"]  # a job types launch/../train.py
    libraries = [find_spec(name) for name in ("torch", "torchvision", "accelerate", "timm")]
    theirs = [Path(spec.origin).parent for spec in libraries if spec and spec.origin]
    install(show_locals=True, suppress=[*map(str, ours), *map(str, theirs)])
    shown, sys.excepthook = sys.excepthook, in_few_lines
