"""The lessons: both languages hold the same commands, all are run or parsed; 29 questions."""

import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from launches import REPOSITORY, SMALL, finish, start, train
from test_house import tracked
from torch import nn
from torch.nn import functional as F

import predict
from bench import notebook
from common.errors import UserError
from config import parse
from data.augment import Augment
from data.files import decode
from data.keyed_random import permutation, uniforms
from data.loaders import build_test_loader, build_train_loader
from data.order import EvaluationBatchSampler, GlobalBatchSampler
from data.sources import load_source
from data.sources.folder import read_class_folders
from data.splits import split_validation
from models import build_model
from models.__main__ import table_of_layers
from report.screen import Report
from tasks import Classification, Regression
from training.learner import inputs

PAGES = [REPOSITORY / "docs" / name for name in ("lessons.md", "lessons.zh.md")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)
CELLS = re.compile(r"^<!-- notebook\n.*?^-->$", flags=re.M | re.S)  # what only the notebook has
NUMBER = re.compile(r"\d(?:[\d.,]*\d)?(?:[hms]\d*)*[hms]?")
MEASURED = re.compile(
    r"ETA \S+|[\d.,]+ (?:ms|img/s)|\d+ % waiting for images|\btime  .*|^\s*real.*"
)
# What the pages tell a reader to type for their digits: AVX-512 then adds like AVX2. What is left
# between processors, which add sums up in another order, is this part of a number.
AS_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
SPREAD = 0.05

# --- the documents --------------------------------------------------------------------------------


def fences(page) -> list[tuple[str, str]]:
    """(language, text) of each block of code; the output of a command has no language."""
    return FENCE.findall(CELLS.sub("", page.read_text(encoding="utf-8")))


def commands() -> list[str]:
    text = "".join(body for language, body in fences(PAGES[0]) if language == "sh")
    return list(dict.fromkeys(text.replace("\\\n", " ").splitlines()))


def needs_more(command: str) -> bool:
    """A command that needs CIFAR-10, the network, a GPU or a cluster: parsed, not run."""
    return re.search(r"cifar10|imagenet|^sbatch|^squeue|^touch", command) is not None


def runnable() -> list[str]:
    return [command for command in commands() if not needs_more(command)]


def plain(line: str) -> str:
    """A line of output without numbers, borders and widths."""
    return " ".join(NUMBER.sub("#", re.sub("[│╭╮╰╯─]", " ", line)).split())


def numbers(line: str) -> list[str]:
    """The numbers of a line that do not depend on what else the machine does."""
    return NUMBER.findall(MEASURED.sub("", line))


def same_numbers(shown: str, printed: str) -> bool:
    """Whole numbers are alike anywhere, what is learned nearly."""
    # Which epoch was the best hangs on a last digit.
    shown, printed = (re.sub(r"at epoch \d+", "", line) for line in (shown, printed))
    pairs = list(zip(numbers(shown), numbers(printed), strict=True))
    if any(a != b for a, b in pairs if "." not in a):
        return False
    values = [(float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs if "." in a]
    return all(abs(a - b) <= SPREAD * max(abs(a), 0.5) for a, b in values)


def not_printed(shown: str, out: str) -> list[str]:
    """Lines of a page's output that a command did not print, words or numbers."""
    printed = [line for line in out.splitlines() if line.strip()]
    return [
        line
        for line in shown.splitlines()
        if line.strip() not in ("", "...")
        and not any(plain(line) == plain(other) and same_numbers(line, other) for other in printed)
    ]


def test_a_number_that_differs_from_the_page_is_seen_and_a_time_is_not():
    page = "epoch 3/3  train loss 0.1314  accuracy 96.24 %  best 94.93 %  ETA 6s\n"
    assert not not_printed(page, page.replace("6s", "1m02s"))
    assert not not_printed(page, page.replace("0.1314", "0.1315"))
    assert not_printed(page, page.replace("0.1314", "0.1814")) == [page.strip()]
    assert not_printed(page, page.replace("94.93", "84.93"))
    at_the_end = "temperature 0.5, sum 2.0.\n"  # of a sentence: its full stop is no digit
    assert not not_printed(at_the_end, at_the_end)
    assert not_printed(at_the_end, at_the_end.replace("2.0", "3.0"))
    assert not_printed("│ model  82,826 parameters │", "│ model  82,827 parameters │")


@pytest.mark.parametrize("page", PAGES, ids=["en", "zh"])
def test_the_page_says_how_its_digits_come_on_a_processor_that_adds_otherwise(page):
    typed = "export " + " ".join(f"{name}={value}" for name, value in AS_AVX2.items())
    assert f"`{typed}`" in page.read_text(encoding="utf-8").split("\n## ")[0]


def test_what_is_trained_says_with_how_many_threads():
    """Each run of the lessons that prints numbers below it fixes what they depend on."""
    for command in runnable():
        if "train.py" in command and shown_after(command) and "--resume" not in command:
            assert "--threads 1" in command, command


def test_both_languages_hold_the_same_commands_code_outputs_and_pictures_in_the_same_order():
    english, chinese = map(fences, PAGES)
    assert english == chinese
    pictures = [re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text("utf-8")) for page in PAGES]
    assert pictures[0] == pictures[1] and len(pictures[0]) >= 2
    headings = [re.findall(r"^(#+) (\d*)", page.read_text("utf-8"), flags=re.M) for page in PAGES]
    assert headings[0] == headings[1]


