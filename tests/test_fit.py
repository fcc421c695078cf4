"""fit(): a run in a process that lives on leaves it as it was, and gives the command's numbers."""

import contextlib
import gc
import json
import logging
import os
import random
import signal
import sys
import threading
import warnings
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from launches import REPOSITORY, python, rows, train
from PIL import Image
from torch import nn

from common.errors import UserError
from data.cache import kept, trim
from models.class_source import standalone_source
from report.notebook import KeptClass, where_it_runs
from report.tracking import uses_wandb
from train import fit

STATES = (AcceleratorState, PartialState, GradientState)
TINY = {
    "dataset": "digits", "image_size": 16, "limit": 256, "epochs": 1, "log_every": 1,
    "plots": False, "threads": 1, "run_dir": "run",
}  # fmt: skip
WIDTH = 8
TRY_ELSEWHERE = KeptClass.try_elsewhere
HOOKS = []  # called by each forward in training: left out of a kept source, as no plain value


def halved(images):
    return nn.functional.max_pool2d(images, 2)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())

    def forward(self, images):
        return halved(self.layers(images))


class Net(nn.Module):
    """Needs a function, a class, a number and imports of its file."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.block = Block(WIDTH)
        self.head = nn.Linear(WIDTH * 8 * 8, num_classes)

    def forward(self, images):
        return self.head(torch.flatten(self.block(images), 1))


class Interrupted(Net):
    """Asks to be stopped in its third forward in training; twice where `times` says so."""

    times = 1

    def forward(self, images):
        if torch.is_grad_enabled() and len(images) == 64:
            HOOKS.append(None)
            if len(HOOKS) == 3:
                for _ in range(self.times):
                    signal.raise_signal(signal.SIGINT)
        return super().forward(images)


class Broken(Net):
    def forward(self, images):
        HOOKS.append(None)
        if len(HOOKS) > 6:
            raise RuntimeError("a mistake in step four")
        return super().forward(images)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder of its own; no state of Accelerate from another test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(KeptClass, "try_elsewhere", lambda *_: None)  # it takes seconds
    HOOKS.clear()
    forget()
    yield
    forget()


@pytest.fixture
def tried(monkeypatch):
    monkeypatch.setattr(KeptClass, "try_elsewhere", TRY_ELSEWHERE)


def forget():
    for state in STATES:
        state._reset_state()


def snapshot() -> dict:
    """All of the process that a run could leave changed."""
    handled = [s for s in signal.Signals if s not in (signal.SIGKILL, signal.SIGSTOP)]
    return {
        "signals": {s: signal.getsignal(s) for s in handled},
        "threads": sorted(t.name for t in threading.enumerate()),
        "children": sorted(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
        "files": open_files(),
        "group": dist.is_initialized(),
        "accelerate": [(id(s._shared_state), dict(s._shared_state)) for s in STATES],
        "torch": {
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
            "fill": torch.utils.deterministic.fill_uninitialized_memory,
            "benchmark": torch.backends.cudnn.benchmark,
            "matmul": torch.get_float32_matmul_precision(),
            "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            "dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
        },
        "environment": dict(os.environ),
        "filters": list(warnings.filters),
        "levels": {
            name: logging.getLogger(name).level
            for name in ("accelerate", "torch.distributed", "PIL", "matplotlib", None)
        },
        "output": sys.stdout.errors,
        "python": random.getstate(),
        "numpy": [str(part) for part in numpy.random.get_state()],
        "generator": torch.get_rng_state().tolist(),
        "folder": Path.cwd(),
        "path": list(sys.path),
        "frozen": gc.get_freeze_count(),
        "switches": sys.getswitchinterval(),
    }


def open_files() -> list[str]:
    """What each descriptor of this process stands for, but for the look at them itself."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(link.readlink()))
    return sorted(target for target in found if not target.endswith("/fd"))


