"""After a run: predictions, pictures, trackers, the learning-rate finder. One launch for all."""

import csv
import io
import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from launches import REPOSITORY, SMALL, command, finish, rows, start, train, wait_for
from PIL import Image

import lr_finder
import page
from config import TrainConfig
from report import Report

CANARY = "canary0123456789abcdef0123456789abcdef012345"


@pytest.fixture(scope="module")
def run(nets):
    """A run with pictures and an offline wandb, by a user whose environment holds secrets."""
    arguments = ["--model", "full.py:Net", *SMALL, "--plots", "--epochs", "5", "--track", "wandb"]
    arguments += ["--lr", "0.01", "--limit", "1200"]
    secrets = {"WANDB_API_KEY": CANARY, "HF_TOKEN": CANARY, "WANDB_MODE": "offline"}
    done = train([*arguments, "--run-dir", "after"], nets, **secrets)
    assert done.status == 0 and "Traceback" not in done.out, done.out
    (nets / "after" / "out.txt").write_text(done.out)
    return nets / "after"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Forty real digits as PNG files named by their class, with one file that is no picture."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for index in range(40):
        pixels = (data.images[index] * 255 / 16).round().astype("uint8")
        Image.fromarray(pixels).save(folder / f"{data.target[index]}-{index:02}.png")
    return folder


def predict(*words, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "predict.py"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_pictures_are_predicted_with_the_accuracy_of_the_run_and_the_same_every_time(run, digits):
    first = predict(digits, "--run", run, "--json", cwd=run.parent)
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    right = sum(row["predictions"][0]["class"] == row["path"].split("/")[-1][0] for row in found)
    assert len(found) == 40 and right >= 30
    assert all(len(row["predictions"]) == 5 for row in found)
    again = predict(digits, "--run", run, "--json", cwd=run.parent)
    assert again.stdout == first.stdout
    one = predict(found[7]["path"], "--run", run, "--json", cwd=run.parent)
    assert json.loads(one.stdout) == [found[7]]


def test_what_is_no_picture_is_named_and_the_others_go_on(run, digits, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    good = next(digits.glob("*.png"))
    words = [tmp_path / "broken.png", tmp_path / "missing.png", good, "--run", run, "--csv"]
    done = predict(*words, cwd=run.parent)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "broken.png" in done.stderr and "missing.png" in done.stderr
    table = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["path"] for row in table] == [str(good)] * 5
    done = predict(good, "--run", tmp_path, cwd=run.parent)
    assert done.returncode == 2 and "no weights in it that can be read" in done.stderr
    assert predict(good, "--model", "alexnet", cwd=run.parent).returncode == 2


def test_imagenet_classes_are_told_by_name_from_a_weights_file(digits, tmp_path):
    from torchvision.models import alexnet

    torch.manual_seed(0)
    model = alexnet(weights=None)
    with torch.no_grad():  # weights under which everything is class 263
        model.classifier[6].weight.zero_()
        model.classifier[6].bias.copy_(torch.eye(1000)[263] * 9)
    torch.save(model.state_dict(), tmp_path / "alexnet.pth")
    picture = next(digits.glob("*.png"))
    words = [picture, "--model", "alexnet", "--weights", tmp_path / "alexnet.pth", "--json"]
    done = predict(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["predictions"][0]["class"] == "Pembroke"


def test_a_run_leaves_its_pictures(run):
    for name in ("curves", "confusion", "mistakes", "samples"):
        with Image.open(run / f"{name}.png") as picture:
            assert min(picture.size) > 150 and len(picture.convert("L").getcolors(256)) > 8


def test_a_run_leaves_its_page_and_names_it(run):
    made = (run / "report.html").read_text(encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text())
    told = f"<strong>{100 * summary['best/test/accuracy']:.2f} %</strong>"
    assert told in made and f"at epoch {summary['best/epoch']}, " in made
    assert "Not shown" not in made and "finished</b>" in made
    assert made.count("data:image/png") == 2  # mistakes and samples; the rest is drawn by the page
    assert re.search(r"page +after/report.html", (run / "out.txt").read_text())
    assert page.build(run) == made.replace("page.py after<", f"page.py {run}<")


def test_wandb_runs_offline_inside_the_folder_and_no_secret_is_written_anywhere(run):
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert json.loads((run / "tracking.json").read_text())["wandb"]
    files = [p for p in run.rglob("*") if p.is_file()]
    assert len(files) > 15
    assert [p for p in files if CANARY.encode() in p.read_bytes()] == []


def test_the_learning_rate_finder_suggests_the_steepest_fall(tmp_path, monkeypatch, capsys):
    rates = [10.0 ** (i / 10 - 5) for i in range(50)]
    losses = [2.3 if i < 20 else max(0.5, 2.3 - 0.1 * (i - 20) ** 1.5) for i in range(50)]
    suggestion = lr_finder.suggest(rates, losses)
    assert rates[20] < suggestion < rates[30]
    monkeypatch.chdir(tmp_path)
    settings = TrainConfig(model="nets/plain.py:Net")
    lr_finder.tell(Report(), settings, rates, losses, suggestion)
    assert (tmp_path / "runs" / "find-lr-plain.py-Net.png").stat().st_size > 5000
    assert f"--lr {suggestion:.2g}" in capsys.readouterr().out


def test_the_learning_rate_finder_makes_no_run_and_needs_no_picture(nets, tmp_path):
    (tmp_path / "runs").write_text("in the way")
    done = train(["--model", nets / "plain.py:Net", *SMALL, "--find-lr"], tmp_path, 2)
    assert done.status == 0 and done.out.count("suggested") == 1, done.out
    assert "runs/find-lr-plain.py-Net.png cannot be written" in " ".join(done.out.split())
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith("output-")} == {"runs"}


@pytest.mark.slow
def test_the_learning_rate_finder_can_be_stopped(nets, tmp_path):
    words = ["--model", str(nets / "full.py:Net"), *SMALL, "--batch-size", "1400", "--find-lr"]
    process, log = start(command(words), tmp_path)
    wait_for(lambda: "parameters" in log.read_text(), process, log)
    process.send_signal(signal.SIGTERM)
    done = finish(process, log, 60)
    assert done.status == 75 and "SIGTERM" in done.out, done.out


def test_linear_regression_learns_slope_and_intercept_and_draws_the_line(tmp_path):
    done = train(["--model", "linear_regression", "--run-dir", "line"], tmp_path)
    assert done.status == 0, done.out
    last = rows(tmp_path / "line")[-1]
    assert last["test/r2"] > 0.99 and 0.4 < last["test/loss"] < 1.0
    assert (tmp_path / "line" / "line.png").exists()
    slope = float(done.out.split("weight")[-1].split()[0])
    intercept = float(done.out.split("bias")[-1].split()[0])
    assert abs(slope - 2) < 0.1 and abs(intercept - 4) < 0.4  # the noise {0, 1, 2} has mean 1
