"""report.html: one page that shows hostile text as text, needs no network, and fits a phone."""

import functools
import html
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from launches import REPOSITORY, SMALL, train

from common.text import printable
from report import live, page
from report import pictures as plots
from report.chart import MOST_POINTS, chart, decades, thinned, ticks
from report.doctor import examine
from tasks import Classification

OWNED = "parent.document.title='owned';document.title='owned'"
CLASSES = [
    f"<script>{OWNED}</script>",
    f'"onload="{OWNED}" x="',
    f"<img src=x onerror={OWNED}>",
    "control \x1b[31m \x00 \u202e and \ud800",
    "&lt;b&gt; &amp; </table></style>",
    "a_name_without_any_space_" * 8,
]
MATRIX = [[30 if x == y else x * (y + 1) % 3 for x in range(6)] for y in range(6)]
HEADINGS = [
    "Curves", "Confusion", "Classes", "Mistakes", "Lives", "Repeat", "Settings", "Environment",
    "Samples",
]  # fmt: skip


def fabricate(folder, classes=CLASSES, matrix=MATRIX, images=False, **status):
    """A run folder with every file that the page reads."""
    folder.mkdir()
    rows = []
    for epoch in range(1, 5):
        for step in range(10 * epoch - 9, 10 * epoch + 1):
            speed = {"speed/images_per_second": 900 + step, "lr": 0.001 * step}
            rows.append({"step": 2500 * step, "epoch": epoch, "train/loss": 2 / step, **speed})
        score = {"test/accuracy": [0.5, 0.75, 0.875, 0.75][epoch - 1], "test/loss": 1 / epoch}
        rows.append({"step": 25_000 * epoch, "epoch": epoch, **score})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lives = [
        {"life": 0, "began": "2030-01-01 10:00:00", "step": 0, "after": None},
        {"life": 1, "began": "2030-01-01 11:00:00", "step": 25_000,
         "after": {"status": "stopped", "step": 25_000, "reason": "SIGTERM <i>"}},
        {"life": 2, "began": "2030-01-01 12:00:00", "step": 50_000,
         "after": {"status": "running", "step": 52_500, "reason": ""}},
    ]  # fmt: skip
    config = {
        "seed": 0,
        "model": "my_cnn",
        "dataset": CLASSES[0],
        "epochs": 4,
        "lr": 0.1,
        "run_dir": "x" * 300,
    }
    origins = {name: "flag" for name in config} | {"model": "default"}
    told = {"status": "finished", "step": 100_000, "reason": "", "life": 2}
    contents = {
        "status": {**told, "lives": lives, **status},
        "summary": {**told, "seconds": 250, "best/test/accuracy": 0.875, "best/epoch": 3,
                    "best/step": 75_000, "best_chosen_on": "test", "test/images": 200},
        "config": {"version": "0", "config": config, "origins": origins},
        "environment": {"python": CLASSES[1], "packages": {"torch": "2", "numpy": "2"}},
        "classes": {"classes": classes},
        "confusion": {"split": "test", "step": 75_000, "epoch": 3, "matrix": matrix},
        "metrics": {"best_is": "accuracy", "metrics": [asdict(m) for m in Classification.metrics]},
    }  # fmt: skip
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "command.sh").write_text(f"#!/bin/sh\n# repeats\npython train.py '{CLASSES[0]}'\n")
    if images:
        pictures = torch.randint(0, 255, (9, 3, 8, 8), dtype=torch.uint8)
        plots.sheet(pictures, ["a\nas b 90 %"] * 9, folder / "mistakes.png")
        shutil.copy(folder / "mistakes.png", folder / "samples.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    name = CLASSES[1].replace("/", "")[:60]
    return fabricate(tmp_path_factory.mktemp("page") / name, images=True)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


class Seen(HTMLParser):
    """Tags, attributes and text of a page, as a browser would take them."""

    def __init__(self, made: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = set(), [], [], []
        self.feed(made)
        assert self.open == [], "a tag is not closed"

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def headings(made: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", made)


def section(made: str, title: str) -> str:
    return made.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def test_the_page_tells_what_the_files_hold(folder):
    made = page.build(folder)
    assert headings(made) == HEADINGS and "Not shown" not in made
    assert "<strong>87.50 %</strong>" in made and "at epoch 3, the best on the test split" in made
    assert "of 200 test images" in made and "<dd>4m10s</dd>" in made and "finished</b>" in made
    assert section(made, "Curves").count("<polyline") == 5
    assert section(made, "Classes").count('scope="row"') == len(CLASSES)
    assert "88.24 %" in section(made, "Classes")  # 30 of the 34 of the second class
    told = section(made, "Settings")
    assert "5 of 6 settings are not" in told and told.index(">lr<") < told.index(">seed<")
    assert page.build(folder) == made


def test_how_each_life_ended_is_told_and_the_first_is_number_1_as_everywhere(folder):
    told = section(page.build(folder), "Lives")
    assert re.findall(r'<th scope="row">(\d)<', told) == ["1", "2", "3"]
    assert dict(live.state_of(folder, [])["facts"])["life"] == "3"
    assert next(line for name, line in examine(folder)[0] if name == "lives").startswith("3, ")
    for words in (
        "stopped at step 25000: SIGTERM &lt;i&gt;",
        "killed at step 52500",
        "finished at step 100000",
    ):
        assert words in told


def test_text_from_outside_stays_text(folder):
    made = page.build(folder)
    seen = Seen(made)
    assert not seen.tags & {"script", "i", "iframe", "object", "form", "a"}
    known = {
        "alt", "aria-label", "charset", "class", "content", "cx", "cy", "d", "height", "href",
        "http-equiv", "lang", "name", "points", "preserveaspectratio", "r", "rel", "role", "scope",
        "src", "tabindex", "title", "viewbox", "width", "x", "y",
    }  # fmt: skip
    assert {name for name, _ in seen.attributes} <= known
    for name in CLASSES:
        shown = printable(name)
        assert shown in seen.texts, shown
    assert not any(c for c in made if not c.isprintable() and c != "\n")
    made.encode("utf-8")


def test_nothing_is_fetched_from_anywhere(folder):
    made = page.build(folder)
    sources = [value for name, value in Seen(made).attributes if name in ("src", "href")]
    assert len(sources) == 3 and all(value.startswith("data:") for value in sources)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"base64,[^\"]*", "", made))
    policy = dict(Seen(made).attributes)["content"]
    assert "width=device-width" in policy or "default-src 'none'" in made


DAMAGE = [
    None, b"", b"\xff\xfe\x00", b"[]", b"null", b"7", b'{"a":', b"{}", b"[" * 100_000,
    b'{"status": [], "lives": 3, "config": 7, "origins": [], "classes": {}, "matrix": "abc", '
    b'"seconds": "long", "life": {}, "step": {}, "test/accuracy": "good", "train/loss": NaN}',
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: str(d)[:12])
def test_a_damaged_file_costs_its_section_and_a_word(copy, damage):
    whole = page.build(copy)
    cost = {
        "metrics.jsonl": {"Curves"}, "status.json": {"Lives"}, "config.json": {"Settings"},
        "confusion.json": {"Confusion", "Classes"}, "classes.json": {"Confusion", "Classes"},
        "environment.json": {"Environment"}, "command.sh": {"Repeat"}, "summary.json": set(),
        "metrics.json": set(),
        "mistakes.png": {"Mistakes"}, "samples.png": {"Samples"},
    }  # fmt: skip
    for name, lost in cost.items():
        path = copy / name
        before = path.read_bytes()
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage)
        made = page.build(copy)
        Seen(made)
        for title in HEADINGS:
            if title not in lost:
                assert section(made, title) == section(whole, title), (name, title)
            elif name.endswith(".png") and damage is None:
                assert title not in headings(made)  # a run without pictures lacks nothing
            elif name == "command.sh" and damage is not None:
                continue  # any text may be a command
            elif name == "environment.json" and damage == DAMAGE[-1]:
                continue  # and any object an environment
            else:
                assert "Not shown" in section(made, title), (name, title)
        path.write_bytes(before)
    assert page.build(copy) == whole


