"""Runs beside each other: a table on the screen, and compare.html, a page without network.

It is made of the files of the run folders alone. What is claimed over seeds is a paired t test, or
no claim; runs that did not share data or code are told.
"""

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from common.disk import read_json, write_text
from common.errors import FINISHED, UserError
from common.metric import Metric
from common.text import counted, printable, some
from config import TrainConfig
from config.fields import OPTIMIZERS
from config.rows import SWEEP
from report.chart import chart, short
from report.page import HERE, PARTS, STYLE, TEMPLATES, Files, is_number, source_of
from report.screen import Report

SCRIPT = (HERE / "sort.js").read_text(encoding="utf-8")
PAGE = "compare.html"
MOST_COLOURS = 8  # of groups in a chart; the others are grey
LEAST = 12  # characters for the names of runs
FEWEST = 3  # shared seeds, below which nothing is claimed
NOT_COMPARED = {"run_dir", "keep", "plots", "track", "log_every", "checkpoint_every", "max_time"}
NOT_COMPARED |= {"decode_threads", "stage", "snapshot_every"}  # of the machine: no number moves
OF_SOME = {name for taken in OPTIMIZERS.values() for name in taken}  # settings of some optimizers
USUAL = {field.name: field.default for field in fields(TrainConfig)}


@dataclass(frozen=True)
class Run:
    """A run folder among those that are compared; `name` tells it from the others."""

    name: str
    files: Files

    @cached_property
    def values(self) -> dict:
        """Its settings; those that it was too old to have are the usual ones.

        What its optimizer does not take is "": SGD's momentum says nothing of an AdamW.
        """
        found = USUAL | self.files.config.get("config", {})
        taken = OPTIMIZERS.get(found["optimizer"])  # None: one's own, which may take any
        return found | {name: "" for name in OF_SOME if taken is not None and name not in taken}

    def best(self, metric: Metric) -> float | None:
        """What its best weights gave on the test images."""
        value = self.files.best[0].get(f"test/{metric.key}")
        return value if is_number(value) else None

    def last(self, metric: Metric) -> float | None:
        """What its last evaluation gave."""
        points = self.files.points(f"test/{metric.key}")
        return points[-1][1] if points else None

    @property
    def seconds(self) -> float | None:
        """How long it has trained, over all its lives."""
        value = self.files.ended.get("seconds")
        return value if is_number(value) else None


def found_in(paths: Iterable[Path], warn: Callable[[str], None] = lambda _: None) -> list[Path]:
    """The run folders that are meant: themselves, or those in a folder of many. UserError: none.

    `runs/*` also names files, and `latest`, which is one of the runs, and what is only starting;
    what is not there is no file.
    """
    found: dict[Path, None] = {}
    given, without = list(paths), []
    folders = [path for path in given if path.is_dir() or not path.exists()] or given
    real = {path.resolve() for path in folders if not path.is_symlink()}
    for path in folders:
        if path.is_symlink() and path.resolve() in real:
            continue
        if (path / "config.json").is_file():
            found[path] = None
            continue
        listed = read_json(path / SWEEP, {}).get("rows", [])
        names = [str(row["name"]) for row in listed] or sorted(
            one.name for one in (path.iterdir() if path.is_dir() else ()) if not one.is_symlink()
        )
        runs = [path / name for name in names if (path / name / "config.json").is_file()]
        found |= dict.fromkeys(runs)
        without += [path] * (not runs)
    for path in without:
        if not found or not path.is_dir():
            raise UserError(f"{path} holds no run: no config.json there", code="no-run")
        warn(f"{printable(path)} is left out: it holds no run yet (no config.json)")
    return list(found)


def read_runs(paths: Iterable[Path], warn: Callable[[str], None] = lambda _: None) -> list[Run]:
    """The runs with names that tell them apart; `warn` hears of folders without one."""
    folders = found_in(paths, warn)
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [Run(name, Files(folder)) for name, folder in zip(names, folders, strict=True)]


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but seed and fold; `values` of them, by (seed, fold)."""

    label: str
    runs: list[Run]
    values: dict[tuple, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the mean lies with 95 %, by Student's t."""
        if (deviation := self.deviation) is None:
            return None
        from scipy.stats import t

        n = len(self.values)
        half = float(t.ppf(0.975, n - 1)) * deviation / n**0.5
        return self.mean - half, self.mean + half


