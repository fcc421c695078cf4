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

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from common.disk import parse_object, read_json, write_text
from common.text import duration, percent, printable
from config import TrainConfig
from errors import FINISHED, UserError
from report.chart import chart, short
from report.pictures import MOST_NAMES

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
PARTS = TEMPLATES.get_template("parts.html").module


def content(path: Path) -> str:
    """A text file; empty where it is missing."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


class Files:
    """What the files of a run folder say; what is missing or damaged is empty."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.resolve().name
        self.config, self.summary, self.status, self.environment, self.classes, self.confusion = (
            read_json(folder / f"{name}.json", {})
            for name in ("config", "summary", "status", "environment", "classes", "confusion")
        )
        lines = content(folder / "metrics.jsonl").split("\n")
        self.rows = [row for line in lines if (row := parse_object(line))]
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
        pairs = [(row.get("step"), row[key]) for row in self.rows if key in row]
        return [pair for pair in pairs if all(map(is_number, pair))]

    @cached_property
    def best(self) -> tuple[dict, str, str]:
        """(row, name of the score, the split that chose it) of the best evaluation."""
        score = "loss" if self.points("test/r2") or "test/r2" in self.summary else "accuracy"
        key = f"val/{score}" if self.points(f"val/{score}") else f"test/{score}"
        pick = min if score == "loss" else max
        points = self.points(key)
        step = pick(points, key=lambda point: point[1])[0] if points else None
        found = [row for row in self.rows if points and row.get("step") == step and key in row]
        # Without rows, what the summary still knows.
        known = {k.removeprefix("best/"): v for k, v in self.summary.items() if "best/" in k}
        return (found or [known])[0], score, "validation part" if "val" in key else "test split"

    def matrix(self) -> tuple[list[list[int]], list[str]]:
        """The confusion matrix, rows: the true class, and the names of the classes."""
        names = [str(name) for name in self.classes["classes"]]
        matrix = self.confusion["matrix"]
        if isinstance(matrix, dict):
            matrix = whole_matrix(matrix["classes"], matrix["cells"], matrix["counts"])
        if not names or [len(row) for row in matrix] != [len(names)] * len(names):
            raise ValueError("the matrix does not fit the classes")
        return matrix, names