def test_a_page_of_nothing_is_a_page(tmp_path):
    made = page.build(tmp_path)
    assert "There is no evaluation to tell of" in made and made.count("Not shown") > 4
    Seen(made)


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ({"status": "running", "life": 3}, "running</b> or killed without a word"),
        ({"status": "running"}, "finished</b>"),  # the run's own page is written before its status
        ({"status": "failed", "reason": "no <room>"}, "failed</b> no &lt;room&gt;"),
        ({"status": "stopped", "reason": "STOP"}, "stopped</b> STOP"),
    ],
)
def test_the_state_is_that_of_the_last_life(tmp_path, status, told):
    made = page.build(fabricate(tmp_path / "run", **status))
    assert told in made
    assert ("4m10s" in made) == (status.get("life") != 3)  # the time of another life is not told
    assert ("--resume" in section(made, "Repeat")) == ("finished" not in told)


ROWS = {"step": [5, 10, 15], "epoch": [1, 2, 3]}


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"test/accuracy": [0.5, 0.9, 0.9]}, "90.00 %</strong>.*epoch 2, the best on the test"),
        (
            {"test/accuracy": [0.5, 0.9, 0.7], "val/accuracy": [0.8, 0.7, 0.6]},
            "50.00 %</strong>.*epoch 1, the best on the validation part",
        ),
        (
            {"test/loss": [3.0, 0.25, 0.5], "test/r2": [0.1, 0.5, 0.4]},
            "0.2500</strong>.*loss on.*R2 0.5000.*epoch 2, the best on the test",
        ),
        ({}, "87.50 %</strong>.*epoch 3, the best on the test"),  # from summary.json
    ],
)
def test_the_best_is_the_one_that_the_run_chose(copy, columns, told):
    (copy / "metrics.json").unlink()  # of an older program
    columns = {**ROWS, **columns}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert re.search(told, page.build(copy))