def test_three_calls_leave_the_process_as_they_found_it(monkeypatch):
    """In float32, in bf16, and one that fails in the middle, deterministic and debugging."""
    mallopt = []
    monkeypatch.setattr("distributed.accelerator.keep_freed_memory", lambda: mallopt.append(1))
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_dtype(torch.float64)
    filters = list(warnings.filters)
    try:
        before = snapshot()
        assert fit(Net, **TINY).status == "finished"
        assert snapshot() == before
        result = fit(Net, **{**TINY, "run_dir": "other", "mixed_precision": "bf16"})
        assert next(result.model.parameters()).dtype == torch.float32
        assert snapshot() == before
        with pytest.raises(RuntimeError, match="step four"):
            fit(Broken, **{**TINY, "run_dir": "broken"}, deterministic=True, debug=True)
        assert snapshot() == before
        assert not mallopt
        assert json.loads(Path("broken/status.json").read_text())["status"] == "failed"
        assert "step four" in Path("broken/crash/rank-0.txt").read_text()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)
        warnings.filters[:] = filters


@pytest.mark.parametrize("size", ["0", "1GB"])
def test_who_decodes_photographs_is_gone_after_a_call(size, monkeypatch):
    """Whether it ends well or in the middle; and so are the files of a pack, with their locks."""
    monkeypatch.setenv("LOCKSTEP_CACHE", str(Path.cwd() / "cache"))
    monkeypatch.setenv("LOCKSTEP_CACHE_SIZE", size)  # 0: photographs stay files
    draw = numpy.random.default_rng(0)
    for number in range(30):
        pixels = draw.integers(0, 256, (80, 90, 3), dtype=numpy.uint8)
        path = Path("photos") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    photos = {**TINY, "dataset": "photos", "augment": "resized_crop"}
    usual = sys.getswitchinterval()  # of who was here before
    sys.setswitchinterval(0.005)
    before = snapshot()
    seen = []

    class Looks(Net):
        def forward(self, x):
            seen.append((threading.active_count(), sys.getswitchinterval()))
            return super().forward(x)

    assert fit(Looks, **photos).status == "finished"
    assert min(seen)[0] > len(before["threads"]) and min(s for _, s in seen) < before["switches"]
    assert snapshot() == before

    class Fails(Looks):
        def forward(self, x):
            if self.training and len(seen) > 12:
                raise RuntimeError("in the middle")
            return super().forward(x)

    seen.clear()
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(Fails, **{**photos, "run_dir": "fails", "epochs": 9})
    gc.collect()  # the frames of an error stand in circles
    assert snapshot() == before
    sys.setswitchinterval(usual)
    assert bool(list(Path("cache").glob("*.pack"))) == (size != "0")
    monkeypatch.setenv("LOCKSTEP_CACHE_SIZE", "0")
    trim()
    assert not kept(), "another process may remove what no call uses any more"