class Comparison:
    """What can be said of several runs by their files."""

    def __init__(self, runs: Sequence[Run]) -> None:
        metrics = {(r.files.deciding.key, r.files.deciding.title): r.files.deciding for r in runs}
        self.metric = next(iter(metrics.values()))
        pick = max if self.metric.higher_is_better else min
        worst = -pick(1, -1) * float("inf")
        of = {run.name: run.best(self.metric) for run in runs}

        def key(run: Run) -> float:
            value = of[run.name]
            return worst if value is None else value

        self.runs = sorted(runs, key=key, reverse=self.metric.higher_is_better)
        names = [name for name in runs[0].values if name not in NOT_COMPARED]
        self.differing = [
            name for name in names if len({str(run.values.get(name)) for run in runs} - {""}) > 1
        ]
        chosen = {run.files.best[1] for run in runs}
        self.by_last = any("test" in word for word in chosen)
        self.again: list[str] = []  # runs that a group has already
        self.groups = sorted(
            self._grouped(runs), key=lambda group: group.mean, reverse=self.metric.higher_is_better
        )
        self.warnings = [*self._doubts(metrics.values()), *self._strange()]

    def _grouped(self, given: Sequence[Run]) -> list[Group]:
        """Of each seed and fold the first that was named counts, whatever it came to."""
        own = [name for name in self.differing if name not in ("seed", "fold")]
        mixed = len({run.values["fold"] is None for run in given}) > 1  # no repeats of each other
        found: dict[str, list[Run]] = defaultdict(list)
        for run in given:
            words = [f"{name} {value}" for name in own if (value := run.values.get(name)) != ""]
            words += ["folds" if run.values["fold"] else "the data's own split"] * mixed
            found[", ".join(words) or "all"].append(run)
        groups = []
        for label, runs in found.items():
            values: dict[tuple, float] = {}
            for run in runs:
                value, key = self.value(run), (run.values["seed"], run.values["fold"])
                if run.files.state == "finished" and value is not None:
                    if key in values:
                        self.again.append(run.name)
                    values.setdefault(key, value)
            if values:
                groups.append(Group(label, runs, values))
        return groups

    def value(self, run: Run) -> float | None:
        """What counts over seeds: a best that was chosen on the test images is too good."""
        return run.last(self.metric) if self.by_last else run.best(self.metric)

    @property
    def counts(self) -> str:
        which = "last epoch (the best was chosen on the test images)"
        return which if self.by_last else "epoch that the validation part chose"

    def tested(self) -> dict[str, str]:
        """What a paired t test says of the first group against each other one, by label."""
        if len(self.groups) < 2:
            return {}
        first, *others = self.groups
        found, said = {}, {}
        for other in others:
            shared = sorted(first.values.keys() & other.values.keys(), key=str)
            ours, theirs = ([of.values[key] for key in shared] for of in (first, other))
            apart = [a - b for a, b in zip(ours, theirs, strict=True)]
            if len(shared) < FEWEST:
                said[other.label] = f"no claim: {counted(len(shared), 'shared seed')}, 3 are needed"
            elif len(set(apart)) == 1:
                said[other.label] = "no claim: all differences are the same number"
            else:
                from scipy.stats import ttest_rel

                found[other.label] = ttest_rel(ours, theirs).pvalue, len(shared)
        for label, p in holm({label: p for label, (p, _) in found.items()}).items():
            word = "differs" if p < 0.05 else "may be chance"
            said[label] = f"p = {p:.2g} over {found[label][1]} pairs: {word}"
        return said

    def _doubts(self, metrics: Iterable[Metric]) -> list[str]:
        """Why numbers stand beside each other that should not."""
        found, titles = [], [metric.title for metric in metrics]
        if len(titles) > 1:
            found.append(f"not the same metric decides: {some(titles)}; {titles[0]} is shown")
        facts = [run.files.environment for run in self.runs]
        data = defaultdict(set)
        for run, fact in zip(self.runs, facts, strict=True):
            data[run.values["fold"]].add(fact.get("data"))
        if any(len(prints) > 1 for prints in data.values()):
            found.append("not the same data: their fingerprints differ (environment.json)")
        for word, name in (("code", "code"), ("class files", "own code")):
            if len({str(fact.get(name)) for fact in facts}) > 1:
                found.append(f"not the same {word}: fingerprints differ (environment.json)")
        packages = {str(fact.get("packages", {}).get("torch")) for fact in facts}
        if len(packages) > 1:
            found.append(f"not the same torch: {some(sorted(packages))}")
        return found

    def _strange(self) -> list[str]:
        found = []
        open_ = [run.name for run in self.runs if run.files.state != "finished"]
        if open_:
            found.append(f"not finished, so not counted over seeds: {some(open_, 5)}")
        if self.again:
            words = "of the same settings, seed and fold as another, so not counted over seeds"
            found.append(f"{words}: {some(self.again, 5)}")
        if any(run.values["fold"] for run in self.runs) and len(self.groups) > 1:
            found.append("folds share training pictures, so tests over them are too sure")
        return found

    @property
    def repeats(self) -> bool:
        """Whether there is anything to say over seeds."""
        return any(len(group.values) > 1 for group in self.groups)