def whole_matrix(classes: int, cells: list[int], counts: list[int]) -> list[list[int]]:
    """A matrix of which only the cells that are not zero were kept."""
    matrix = [[0] * classes for _ in range(classes)]
    for cell, count in zip(cells, counts, strict=True):
        matrix[cell // classes][cell % classes] = count
    return matrix


def is_number(value: object) -> bool:
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


# --- sections: HTML, or "" where one does not apply; an error in one costs that section -----------


def verdict(files: Files) -> Markup:
    row, score, chosen = files.best
    value = row.get(f"test/{score}")
    if not is_number(value):
        return PARTS.verdict(files.state, files.reason)
    images = files.ended.get("test/images")
    of = f"of {images:,} test images" if is_number(images) else "of the test images"
    number = percent(value)
    if score == "loss":
        number, of = f"{value:.4g}", f"loss on the test data, R2 {row['test/r2']:.4f}"
    when = f"at epoch {row.get('epoch', '?')}, the best on the {chosen}"
    return PARTS.verdict(files.state, files.reason, number, of, when)


def facts(files: Files) -> Markup:
    config, ended = files.config.get("config", {}), files.ended
    last = files.rows[-1] if files.rows else {}
    rows = [("model", config.get("model")), ("data", config.get("dataset"))]
    for key, show in (("test/accuracy", percent), ("test/r2", "R2 {:.4f}".format)):
        rows += [("last evaluation", show(value)) for _, value in files.points(key)[-1:]]
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
    row, score, _ = files.best
    name, show = ("r2", short) if score == "loss" else ("accuracy", lambda v: f"{100 * v:.4g} %")
    losses = {f"{split}/loss": files.points(f"{split}/loss") for split in ("train", "val", "test")}
    scores = {f"{split}/{name}": files.points(f"{split}/{name}") for split in ("val", "test")}
    value = row.get(f"test/{name}") if any(scores.values()) else None
    ring = (row["step"], value) if is_number(value) else None
    drawn = [
        chart("loss", losses),
        chart(name.replace("r2", "R2"), scores, show, ring),
        chart("learning rate", {"lr": files.points("lr")}),
        chart("images per second", {SPEED: files.points(SPEED)}),
    ]
    if not any(drawn):
        raise ValueError("no row holds a number")
    fit = picture(files.folder / "line.png", "the points, and the line that was learned")
    return PARTS.charts([*drawn, fit])


def confusion(files: Files) -> Markup | str:
    if not is_number(files.best[0].get("test/accuracy")):
        return ""  # a regression, or not evaluated yet
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
    if not is_number(files.best[0].get("test/accuracy")):
        return ""  # a regression, or not evaluated yet
    if not files.confusion and len(files.classes["classes"]) > MOST_NAMES:
        return ""
    (matrix, names), rows = files.matrix(), []
    guessed = [sum(column) for column in zip(*matrix, strict=True)]
    for y, row in enumerate(matrix):
        right, total = row[y], sum(row)
        count, x = max(((n, -x) for x, n in enumerate(row) if x != y), default=(0, 0))
        bar = PARTS.bar(f"{100 * right / max(1, total):.1f}")
        parts = [percent(right / of) if of else "-" for of in (total, guessed[y])]
        taken = f"{names[-x]} ({count})" if count else ""
        rows.append([names[y], total, parts[0], bar, parts[1], taken])
    head = ["class", "#images", "#accuracy", "", "#precision", "most often taken for"]
    made = PARTS.table(head, rows) + PARTS.note(
        "Accuracy: how many images of the class were recognised. Precision: "
        "how many of the images taken for the class belong to it."
    )
    return PARTS.folded(f"{len(rows)} classes", made) if len(rows) > MOST_NAMES else made


def mistakes(files: Files) -> Markup | str:
    message = (
        "What it is, what it was taken for: the surest mistakes in the first 1,000 test images"
    )
    return picture(files.folder / "mistakes.png", message, "sheet")


def lives(files: Files) -> Markup:
    """A row for each start; how a life ended is known to the next one, or to the last status."""
    known, rows = files.status["lives"], []
    last = {**files.status, **files.ended, "status": files.state, "reason": files.reason}
    ends = [*(life["after"] for life in known[1:]), last]
    for life, end in zip(known, ends, strict=True):
        dead = end is not last and end["status"] == "running"
        how = f"{'killed' if dead else end['status']} at step {end['step']}"
        message = f"{how}: {end['reason']}" if end["reason"] else how
        rows.append([life["life"], life["began"], life["step"], message])
    return PARTS.table(["life", "began", "#from step", "ended"], rows, "lives")


def repeat(files: Files) -> Markup:
    lines = (files.folder / "command.sh").read_text("utf-8", "replace").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    if files.state != "finished":
        lines.append(f"python train.py --resume {shlex.quote(str(files.folder))}  # goes on")
    return PARTS.command(Markup("\n").join(map(printable, lines)))


def settings(files: Files) -> Markup:
    values, origins = files.config["config"], files.config["origins"]
    usual = {field.name: field.default for field in fields(TrainConfig)}
    changed = [name for name in values if values[name] != usual.get(name)]
    names = changed + [name for name in values if name not in changed]
    rows = [[name, values[name], origins.get(name)] for name in names]
    message = f"{len(changed)} of {len(names)} settings are not the default; they come first"
    return PARTS.folded(message, PARTS.table(["setting", "value", "from"], rows, "wide"))


def environment(files: Files) -> Markup:
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
    message = "Training images as the model sees them"
    inside = picture(files.folder / "samples.png", message, "sheet")
    return PARTS.folded("the first training images", inside) if inside else ""


SECTIONS = [
    ("", verdict, "the result"),
    ("", facts, "the summary"),
    ("Curves", curves, "metrics.jsonl"),
    ("Confusion", confusion, "confusion.json or classes.json"),
    ("Classes", per_class, "confusion.json or classes.json"),
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
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return TEMPLATES.get_template("page.html").render(
        policy=Markup(f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"),
        style=Markup(STYLE),
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
