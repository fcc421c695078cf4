"""After a run: predictions, pictures, trackers, the learning-rate finder. One launch for all."""

import contextlib
import csv
import io
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launches import (
    REPOSITORY,
    SMALL,
    Command,
    command,
    environment,
    finish,
    interpreter,
    python,
    rows,
    start,
    train,
    wait_for,
)
from PIL import Image
from refusals import refused
from torch import nn

from config import TrainConfig, parse
from data.sources import load_source
from models import build_model
from predict import main as predict_main
from predict import predict as predict_picture
from predict import prepare
from report import page, panels
from report.answers import Answer, Kept
from report.screen import Report
from training import lr_finder
from training.data import build_data
from training.start import weights_card

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
    return python(REPOSITORY / "predict.py", *words, cwd=cwd)


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
    named = predict(found[7]["path"], "--run", run / "model.safetensors", "--json", cwd=run.parent)
    assert named.stdout == one.stdout


def test_what_is_no_picture_is_named_and_the_others_go_on(run, digits, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    wide = Image.new("1", (30_000, 4_000))  # 120 million pixels in 15 kB
    wide.save(tmp_path / "bomb.png")
    good = sorted(digits.glob("*.png"))[0]
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:-30])
    bad = [
        tmp_path / name for name in ("broken.png", "missing.png", "bomb.png", "cut.png", "empty")
    ]
    done = predict(*bad, good, "--run", run, "--csv", cwd=run.parent)
    assert done.returncode == 1
    told = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in told] == list(map(str, bad)), told
    assert "120 million" in told[2] or "30000 x 4000 pixels" in told[2]
    assert "a folder without pictures" in told[4]
    table = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["path"] for row in table] == [str(good)] * 5
    empty = predict(tmp_path / "empty", "--run", run, "--json", cwd=run.parent)
    assert empty.returncode == 1 and json.loads(empty.stdout) == []


