"""report.html: a run on one page that needs no network and no script: `python page.py runs/NAME`.

It is made of the files of the run folder alone, so it can be made again at any time, also of a
run that was killed. A file that is missing or damaged costs its section, never the page.
"""

import argparse
import base64
import hashlib
import heapq
import html
import math
import shlex
import statistics
import struct
import sys
from dataclasses import fields
from functools import cached_property
from pathlib import Path

from chart import chart, short
from common.disk import parse_object, read_json, write_text
from common.text import duration, percent, printable
from config import TrainConfig
from errors import FINISHED, USER_ERROR, UserError
from plots import MOST_NAMES

STYLE = (Path(__file__).resolve().parent / "page.css").read_text(encoding="utf-8")
MOST_PAIRS = 20
STATES = ("running", "finished", "stopped", "failed")
SPEED = "speed/images_per_second"
PNG, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def text(value: object) -> str:
    """Anything from outside as HTML text or attribute: no markup, no control characters."""
    return html.escape(printable(" ".join(str(value).split())))


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
        told = self.status if self.status.get("status") in STATES else {}
        same = self.summary.get("life") == told.get("life")
        self.ended = self.summary if same or not told else {}
        if self.ended and told.get("status", "running") == "running":
            told = self.ended
        self.state, self.reason = str(told.get("status", "unknown")), told.get("reason") or ""
        if self.state == "running":
            self.reason = "or killed without a word: python doctor.py tells which"

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
        matrix, names = self.confusion["matrix"], [text(name) for name in self.classes["classes"]]
        if not names or [len(row) for row in matrix] != [len(names)] * len(names):
            raise ValueError("the matrix does not fit the classes")
        return matrix, names


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e100


# --- pieces -------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list], kind: str = "") -> str:
    """Cells are HTML; the first of a row is its heading; columns called `#...` hold numbers."""
    marks = [' class="n"' if name.startswith("#") else "" for name in head]
    pairs = zip(marks, head, strict=True)
    top = "".join(f'<th scope="col"{mark}>{name.lstrip("#")}</th>' for mark, name in pairs)
    body = ""
    for first, *others in rows:
        cells = "".join(f"<td{m}>{cell}</td>" for m, cell in zip(marks[1:], others, strict=True))
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>\n'
    return scrolled(f'<table class="{kind}"><thead><tr>{top}</tr></thead>{body}</table>')


def scrolled(inside: str, kind: str = "") -> str:
    """What is wider than a phone moves inside its own frame."""
    return f'<div class="scroll {kind}" tabindex="0">{inside}</div>'


def folded(title: str, inside: str) -> str:
    return f"<details><summary>{title}</summary>{inside}</details>"


def absent(name: str) -> str:
    return f'<p class="absent">Not shown: {name} is missing or damaged.</p>'


def picture(path: Path, told: str, kind: str = "") -> str:
    """A PNG file inside the page, a word where it is damaged, nothing where there is none."""
    if not path.exists():
        return ""
    data = path.read_bytes()
    if not (data.startswith(PNG) and data.endswith(PNG_END)):
        return absent(path.name)
    width, height = struct.unpack(">II", data[16:24])
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    image = f'<img src="{source}" alt="{told}" width="{width}" height="{height}">'
    return f"<figure>{scrolled(image, kind)}<figcaption>{told}</figcaption></figure>"


# --- sections: HTML, or "" where one does not apply; an error in one costs that section -----------


def verdict(files: Files) -> str:
    row, score, chosen = files.best
    state = f'<p><b class="{text(files.state)}">{text(files.state)}</b> {text(files.reason)}</p>'
    value = row.get(f"test/{score}")
    if not is_number(value):
        return f"{state}<p>There is no evaluation to tell of.</p>"
    images = files.ended.get("test/images")
    of = f"of {images:,} test images" if is_number(images) else "of the test images"
    number = percent(value)
    if score == "loss":
        number, of = f"{value:.4g}", f"loss on the test data, R2 {row['test/r2']:.4f}"
    when = f"at epoch {text(row.get('epoch', '?'))}, the best on the {chosen}"
    return f'<p class="verdict"><strong>{number}</strong> <span>{of}<br>{when}</span></p>{state}'


