"""Runs beside each other: what is claimed of them, what is warned of, and that the page is safe."""

import base64
import hashlib
import io
import json
import re
import shutil
import statistics
import subprocess

import numpy
import pytest
from launches import python
from refusals import refused
from rich.console import Console
from safetensors.numpy import save_file
from scipy import stats

from data.__main__ import main as data
from report.__main__ import main as report
from report.compare import Comparison, build, found_in, group_rows, holm, read_runs, run_rows, table
from report.runs import list_runs
from report.suspects import FILE, confident, section

ACCURACY = {"key": "accuracy", "title": "accuracy", "format": ".2%", "higher_is_better": True}
LOSS = {"key": "loss", "title": "loss", "format": ".4f", "higher_is_better": False}


def made(folder, values, *, metric=ACCURACY, status="finished", environment=None, **settings):
    """A run folder whose evaluations gave these values, one an epoch."""
    folder.mkdir(parents=True)
    told = {"dataset": "digits", "lr": 0.1, "seed": 0, "fold": None, **settings}
    rows = [{"step": n, "epoch": n, f"test/{metric['key']}": value}
            for n, value in enumerate(values, 1)]  # fmt: skip
    shown = {"shown": ["line", "best", "chart"]}
    files = {
        "config": {"config": told, "origins": {}, "version": "1"},
        "status": {
            "status": status,
            "life": 0,
            "lives": [{"began": f"2026-01-0{1 + told['seed']}"}],
        },
        "summary": {"status": status, "life": 0, "seconds": 90.0},
        "environment": {"data": "d", "code": "c", **(environment or {})},
        "metrics": {"best_is": metric["key"], "metrics": [{**metric, **shown}]},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def many(tmp_path):
    """Two learning rates with four seeds each; the second is better by about 0.02."""
    noise = [0.001, -0.002, 0.003, 0.0]
    for seed, apart in enumerate(noise):
        made(tmp_path / f"a{seed}", [0.5, 0.90 + apart], seed=seed)
        made(tmp_path / f"b{seed}", [0.97, 0.92 + 2 * apart], seed=seed, lr=0.2)
    return tmp_path


def test_what_an_optimizer_does_not_take_is_no_setting_of_its_runs(tmp_path):
    for name, settings in {
        "a": {"optimizer": "adamw", "momentum": 0.9},
        "b": {"optimizer": "sgd", "momentum": 0.9},
        "c": {"optimizer": "sgd", "momentum": 0.0},
    }.items():
        made(tmp_path / name, [0.5], **settings)
    found = Comparison(read_runs([tmp_path]))
    assert found.differing == ["optimizer", "momentum"]
    head, rows = run_rows(found)
    assert head[:3] == ["run", "optimizer", "#momentum"]
    assert sorted(row[:3] for row in rows) == [
        ["a", "adamw", ""], ["b", "sgd", "0.9"], ["c", "sgd", "0.0"],
    ]  # fmt: skip
    assert {group.label for group in found.groups} == {
        "optimizer adamw", "optimizer sgd, momentum 0.9", "optimizer sgd, momentum 0.0",
    }  # fmt: skip


def test_only_settings_that_differ_are_shown_and_the_best_stands_first(many):
    found = Comparison(read_runs([many]))
    assert found.differing == ["lr", "seed"] and found.warnings == []
    head, rows = run_rows(found)
    assert head == [
        "run",
        "#lr",
        "#seed",
        "#best accuracy",
        "#at epoch",
        "#last",
        "#seconds",
        "status",
    ]
    assert rows[0][1] == "0.2" and rows[0][3:5] == ["97.00 %", "1"] and rows[-1][1] == "0.1"
    losses = [made(many / "x" / name, values, metric=LOSS, lr=lr)
              for name, values, lr in (("p", [0.9, 0.2], 1), ("q", [0.4, 0.5], 2))]  # fmt: skip
    assert [run.name for run in Comparison(read_runs(losses)).runs] == ["p", "q"]


def test_mean_deviation_interval_and_paired_test_are_those_of_the_books(many):
    found = Comparison(read_runs([many]))
    first, second = found.groups
    assert (first.label, second.label) == ("lr 0.2", "lr 0.1")
    ours, theirs = ([group.values[seed, None] for seed in range(4)] for group in found.groups)
    # Of the last epoch: the best one was chosen on the test images, and would be too good.
    assert ours == [0.922, 0.916, 0.926, 0.92] and "last epoch" in found.counts
    assert first.mean == pytest.approx(statistics.mean(ours))
    assert first.deviation == pytest.approx(numpy.std(ours, ddof=1))
    low, high = stats.t.interval(0.95, 3, numpy.mean(ours), stats.sem(ours))
    assert first.interval == pytest.approx((low, high))
    p = stats.ttest_rel(ours, theirs).pvalue
    assert found.tested() == {"lr 0.1": f"p = {p:.2g} over 4 pairs: differs"} and p < 0.05


def test_nothing_is_claimed_of_few_seeds_nor_of_runs_that_did_not_end(many):
    for name in ("a2", "a3"):
        shutil.rmtree(many / name)
    assert (
        "no claim: 2 shared seeds, 3 are needed" in Comparison(read_runs([many])).tested().values()
    )
    made(many / "a2", [0.5, 0.903], seed=2, status="stopped")
    found = Comparison(read_runs([many]))
    assert "no claim" in found.tested()["lr 0.1"] and "not finished" in " ".join(found.warnings)
    alone = Comparison(read_runs([many / "a0"]))
    assert not alone.repeats and alone.tested() == {} and alone.groups[0].interval is None
    assert group_rows(alone)[1][0][3:] == ["", ""]


def test_the_same_run_twice_counts_once_the_first_that_was_named_and_is_told(many):
    made(many / "c0", [0.5, 0.99], seed=0, decode_threads=3)
    found = Comparison(read_runs(sorted(many.iterdir())))
    assert found.groups[1].values[0, None] == 0.901 and len(found.groups) == 2
    assert "c0" in (told := " ".join(found.warnings)) and "not counted over seeds" in told


def test_several_tests_cost_each_of_them():
    raised = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert raised == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_other_data_and_other_code_are_warned_of_but_folds_are_no_other_data(tmp_path):
    made(tmp_path / "a", [0.5], environment={"code": "other", "packages": {"torch": "1"}})
    made(tmp_path / "b", [0.6], environment={"data": "other", "packages": {"torch": "2"}})
    words = " ".join(Comparison(read_runs([tmp_path])).warnings)
    assert "not the same data" in words and "not the same code" in words and "torch: 1, 2" in words
    for k in (1, 2):
        made(tmp_path / "f" / str(k), [0.5], fold=f"{k}/2", environment={"data": f"fold {k}"})
    assert Comparison(read_runs([tmp_path / "f"])).warnings == []
    made(tmp_path / "c", [0.6], metric=LOSS)
    assert "not the same metric" in Comparison(read_runs([tmp_path])).warnings[0]


def test_folds_and_the_datas_own_split_are_no_repeats_of_each_other(tmp_path):
    """A hashed fifth is the first of five folds: counted twice, it would make the rest surer."""
    for n in range(3):
        made(tmp_path / f"f{n}", [0.5 + n / 100], fold=f"{n + 1}/3")
    made(tmp_path / "own", [0.5])
    groups = Comparison(read_runs([tmp_path])).groups
    labels = {group.label: len(group.values) for group in groups}
    assert labels == {"folds": 3, "the data's own split": 1}


def test_a_folder_of_many_in_the_list_has_its_best(many):
    rows = [{"name": f"{name}0", "values": {}} for name in "ab"]
    (many / "sweep.json").write_text(json.dumps({"base": [], "rows": rows}))
    (row,) = list_runs(many.parent)
    assert row[:3] == [f"{many.name}/", "2 of 2 runs finished", "97.00 % accuracy (b0)"]


def test_a_folder_of_many_is_read_in_its_order_and_what_is_none_is_told(many):
    rows = [{"row": n, "name": name} for n, name in enumerate(["b1", "a0", "gone"])]
    (many / "sweep.json").write_text(json.dumps({"rows": rows}))
    assert [path.name for path in found_in([many])] == ["b1", "a0"]
    assert [path.name for path in found_in([many / "a1", many, many / "a0"])] == ["a1", "b1", "a0"]
    (many / "latest").symlink_to("a0")
    every = sorted(many.iterdir())  # as a shell expands runs/*: files too, and one run twice
    assert [path.name for path in found_in(every)] == [x + str(n) for x in "ab" for n in range(4)]
    assert [path.name for path in found_in([many / "latest"])] == ["latest"]
    with refused("no-run", match="nowhere"):
        found_in([many / "a0", many / "nowhere"])
    (many / "c0").mkdir()  # a run that is only starting
    told: list[str] = []
    assert [path.name for path in found_in([many / "a0", many / "c0"], told.append)] == ["a0"]
    assert len(told) == 1 and "c0 is left out" in told[0]
    with refused("no-run", match="c0"):
        found_in([many / "c0"])


def test_the_page_asks_no_network_runs_its_own_script_alone_and_believes_no_name(many):
    made(many / "e", [0.3], lr=0.3, augment="<script>alert(1)</script>")
    (many / "e" / "report.html").write_text("x")
    page = build(Comparison(read_runs([many])), "a<b", many)
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "<h1>a&lt;b</h1>" in page
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1 and f"script-src 'sha256-{digest}'" in page
    assert not re.search(r'(src|href)="(https?:)?//', page) and 'href="e/report.html"' in page
    assert page == build(Comparison(read_runs([many])), "a<b", many)


def test_names_of_runs_are_whole_in_a_terminal_of_100_columns(many):
    """They are what is typed next; numbers and heads may go over two lines."""
    shutil.rmtree(many)
    for n in range(3):
        settings = {"lr": 0.001 * (n + 1), "weight_decay": 0.05 * n, "label_smoothing": 0.1 * n}
        name = f"00{n}-lr{settings['lr']}-weight_decay{settings['weight_decay']}"
        made(
            many / name, [0.5, 0.6], **settings, batch_size=64 << n, augment=["crop", "none"][n % 2]
        )
    done = python("-m", "report", "compare", many, COLUMNS="100")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    for path in (path for path in many.iterdir() if path.is_dir()):
        assert f" {path.name} " in done.stdout, done.stdout


def test_values_are_whole_too_where_a_name_that_is_broken_leaves_room_for_them():
    """As in the tables of lesson 10: `finis hed` and `97.18` without its `%` are hard to read."""
    head = ["run", "loss", "#label smoothing", "#best accuracy", "#at epoch", "#last", "#seconds"]
    names = [f"00{n}-losscross_entropy-label_smoothing0.{n}" for n in range(3)]
    rows = [[name, "cross_entropy", "0.1", "97.18 %", "4", "96.62 %", "3", "finished"]
            for name in names]  # fmt: skip
    for width in (100, 130):
        screen = Console(width=width, file=io.StringIO())
        screen.print(table([*head, "status"], rows, width=width))
        shown = screen.file.getvalue()
        assert max(map(len, shown.splitlines())) <= width
        for value in (*rows[0][1:], "smoothing"):
            assert f" {value} " in shown, shown
        assert (f" {names[0]} " in shown) == (width == 130), shown


def test_a_curve_has_its_groups_colour_whatever_its_run_is_called(many):
    """One that has not finished is in no group; its name may be that of a colour, or of a ring."""
    made(many / "best", [0.3], lr=0.7, status="running")
    made(many / "c1x", [0.4], lr=0.8, status="stopped")
    page = build(Comparison(read_runs([many])), "many", many)
    lines = re.findall(r'<polyline class="(.*?)"', page)
    assert sorted(set(lines)) == ["c0", "c1", "train"] and lines.count("train") == 2
    assert '<span class="key train">others</span>' in page


def test_the_command_shows_tables_and_lists_runs(many):
    done = python("-m", "report", "compare", many, COLUMNS="150")
    assert done.returncode == 0, done.stderr
    assert "97.00 %" in done.stdout and "paired t test" in done.stdout
    assert (many / "compare.html").read_text().count("<polyline") == 8
    made(many / "b9", [0.9], seed=8, status="running")
    done = python("-m", "report", many, COLUMNS="150")
    lines = [line for line in done.stdout.splitlines() if "2026-" in line]
    assert done.returncode == 0 and "b9" in lines[0] and "died without a word" in lines[0]
    assert "90.00 % accuracy" in lines[0] and len(lines) == 9
    assert [row[0] for row in list_runs(many)][-2:] in (["a0", "b0"], ["b0", "a0"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("list a0", "a0 holds no run"),
        ("list gone", "there is no folder gone"),
        ("gone", "gone: no folder, and no command of page, doctor"),
        ("compare a0 gone", "gone holds no run"),
    ],
)
def test_what_is_not_there_is_one_sentence(many, words, says, monkeypatch, capsys):
    monkeypatch.chdir(many)
    assert report(words.split()) == 2
    told = capsys.readouterr()
    assert told.err.startswith(says) and told.err.count("\n") == 1 and not told.out


def test_a_browser_sorts_the_table_and_nothing_overflows(many, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("needs a browser: apt-get install -y chromium")
    page = build(Comparison(read_runs([many])), "many", many)
    probe = """<script>
      const table = [...document.querySelectorAll("table.sorted")].pop();
      const names = () => [...table.tBodies[0].rows].map((row) => row.cells[1].textContent);
      const before = names(); table.tHead.rows[0].cells[1].click();
      const after = names(); table.tHead.rows[0].cells[1].click();
      document.title = JSON.stringify([before, after, names(),
        document.documentElement.scrollWidth <= innerWidth]);
    </script>"""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    (tmp_path / "probe.html").write_text(page.replace("</body>", probe + "</body>"))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,900",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path}/probe.html"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.search("<title>(.*?)</title>", done.stdout, flags=re.S)[1]
    before, up, down, fits = json.loads(title.replace("&quot;", '"'))
    assert before == ["0.2"] * 4 + ["0.1"] * 4
    assert up == ["0.1"] * 4 + ["0.2"] * 4 and down == ["0.2"] * 4 + ["0.1"] * 4 and fits


# --- suspects ------------------------------------------------------------------------------------


def test_planted_wrong_labels_are_found_and_hardly_any_others():
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    digits = load_digits()
    images, true = digits.data[:900] / 16, digits.target[:900]
    random = numpy.random.default_rng(0)
    planted = random.choice(len(true), 45, replace=False)
    labels = true.copy()
    labels[planted] = (true[planted] + random.integers(1, 10, len(planted))) % 10
    model = LogisticRegression(max_iter=200)
    table = cross_val_predict(model, images, labels, cv=5, method="predict_proba")
    places, suggested, scores = confident(table, labels)
    found = set(places.tolist())
    assert len(found & set(planted.tolist())) >= 26 and len(found) <= 40
    assert len(set(places[:20].tolist()) & set(planted.tolist())) >= 19  # the surest first
    assert (suggested[:20] == true[places[:20]]).mean() > 0.9
    assert (numpy.diff(scores) >= 0).all() and scores.min() >= 0 and scores.max() <= 1


def test_confident_learning_is_as_it_is_defined():
    """By hand: thresholds are 0.7 and 0.5; the third counts for class 1 and is labelled 0."""
    table = numpy.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.45, 0.55], [0.55, 0.45]])
    places, suggested, scores = confident(table, numpy.array([0, 0, 0, 1, 1]))
    assert places.tolist() == [2] and suggested.tolist() == [1]
    assert scores == pytest.approx([(0.4 - 0.6 + 1) / 2])