def test_each_lesson_has_a_command_an_exercise_and_points_into_the_code():
    for page, exercise in zip(PAGES, ("*Exercise.*", "*练习*"), strict=True):
        sections = page.read_text(encoding="utf-8").split("\n## ")
        numbered = [section for section in sections if section[0].isdigit()]
        assert len(numbered) == 16
        for lesson in numbered:
            assert "```sh\n" in lesson and exercise in lesson, lesson[:40]
            assert re.search(r"\]\(\.\./[\w/]+\.(py|sbatch)\)", lesson), lesson[:40]


def test_each_of_the_29_questions_has_an_answer_in_both_languages_and_a_test():
    wanted = [str(number) for number in range(1, 30)]
    for page in PAGES:
        assert re.findall(r"^### (\d+)", page.read_text(encoding="utf-8"), flags=re.M) == wanted
    for number in range(1, 30):
        assert any(name.startswith(f"test_question_{number:02}_") for name in globals()), number


def test_commands_that_need_more_than_a_laptop_parse(tmp_path):
    for command in filter(needs_more, commands()):
        words = shlex.split(command)
        script = next((w for w in words if w.endswith((".py", ".sbatch"))), "")
        flags = words[words.index(script) + 1 :] if script else []
        if script == "predict.py":
            predict.parse(flags)
        elif script in ("train.py", "launch/slurm.sbatch"):
            parse(flags)
            assert (REPOSITORY / script).is_file()
        else:
            assert words[0] in ("squeue", "touch"), command


def write_snippets(folder) -> None:
    for language, body in fences(PAGES[0]):
        if language in ("python", "yaml"):
            name = re.match(r"# (\w+\.\w+)\n", body)[1]
            (folder / name).write_text(body, encoding="utf-8")


def run_in(folder, command: str):
    """A command of the page, typed in the repository: here in a folder that may be written to."""
    words = shlex.split(command)
    words = [str(REPOSITORY / w) if (REPOSITORY / w).is_file() else w for w in words]
    if words[0] == "torchrun":
        words[:1] = ["python", "-m", "torch.distributed.run"]
    assert words[0] == "python", command
    # Threads that wait without spinning: cores here are shared with other tests.
    env = {"PYTHONPATH": str(REPOSITORY), "OMP_WAIT_POLICY": "passive"}
    env["LOCKSTEP_PYTHON"] = sys.executable
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        env |= AS_AVX2
    return finish(*start([sys.executable, *words[1:]], folder, **env))


def shown_after(command: str) -> str:
    """The output that the page shows below a command, or ""."""
    blocks = fences(PAGES[0])
    for (language, body), (kind, below) in pairwise(blocks):
        if language == "sh" and body.replace("\\\n", " ").splitlines()[-1] == command:
            return below if kind == "" else ""
    return ""