def facts(files: Files) -> str:
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
    cells = [f"<div><dt>{name}</dt><dd>{text(value)}</dd></div>" for name, value in rows if value]
    return f"<dl>{''.join(cells)}</dl>"


def curves(files: Files) -> str:
    row, score, _ = files.best
    name, show = ("r2", short) if score == "loss" else ("accuracy", lambda v: f"{100 * v:.4g} %")
    losses = {f"{split}/loss": files.points(f"{split}/loss") for split in ("train", "val", "test")}
    scores = {f"{split}/{name}": files.points(f"{split}/{name}") for split in ("val", "test")}
    value = row.get(f"test/{name}") if any(scores.values()) else None
    ring = (row["step"], value) if is_number(value) else None
    drawn = chart("loss", losses) + chart(name.replace("r2", "R2"), scores, show, ring)
    drawn += chart("learning rate", {"lr": files.points("lr")})
    drawn += chart("images per second", {SPEED: files.points(SPEED)})
    if not drawn:
        raise ValueError("no row holds a number")
    fit = picture(files.folder / "line.png", "the points, and the line that was learned")
    return f'<div class="charts">{drawn}{fit}</div>'


def confusion(files: Files) -> str:
    if not is_number(files.best[0].get("test/accuracy")):
        return ""  # a regression, or not evaluated yet
    matrix, names = files.matrix()
    told = f"All {sum(map(sum, matrix)):,} test images at epoch {text(files.confusion['epoch'])}"
    if len(names) > MOST_NAMES:
        cells = ((n, y, x) for y, row in enumerate(matrix) for x, n in enumerate(row) if n)
        wrong = ((n, y, x) for n, y, x in cells if x != y)
        worst = heapq.nlargest(MOST_PAIRS, wrong, key=lambda cell: cell[0])
        rows = [[names[y], names[x], n, percent(n / sum(matrix[y]))] for n, y, x in worst]
        whole = picture(files.folder / "confusion.png", "all classes")
        head = ["class", "taken for", "#images", "#part of the class"]
        return f'<p class="note">{told}: the most frequent mistakes.</p>{table(head, rows)}{whole}'
    body = ""
    for y, row in enumerate(matrix):
        body += f'<tr><th scope="row" title="{names[y]}">{names[y]}</th>'
        for x, cell in enumerate(row):
            part = cell / max(1, sum(row))
            shade = math.ceil(10 * (part if x == y else math.sqrt(part)))  # few are seen, too
            kind = "hit" if x == y else "miss"
            body += f'<td class="{kind} s{shade}">{cell}</td>' if cell else "<td></td>"
        body += "</tr>\n"
    head = "".join(f'<th scope="col" title="{name}"><span>{name}</span></th>' for name in names)
    made = scrolled(f'<table class="matrix"><thead><tr><td></td>{head}</tr></thead>{body}</table>')
    told += ". Rows: the true class; columns: what it was taken for."
    return f'<p class="note">{told}</p>{made}'


def per_class(files: Files) -> str:
    if not is_number(files.best[0].get("test/accuracy")):
        return ""  # a regression, or not evaluated yet
    (matrix, names), rows = files.matrix(), []
    guessed = [sum(column) for column in zip(*matrix, strict=True)]
    for y, row in enumerate(matrix):
        right, total = row[y], sum(row)
        count, x = max(((n, -x) for x, n in enumerate(row) if x != y), default=(0, 0))
        length = 100 * right / max(1, total)
        bar = f'<rect class="all" width="100" height="6"/><rect width="{length:.1f}" height="6"/>'
        bar = f'<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none">{bar}</svg>'
        parts = [percent(right / of) if of else "-" for of in (total, guessed[y])]
        taken = f"{names[-x]} ({count})" if count else ""
        rows.append([names[y], total, parts[0], bar, parts[1], taken])
    made = table(["class", "#images", "#accuracy", "", "#precision", "most often taken for"], rows)
    made += '<p class="note">Accuracy: how many images of the class were recognised. Precision: '
    made += "how many of the images taken for the class belong to it.</p>"
    return folded(f"{len(rows)} classes", made) if len(rows) > MOST_NAMES else made


