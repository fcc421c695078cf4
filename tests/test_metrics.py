"""A metric is declared once, by its task, and everything that shows or weighs one follows."""

import ast
import io
import json
import re

import pytest
from launches import REPOSITORY, SMALL, Command, finish, rows, start, train
from rich.console import Console

from common.metric import LOSS, Metric
from config import HINTS
from report import page
from report import pictures as plots
from report.screen import Report
from tasks import TASKS, Classification, Task

# A task as someone would add it: one metric more, which decides. Nothing else is touched.
INVENTED = """
import runpy
import sys

sys.path[0] = {tree!r}
import tasks
from common.metric import Metric


class Invented(tasks.Classification):
    metrics = (
        *tasks.Classification.metrics,
        Metric(
            key="distance", title="mean distance", format=".3f", shown=("line", "best", "chart")
        ),
    )
    best_is = "distance"

    def results(self, counts):
        found, total = super().results(counts), 0
        for true, row in enumerate(found["confusion"]):
            total += sum(n * abs(true - answer) for answer, n in enumerate(row))
        return found | {{"distance": total / found["images"]}}


tasks.TASKS["classification"] = Invented
runpy.run_path({tree!r} + "/train.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("loss", "words"),
    [(0.05154, "0.0515"), (999.9, "999.9000"), (4052.6129, "4,053"), (-7637.8, "-7,638"),
     (1048576.0, "1,048,576"), (2.2139e28, "2.214e+28")],
)  # fmt: skip
def test_a_loss_that_exploded_has_no_more_digits_than_one_that_did_not(loss, words):
    assert LOSS.show(loss) == words
    screen = Report(console=Console(file=io.StringIO()))
    row = {"train/loss": loss, "lr": 0.1, "speed/images_per_second": 9.0, "step": 1}
    screen.train_line(row, 2, 0)
    assert f"loss {words}  lr" in screen.console.file.getvalue()
    assert Metric(key="x", title="x", format=".2%").show(12.0) == "1200.00 %"


def test_an_invented_metric_is_shown_written_drawn_and_decides(nets, monkeypatch):
    (nets / "invented.py").write_text(INVENTED.format(tree=str(REPOSITORY)))
    flags = ["--model", "plain.py:Net", *SMALL, "--epochs", "3", "--run-dir", "invented"]
    done = finish(*start(Command([nets / "invented.py", *flags]), nets))
    assert done.status == 0, done.out
    run = nets / "invented"
    values = [row["test/distance"] for row in rows(run) if "test/distance" in row]
    best, last = f"{min(values):.3f}", f"{values[-1]:.3f}"
    assert len(values) == 3
    assert re.search(
        rf"epoch 3/3  train loss .*  test loss .*  mean distance {last}  best {best}", done.out
    )
    assert re.search(rf"last +{last} mean distance on 355 test images", done.out)
    assert re.search(rf"best +{best} at epoch {values.index(min(values)) + 1} ", done.out)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best/test/distance"] == min(values)
    made = page.build(run)
    assert f"<strong>{best}</strong>" in made and "mean distance on 355 test images" in made
    assert 'aria-label="mean distance over the steps' in made
    assert f"last mean distance</dt><dd>{last}" in made
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    plots.curves(rows(run), page.Files(run).metrics, run / "curves.png")
    titles = [axes.get_title() for axes in drawn[0].axes]
    usual = [metric.title for metric in Classification.metrics if metric.has("chart")]
    assert titles == [*usual, "mean distance", "learning rate"]


@pytest.mark.slow
def test_pictures_are_the_same_on_any_number_of_processes_and_of_the_best_weights(nets):
    """On three, evaluation batches are dealt out; no process asks the model once more."""
    flags = ["--model", "full.py:Net", "--dataset", "digits", "--image-size", "16"]
    flags += ["--limit", "400"]
    flags += ["--batch-size", "60", "--shards", "6", "--epochs", "2", "--threads", "1", "--bitwise"]
    names = ("mistakes.png", "samples.png", "confusion.png", "confusion.json")
    made = []
    for processes in (1, 2, 3):
        done = train([*flags, "--run-dir", f"pictures-{processes}"], nets, processes)
        assert done.status == 0 and "could be drawn" not in done.out, done.out
        made.append([(nets / f"pictures-{processes}" / name).read_bytes() for name in names])
    assert made[0] == made[1] == made[2]


def test_each_task_declares_a_loss_and_what_decides():
    for task in TASKS.values():
        assert issubclass(task, Task)
        keys = [metric.key for metric in task.metrics]
        assert "loss" in keys and task.best_is in keys and len(set(keys)) == len(keys)


# Words about something else: the tables of the classes, and what stands below one; help.
SPOKEN = {
    "config/fields.py": {HINTS["select"].metadata["help"]},
    "report/screen.py": {"accuracy"},
    "report/page.py": {"#accuracy"},
}


def literals(tree: ast.Module) -> set[str]:
    """All texts of a source file but docstrings."""
    told = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    texts = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and n not in told)
    return {n.value for n in texts if isinstance(n.value, str)}


ROOMS = (
    "train.py", "predict.py", "config", "training", "report", "distributed", "data", "export",
    "many", "optim", "bench/verify.py",
)  # fmt: skip


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_knows_a_metric_by_name(room):
    keys = {metric.key for task in TASKS.values() for metric in task.metrics} - {"loss"}
    names = re.compile(rf"\b({'|'.join(keys)}|top-5|mae|best_is ==)\b", re.IGNORECASE)
    place = REPOSITORY / room
    for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
        name = path.relative_to(REPOSITORY).as_posix()
        for text in literals(ast.parse(path.read_text(encoding="utf-8"))):
            spoken = text in SPOKEN.get(name, ()) or text.startswith("Accuracy: how many images")
            assert spoken or not names.search(text), f"{name}: {text!r}"