@pytest.mark.parametrize("wrong", [
    {"format": "999999999d"}, {"format": "<script>"}, {"shown": ["<"]}, {"key": []}, {"extra": 1},
])  # fmt: skip
def test_a_declaration_from_outside_is_one_or_it_is_not_followed(copy, wrong):
    whole = page.build(copy)
    declared = json.loads((copy / "metrics.json").read_text())
    declared["metrics"][1] |= {"title": CLASSES[0]}
    (copy / "metrics.json").write_text(json.dumps(declared))
    assert printable(CLASSES[0]) in Seen(page.build(copy)).texts
    declared["metrics"][1] |= wrong
    (copy / "metrics.json").write_text(json.dumps(declared))
    assert page.build(copy) == whole


def test_a_run_that_was_stopped_before_an_evaluation_lacks_nothing(copy):
    for name in ("summary", "confusion"):
        (copy / f"{name}.json").unlink()
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in lines if "test/" not in line]
    (copy / "metrics.jsonl").write_text("\n".join(lines))
    made = page.build(copy)
    assert headings(made) == [h for h in HEADINGS if h not in ("Confusion", "Classes")]
    assert "There is no evaluation to tell of" in made and "Not shown" not in made


def test_many_classes_show_their_most_frequent_mistakes(tmp_path):
    matrix = [[50 * (x == y) for x in range(40)] for y in range(40)]
    matrix[7][9], matrix[8][7] = 5, 3
    made = page.build(fabricate(tmp_path / "many", [f"kind {n}" for n in range(40)], matrix))
    told = section(made, "Confusion")
    assert re.findall(r'scope="row">(.*?)<', told) == ["kind 7", "kind 8"]
    assert '<td class="n">9.09 %' in told and "<summary>40 classes</summary>" in made


