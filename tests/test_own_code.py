"""What predicts is what was trained: the files of an own model, kept, compared and trusted."""

import importlib
import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from launches import REPOSITORY, SMALL, python, train
from PIL import Image
from safetensors.torch import save_file

from common.errors import UserError
from distributed.checkpoint import card_of
from models import build_model, own_file
from models.own_file import code_of_weights, digests_of, keep_code
from predict import main as predict_main

HELPER = "def act(x):\n    return x.relu()\n"
NET = """
from torch import nn
from parts.inner import width

class Net(nn.Module):
    def __init__(self, num_classes=10, image_size=8):
        super().__init__()
        self.first = nn.Linear(3 * image_size**2, width)
        self.head = nn.Linear(width, num_classes)
    def forward(self, x):
        from blocks import act
        return self.head(act(self.first(x.flatten(1))))
"""


def written(folder: Path) -> Path:
    """A model's file, a helper that it imports late, a package below it, and a bystander."""
    (folder / "parts").mkdir(parents=True)
    (folder / "net.py").write_text(NET)
    (folder / "blocks.py").write_text(HELPER)
    (folder / "parts" / "__init__.py").write_text("")
    (folder / "parts" / "inner.py").write_text("width = 16\n")
    (folder / "unused.py").write_text("raise SystemExit\n")
    return folder


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """The name of a model that was built and tried."""
    for name in ("blocks", "parts", "parts.inner", "own_net"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    name = f"{written(tmp_path / 'mine') / 'net.py'}:Net"
    model = build_model(name, num_classes=3, image_size=8)
    model(torch.zeros(1, 3, 8, 8))
    yield name
    for name in ("blocks", "parts", "parts.inner", "own_net"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(loaded, tmp_path) -> Path:
    """A run folder that keeps that model's code."""
    folder = tmp_path / "runs" / "a b"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"config": {}}')
    assert keep_code(folder, loaded) == ""
    return folder


FILES = ["blocks.py", "net.py", "parts/__init__.py", "parts/inner.py"]


def test_the_files_of_a_model_are_those_it_imports_below_its_folder(loaded, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "not_to_be_imported", None)
    mine = Path(own_file._split(loaded)[0]).parent
    monkeypatch.chdir(mine)  # where torch._classes seems to lie
    # What the calling program has loaded from there is not the model's.
    for name in ("__mp_main__", "unused", "own_other"):
        program = types.ModuleType(name)
        program.__file__ = str(mine / "unused.py")
        monkeypatch.setitem(sys.modules, name, program)
    assert list(digests_of(loaded)) == FILES
    kept = [p for p in (run / "code").rglob("*") if p.is_file()]
    assert sorted(p.relative_to(run / "code").as_posix() for p in kept) == FILES
    assert digests_of("resnet18") == {}


def test_settings_that_the_code_names_beside_it_are_kept_and_what_a_script_does_is_not(tmp_path):
    mine, folder = tmp_path / "mine", tmp_path / "run"
    (mine / "sizes").mkdir(parents=True)
    folder.mkdir()
    for name in ("sizes/net.json", "results.json", "unnamed.json", "net.pth"):
        (mine / name).write_text('{"width": 5}')
    (tmp_path / "above.json").write_text("{}")
    (mine / "net.py").write_text(
        "import json\nfrom pathlib import Path\nfrom torch import nn\n"
        "FILES = ['net.pth', '../above.json', 'gone.json', 'x' * 999 + '.json', 'a\\0.json']\n"
        "WIDTH = json.loads((Path(__file__).parent / 'sizes/net.json').read_text())['width']\n"
        "class Net(nn.Linear):\n    def __init__(self): super().__init__(WIDTH, 2)\n"
        "if __name__ == '__main__':\n    open('results.json', 'w')\n"
    )
    name = f"{mine / 'net.py'}:Net"
    assert build_model(name, num_classes=2, image_size=8).in_features == 5
    assert list(digests_of(name)) == ["net.py", "sizes/net.json"]
    assert keep_code(folder, name) == ""
    shutil.rmtree(mine)
    copy = f"{folder / 'code' / 'net.py'}:Net"
    assert build_model(copy, num_classes=2, image_size=8).in_features == 5


def test_an_import_with_a_dot_is_told_how_the_file_finds_its_neighbour(tmp_path):
    (tmp_path / "blocks.py").write_text("")
    (tmp_path / "net.py").write_text("from .blocks import Net\n")
    with pytest.raises(UserError, match=r"net.py, line 1: .*without the dot"):
        build_model(f"{tmp_path / 'net.py'}:Net", num_classes=2, image_size=8)


def test_more_than_a_megabyte_is_not_kept_and_told(loaded, tmp_path):
    with (tmp_path / "mine" / "blocks.py").open("a") as file:
        file.write("#" * own_file.MOST_KEPT)
    folder = tmp_path / "other"
    folder.mkdir()
    assert "1.0 MB" in keep_code(folder, loaded) and list(folder.iterdir()) == []


def test_code_of_an_earlier_life_stays_for_the_weights_that_it_made(loaded, run, tmp_path):
    told, mine = digests_of(loaded), tmp_path / "mine"
    (mine / "blocks.py").write_text(HELPER.replace("relu", "tanh"))
    assert keep_code(run, loaded) == "" and keep_code(run, loaded) == ""
    assert "tanh" in (run / "code" / "blocks.py").read_text()
    assert code_of_weights(loaded, told, run) == f"{run / 'code.old-1' / 'net.py'}:Net"
    assert code_of_weights(loaded, digests_of(loaded), run) == loaded
    assert len(list(run.glob("code*"))) == 2


@pytest.mark.parametrize("change", ["none", "edited", "helper edited", "gone", "both"])
def test_the_original_is_executed_where_it_is_unchanged_else_the_copy(
    loaded, run, tmp_path, change
):
    told, mine = digests_of(loaded), tmp_path / "mine"
    if change in ("edited", "both"):
        (mine / "net.py").write_text(NET + "\n")
    elif change == "helper edited":
        (mine / "blocks.py").write_text(HELPER + "\n")
    elif change == "gone":
        shutil.rmtree(mine)
    if change == "both":
        (run / "code" / "blocks.py").unlink()
        with pytest.raises(UserError, match=r"has changed since, and .* holds no copy"):
            code_of_weights(loaded, told, run)
        return
    copy = f"{run / 'code' / 'net.py'}:Net"
    assert code_of_weights(loaded, told, run) == (loaded if change == "none" else copy)
    if change != "gone":  # weights of before there were hashes: what is there
        assert code_of_weights(loaded, {}, run) == loaded


def test_weights_alone_and_folders_of_others_bring_no_code(loaded, run, monkeypatch):
    told = digests_of(loaded)
    (run / "config.json").rename(run / "x")
    with pytest.raises(UserError, match=r"weights alone bring no code.*--trust-code"):
        code_of_weights(loaded, told, run)
    assert code_of_weights(loaded, told, run, trust=True) == loaded
    (run / "config.json").write_text('{"architectures": ["Net"]}')  # a folder of the hub
    with pytest.raises(UserError, match=r"weights alone bring no code.*--trust-code"):
        code_of_weights(loaded, told, run)
    (run / "x").rename(run / "config.json")
    assert code_of_weights(loaded, told, run) == loaded
    if not hasattr(os, "geteuid"):
        return
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(UserError, match="belongs to somebody else"):
        code_of_weights(loaded, told, run)
    assert code_of_weights(loaded, told, run, trust=True) == loaded


@pytest.mark.parametrize("trust", [False, True])
def test_a_file_that_a_strangers_weights_name_is_not_run(tmp_path, monkeypatch, capsys, trust):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + NET)
    told = {"model": str(tmp_path / "evil.py") + ":Net", "image_size": 8, "classes": ["a", "b"]}
    told |= {"mean": [0.5] * 3, "std": [0.5] * 3, "dataset": "digits", "step": 1}
    weights = {"head.weight": torch.zeros(2, 768), "head.bias": torch.zeros(2)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"lockstep": json.dumps(told)})
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    words = [str(tmp_path / "x.png"), "--run", str(tmp_path)] + ["--trust-code"] * trust
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "own_evil", None)
        assert predict_main(words) == 2
    assert (tmp_path / "ran").exists() == trust
    assert ("--trust-code" in capsys.readouterr().err) != trust