def holm(found: dict[str, float]) -> dict[str, float]:
    """Holm's correction of several p: that of any mistaken claim among them."""
    ordered = sorted(found.items(), key=lambda item: item[1])
    raised = [min(1.0, p * (len(ordered) - n)) for n, (_, p) in enumerate(ordered)]
    for before, after in pairwise(range(len(raised))):
        raised[after] = max(raised[before], raised[after])
    return {label: p for (label, _), p in zip(ordered, raised, strict=True)}


# --- shown ---------------------------------------------------------------------------------------


def shown(metric: Metric, value: float | None) -> str:
    """As the metric writes it; nothing where there is none."""
    return "" if value is None else metric.show(value)


def run_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of runs, the best first; columns called `#...` hold numbers."""
    metric, runs = comparison.metric, comparison.runs

    def number(name: str) -> bool:
        return all(run.values.get(name) == "" or is_number(run.values[name]) for run in runs)

    head = ["run", *["#" * number(name) + name.replace("_", " ") for name in comparison.differing]]
    head += [f"#best {metric.title}", "#at epoch", "#last", "#seconds", "status"]
    rows = []
    for run in runs:
        values = [str(run.values.get(name)) for name in comparison.differing]
        best, last = (shown(metric, of(metric)) for of in (run.best, run.last))
        epoch = run.files.best[0].get("epoch", "") if best else ""
        seconds = "" if run.seconds is None else f"{run.seconds:,.0f}"
        rows.append([run.name, *values, best, str(epoch), last, seconds, run.files.state])
    return head, rows


def group_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table over seeds."""
    metric, tested = comparison.metric, comparison.tested()
    head = ["settings", "#runs", f"#mean {metric.title}", "#deviation", "95 % interval"]
    head += ["against the first"] * bool(tested)
    rows = []
    for group in comparison.groups:
        low, high = (map(metric.show, group.interval)) if group.interval else ("", "")
        deviation = "" if group.deviation is None else metric.show(group.deviation)
        row = [group.label, str(len(group.values)), metric.show(group.mean), deviation]
        row.append(f"{low} to {high}" if low else "")
        rows.append([*row, *[tested.get(group.label, "")] * bool(tested)])
    return head, rows