def test_the_two_parameters_of_the_second_lesson_take_the_steps_that_the_page_prints(tmp_path):
    write_snippets(tmp_path)
    done = run_in(tmp_path, "python one_step.py")
    assert done.status == 0 and done.out == shown_after("python one_step.py")


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """Every command of the lessons that a laptop can run, in order, in one folder."""
    folder = tmp_path_factory.mktemp("lessons")
    write_snippets(folder)
    return {command: run_in(folder, command) for command in runnable()}, folder


@pytest.mark.slow
def test_every_command_runs_and_prints_what_the_page_shows(walk):
    done, _ = walk
    assert len(done) > 15
    wrong = []
    for command, result in done.items():
        shown = shown_after(command)
        wanted = 1 if "cannot decode" in shown else 0
        assert result.status == wanted, f"{command}\n{result.last_lines}"
        wrong += [f"{command}\n  {line}" for line in not_printed(shown, result.out)]
    assert not wrong, "not printed so:\n" + "\n".join(wrong)


@pytest.mark.slow
def test_the_lessons_teach_what_they_say(walk):
    done, folder = walk

    def last(run: str) -> float:
        (out,) = (d.out for c, d in done.items() if c.endswith(f"--run-dir runs/{run}"))
        return float(re.search(r"last +([\d.]+) %", out)[1])

    (line,) = (d.out for c, d in done.items() if c.endswith("--run-dir runs/line"))
    assert abs(float(re.search(r"weight +([\d.]+)", line)[1]) - 2) < 0.1
    assert abs(float(re.search(r"bias +([\d.]+)", line)[1]) - 4) < 0.4  # the noise has mean 1
    assert last("all-layers") > last("last-layer") > 80
    assert last("my-cnn") > 90 and last("my-net") > 90
    assert "the same experiment" in done["python -m bench.same runs/one runs/two"].out
    assert abs(last("one") - last("two")) < 1
    (lost,) = (d.out for c, d in done.items() if c.startswith("python lose_one.py"))
    assert "rank 1 on " in lost and "from the snapshot in memory" in lost
    lives = json.loads((folder / "runs/lost/status.json").read_text())["life"]
    assert lives == 1 and "the same bits: True" in lost
    assert (folder / "runs" / "line" / "line.png").exists()


# --- the notebooks --------------------------------------------------------------------------------


def test_the_notebooks_are_made_of_the_pages():
    for page in PAGES:
        told = "type python -m bench.notebook --write"
        assert page.with_suffix(".ipynb").read_text(encoding="utf-8") == notebook.made(page), told
    made = [notebook.cells(page.read_text(encoding="utf-8")) for page in PAGES]
    code = [[source for kind, source in cells if kind == "code"] for cells in made]
    assert code[0] == code[1] and len(code[0]) > 20
    for page in PAGES:  # a notebook ends before the questions
        assert "](#" not in notebook.made(page) and f"]({page.name}#" in notebook.made(page)


def in_words(output: dict) -> str:
    """What a cell printed, or a panel of its own says, without colours."""
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    return re.sub(r"\x1b\[[\d;]*m", "", text)