@pytest.mark.slow
def test_a_run_is_predicted_evaluated_and_gone_on_with_by_its_own_code(tmp_path):
    mine, words = written(tmp_path / "mine"), [*SMALL, "--image-size", "8", "--limit", "256"]
    words += ["--model", "net.py:Net", "--run-dir", "r", "--lr", "0.01"]
    done = train([*words, "--epochs", "1"], mine)
    assert done.status == 0, done.out
    assert list(card_of(mine / "r" / "model.safetensors")["code"]) == FILES
    before = train(["--resume", "r", "--eval-only"], mine)
    assert before.status == 0 and "net.py:Net" in before.out, before.out
    (mine / "blocks.py").write_text(HELPER.replace("x.relu()", "(3 * x).tanh()"))
    after = train(["--resume", "r", "--eval-only"], mine)
    shown = [line for line in before.out.splitlines() if "images: loss" in line]
    assert shown and shown[0] in after.out and "r/code/net.py:Net" in after.out, after.out
    done = train([*words, "--epochs", "2"], mine)
    assert done.status == 2 and "code changed since this checkpoint: blocks.py" in done.out
    assert "they are in r/code)" in done.out, done.out
    done = train([*words, "--epochs", "2", "--allow-change", "code"], mine)
    assert done.status == 0 and "no longer bit for bit" in " ".join(done.out.split()), done.out
    shutil.copytree(mine / "r", tmp_path / "else" / "r")
    Image.new("RGB", (8, 8)).save(tmp_path / "else" / "x.png")
    shutil.rmtree(mine)
    told = python(REPOSITORY / "predict.py", "x.png", "--run", "r", "--csv", cwd=tmp_path / "else")
    assert told.returncode == 0 and told.stdout.count("\nx.png,") == 5, told.stderr
    assert "the model is executed from r/code" in told.stderr
    done = train(["--resume", "r", "--epochs", "3"], tmp_path / "else")
    assert done.status == 2 and "--model r/code/net.py:Net --allow-change model" in done.out
    copy = ["--model", "r/code/net.py:Net", "--allow-change", "model"]
    done = train(["--resume", "r", "--epochs", "3", *copy], tmp_path / "else")
    assert done.status == 0, done.out
