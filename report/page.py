"""report.html: a run on one page that needs no network and no script.

It is made of the files of the run folder alone, so it can be made again at any time, also of a
run that was killed. A file that is missing or damaged costs its section, never the page.
"""

import base64
import hashlib
import heapq
import math
import shlex
import statistics
import struct
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from common.confusion import dense, totals
from common.disk import parse_object, read_json, write_text
from common.errors import FINISHED, UserError
from common.metric import Metric
from common.text import duration, pasted, percent, printable
from config import TrainConfig
from report.chart import chart, short
from report.pictures import MOST_NAMES
from training.goodput import LOST, goodput, slow_ones

HERE = Path(__file__).resolve().parent
STYLE = (HERE / "page.css").read_text(encoding="utf-8")
MOST_PAIRS = 20
STATES = ("running", "finished", "stopped", "failed")
SPEED = "speed/images_per_second"
PNG, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def cleaned(value: object) -> object:
    """What a template writes of a value: HTML of our own as it is, other text on one clean line."""
    return value if isinstance(value, Markup) else printable(" ".join(str(value).split()))


TEMPLATES = Environment(
    loader=FileSystemLoader(HERE), autoescape=True, finalize=cleaned, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
PARTS: Any = TEMPLATES.get_template("parts.html").module  # its macros


def content(path: Path) -> str:
    """A text file; empty where it is missing."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


class Files:
    """What the files of a run folder say; what is missing or damaged is empty."""

    def __init__(self, folder: Path, rows: list[dict] | None = None):
        """rows: those of metrics.jsonl, where somebody has read them already."""
        self.folder, self.name = folder, folder.resolve().name
        self.config, self.summary, self.status, self.environment, self.classes, self.confusion = (
            read_json(folder / f"{name}.json", {})
            for name in ("config", "summary", "status", "environment", "classes", "confusion")
        )
        if rows is None:
            lines = content(folder / "metrics.jsonl").split("\n")
            rows = [row for line in lines if (row := parse_object(line))]
        self.rows = rows
        # The end of a life stands in summary.json a moment before it does in status.json.
        status = self.status if self.status.get("status") in STATES else {}
        same = self.summary.get("life") == status.get("life")
        self.ended = self.summary if same or not status else {}
        if self.ended and status.get("status", "running") == "running":
            status = self.ended
        self.state, self.reason = str(status.get("status", "unknown")), status.get("reason") or ""
        if self.state == "running":
            self.reason = "or killed without a word: python -m report doctor tells which"

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of the rows in which both are finite numbers."""
        pairs = ((row.get("step"), row[key]) for row in self.rows if key in row)
        return [(step, value) for step, value in pairs if is_number(step) and is_number(value)]

    @cached_property
    def declared(self) -> tuple[tuple[Metric, ...], str]:
        """What the numbers of an evaluation are, and the key of the one that chose the best.

        A folder of an older program lacks metrics.json: its numbers tell which task it had.
        """
        try:
            declared = read_json(self.folder / "metrics.json", {})
            metrics = tuple(Metric(**metric) for metric in declared["metrics"])
            if declared["best_is"] in {metric.key for metric in metrics}:
                return metrics, declared["best_is"]
        except (KeyError, TypeError, ValueError):
            pass
        from tasks import TASKS  # brings torch

        keys = {key for row in self.rows for key in row if "test/" in key} or {*self.summary}
        there = {key.rpartition("/")[2] for key in keys}
        task = max(TASKS.values(), key=lambda task: len(there & {m.key for m in task.metrics}))
        return task.metrics, task.best_is

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return self.declared[0]

    @property
    def deciding(self) -> Metric:
        return next(metric for metric in self.metrics if metric.key == self.declared[1])

    @cached_property
    def best(self) -> tuple[dict, str]:
        """(row, the split that chose it) of the best evaluation."""
        metric = self.deciding
        key = f"val/{metric.key}" if self.points(f"val/{metric.key}") else f"test/{metric.key}"
        pick = max if metric.higher_is_better else min
        points = self.points(key)
        step = pick(points, key=lambda point: point[1])[0] if points else None
        found = [row for row in self.rows if points and row.get("step") == step and key in row]
        # Without rows, what the summary still knows.
        known = {k.removeprefix("best/"): v for k, v in self.summary.items() if "best/" in k}
        return (found or [known])[0], "validation part" if key.startswith("val") else "test split"

    @property
    def has_matrix(self) -> bool:
        """Whether there ought to be one: not for a regression, nor before an evaluation."""
        evaluated = is_number(self.best[0].get(f"test/{self.deciding.key}"))
        return evaluated and self.classes.get("classes") != [] and not self.summary.get("by_class")

    def matrix(self) -> tuple[list[list[int]], list[str]]:
        """The confusion matrix, rows: the true class, and the names of the classes."""
        names = [str(name) for name in self.classes["classes"]]
        matrix = dense(self.confusion["matrix"])
        if not names or [len(row) for row in matrix] != [len(names)] * len(names):
            raise ValueError("the matrix does not fit the classes")
        return matrix, names


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a file is a number that can be drawn."""
    return isinstance(value, int | float) and abs(value) < 1e100


def picture(path: Path, message: str, kind: str = "") -> Markup | str:
    """A PNG file inside the page, a word where it is damaged, nothing where there is none."""
    if not path.exists():
        return ""
    data = path.read_bytes()
    if not (data.startswith(PNG) and data.endswith(PNG_END)):
        return PARTS.absent(path.name)
    width, height = struct.unpack(">II", data[16:24])
    return PARTS.picture(base64.b64encode(data).decode(), message, width, height, kind)


def source_of(text: str) -> str:
    """How a page's policy names the one style or script that it lets in."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# --- sections: HTML, or "" where one does not apply; an error in one costs that section -----------


def verdict(files: Files) -> Markup:
    """The best result, or how far the run came."""
    (row, chosen), metric = files.best, files.deciding
    value = row.get(f"test/{metric.key}")
    if not is_number(value):
        return PARTS.verdict(files.state, files.reason)
    images = files.ended.get("test/images")
    of = metric.about(f"{images:,} test images" if is_number(images) else "the test images")
    others = (m.named(value) for m, value in of_the_line(files, row) if m is not metric)
    when = f"at epoch {row.get('epoch', '?')}, the best on the {chosen}"
    about = ", ".join((of, *others))
    return PARTS.verdict(files.state, files.reason, metric.show(value), about, when)


def of_the_line(files: Files, row: dict) -> list[tuple[Metric, float]]:
    """What a row says of the test images, of what an epoch's line has."""
    pairs = [(metric, row.get(f"test/{metric.key}")) for metric in files.metrics]
    return [(m, value) for m, value in pairs if m.has("line") and is_number(value)]


def facts(files: Files) -> Markup:
    """Model, data, length, time and speed."""
    config, ended = files.config.get("config", {}), files.ended
    last = files.rows[-1] if files.rows else {}
    rows = [("model", config.get("model")), ("data", config.get("dataset"))]
    evaluations = [numbers for row in files.rows if (numbers := of_the_line(files, row))]
    newest = evaluations[-1] if evaluations else []
    rows += [(f"last {m.title}", m.show(value)) for m, value in newest]
    also = [(m, files.best[0].get(f"test/{m.key}")) for m in files.metrics if m.has("end")]
    rows += [(f"{m.title}, at the best", m.show(value)) for m, value in also if is_number(value)]
    rows.append(("epoch", f"{last['epoch']} of {config.get('epochs')}" if last else ""))
    rows.append(("steps", f"{ended.get('step') or last.get('step', 0):,}"))
    if is_number(ended.get("seconds")):
        rows.append(("time in all", duration(ended["seconds"])))
    speeds = [speed for _, speed in files.points(SPEED)]
    if speeds:
        rows.append(("speed, median", f"{short(statistics.median(speeds))} images/s"))
    rows.append(("devices", files.environment.get("devices")))
    rows += [(f"skipped {name}", ended.get(f"skipped_{name}")) for name in ("images", "updates")]
    return PARTS.facts([(name, value) for name, value in rows if value])


def curves(files: Files) -> Markup:
    """The metrics that want a chart, learning rate and speed over the steps."""
    row, drawn = files.best[0], []
    for metric in files.metrics:
        keys = [f"{split}/{metric.key}" for split in ("train", "val", "test")]
        lines = {key: files.points(key) for key in keys}
        value = row.get(keys[-1]) if metric is files.deciding and lines[keys[-1]] else None
        ring = (row["step"], value) if is_number(value) else None
        if metric.has("chart"):
            show, wide = metric.on_axis(short), not metric.is_share
            drawn.append(chart(metric.title, lines, show, ring, may_be_wide=wide))
    drawn += [
        chart("learning rate", {"lr": files.points("lr")}),
        chart("images per second", {SPEED: files.points(SPEED)}),
        chart(
            "waited for photographs, part of the time",
            {"data/wait": files.points("data/wait")},
            lambda share: f"{short(100 * share)} %",
        ),
        chart(
            "gradient norm, before clipping",
            {"train": files.points("train/grad_norm")},
            may_be_wide=True,
        ),
        chart("peak memory so far, GB", {"memory": files.points("system/peak_memory_gb")}),
    ]
    if not any(drawn):
        raise ValueError("no row holds a number")
    fit = picture(files.folder / "line.png", "the points, and the line that was learned")
    return PARTS.charts([*drawn, fit])


def calibration(files: Files) -> Markup | str:
    """How often answers are right, by how sure they are."""
    known = files.summary.get("calibration")
    if not known:
        return ""
    bins = zip(known["images"], known["right"], known["sure"], strict=True)
    points = [(sure / images, right / images) for images, right, sure in bins if images]
    exact = [(0.0, 0.0), (1.0, 1.0)]
    lines = {"test/right": [(round(x, 3), y) for x, y in points], "exact": exact}
    note = "The part of the test images that is right, by how sure the answer was, in 15 bins"
    drawn = chart("right by confidence", lines, lambda v: f"{100 * v:.4g} %", axis="confidence")
    return PARTS.note(f"{note}. On the line, confidences can be believed.") + PARTS.charts([drawn])


def confusion(files: Files) -> Markup | str:
    """The confusion matrix, or the most frequent mistakes where there are many classes."""
    if not files.has_matrix:
        return ""
    if not files.confusion and len(files.classes["classes"]) > MOST_NAMES:
        return PARTS.note("No confusion matrix was kept of so many classes.")
    matrix, names = files.matrix()
    message = f"All {sum(map(sum, matrix)):,} test images at epoch {files.confusion['epoch']}"
    if len(names) > MOST_NAMES:
        cells = ((n, y, x) for y, row in enumerate(matrix) for x, n in enumerate(row) if n)
        wrong = ((n, y, x) for n, y, x in cells if x != y)
        worst = heapq.nlargest(MOST_PAIRS, wrong, key=lambda cell: cell[0])
        rows = [[names[y], names[x], n, percent(n / sum(matrix[y]))] for n, y, x in worst]
        head = ["class", "taken for", "#images", "#part of the class"]
        whole = picture(files.folder / "confusion.png", "all classes")
        note = PARTS.note(f"{message}: the most frequent mistakes.")
        return note + PARTS.table(head, rows) + whole

    def cell(y: int, x: int, count: int) -> tuple[str, int, int]:
        part = count / max(1, sum(matrix[y]))
        shade = math.ceil(10 * (part if x == y else math.sqrt(part)))  # few are seen, too
        return "hit" if x == y else "miss", shade, count

    cells = [[cell(y, x, count) for x, count in enumerate(row)] for y, row in enumerate(matrix)]
    message += ". Rows: the true class; columns: what it was taken for."
    return PARTS.note(message) + PARTS.matrix(names, cells)


def per_class(files: Files) -> Markup | str:
    """Accuracy and precision of each class, or what the task tells of each."""
    if kept := files.summary.get("by_class"):
        metrics = [Metric(**metric) for metric in kept["metrics"]]
        columns = [kept["values"][metric.key] for metric in metrics]
        rows = [
            [name, *("-" if v is None else m.show(v) for m, v in zip(metrics, row, strict=True))]
            for name, *row in zip(files.classes["classes"], *columns, strict=True)
        ]
        made = PARTS.table(["class", *(f"#{metric.title}" for metric in metrics)], rows)
        return PARTS.folded(f"{len(rows)} classes", made) if len(rows) > MOST_NAMES else made
    if not files.has_matrix:
        return ""
    if not files.confusion and len(files.classes["classes"]) > MOST_NAMES:
        return ""
    (matrix, names), rows = files.matrix(), []
    guessed = totals({"confusion": matrix})[1]
    for y, row in enumerate(matrix):
        right, total = row[y], sum(row)
        count, x = max(((n, -x) for x, n in enumerate(row) if x != y), default=(0, 0))
        bar = PARTS.bar(f"{100 * right / max(1, total):.1f}")
        parts = [percent(right / of) if of else "-" for of in (total, guessed[y])]
        f1 = f"{2 * right / (total + guessed[y]):.3f}" if total + guessed[y] else "-"
        taken = f"{names[-x]} ({count})" if count else ""
        rows.append([names[y], total, parts[0], bar, parts[1], f1, taken])
    head = ["class", "#images", "#accuracy", "", "#precision", "#F1", "most often taken for"]
    made = PARTS.table(head, rows) + PARTS.note(
        "Accuracy: how many images of the class were recognised. Precision: "
        "how many of the images taken for the class belong to it. F1: the harmonic mean of both."
    )
    return PARTS.folded(f"{len(rows)} classes", made) if len(rows) > MOST_NAMES else made


def mistakes(files: Files) -> Markup | str:
    """The sheet of the surest mistakes of each class, their names, and where the model looked."""
    message = "What it is, what it was taken for: the surest mistakes among the test images"
    made = picture(files.folder / "mistakes.png", message, "sheet")
    kept = read_json(files.folder / "mistakes.json", {}).get("mistakes", [])
    if named := [one for one in kept if one.get("name")]:
        names = [str(name) for name in files.classes["classes"]]
        rows = [
            [o["name"], names[o["label"]], names[o["answer"]], percent(o["confidence"])]
            for o in named
        ]
        table = PARTS.table(["picture", "class", "taken for", "#confidence"], rows, "wide")
        made += PARTS.folded(f"the names of these {len(rows)} pictures", table)
    words = "What spoke for the wrong answer, of the surest: red, yellow where most (Grad-CAM)"
    return made + picture(files.folder / "gradcam.png", words, "sheet")


def lives(files: Files) -> Markup:
    """A row for each start; how a life ended is known to the next one, or to the last status."""
    known, rows = files.status["lives"], []
    last = {**files.status, **files.ended, "status": files.state, "reason": files.reason}
    ends = [*(life["after"] for life in known[1:]), last]
    for life, end in zip(known, ends, strict=True):
        dead = end is not last and end["status"] == "running"
        how = f"{'killed' if dead else end['status']} at step {end['step']}"
        message = f"{how}: {end['reason']}" if end["reason"] else how
        rows.append([life["life"] + 1, life["began"], life["step"], message])
    made = PARTS.table(["life", "began", "#from step", "ended"], rows, "lives")
    spent = goodput(known)
    if not spent:
        return made
    names = {"useful": "steps", **LOST}
    parts = [(cause, 100 * spent[cause] / spent["wall"], names[cause]) for cause in names]
    parts = [part for part in parts if part[1] > 0.05]
    slow = Markup("").join(map(PARTS.note, slow_ones(known)))
    return PARTS.goodput(parts, f"Of {duration(spent['wall'])}:") + slow + made


def repeat(files: Files) -> Markup:
    """What to type to run it again, or to go on."""
    lines = (files.folder / "command.sh").read_text("utf-8", "replace").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    if files.state != "finished":
        lines.append(f"{pasted('train.py', '--resume', files.folder)}  # goes on")
    return PARTS.command(Markup("\n").join(map(printable, lines)))


def settings(files: Files) -> Markup:
    """Every setting with its origin, those that are no default first."""
    values, origins = files.config["config"], files.config["origins"]
    usual = {field.name: field.default for field in fields(TrainConfig)}
    changed = [name for name in values if values[name] != usual.get(name)]
    names = changed + [name for name in values if name not in changed]
    rows = [[name, values[name], origins.get(name)] for name in names]
    message = f"{len(changed)} of {len(names)} settings are not the default; they come first"
    return PARTS.folded(message, PARTS.table(["setting", "value", "from"], rows, "wide"))


def environment(files: Files) -> Markup:
    """Versions, machine and fingerprints."""
    rows = []
    for name, value in files.environment.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {of}" for key, of in value.items())
        rows.append([name.replace("_", " "), value])
    if not rows:
        raise ValueError("nothing is known of it")
    table = PARTS.table(["what", "value"], rows, "wide")
    return PARTS.folded("versions, machine, fingerprints", table)


def samples(files: Files) -> Markup | str:
    """The sheet of training images."""
    message = "Training images as the model sees them"
    inside = picture(files.folder / "samples.png", message, "sheet")
    return PARTS.folded("a few training images", inside) if inside else ""


SECTIONS = [
    ("", verdict, "the result"),
    ("", facts, "the summary"),
    ("Curves", curves, "metrics.jsonl"),
    ("Confusion", confusion, "confusion.json or classes.json"),
    ("Classes", per_class, "confusion.json or classes.json"),
    ("Calibration", calibration, "summary.json"),
    ("Mistakes", mistakes, "mistakes.png"),
    ("Lives", lives, "the list of lives in status.json"),
    ("Repeat", repeat, "command.sh"),
    ("Settings", settings, "config.json"),
    ("Environment", environment, "environment.json"),
    ("Samples", samples, "samples.png"),
]


def build(folder: Path) -> str:
    """The page of a run folder: the same text for the same files."""
    files, sections = Files(folder), []
    for title, section, source in SECTIONS:
        try:
            inside = section(files)
        except Exception:  # whatever a damaged file may hold
            inside = PARTS.absent(source)
        if inside:
            sections.append((title, inside))
    return TEMPLATES.get_template("page.html").render(
        policy=Markup(f"default-src 'none'; img-src data:; style-src {source_of(STYLE)}"),
        style=Markup(STYLE),
        script="",
        name=files.name,
        state=files.state,
        sections=sections,
        version=files.config.get("version", ""),
        folder=shlex.quote(str(folder)),
    )


def write_page(folder: Path) -> Path:
    """Write report.html into a run folder, whole or not at all; OSError where that fails."""
    path = folder / "report.html"
    write_text(path, build(folder))
    return path


def command(folder: Path) -> int:
    """`python -m report page`: the page of a run, made again of what is there."""
    if not any((folder / name).is_file() for name in ("config.json", "metrics.jsonl")):
        raise UserError(
            f"{folder} holds no run: it has no config.json and no metrics.jsonl", code="no-run"
        )
    print(printable(write_page(folder)))
    return FINISHED