def method(comparison: Comparison) -> str:
    """What the table over seeds is made of, and what its words claim."""
    words = f"Over seeds and folds, of the {comparison.counts}; interval by Student's t"
    if comparison.tested():
        words += "; paired t test against the first over what both share, p by Holm"
    return words + "."


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], whole: bool = True, width: int = 100
) -> Table:
    """As rich shows it; whole: the first column holds names, broken only where values would be.

    width: characters of the screen.
    """
    made, rows = Table(), [[printable(cell) for cell in row] for row in rows]
    heads = [printable(name.lstrip("#")) for name in head]
    least = [
        max(len(text) for text in [*heads[place].split(), *(row[place] for row in rows)])
        for place in range(len(heads))
    ]
    wanted = sum(map(max, zip(map(len, heads), least, strict=True))) + 3 * len(heads) + 1
    room = width - sum(least[1:]) - 3 * len(heads) - 1
    breaks = whole and wanted > width and room >= LEAST
    least[0] = min(room, least[0])
    for place, name in enumerate(heads):
        right = "right" if head[place].startswith("#") else "left"
        fixed = least[place] if breaks else None
        made.add_column(
            Text(name), justify=right, overflow="fold", width=fixed,
            no_wrap=whole and not place and not breaks,
        )  # fmt: skip
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def curves(comparison: Comparison) -> list[Markup | str]:
    """The deciding metric and the training loss of all runs over each other, groups in colours."""
    # One that is in no group has not finished: what it is called is no colour.
    kinds, keys = {run.name: "train" for run in comparison.runs}, {}
    for number, group in enumerate(comparison.groups[:MOST_COLOURS]):
        keys[f"c{number}"] = group.label
        kinds |= {run.name: f"c{number}" for run in group.runs}
    if "train" in kinds.values():
        keys["train"] = "others"
    metric, drawn = comparison.metric, []
    shown: list[tuple[str, str, Callable, bool]] = [
        (f"{metric.title}, test images", f"test/{metric.key}", metric.on_axis(short),
         not metric.is_share),
        ("loss, training images", "train/loss", short, True),
    ]  # fmt: skip
    for title, key, show, wide in shown:
        lines = {run.name: run.files.points(key) for run in reversed(comparison.runs)}
        drawn.append(chart(title, lines, show, kinds=kinds, keys=keys, may_be_wide=wide))
    return drawn


def build(comparison: Comparison, title: str, place: Path, further: Sequence[tuple] = ()) -> str:
    """The page; `place` is the folder that it lies in, `further` are sections of its own."""
    head, rows = run_rows(comparison)
    linked = []
    for run, row in zip(comparison.runs, rows, strict=True):
        path = run.files.folder / "report.html"
        target = quote(Path(os.path.relpath(path, place)).as_posix())
        linked.append([PARTS.link(target, row[0]) if path.is_file() else row[0], *row[1:]])
    sections = [("", PARTS.warnings(comparison.warnings))] if comparison.warnings else []
    if comparison.repeats or len(comparison.groups) > 1:
        over = PARTS.table(*group_rows(comparison), "sorted wide") if comparison.repeats else ""
        if over:
            sections.append(("Over seeds", over + PARTS.note(method(comparison))))
    sections.append(("Runs", PARTS.table(head, linked, "sorted")))
    sections.append(("Curves", PARTS.charts(curves(comparison))))
    sections += further
    return TEMPLATES.get_template("page.html").render(
        policy=Markup(
            f"default-src 'none'; img-src data:; style-src {source_of(STYLE)}; "
            f"script-src {source_of(SCRIPT)}"
        ),
        style=Markup(STYLE), script=Markup(SCRIPT), name=title,
        state=counted(len(comparison.runs), "run"), sections=sections, folder="",
        version=comparison.runs[0].files.config.get("version", ""),
    )  # fmt: skip


def place_of(paths: Sequence[Path], runs: Sequence[Run]) -> Path:
    """Where the page of a comparison lies: the folder that was named, or that of all its runs."""
    if len(paths) == 1 and not (paths[0] / "config.json").is_file():
        return paths[0]
    return Path(os.path.commonpath([run.files.folder.absolute().parent for run in runs]))


def write_comparison(paths: Sequence[Path], screen: Report) -> Path:
    """Show the tables and write the page; where it lies. OSError where it cannot be written."""
    runs = read_runs(paths, screen.warn)
    comparison, place = Comparison(runs), place_of(paths, runs)
    screen.show(table(*run_rows(comparison), width=screen.console.width))
    if comparison.repeats:
        screen.show(table(*group_rows(comparison), whole=False))
        screen.show(method(comparison))
    for warning in comparison.warnings:
        screen.warn(warning)
    path, further = place / PAGE, []
    if (place / SWEEP).is_file() and any(run.values["fold"] for run in runs):
        from report.suspects import CSV, section

        if made := section(place, [run.files.folder for run in runs]):
            further.append(made)
            screen.note(f"labels to look at: {place / CSV}, and on the page")
    write_text(path, build(comparison, place.resolve().name, place, further))
    return path


def command(paths: Sequence[Path]) -> int:
    """`python -m report compare RUN... | SWEEP`."""
    screen = Report()
    screen.note(printable(write_comparison(paths, screen)))
    return FINISHED