def test_a_result_is_what_the_run_left():
    result = fit(model=Net, **{**TINY, "epochs": 2})
    assert (result.status, result.folder) == ("finished", Path("run"))
    steps, values = result.history["train/loss"]
    found = [(r["step"], r["train/loss"]) for r in rows(Path("run")) if "train/loss" in r]
    assert list(zip(steps, values, strict=True)) == found and len(found) == 8
    assert isinstance(values, numpy.ndarray)
    best = max(result.history["test/accuracy"][1])
    assert result.metrics["accuracy"] == best and str(round(best, 4)) in repr(result)
    assert type(result.model) is Net and not result.model.training
    weights = result.model.state_dict()
    from safetensors.torch import load_file

    kept = load_file("run/model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in weights.items())
    assert "forward" not in vars(result.model), "nothing of Accelerate hangs on it"


def test_a_users_own_accelerator_goes_on():
    mine = Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer = mine.prepare(net := nn.Linear(4, 4), torch.optim.SGD(net.parameters()))
    fit(Net, **TINY, mixed_precision="no")
    assert mine.mixed_precision == "bf16" and AcceleratorState().mixed_precision == "bf16"
    with mine.autocast():
        loss = model(torch.ones(2, 4)).sum()
        assert torch.is_autocast_enabled("cpu")
    mine.backward(loss)
    optimizer.step()


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        ({"epoch": 3}, "unknown-flag"),
        ({"epochs": "many"}, "bad-value"),
        ({"epochs": True}, "bad-value"),
        ({"optimizer": "adm"}, "bad-value"),
        ({"model": "alexnt"}, "unknown-model"),
        ({"model": "none.py:Net"}, "no-model-file"),
        ({"model": nn.Linear(2, 2)}, "not-a-module"),
        ({"model": dict}, "not-a-module"),
        ({"dry_run": True}, "not-in-fit"),
        ({"help": True}, "not-in-fit"),
        ({"plots": "yes"}, "unknown-flag"),
        ({"resume": "runs/none"}, "no-run"),
        ({"model": Net, "config": "none.yaml"}, "no-config-file"),
        ({"model": Net, "image_size": 0}, "bad-value"),
        ({"model": Net, "dataset": "line"}, "data-of-another-task"),
    ],
)
def test_a_mistake_is_the_command_lines_sentence_and_leaves_nothing(flags, code, capfd):
    before = snapshot()
    with pytest.raises(UserError) as error:
        fit(**flags)
    assert error.value.code == code
    assert snapshot() == before and not list(Path.cwd().iterdir())
    assert str(error.value) not in "".join(capfd.readouterr()), "the notebook shows it"


def test_several_mistakes_come_together_with_what_was_meant():
    with pytest.raises(UserError, match=r"(?s)--epoch: .*--epochs.*--optimzer: .*--optimizer"):
        fit(Net, epoch=3, optimzer="sgd")


def test_one_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as error:
        fit(Net)
    assert error.value.code == "one-process"


def test_the_first_interrupt_stops_and_saves_and_the_run_goes_on():
    stopped = fit(Interrupted, **TINY)
    assert stopped.status == "stopped" and not stopped.metrics
    assert stopped.history["train/loss"][0][-1] < 4
    went_on = fit(Interrupted, resume="run")
    assert went_on.status == "finished"
    assert list(went_on.history["train/loss"][0]) == [1, 2, 3, 4]
    whole = fit(Net, **{**TINY, "run_dir": "whole"})
    assert numpy.array_equal(whole.history["train/loss"][1], went_on.history["train/loss"][1])


def test_latest_is_the_link_or_where_there_is_none_the_newest_run():
    """A mounted drive takes no links, and its session ended without a word."""
    flags = {name: value for name, value in TINY.items() if name != "run_dir"}
    older = fit(Net, **flags, max_steps=1)
    stopped = fit(Interrupted, **flags)
    assert Path("runs/latest").resolve() == stopped.folder.resolve()
    Path("runs/latest").unlink()
    os.utime(older.folder / "status.json", (1, 1))
    said = python("-m", "report", "doctor", cwd=Path.cwd(), PYTHONPATH=str(REPOSITORY))
    assert f"{stopped.folder.name} is the newest run" in said.stderr, said.stderr
    asked = python(REPOSITORY / "predict.py", "nothing.png", cwd=Path.cwd())
    assert f"{stopped.folder.name} is the newest run" in asked.stderr, asked.stderr
    went_on = fit(Interrupted, resume="latest")
    assert went_on.folder == stopped.folder and went_on.status == "finished"
    assert list(went_on.history["train/loss"][0]) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "gone", "kept"),
    [
        ("COLAB_RELEASE_TAG", "/content/runs/a", "/content/drive/MyDrive/runs/a"),
        ("KAGGLE_KERNEL_RUN_TYPE", "/tmp/runs/a", "/kaggle/working/runs/a"),
    ],
)
def test_a_hosted_notebook_says_what_would_be_lost(name, gone, kept, monkeypatch):
    """The environments are made up here; no test runs on either host."""
    assert not where_it_runs(Path(gone))
    monkeypatch.setenv(name, "made up")
    [message] = where_it_runs(Path(gone))
    assert f"run_dir='{kept}'" in message and not where_it_runs(Path(kept))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    [message] = where_it_runs(Path(kept))
    assert "takes one of 2 GPUs" in message and "--nproc-per-node 2" in message