@pytest.mark.slow
def test_a_kernel_runs_the_lessons_in_a_notebook(tmp_path, monkeypatch):
    """As on a machine that has nothing but the repository; the two languages have the same code."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for path in tracked():
        place = tmp_path / path.relative_to(REPOSITORY)
        if place.parts[len(tmp_path.parts)] != "tests":
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        for name, value in AS_AVX2.items():
            monkeypatch.setenv(name, value)
    book = nbformat.read(tmp_path / "docs" / "lessons.ipynb", as_version=4)
    where = {"metadata": {"path": str(tmp_path / "docs")}}
    nbclient.NotebookClient(book, timeout=900, kernel_name="python3", resources=where).execute()
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    said = ["".join(map(in_words, cell.outputs)) for cell in cells]
    pictures = [sum("image/png" in out.get("data", {}) for out in cell.outputs) for cell in cells]
    assert sum(pictures) == 6, "before, after, its curve, a batch, curves, the run that went on"
    printed = "\n".join(said)
    for line in ("linear.bias    4.0635", "last     95.04 % of 121", "whole.pth is refused"):
        assert line in printed, line
    stop = int(re.findall(r"stopped at step (\d+): a stop signal", printed)[0])
    assert stop >= 22, "an epoch is done before it is stopped, says the text"
    assert f"at step {stop}, in epoch {stop // 22 + 1} of 30" in printed
    assert "Result(status='stopped'" in printed and "Result(status='finished'" in printed
    assert ", 660 steps" in printed, "30 epochs of 22 steps"
    assert "IProgress" not in printed, "the first cell warns of nothing"
    for said_of in ("-m data stats", "predict.py"):  # what cannot be erased in a cell is not drawn
        (output,) = (s for s, c in zip(said, cells, strict=True) if said_of in c.source)
        assert "\x1b[2K" not in output and "\n\n\n" not in output, output


# --- the questions --------------------------------------------------------------------------------


def told(classes=("cat", "dog"), size=8) -> dict:
    return {"image_size": size, "classes": classes, "mean": [0.5] * 3, "std": [0.25] * 3}


def picture(path, mode="RGB", size=(8, 8)):
    from PIL import Image

    depth = len(Image.new(mode, (1, 1)).getbands())
    values = bytes(17 * i % 256 for i in range(size[0] * size[1] * depth))
    Image.frombytes(mode, size, values).save(path)
    return path


def test_question_01_a_picture_is_predicted_the_same_every_time(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 64, 2))
    path = picture(tmp_path / "dog.png")
    answers = [predict.predict(model.eval(), told(), path, 2) for _ in range(5)]
    assert all(answer == answers[0] for answer in answers)
    trained = predict.predict(model.train(), told(), path, 2)
    assert trained != answers[0]  # what model.eval() is for
    augment = Augment("resized_crop", 8, (0.5,) * 3, (0.25,) * 3, seed=0)
    images, index = torch.arange(3 * 64, dtype=torch.uint8).view(1, 3, 8, 8), torch.tensor([0])
    assert not torch.equal(augment.train(images, index, 0), augment.train(images, index, 1))
    assert torch.equal(augment.evaluate(images), augment.evaluate(images))


def test_question_02_no_step_sees_a_test_image_nor_one_of_the_validation_part():
    source, cpu = load_source("digits"), torch.device("cpu")
    assert (len(source.train), len(source.test)) == (1442, 355)
    loader, sampler = build_train_loader(source.train, 64, 0, cpu)
    test = build_test_loader(source.test, 1, cpu)
    assert loader.dataset.images.data_ptr() != test.dataset.images.data_ptr()
    seen = torch.cat(list(sampler))
    assert set(seen.tolist()) <= set(range(1442))
    keep, held_out = split_validation(source.train.labels, 0.1, 0)
    assert not set(keep.tolist()) & set(held_out.tolist()) and len(held_out) == 144


def evaluated(logits, labels, classes=10) -> dict:
    task = Classification(classes)
    counts = task.new_counts("cpu")
    task.count(counts, logits, labels, torch.ones_like(labels))
    return task.results(counts)


def test_question_03_one_class_for_everything_is_told_once():
    labels, names = torch.arange(100) % 10, list("abcdefghij")
    metrics = evaluated(torch.eye(10)[torch.full((100,), 3)] * 5, labels)
    found = Classification(10).doubts(metrics, names)
    assert found["one class"].startswith("100% of the answers are class d, the label of 10%")
    screen = io.StringIO()
    report = Report(console=console(screen))
    report.warn_once(found)
    report.warn_once(found)
    assert screen.getvalue().count("of the answers") == 1
    honest = torch.where(torch.arange(100) < 95, 0, 1)  # 95 % of the images are of one class
    assert not Classification(2).doubts(evaluated(torch.eye(2)[honest] * 5, honest, 2), ["a", "b"])


def console(file):
    from rich.console import Console

    return Console(file=file, width=200, highlight=False)


OWN = """
from torch import nn