def test_answers_of_a_fold_that_are_damaged_cost_their_section_not_the_page(tmp_path):
    run = made(tmp_path / "a", [0.5], fold="1/2")
    assert section(tmp_path, [run]) is None
    (run / FILE).write_bytes(b"half a file")
    told = section(tmp_path, [run])
    assert told is not None and "cannot be read" in told[1]


def test_folds_of_several_data_sets_are_not_mixed(tmp_path):
    """Pictures without names are called alike in each: train/5."""
    runs = [made(tmp_path / name, [0.5], fold="1/2", dataset=name) for name in ("a", "b")]
    for run in runs:
        (run / FILE).write_bytes(b"")
    told = section(tmp_path, runs)
    assert told is not None and "several data sets" in told[1]


# --- a corrected folder --------------------------------------------------------------------------


@pytest.fixture
def pets(tmp_path):
    """Six pictures in two classes, and what is suspected of them."""
    for number, name in enumerate(("cat", "cat", "cat", "dog", "dog", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / name / f"{number % 3}.png").write_text(f"{name} {number % 3}")
    rows = ["name,given,suggested,score", "cat/1.png,cat,dog,0.1", "dog/2.png,dog,cat,0.2"]
    (tmp_path / "suspects.csv").write_text("\n".join([*rows, "dog/0.png,dog,,0.3"]) + "\n")
    return tmp_path


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_a_corrected_folder_has_the_labels_of_the_list_and_the_old_one_stays(pets, capsys):
    before = contents(pets / "pets")
    words = ["correct", str(pets / "suspects.csv"), "--dataset", str(pets / "pets"), "--out"]
    assert data([*words, str(pets / "all")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "5 files" in told and "2 in another class, 1 left out" in told
    assert contents(pets / "all") == {
        "cat/0.png": "cat 0",
        "cat/2.png": "cat 2",
        "dog/cat-1.png": "cat 1",  # dog/1.png is another picture
        "cat/dog-2.png": "dog 2",
        "dog/1.png": "dog 1",
    }
    assert data([*words, str(pets / "one"), "--rows", "2"]) == 0
    assert contents(pets / "one").keys() ^ before.keys() == {"dog/2.png", "cat/dog-2.png"}
    assert data([*words, str(pets / "two"), "--rows", "2=, 3=cat"]) == 0
    assert contents(pets / "two").keys() ^ before.keys() == {
        "dog/2.png", "dog/0.png", "cat/dog-0.png"
    }  # fmt: skip
    assert contents(pets / "pets") == before


@pytest.mark.parametrize(
    ("row", "more", "says"),
    [
        ("cat/9.png,cat,dog", "", "cat/9.png is not in"),
        ("cat/1.png,cat,dgo", "", r"no class dgo \(did you mean dog\?\)"),
        ("cat/1.png,dog,cat", "", "does not lie in a folder dog"),
        ("../pets/cat/1.png,cat,dog", "", "does not lie in a folder cat"),
        ("cat/1.png,cat,dog\ncat/1.png,cat,dog", "", "stands there twice"),
        ("cat/1.png,cat,dog", "--rows 0", "write numbers from 1"),
        ("cat/1.png,cat,dog", "--rows 2", "has 1 row, not 2"),
        ("cat/1.png,cat,dog", "--out pets", "is there already"),
        ("cat/1.png,cat,dog", "--out pets/cat/new", "lies in --dataset"),
        ("cat/1.png,cat,dog", "--dataset none", "name a folder"),
        ("", "", "has no column|has 0 rows"),
    ],
)
def test_a_list_that_does_not_fit_changes_nothing(pets, row, more, says, monkeypatch, capsys):
    monkeypatch.chdir(pets)
    before = contents(pets)
    (pets / "l.csv").write_text(f"name,given,suggested\n{row}\n" if row else "")
    assert data(["correct", "l.csv", "--dataset", "pets", "--out", "new", *more.split()]) == 2
    assert re.search(says, capsys.readouterr().err)
    assert contents(pets).items() - before.items() == {("l.csv", (pets / "l.csv").read_text())}
    assert not (pets / "new").exists()


def test_the_page_says_how_far_the_models_of_its_suspects_are_to_be_believed(tmp_path):
    """Weak models suspect what they do not know: their number is no number of wrong labels."""
    runs = [made(tmp_path / f"{n}", [0.5], fold=f"{n}/2", dataset=str(tmp_path)) for n in (1, 2)]
    for number, run in enumerate(runs, 1):
        names = [f"a/{number}{place}.png" for place in range(4)]
        (run / "split.csv").write_text(
            "name,split,class\n" + "".join(f"{name},test,a\n" for name in names)
        )
        (run / "classes.json").write_text(json.dumps({"classes": ["a", "b"]}))
        table = numpy.array([[0.9, 0.1], [0.8, 0.2], [0.9, 0.1], [0.1, 0.9]], numpy.float32)
        save_file({"probabilities": table, "labels": numpy.array([0, 1, 0, 0])}, run / FILE)
    title, told = section(tmp_path, runs)
    text = " ".join(told.split())
    assert title == "Labels to look at" and "4 pictures of 8 may be labelled wrongly" in text
    assert "answer as labelled for 50.00 %" in text
    assert f"python -m data correct {tmp_path}/suspects.csv --rows 3,12-15,7=CLASS" in text