def test_the_second_interrupt_raises(monkeypatch):
    monkeypatch.setattr(Interrupted, "times", 2)
    before = snapshot()
    with pytest.raises(KeyboardInterrupt):
        fit(Interrupted, **TINY)
    assert snapshot() == before
    assert "interrupted twice" in json.loads(Path("run/status.json").read_text())["reason"]
    assert json.loads(Path("run/lock").read_text())["released"]
    assert fit(Interrupted, resume="run").status == "finished"


def test_each_call_has_a_folder_of_its_own_also_within_a_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    flags = {name: value for name, value in TINY.items() if name != "run_dir"}
    folders = [fit(Net, **flags, max_steps=1).folder for _ in range(2)]
    assert folders == [Path("runs/Net-digits-1"), Path("runs/Net-digits-2")]


@pytest.mark.slow
def test_wandb_leaves_with_the_call_unless_the_notebook_uses_it_too(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    before = snapshot()
    fit(Net, **TINY, track="wandb")
    assert list(Path("run/wandb").glob("offline-run-*")), "it was there"
    assert snapshot() == before
    theirs = wandb.init(mode="offline", dir=str(tmp_path), settings={"console": "off"})
    try:
        assert uses_wandb()
        fit(Net, **{**TINY, "run_dir": "other"}, track="wandb")
        assert list(Path("other/wandb").glob("offline-run-*")), "ours is another one"
        assert wandb.run is theirs, "what somebody else began goes on"
        theirs.log({"mine": 1.0})
        assert {key for key in dict(theirs.summary) if key[0] != "_"} == {"mine"}
        theirs.finish()
    finally:
        wandb.teardown()


# --- the source of a class ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_class_is_kept_with_all_that_it_uses_and_predicts_elsewhere(tried, capsys):
    fit(Net, **TINY)
    assert "does not stand alone" not in capsys.readouterr().out
    text = Path("run/code/Net.py").read_text()
    for line in ("import torch\n", "import torch.nn as nn\n", "WIDTH = 8\n"):
        assert line in text
    picture = Path("picture.png")

    Image.new("RGB", (16, 16), "white").save(picture)
    done = python(REPOSITORY / "predict.py", picture, "--run", "run", "--json", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    [found] = json.loads(done.stdout)
    assert len(found["predictions"]) == 5
    assert fit(resume="run", epochs=2).history["train/loss"][0][-1] == 8, "from its file"


def test_a_class_that_does_not_stand_alone_is_told(tried, capsys):
    class Inner(Net):
        """Its number is a variable of this function."""

        def forward(self, images):
            return super().forward(images) * times

    times = 1.0
    for made in (Inner, type("Lost", (Net,), {})):  # of the second, Python knows no source
        forget()
        flags = {**TINY, "run_dir": made.__name__, "max_steps": 1}
        assert fit(made, **flags).status == "finished"
        told = capsys.readouterr().out
        assert f"{made.__name__}.py does not stand alone" in told and "predict.py" in told


def test_the_class_is_trained_as_it_is_in_memory_and_a_mended_file_is_not_lost(monkeypatch):
    fit(Net, **TINY, max_steps=1)
    Path("run/code/Net.py").write_text("# mended\n")
    fit(Net, resume="run", max_steps=2)
    assert Path("run/code/Net.old-1.py").read_text() == "# mended\n"
    assert "class Net" in Path("run/code/Net.py").read_text()


def test_a_source_defines_what_it_uses_before_it_is_used():
    text = standalone_source(Interrupted)
    order = [text.index(f"{word} ") for word in ("def halved(images):\n   ", "class")]
    assert order == sorted(order)
    for first, then in (("def halved", "class Block"), ("class Block", "class Net"),
                        ("class Net", "class Interrupted")):  # fmt: skip
        assert text.index(first) < text.index(then)
    space: dict = {"__name__": "elsewhere"}
    exec(compile(text, "elsewhere.py", "exec"), space)
    assert space["Interrupted"](num_classes=3).eval()(torch.zeros(2, 3, 16, 16)).shape == (2, 3)


# --- against the command --------------------------------------------------------------------------


@pytest.mark.slow
def test_two_calls_of_other_precision_and_threads_give_the_numbers_of_two_fresh_processes(
    nets, tmp_path
):
    model = f"{nets / 'full.py'}:Net"
    both = {"a": {"mixed_precision": "bf16", "threads": 1}, "b": {"threads": 2}}
    for name, flags in both.items():
        torch.manual_seed(7)
        fit(model, **{**TINY, **flags, "run_dir": f"fit-{name}"})
    for name, flags in both.items():
        asked = {**TINY, **flags, "run_dir": f"command-{name}"}
        del asked["plots"]
        words = [f"--{key.replace('_', '-')}={value}" for key, value in asked.items()]
        done = train(["--model", model, "--no-plots", *words], tmp_path)
        assert done.status == 0, done.out
        assert rows(Path(f"fit-{name}")) == rows(Path(f"command-{name}"))
        last = [Path(f"{kind}-{name}/last.safetensors").read_bytes() for kind in ("fit", "command")]
        assert last[0] == last[1]


class Large(nn.Module):
    """A model of 16 MB, beside which a run's other things are small."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(768, 5200), nn.Linear(5200, 10))

    def forward(self, images):
        return self.layers(images)


def held_bytes() -> int:
    """Of all tensors that Python still knows, each storage once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.slow
def test_ten_calls_keep_less_memory_than_one_model():
    sizes = []
    for number in range(10):
        fit(Large, **{**TINY, "run_dir": f"run-{number}", "limit": 64})
        sizes.append(held_bytes())
    assert sizes[-1] - sizes[0] < 4 * 768 * 5200


NOTEBOOK = '''
import sys
sys.path.insert(0, {repository!r})
import torch
from torch import nn
from train import fit
scale = 2.0
---
class Cell(nn.Module):
    """Written in a cell."""
    def __init__(self, num_classes=10):
        super().__init__()
        self.head = nn.Linear(768, num_classes)
    def forward(self, images):
        return self.head(torch.flatten(images, 1)) * scale
---
result = fit(Cell, dataset="digits", image_size=16, epochs=3, threads=1, plots=False)
result
---
from common.errors import UserError
try:
    fit(Cell, epoch=3)
except UserError as error:
    print("code", error.code)
---
import pathlib, signal, threading, time
def interrupt():
    while not pathlib.Path("runs/Cell-digits-2/metrics.jsonl").exists():
        time.sleep(0.1)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
threading.Thread(target=interrupt).start()
print("then", fit(Cell, dataset="digits", image_size=16, epochs=9999, threads=1).status)
'''


def shown(cell) -> str:
    """What stands under a cell, as plain text."""
    return "\n".join(
        output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"]
        for output in cell.outputs
    )


@pytest.mark.slow
def test_a_notebook_with_a_class_in_a_cell(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    text = NOTEBOOK.format(repository=str(REPOSITORY))
    cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in text.split("---\n")]
    book = nbformat.v4.new_notebook(cells=cells)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=place).execute()
    _, _, trained, mistake, stopped = (shown(cell) for cell in cells)
    assert trained.count("epoch 1/3") == trained.count("epoch 3/3") == 1, trained
    assert "status='finished'" in trained and "does not stand alone" not in trained, trained
    assert "Cell-digits-1" in trained
    assert mistake.strip() == "code unknown-flag", "told once, by the one who caught it"
    assert "then stopped" in stopped, stopped
    assert "epoch 3/3" in (tmp_path / "runs/Cell-digits-1/train.log").read_text()
    assert "scale = 2.0" in (tmp_path / "runs/Cell-digits-1/code/Cell.py").read_text()