def test_a_long_curve_keeps_its_extremes():
    points = [(step, float(step % 1000)) for step in range(50_000)]
    points[31_111], points[777] = (31_111, 5000.0), (777, -3.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS and kept == sorted(kept)
    assert {(31_111, 5000.0), (777, -3.0)} <= set(kept)
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


@pytest.mark.parametrize(
    "ends", [(0, 1), (0.7, 0.93), (-3, 2e6), (1e-5, 1.0001e-5), (5, 5), (0, 0), (1, 1 + 1e-15)]
)
def test_ticks_are_few_round_and_around_what_is_drawn(ends):
    marks = ticks(*ends)
    assert 3 <= len(marks) <= 8 and marks[0] <= ends[0] + 1e-12 and marks[-1] >= ends[1] - 1e-12
    apart = {f"{b - a:.6g}" for a, b in itertools.pairwise(marks)}
    assert len(apart) == 1 and f"{float(apart.pop()):.0e}"[0] in "125"


def test_a_loss_that_exploded_leaves_the_other_curves_to_be_read():
    lines = {"burst": [(1, 2.3), (50, 2e28)], "fine": [(1, 2.3), (50, 0.03)]}
    heights = {}
    for wide in (False, True):
        made = str(chart("loss", lines, may_be_wide=wide))
        ways = re.findall(r'class="(burst|fine)" points="[\d.]+,([\d.]+) [\d.]+,([\d.]+)"', made)
        heights[wide] = {name: abs(float(a) - float(b)) for name, a, b in ways}
        assert ("log scale" in made) == wide
        assert float(re.findall(r'class="end" x="45" y="([\d.]+)"', made)[0]) == 210
    assert heights[False]["fine"] == 0 and heights[True]["fine"] > 5
    few = {"fine": [(1, 2.3), (50, 0.03)]}
    assert chart("loss", few, may_be_wide=True) == chart("loss", few)


@pytest.mark.parametrize("ends", [(0.03, 2e28), (0.775, 148.7), (0.01, 100), (1e-9, 1.1)])
def test_decades_are_few_and_around_what_is_drawn(ends):
    marks = decades(*ends)
    assert 3 <= len(marks) <= 7 and marks[0] <= ends[0] and marks[-1] >= ends[1]


def test_the_page_is_written_whole_or_not_at_all(copy):
    path = page.write_page(copy)
    assert path.read_text(encoding="utf-8") == page.build(copy)
    path.unlink()
    (path / "in the way").mkdir(parents=True)
    with pytest.raises(OSError):
        page.write_page(copy)
    assert not list(copy.glob("*.partial"))


def test_the_command_writes_it_again_and_refuses_what_is_no_run(copy, tmp_path):
    def run(*words):
        words = [sys.executable, "-m", "report", "page", *words]
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env)

    done = run("copy")
    assert (done.returncode, done.stdout) == (0, "copy/report.html\n"), done.stderr
    (tmp_path / "empty").mkdir()
    for words in (["empty"], ["missing"], []):
        done = run(*words)
        assert done.returncode == 2 and "holds no run" in done.stderr
    done = run("copy", "--rnu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--help" in done.stderr
    loaded = (
        "import sys; from report import page; print({'torch', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, cwd=REPOSITORY)
    assert done.stdout.strip() == b"set()"


# --- real runs, in a real browser ---------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(nets):
    """A classification with pictures; a regression whose second life cannot write its page."""
    flags = ["--model", "plain.py:Net", *SMALL, "--plots", "--epochs", "2", "--lr", "0.01"]
    done = train([*flags, "--run-dir", "page-digits"], nets)
    assert done.status == 0, done.out
    line = ["--model", "linear_regression", "--threads", "1", "--run-dir", "page-line"]
    done = train([*line, "--epochs", "5"], nets)
    assert done.status == 0, done.out
    return nets


@pytest.mark.slow
def test_a_page_that_cannot_be_written_is_a_warning_and_a_regression_has_one(runs):
    path = runs / "page-line" / "report.html"
    first = path.read_text(encoding="utf-8")
    assert "R2" in first and headings(first) == [
        "Curves", "Lives", "Repeat", "Settings", "Environment"
    ]  # fmt: skip
    assert "Not shown" not in first and first.count("data:image/png") == 1
    path.unlink()
    (path / "in the way").mkdir(parents=True)
    done = train(["--resume", "page-line", "--epochs", "6"], runs)
    assert done.status == 0 and "Traceback" not in done.out, done.out
    assert "warning: report.html cannot be written: " in done.out
    assert not re.search(r"page +page-line", done.out)
    shutil.rmtree(path)
    told = section(page.write_page(runs / "page-line").read_text("utf-8"), "Lives")
    assert told.count("finished at step") == 2


HARNESS = """<!DOCTYPE html><link rel="icon" href="data:,"><title>harness</title>
<iframe src="PAGE" width="WIDTH" height="900"></iframe><pre></pre><script>
window.addEventListener("load", () => {
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  page.querySelectorAll("details").forEach((each) => { each.open = true; });
  const colour = (name) => {
    const style = view.getComputedStyle(page.querySelector(name));
    return style.color;
  };
  const outside = [...page.querySelectorAll("figure svg text")].filter((each) => {
    const [a, b] = [each.getBoundingClientRect(), each.closest("svg").getBoundingClientRect()];
    return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom;
  });
  document.querySelector("pre").textContent = JSON.stringify({
    title: document.title, inside: page.title,
    width: view.innerWidth, scroll: page.documentElement.scrollWidth,
    paper: view.getComputedStyle(page.body).backgroundColor,
    ink: [colour("body"), colour("h2"), colour("figcaption"), colour("b"), colour("dt")],
    images: [...page.images].map((each) => each.complete && each.naturalWidth),
    classes: [...page.querySelectorAll(".matrix tbody th")].map((each) => each.textContent),
    styled: view.getComputedStyle(page.querySelector("main")).maxWidth,
    outside: outside.map((each) => each.textContent),
  });
});
</script>"""


@pytest.fixture(scope="session")
def chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if found is None:
        assert not os.environ.get("LOCKSTEP_REQUIRE_CHROMIUM"), "no chromium, but it is required"
        pytest.skip("needs a browser: apt-get install -y chromium")
    return found


@pytest.fixture
def look(chromium, tmp_path):
    """look(page, width, dark) -> (what the browser found, its console, the paths it asked for)."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *words):
            asked.append(self.path)

    served = tmp_path / "served"
    served.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def look(made: str, width: int = 360, dark: bool = False):
        asked.clear()
        (served / "report.html").write_text(made, encoding="utf-8")
        harness = HARNESS.replace("PAGE", "report.html").replace("WIDTH", str(width))
        (served / "harness.html").write_text(harness, encoding="utf-8")
        words = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom",
            f"http://127.0.0.1:{server.server_address[1]}/harness.html",
        ]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        found = re.search("<pre>(.+?)</pre>", done.stdout, flags=re.S)
        assert found, done.stderr[-2000:]
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return json.loads(html.unescape(found[1])), console, list(asked)

    yield look
    server.shutdown()
    server.server_close()


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours as WCAG 2 defines it, from 1 to 21."""
    lights = []
    for colour in (one, other):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05)
    return max(lights) / min(lights)


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_hostile_text_and_keeps_the_page_in_its_width(look, folder, width):
    seen, console, asked = look(page.build(folder), width)
    assert console == [] and asked == ["/harness.html", "/report.html"]
    assert seen["title"] == "harness" and seen["inside"] == f"{folder.name}: finished"
    assert seen["classes"] == [printable(name) for name in CLASSES]
    assert seen["width"] == seen["scroll"] == width and seen["outside"] == []
    assert len(seen["images"]) == 2 and all(seen["images"])
    assert seen["styled"] != "none"


@pytest.mark.slow
def test_the_policy_stops_a_script_even_where_escaping_failed(look, folder):
    made = page.build(folder).replace("<main>", f"<main><script>{OWNED}</script>")
    seen, console, _ = look(made)
    assert seen["title"] == "harness" and len(console) == 1 and "Content Security" in console[0]
    image = '<main><img src="/elsewhere.png">'
    seen, console, asked = look(page.build(folder).replace("<main>", image))
    assert "/elsewhere.png" not in asked and not all(seen["images"]) and console


@pytest.mark.slow
def test_it_is_dark_where_the_reader_is_and_legible_in_both(look, folder):
    made = page.build(folder)
    light, dark = look(made)[0], look(made, dark=True)[0]
    assert light["paper"] == "rgb(255, 255, 255)" and contrast(dark["paper"], "0 0 0") < 1.5
    for seen in (light, dark):
        assert all(contrast(seen["paper"], ink) >= 4.5 for ink in seen["ink"]), seen
    assert all(a != b for a, b in zip(light["ink"], dark["ink"], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "images"), [("page-digits", 3), ("page-line", 1)])
def test_pages_of_real_runs_are_whole_in_a_browser(look, runs, name, images):
    seen, console, asked = look(page.build(runs / name))
    assert console == [] and asked == ["/harness.html", "/report.html"]
    assert len(seen["images"]) == images and all(seen["images"])
    assert seen["scroll"] == 360 and seen["outside"] == []


def test_the_share_that_waited_for_photographs_is_a_chart_where_it_was_measured(tmp_path):
    fabricate(tmp_path / "run")
    curves = section(page.build(tmp_path / "run"), "Curves")
    assert "waited for photographs" not in curves and curves.count("<polyline") == 5
    metrics = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [row | {"data/wait": 0.25} if "lr" in row else row for row in rows]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = section(page.build(tmp_path / "run"), "Curves")
    assert "waited for photographs" in curves and curves.count("<polyline") == 6
    lines = set(re.findall(r'<polyline class="(\w+)"', curves))
    filled = re.findall(r"(?:^|, )\.(\w+)(?=[^{}\n]*\{[^}]*fill: var)", page.STYLE, flags=re.M)
    assert "data" in lines and "bar" in filled and not lines & set(filled)  # a line, no area
    assert "25 %" in curves