class Frozen(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.layer = nn.Linear(192, num_classes)
        for p in self.parameters():
            p.requires_grad = False

class Misspelt(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.layer = nn.Linear(192, num_classes)
        for p in self.parameters():
            p.require_grad = False

class Unused(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.first = nn.Linear(768, 768)
        self.last = nn.Linear(768, num_classes)
    def forward(self, images):
        return self.last(images.flatten(1))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return path


def test_question_04_a_model_that_is_all_frozen_is_refused(own):
    with pytest.raises(UserError, match="requires_grad=True, so nothing can learn"):
        build_model(f"{own}:Frozen", num_classes=10, image_size=8)


def test_question_05_the_two_zero_grads_differ_by_what_the_optimizer_does_not_hold():
    for everything in (True, False):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        held = model.parameters() if everything else model[1].parameters()
        optimizer = torch.optim.SGD(held, lr=0.1)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.zero_grad()
        assert all(p.grad is None for p in model[1].parameters())
        assert all((p.grad is None) == everything for p in model[0].parameters())
        model.zero_grad()
        assert all(p.grad is None for p in model.parameters())


def test_question_06_a_shape_that_would_broadcast_is_an_error():
    targets = torch.randn(30, 1, generator=torch.Generator().manual_seed(0))
    assert (targets - targets.view(1, 30)).shape == (30, 30)  # nine hundred differences
    with pytest.raises(ValueError, match="broadcast"):
        Regression().loss(targets.view(1, 30), targets)
    assert Regression().loss(targets, targets) == 0


def test_question_07_images_go_where_the_weights_are():
    there = torch.device("meta")  # stands for a GPU: another device than the CPU
    images, model = torch.zeros(2, 3, 8, 8), nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    moved = inputs(images, there, channels_last=False)
    assert moved.device == there and images.device.type == "cpu"  # .to() gives back another tensor
    with pytest.raises(RuntimeError):
        model(moved)
    assert model.to(there)(moved).device == there  # a module moves itself


def test_question_08_importing_train_starts_nothing_and_workers_need_that(tmp_path):
    loop = (
        "import multiprocessing as mp\n"
        "def work(): pass\n"
        "def main():\n"
        "    p = mp.get_context('spawn').Process(target=work)\n"  # as Windows and macOS start one
        "    p.start(); p.join(); raise SystemExit(p.exitcode)\n"
    )
    (tmp_path / "bare.py").write_text(loop + "main()\n")
    (tmp_path / "guarded.py").write_text(loop + "if __name__ == '__main__': main()\n")
    python = [sys.executable]
    bare = subprocess.run([*python, "bare.py"], cwd=tmp_path, capture_output=True, text=True)
    assert bare.returncode != 0 and "__name__ == '__main__'" in bare.stderr
    assert subprocess.run([*python, "guarded.py"], cwd=tmp_path).returncode == 0
    words = [*python, "-c", "import train", "--model", "my_cnn"]
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "" and not (tmp_path / "runs").exists()


def test_question_09_the_loss_takes_inceptions_tuple_and_evaluation_gets_logits():
    labels = torch.tensor([0, 1])
    logits, extra = torch.randn(2, 10), torch.randn(2, 10)
    both = Classification(10, auxiliary=0.4).loss((logits, extra), labels)
    one, other = (F.cross_entropy(x, labels, reduction="sum") for x in (logits, extra))
    assert torch.allclose(both, one + 0.4 * other)
    with torch.device("meta"):
        model, images = (
            build_model("inception_v3", num_classes=10, image_size=96),
            torch.zeros(2, 3, 96, 96),
        )
    assert [tuple(x.shape) for x in model.train()(images)] == [(2, 10), (2, 10)]
    assert model.eval()(images).shape == (2, 10)


def test_question_10_pretrained_is_answered_with_weights():
    with pytest.raises(UserError, match="--weights imagenet"):
        parse(["--model", "vgg16", "--pretrained"])
    config = parse(["--model", "vgg16", "--weights", "imagenet"]).config
    assert (config.weights, config.image_size) == ("imagenet", 224)


def test_question_11_781_steps_of_64_and_313_batches_of_32():
    assert GlobalBatchSampler(50_000, 64, 0).steps_per_epoch == 781
    assert math.ceil(10_000 / 32) == 313 and 10_000 % 32 == 16
    places = torch.cat(list(EvaluationBatchSampler(10_000, 128)))
    assert int((places >= 0).sum()) == 10_000 and len(places) % 128 == 0  # padding weighs nothing


def test_question_12_an_epoch_takes_each_image_at_most_once_and_the_next_another_order():
    sampler = GlobalBatchSampler(1442, 64, 0)
    orders = []
    for epoch in (0, 1):
        sampler.start(epoch)
        orders.append(torch.cat(list(sampler)))
        assert len(orders[-1]) == len(set(orders[-1].tolist())) == 22 * 64
    assert not torch.equal(*orders)


def test_question_13_a_loss_of_6869_is_told_as_steps_too_large():
    labels = torch.arange(100) % 10
    metrics = evaluated(torch.randn(100, 10, generator=torch.Generator().manual_seed(0)), labels)
    found = Classification(10).doubts(metrics | {"loss": 6869.0}, list("abcdefghij"))
    assert "6869, where guessing costs 2.30: the steps are too large" in found["explodes"]
    assert "explodes" not in Classification(10).doubts(metrics, list("abcdefghij"))


def test_question_14_a_loss_of_ln_10_is_told_as_guessing_and_one_of_1_8_is_not():
    labels, names = torch.arange(100) % 10, list("abcdefghij")
    metrics = evaluated(torch.zeros(100, 10), labels)
    assert abs(metrics["loss"] - math.log(10)) < 1e-5
    assert (
        "2.3026 is what guessing costs (2.3026)"
        in Classification(10).doubts(metrics, names)["guesses"]
    )
    learning = evaluated(torch.eye(10)[labels], labels)
    assert 1.4 < learning["loss"] < 1.5 and Classification(10).doubts(learning, names) == {}


def test_question_15_the_class_table_says_what_a_cat_is_taken_for():
    screen = io.StringIO()
    Report(console=console(screen)).class_table(
        ["cat", "dog", "ship"], [[5, 4, 1], [3, 7, 0], [0, 0, 9]]
    )
    rows = [" ".join(line.replace("│", " ").split()) for line in screen.getvalue().splitlines()]
    assert "cat 10 5 50.00 % 62.50 % 0.556 dog (4)" in rows
    assert "dog 10 7 70.00 % 63.64 % 0.667 cat (3)" in rows


def test_question_16_mean_and_std_are_those_of_the_training_images_for_all_three():
    source = load_source("digits")
    pixels = source.train.images.double() / 255
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(source.mean).double(), atol=1e-6)
    augment = Augment("none", 8, source.mean, source.std, seed=0)
    indices = torch.arange(len(source.train))
    images = augment.train(source.train.images, indices, 0)
    assert abs(float(images.mean())) < 1e-3 and abs(float(images.std()) - 1) < 1e-3
    assert torch.equal(images, augment.evaluate(source.train.images))


def test_question_17_pixels_cost_a_49th_at_32_instead_of_224():
    def multiply_adds(size: int) -> int:
        table, _ = table_of_layers("my_cnn", size, 10)
        return int(list(table.columns[-1].cells)[-1].replace(",", ""))

    assert multiply_adds(224) == 49 * multiply_adds(32)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16"])
def test_question_18_png_and_grey_become_rgb(mode, tmp_path):
    from PIL import Image

    path = tmp_path / "grey.png"
    if mode in ("L", "RGBA", "LA"):
        picture(path, mode)
    else:
        Image.new(mode, (8, 8)).save(path)
    pixels = decode(path, None)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == "uint8"
    if mode == "L":
        assert (pixels[..., 0] == pixels[..., 2]).all() and len(set(pixels.ravel().tolist())) > 9


def test_question_19_order_and_draws_are_whole_numbers_alike_on_every_machine(tmp_path):
    assert permutation(0, 0, 10).tolist() == [2, 6, 8, 4, 7, 0, 9, 5, 1, 3]
    draws = uniforms(0, 0, torch.arange(3), 1)[:, 0] * 2**24
    assert draws.tolist() == [6694888, 16311500, 326307]
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        picture(tmp_path / name / "1.png")
        picture(tmp_path / name / "2.png")
        (tmp_path / name / "._1.png").write_bytes(b"left by a Mac")
    (tmp_path / ".DS_Store").write_bytes(b"left by a Mac")
    assert len(read_class_folders(tmp_path).items) == 4


def test_question_20_our_alexnet_is_torchvisions_of_2014_not_the_paper_of_2012():
    with torch.device("meta"):
        model = build_model("alexnet", num_classes=1000, image_size=224)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in layers] == [64, 192, 384, 256, 256]  # 2012: 96 256 384 384 256
    assert sum(p.numel() for p in model.parameters()) == 61_100_840
    assert not any(isinstance(m, nn.LocalResponseNorm) for m in model.modules())


def test_question_21_the_loss_has_the_softmax_and_a_second_one_stops_it_at_1_46():
    right = torch.eye(10) * 50
    labels = torch.arange(10)
    task = Classification(10)
    assert float(task.loss(right, labels)) < 1e-6
    assert abs(float(task.loss(right.softmax(1), labels)) / 10 - 1.4612) < 1e-4


def test_question_22_the_losss_graph_leads_to_exactly_the_parameters():
    model = build_model("my_cnn", num_classes=10, image_size=8)
    loss = Classification(10).loss(model(torch.randn(2, 3, 8, 8)), torch.tensor([0, 1]))
    found, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [before for before, _ in node.next_functions if before is not None]
    assert found == {id(p) for p in model.parameters()}


@pytest.mark.slow
def test_question_23_a_forgotten_step_is_told_as_guessing(tmp_path, nets):
    text = (REPOSITORY / "train.py").read_text(encoding="utf-8")
    assert text.count("    optimizer.step()\n") == 1
    (tmp_path / "train.py").write_text(text.replace("    optimizer.step()\n", ""))
    words = [sys.executable, "train.py", "--model", nets / "plain.py:Net", *SMALL, "--epochs", "3"]
    done = finish(*start(words, tmp_path, PYTHONPATH=str(REPOSITORY)))
    assert done.status == 0 and "is what guessing costs" in done.out, done.out
    rows = re.findall(r"test loss ([\d.]+)", done.out)
    assert len(set(rows)) == 1 < len(rows)


def test_question_24_a_typo_is_named(own):
    with pytest.raises(UserError, match=r"did you mean --freeze\?"):
        parse(["--model", "alexnet", "--freze", "backbone"])
    model = build_model(f"{own}:Misspelt", num_classes=10, image_size=8)
    assert all(p.requires_grad for p in model.parameters())  # Python takes any attribute


@pytest.mark.slow
def test_question_25_each_next_of_a_new_iterator_is_a_first_batch(tmp_path):
    write_snippets(tmp_path)
    done = run_in(tmp_path, "python batch.py")
    assert done.status == 0 and done.out == shown_after("python batch.py")
    assert (tmp_path / "batch.png").stat().st_size > 1000


def test_question_26_a_worker_cannot_import_a_class_of_a_cell():
    import pickle

    space = {"__name__": "__main__"}
    exec("class Cell: pass", space)  # what a worker that begins anew would have to find
    with pytest.raises((pickle.PicklingError, AttributeError), match="Cell"):
        pickle.dumps(space["Cell"]())


@pytest.mark.slow
def test_question_27_a_head_in_its_place_and_what_renaming_changes(tmp_path):
    write_snippets(tmp_path)
    done = run_in(tmp_path, "python heads.py")
    assert done.status == 0 and done.out == shown_after("python heads.py")


def test_question_28_two_files_of_one_network_have_the_same_names(tmp_path):
    from safetensors.torch import save_file

    write_snippets(tmp_path)
    for name in ("a", "b"):
        model = build_model("my_cnn", num_classes=10, image_size=8)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    done = run_in(tmp_path, "python differ.py a.safetensors b.safetensors")
    assert "shapes: True" in done.out and "fc.weight    differs by at most 0." in done.out


def test_question_29_numbers_are_places_of_names_sorted_as_text(tmp_path):
    for name in ("2", "10", "6"):
        (tmp_path / name).mkdir()
        for number in range(2):
            picture(tmp_path / name / f"{number}.png")
    assert list(read_class_folders(tmp_path).classes) == ["10", "2", "6"]


@pytest.mark.slow
def test_questions_2_11_17_and_24_are_answered_on_the_screen_of_a_run(own, tmp_path):
    words = ["--model", f"{own}:Unused", *SMALL, "--epochs", "1", "--run-dir", "screen"]
    done = train(words, tmp_path)
    assert done.status == 0, done.out
    assert "first.weight, first.bias" in done.out and "got no gradient" in done.out
    assert "1,442 training, 355 test images" in done.out
    assert "22 (22 an epoch, 1 epoch)" in done.out
    assert "best epoch chosen on the test split" in done.out
    assert "img/s" in done.out