def test_a_pattern_that_no_shell_knew_is_the_files_that_fit_and_a_closed_folder_is_named(
    run, digits, tmp_path, monkeypatch, capsys
):
    good = sorted(digits.glob("*.png"))[:2]
    (tmp_path / "x[1].png").write_bytes(good[0].read_bytes())
    (tmp_path / "closed").mkdir()
    words = [tmp_path / "x[1].png", good[0].parent / "*.png", tmp_path / "none*.png", tmp_path]
    real = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: "closed" not in str(p) and real(p, mode))
    assert predict_main([*map(str, words), "--run", str(run), "--csv", "--top", "1"]) == 1
    told = capsys.readouterr()
    named = [line.partition(":")[0] for line in told.err.splitlines()]
    assert named[1:] == [str(tmp_path / "none*.png"), str(tmp_path / "closed")]
    paths = [row["path"] for row in csv.DictReader(io.StringIO(told.out))]
    assert paths[1:-1] == list(map(str, sorted(digits.glob("*.png"))))
    assert paths[0] == paths[-1] == str(tmp_path / "x[1].png")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with the weights of ten classes, and of hardly anything."""
    folder = tmp_path_factory.mktemp("weights")
    state = build_model("resnet18", num_classes=10, image_size=32).state_dict()
    torch.save(state, folder / "ten.pth")
    torch.save({"fc.bias": torch.zeros(5)}, folder / "five.pth")
    return folder


def answers(run, *words) -> list[dict]:
    """What a file of answers holds after predict.py, called in this process."""
    out = Path(next(word for word in words if str(word).endswith(".jsonl")))
    assert predict_main([*map(str, words), "--run", str(run)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_all_classes_with_their_numbers_and_the_same_in_batches(run, digits, tmp_path):
    alone = answers(run, digits, "--all", "--out", tmp_path / "a.jsonl")
    names = json.loads((run / "classes.json").read_text())["classes"]
    for row in alone:
        assert sorted(p["index"] for p in row["predictions"]) == list(range(10))
        assert all(p["class"] == names[p["index"]] for p in row["predictions"])
        assert abs(sum(p["confidence"] for p in row["predictions"]) - 1) < 1e-5
    whole = [{p["index"]: p["confidence"] for p in row["predictions"]} for row in alone]
    for size in (7, 64):
        words = ("--all", "--batch-size", size, "--out", tmp_path / f"{size}.jsonl")
        for row, found in zip(answers(run, digits, *words), whole, strict=True):
            near = [abs(found[p["index"]] - p["confidence"]) for p in row["predictions"]]
            assert max(near) < 1e-5
    some = sorted(digits.glob("*.png"))[5:9]
    few = answers(run, *some, "--all", "--out", tmp_path / "few.jsonl")
    assert few == alone[5:9]  # the same bits, whatever else is with them


def test_views_are_those_of_the_evaluation(tmp_path):
    from data.augment import Augment
    from predict import ask

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    told = {"image_size": 8, "mean": [0.5] * 3, "std": [0.2] * 3, "classes": "abc"}
    one = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8)
    for no_flip in (False, True):
        for tta in (0, 1, 2):
            augment = Augment("none", 8, (0.5,) * 3, (0.2,) * 3, 0, tta=tta, no_flip=no_flip)
            with torch.no_grad():
                votes = augment.vote(model, augment.evaluate(one)).softmax(1)[0]
            ((*found,),) = ask(model, told | {"no_flip": no_flip}, [one], 3, tta)
            assert {a.index: a.confidence for a in found} == dict(enumerate(votes.tolist()))
            assert isinstance(found[0], Answer) and found[0].name == "abc"[found[0].index]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_answers_in_a_file_go_on_after_any_cut_without_a_picture_twice(
    run, digits, tmp_path, monkeypatch, form
):
    import predict as module

    asked, real = [], module.ask
    monkeypatch.setattr(module, "ask", lambda *words: asked.append(len(words[2])) or real(*words))
    folder = tmp_path / "odd"
    folder.mkdir()
    for number, path in enumerate(sorted(digits.glob("*.png"))[:6]):
        name = ['a "quoted", one', "two\nlines", "é", "\udcff", "plain", "z"][number]
        (folder / f"{name}.png").write_bytes(path.read_bytes())
    out = tmp_path / f"found.{form}"
    words = [str(folder), "--run", str(run), "--out", str(out), "--top", "3"]
    assert predict_main(words) == 0
    whole = out.read_bytes()
    assert sum(asked) == 6 and whole.count(b"plain") == (3 if form == "csv" else 1)
    for end in range(0, len(whole), 37 if form == "csv" else 61):
        out.write_bytes(whole[:end])
        asked.clear()
        assert predict_main(words) == 0
        assert out.read_bytes() == whole, end
        kept = 6 - sum(asked)
        assert kept >= whole[:end].count(b"\n") // 4 - 1 and (end or not kept)
    asked.clear()
    assert predict_main(words) == 0 and asked == [] and out.read_bytes() == whole


@pytest.mark.parametrize("word", ["--flip", "--no-flip"])
def test_weights_say_whether_what_is_mirrored_is_another_thing(word):
    """A run that was told --no-flip evaluates no mirror images: no more does predict --tta 1."""
    settings = parse(["--model", "my_cnn", "--dataset", "synthetic", "--tta", "1", word])
    data = build_data(settings, load_source("synthetic"), torch.device("cpu"), 1, 0)
    plan = SimpleNamespace(config=settings.config)
    assert bool(weights_card(plan, data).get("no_flip")) == data.augment.no_flip  # as predict reads


def test_answers_of_other_weights_do_not_get_into_a_file(run, digits, tmp_path, capsys):
    words = [str(digits), "--out", str(tmp_path / "x.csv"), "--run"]
    assert predict_main([*words, str(run)]) == 0
    whole = (tmp_path / "x.csv").read_bytes()
    capsys.readouterr()
    others = (["last.safetensors"], ["model.safetensors", "--top", "2"], ["", "--tta", "1"])
    for name, *more in others:
        assert predict_main([*words, str(run / name), *more]) == 2
        assert "not made by these weights" in capsys.readouterr().err
    lines = tmp_path / "x.jsonl"
    assert predict_main([str(digits), "--run", str(run), "--out", str(lines)]) == 0
    lines.write_text('{"a": 1}\n')
    capsys.readouterr()
    for out, said in ((lines, "no answers"), (lines / "x.csv", "cannot be written")):
        assert predict_main([str(digits), "--run", str(run), "--out", str(out)]) == 2
        assert f"--out {out}: " in (told := capsys.readouterr().err) and said in told
    assert lines.read_text() == '{"a": 1}\n'
    (tmp_path / "y.csv").write_text("mine\n")
    assert predict_main([str(digits), "--out", str(tmp_path / "y.csv"), "--run", str(run)]) == 2
    assert (tmp_path / "y.csv").read_text() == "mine\n"
    assert (tmp_path / "x.csv").read_bytes() == whole


def test_a_folder_is_streamed_with_few_pictures_in_memory(run, digits, tmp_path, monkeypatch):
    import predict as module

    held, most, real = [0], [0], module.prepare

    def counted(path, told):
        held[0] += 1
        most[0] = max(most[0], held[0])
        return real(path, told)

    def asked(model, told, prepared, *words):
        held[0] -= len(prepared)
        return ask(model, told, prepared, *words)

    ask = module.ask
    monkeypatch.setattr(module, "prepare", counted)
    monkeypatch.setattr(module, "ask", asked)
    monkeypatch.setattr(module, "cpus", lambda: 2)
    for number in range(10):
        (tmp_path / str(number)).mkdir()
        for path in digits.glob("*.png"):
            (tmp_path / str(number) / path.name).symlink_to(path)
    found = answers(run, tmp_path, "--out", tmp_path / "x.jsonl")
    assert len(found) == 400 and most[0] <= 1 + 2 + 2
    names = [row["path"] for row in found]
    assert names == sorted(names, key=lambda name: Path(name).parts)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a pipe that has a name")
def test_a_killed_prediction_goes_on(run, digits, tmp_path):
    first, second = sorted(digits.glob("*.png"))[:2]
    os.mkfifo(tmp_path / "slow.png")
    out = tmp_path / "found.jsonl"
    words = [REPOSITORY / "predict.py", first, tmp_path / "slow.png", "--run", run, "--out", out]
    process, log = start(Command(words), tmp_path)
    wait_for(lambda: out.exists() and out.read_bytes().endswith(b"\n"), process, log)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    (tmp_path / "slow.png").unlink()
    (tmp_path / "slow.png").write_bytes(second.read_bytes())
    before = out.read_bytes()
    done = finish(*start(Command(words), tmp_path))
    assert done.status == 0 and "2 of 2 pictures, 1 of them from before" in done.out, done.out
    assert out.read_bytes().startswith(before) and out.read_bytes().count(b"\n") == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a pipe that has a name")
@pytest.mark.parametrize("form", ["--csv", "--json", "--top=1"])
def test_what_was_predicted_before_an_interrupt_is_kept(run, digits, tmp_path, form):
    first, second, third = sorted(digits.glob("*.png"))[:3]
    os.mkfifo(tmp_path / "slow.png")  # the second picture takes until its bytes come
    words = [REPOSITORY / "predict.py", first, tmp_path / "slow.png", third, "--run", run, form]
    process, log = start(Command(words), tmp_path)
    with (tmp_path / "slow.png").open("wb") as file:  # opens when it is that picture's turn
        if form != "--top=1":  # written as they come; a table, at the end
            wait_for(lambda: str(first) in log.read_text(), process, log)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        with contextlib.suppress(BrokenPipeError):  # an interrupt before the first answer
            file.write(second.read_bytes())
            file.flush()
    done = finish(process, log, 60)
    count = "[12]" if form == "--top=1" else "2"
    assert done.status == 130, done.out
    assert re.search(f"stopped by SIGINT: {count} of 3 pictures", done.out), done.out
    out, _, _ = done.out.partition("stopped by")
    assert str(third) not in out
    if form == "--json":
        found = [row["path"] for row in json.loads(out[out.index("[") :])]
        assert found == [str(first), str(tmp_path / "slow.png")]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a pipe that has a name")
def test_a_picture_that_never_comes_keeps_no_prediction_from_ending(run, digits, tmp_path):
    first = sorted(digits.glob("*.png"))[0]
    os.mkfifo(tmp_path / "never.png")
    words = [REPOSITORY / "predict.py", first, tmp_path / "never.png", "--run", run, "--csv"]
    process, log = start(Command(words), tmp_path)
    wait_for(lambda: str(first) in log.read_text(), process, log)
    process.send_signal(signal.SIGTERM)
    done = finish(process, log, 60)
    assert done.status == 128 + signal.SIGTERM, done.out
    assert "stopped by SIGTERM: 1 of 2 pictures" in done.out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
def test_answers_that_cannot_be_written_are_a_sentence(run, digits, tmp_path):
    words = [str(REPOSITORY / "predict.py"), str(digits), "--run", str(run), "--csv"]
    process = interpreter().start(
        words, tmp_path, Path("/dev/full"), environment=environment(), errors=tmp_path / "errors"
    )
    done = finish(process, tmp_path / "errors")
    assert done.status == 1 and "stdout cannot be written (No space left on device)" in done.out
    where, told = done.out.splitlines()  # the run's copy is executed, which stands in no answer
    assert "executed from" in where and "of 40 pictures" in told, done.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--run nowhere", "--run nowhere: there is no such folder"),
        ("--run .", "--run .: there are no weights in it that can be read"),
        ("--run . --model alexnet --weights imagenet", "--run brings its own model"),
        ("--model alexnet", "--model and --weights go together"),
        ("--model alexnt --weights imagenet", "did you mean alexnet?"),
        ("--model my_cnn --weights imagenet", "no ImageNet weights for my_cnn"),
        ("--model linear_regression --weights x.pth", "it predicts a number, not a class"),
        ("--model resnet18 --weights none.pth", "there is no such file"),
        ("--model resnet18 --weights ten.pth", "ten.pth: these are not ImageNet's 1,000 classes"),
        ("--model resnet18 --weights five.pth", "does not fit --model resnet18: missing"),
        ("--top 0", "--top 0: must be at least 1"),
        ("--top 2 --all", "not allowed with argument --top"),
        ("--out x.txt", "name a file that ends in .csv or .jsonl"),
        ("--batch-size -1", "--batch-size -1: must be"),
        ("--jsn", "--jsn; see python predict.py --help"),
    ],
)
def test_a_wrong_word_is_one_sentence(words, says, weights, monkeypatch, capsys):
    monkeypatch.chdir(weights)
    assert predict_main(["x.png", *words.split()]) == 2
    told = capsys.readouterr()
    assert says in told.err and told.err.count("\n") == 1 and not told.out


def test_a_file_of_answers_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("file/x.csv", "file/in/x.csv"):
        with refused("output-unwritable", match="x.csv: cannot be written"):
            Kept(tmp_path / place, {"classes": 5})
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("shape", [(8, 8), (64, 64), (40, 60), (100, 60), (300, 500), (80, 80)])
@pytest.mark.parametrize("words", ["--image-size 16", "--image-size 48", "--image-size 64"
    " --resize pad", "--image-size 32 --eval-size 48", "--image-size 32 --resize squash",
    "--image-size 96 --eval-resize 96", "--image-size 16 --decode scaled"])  # fmt: skip
def test_a_picture_is_seen_as_the_evaluation_sees_it(tmp_path, words, shape):
    (height, width), cpu, scaled = shape, torch.device("cpu"), "scaled" in words
    draw = torch.Generator().manual_seed(0)
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / folder).mkdir(parents=True)
        pixels = torch.randint(256, (height, width, 3), generator=draw).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / folder / "x.png", "jpeg" if scaled else "png")
    settings = parse([*words.split(), "--batch-size", "1", "--model", "my_cnn"])
    source = load_source(str(tmp_path), image_size=settings.config.image_size)
    data = build_data(settings, source, cpu, 1, 0)
    told = {"image_size": settings.config.image_size, "mean": source.mean, **data.cut_as()}
    for place, name in enumerate("ab"):
        (batch, *_) = data.evaluation("test")
        seen = prepare(tmp_path / "test" / name / "x.png", told)
        assert torch.equal(seen[0], batch["images"][place])
    given = []

    class Net(nn.Linear):
        def forward(self, images):
            given.append(images)
            return super().forward(images.mean((2, 3)))

    told |= {"std": source.std, "classes": source.classes}
    predict_picture(Net(3, 2).eval(), told, tmp_path / "test" / "b" / "x.png", 1)
    assert torch.equal(given[0][0], data.augment.evaluate(batch["images"])[1])


def test_imagenet_sees_the_middle_224_of_256(tmp_path):
    pixels = torch.zeros(512, 768, 3, dtype=torch.uint8)
    pixels[32:480, 160:608] = 200  # the middle 448 of 512
    Image.fromarray(pixels.numpy()).save(tmp_path / "x.png")
    told = {"image_size": 224, "photographs": True, "mean": (0.485, 0.456, 0.406)}
    seen = prepare(tmp_path / "x.png", told)
    assert seen.shape == (1, 3, 224, 224) and seen[..., 3:-3, 3:-3].eq(200).all()
    assert seen.float().mean() > 195


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
    assert made.count("data:image/png") == 3  # mistakes, gradcam, samples; the page draws the rest
    assert re.search(r"page +after/report.html", (run / "out.txt").read_text())
    assert page.build(run) == made.replace("report page after<", f"report page {run}<")


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
    assert lr_finder.suggest(rates[:3], [1.0, 1.2, 1.4]) == rates[0]
    monkeypatch.chdir(tmp_path)
    plan = SimpleNamespace(config=TrainConfig(model="nets/plain.py:Net"))
    found = lr_finder.Rates(rates, losses, suggestion)
    assert panels.show_rates(Report(), found, plan, SimpleNamespace(is_main=True)) == 0
    assert (tmp_path / "runs" / "find-lr-plain.py-Net.png").stat().st_size > 5000
    assert f"--lr {suggestion:.2g}" in capsys.readouterr().out


def test_the_learning_rate_finder_makes_no_run_and_needs_no_picture(nets, tmp_path):
    (tmp_path / "runs").write_text("in the way")
    done = train(["--model", nets / "plain.py:Net", *SMALL, "--find-lr"], tmp_path, 2)
    assert done.status == 0 and done.out.count("suggested") == 1, done.out
    assert "none (--find-lr)" in done.out
    assert "runs/find-lr-plain.py-Net.png cannot be written" in " ".join(done.out.split())
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith("output-")} == {"runs"}


@pytest.mark.parametrize("seed", range(20))
def test_the_noise_of_single_batches_is_no_fall(seed):
    rates = [1e-6 * 10 ** (7 * i / 99) for i in range(60)]
    truth = [1.82 - 0.012 * max(0, i - 24) if i < 44 else 1.58 + 0.05 * (i - 44) for i in range(60)]
    noise = 0.05 * torch.randn(60, generator=torch.Generator().manual_seed(seed))
    losses = lr_finder.smooth([a + b for a, b in zip(truth, noise.tolist(), strict=True)])
    assert rates[24] < lr_finder.suggest(rates, losses) < rates[44]


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