def mistakes(files: Files) -> str:
    told = "What it is, what it was taken for: the surest mistakes in the first 1,000 test images"
    return picture(files.folder / "mistakes.png", told, "sheet")


def lives(files: Files) -> str:
    """A row for each start; how a life ended is known to the next one, or to the last status."""
    known, rows = files.status["lives"], []
    last = {**files.status, **files.ended, "status": files.state, "reason": files.reason}
    ends = [*(life["after"] for life in known[1:]), last]
    for life, end in zip(known, ends, strict=True):
        dead = end is not last and end["status"] == "running"
        how = f"{'killed' if dead else end['status']} at step {end['step']}"
        told = f"{how}: {end['reason']}" if end["reason"] else how
        rows.append([text(cell) for cell in (life["life"], life["began"], life["step"], told)])
    return table(["life", "began", "#from step", "ended"], rows, "lives")


def command(files: Files) -> str:
    lines = (files.folder / "command.sh").read_text("utf-8", "replace").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    if files.state != "finished":
        lines.append(f"python train.py --resume {shlex.quote(str(files.folder))}  # goes on")
    return (
        '<pre tabindex="0">' + "\n".join(html.escape(printable(line)) for line in lines) + "</pre>"
    )


def settings(files: Files) -> str:
    values, origins = files.config["config"], files.config["origins"]
    usual = {field.name: field.default for field in fields(TrainConfig)}
    changed = [name for name in values if values[name] != usual.get(name)]
    names = changed + [name for name in values if name not in changed]
    rows = [[text(cell) for cell in (name, values[name], origins.get(name))] for name in names]
    told = f"{len(changed)} of {len(names)} settings are not the default; they come first"
    return folded(told, table(["setting", "value", "from"], rows, "wide"))


def environment(files: Files) -> str:
    rows = []
    for name, value in files.environment.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {of}" for key, of in value.items())
        rows.append([text(name.replace("_", " ")), text(value)])
    if not rows:
        raise ValueError("nothing is known of it")
    return folded("versions, machine, fingerprints", table(["what", "value"], rows, "wide"))


def samples(files: Files) -> str:
    told = "Training images as the model sees them"
    inside = picture(files.folder / "samples.png", told, "sheet")
    return folded("the first training images", inside) if inside else ""


SECTIONS = [
    ("", verdict, "the result"),
    ("", facts, "the summary"),
    ("Curves", curves, "metrics.jsonl"),
    ("Confusion", confusion, "confusion.json or classes.json"),
    ("Classes", per_class, "confusion.json or classes.json"),
    ("Mistakes", mistakes, "mistakes.png"),
    ("Lives", lives, "the list of lives in status.json"),
    ("Repeat", command, "command.sh"),
    ("Settings", settings, "config.json"),
    ("Environment", environment, "environment.json"),
    ("Samples", samples, "samples.png"),
]


def build(folder: Path) -> str:
    """The page of a run folder: the same text for the same files."""
    files, body = Files(folder), ""
    for title, section, source in SECTIONS:
        try:
            inside = section(files)
        except Exception:  # whatever a damaged file may hold
            inside = absent(source)
        heading = f"<h2>{title}</h2>\n" if title else ""
        body += f"<section>{heading}{inside}</section>\n" if inside else ""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{text(files.name)}: {text(files.state)}</title>
<style>{STYLE}</style></head>
<body><main><h1>{text(files.name)}</h1>
{body}<footer>Made by Lockstep {text(files.config.get("version", ""))} of the files in this folder;
<code>python page.py {text(shlex.quote(str(folder)))}</code> makes it again.</footer></main>
</body></html>
"""


def write_page(folder: Path) -> Path:
    """Write report.html into a run folder, whole or not at all; OSError where that fails."""
    path = folder / "report.html"
    write_text(path, build(folder))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", default="runs/latest", type=Path)
    folder = parser.parse_args().run
    try:
        if not any((folder / name).is_file() for name in ("config.json", "metrics.jsonl")):
            raise UserError(
                f"{folder} holds no run: it has no config.json and no metrics.jsonl", code="no-run"
            )
        print(printable(write_page(folder)))
    except (UserError, OSError) as error:
        print(printable(error), file=sys.stderr)
        return USER_ERROR
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
