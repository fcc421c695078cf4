"""Many runs of one command: rows, folds, and each row the run that it is alone."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from launches import REPOSITORY, begun, command, finish, python, rows, start, train, wait_for
from refusals import refused

from config import parse
from config.rows import Row, Rows, read_sweep
from data.sources import load_source
from data.splits import folded, keyed_folds, keyed_split
from distributed.stop import SIGNALS
from distributed.watch import alive
from many import crew as crews
from many import folder as folders
from many import starts
from training.out_of_fold import FILE

SMALL = ["--model", "my_cnn", "--dataset", "digits", "--image-size", "16", "--batch-size", "64"]
SMALL += ["--weights", "none", "--threads", "1", "--no-plots", "--log-every", "1"]


def written(folder, text, name="s.yaml"):
    (folder / name).write_text(text)
    return str(folder / name)


# --- rows ----------------------------------------------------------------------------------------


def test_a_grid_is_each_value_with_each_and_seeds_and_folds_multiply(tmp_path):
    file = written(tmp_path, "lr: [0.1, 2e-1]\nnesterov: [yes, off]\nepochs: 3\n")
    found = parse(["--sweep", file, "--optimizer", "sgd", "--seeds", "2", "--seed", "7"]).rows
    assert [row.words for row in found.rows[:3]] == [
        ["--lr", "0.1", "--nesterov", "--epochs", "3", "--seed", "7"],
        ["--lr", "0.1", "--nesterov", "--epochs", "3", "--seed", "8"],
        ["--lr", "0.1", "--no-nesterov", "--epochs", "3", "--seed", "7"],
    ]
    assert found.base == ("--optimizer", "sgd") and len(found.rows) == 8
    assert found.rows[0].name == "000-lr0.1-nesterovyes-epochs3-seed7"
    words = found.words(found.rows[5])
    assert words[-2:] == ["--run-dir", "runs/s-seeds2/005-lr2e-1-nesterovyes-epochs3-seed8"]
    config = parse(words).config
    assert (config.lr, config.seed, config.nesterov, config.epochs) == (0.2, 8, True, 3)
    folds = parse(["--dataset", "digits", "--folds", "3", "--run-dir", "x"]).rows
    assert [row.values for row in folds.rows] == [{"fold": f"{k}/3"} for k in (1, 2, 3)]
    assert str(folds.folder) == "x" and len({row.name for row in folds.rows}) == 3


def test_rows_are_as_they_stand_and_array_jobs_get_the_same(tmp_path):
    file = written(tmp_path, "- {lr: 0.1, momentum: 0.8}\n- augment: 'crop|erase(0.25)'\n")
    assert [values for _, values in read_sweep(tmp_path / "s.yaml")] == [
        {"lr": "0.1", "momentum": "0.8"}, {"augment": "crop|erase(0.25)"},
    ]  # fmt: skip
    words = ["--sweep", file, "--dataset", "digits"]
    told = parse(words).rows.content()
    assert json.loads(python("-m", "config", "--json", *words).stdout) == told
    done = python(
        "launch/submit.py", "--gpus", "2", "--nodes", "8", "--dry-run", "--sweep", file, "--",
        "--dataset", "digits", "--model", "my_cnn", "--batch-size", "64",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for row in told["rows"]:
        own = [word for word in row["words"] if word not in ("--dataset", "digits")]
        assert " ".join(own).replace("'", "") in done.stdout.replace("'", "")
    assert "nothing was submitted" in done.stdout and "--array=0-1" in done.stdout
    assert "16: 8 nodes x 2 GPUs" in done.stdout and "64 = 16 x 4 images" in done.stdout
    assert "warning: 4 images are left for each GPU" in done.stdout


def test_an_array_job_may_have_rows_more_at_the_end_and_no_others(tmp_path):
    """What docs/many-runs.md promises of a file, wherever its rows run."""
    words = ["--dataset", "digits", "--model", "my_cnn", "--run-dir", str(tmp_path / "x")]
    told = parse([*words, "--seeds", "2"]).rows.content()
    (tmp_path / "x").mkdir()
    submit = ["launch/submit.py", "--dry-run", "--", *words]
    for kept, seeds, status in ((told, 3, 0), (told, 1, 2), ({"base": []}, 2, 2)):
        (tmp_path / "x" / "sweep.json").write_text(json.dumps(kept))
        done = python(*submit, "--seeds", str(seeds))
        assert done.returncode == status, (kept, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr


def test_what_another_command_wrote_until_the_lock_was_ours_counts(tmp_path, monkeypatch):
    """Both find an empty folder; the second one has the lock when the first one has ended."""
    folder = tmp_path / "x"
    rows = Rows(folder, ("--model", "my_cnn"), (Row(0, "", {"lr": "0.1"}),))
    others = Rows(folder, ("--model", "alexnet"), rows.rows).content()
    monkeypatch.setattr(
        folders.fcntl,
        "lockf",
        lambda *_: (folder / "sweep.json").write_text(json.dumps(others)),
    )
    with (
        refused("other-sweep", match="holds other runs: --model alexnet"),
        folders.entered(rows),
    ):
        pass
    assert json.loads((folder / "sweep.json").read_text()) == others
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "letter.txt").write_text("")
    with refused("run-dir-foreign"), folders.entered(Rows(tmp_path / "own", (), rows.rows)):
        pass
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "lr: [0.1, x]\nmomentm: 1\n",
            r"line 1: lr 'x': must be a number\n.*line 2: momentm: no.*",
        ),
        ("lr: [0.1]\nlr: [0.2]\n", "line 2: lr stands there twice"),
        ("lr: [0.1, 0.1]\n", "line 1: lr: a value stands there twice"),
        ("lr: []\n", "line 1: lr: the list is empty"),
        ("run_dir: [a, b]\n", "line 1: run_dir: is no row's own"),
        ("- {lr: [1, 2]}\n", "line 1: lr: a row has one value"),
        ("- {lr: 0.1}\n- hello\n", "line 2: a row is written as"),
        ("lr: [0.1\n", "line 2: is no valid YAML"),
        ("hello\n", "write a grid"),
        ("[]\n", "holds no row"),
        ("lr:\n", "line 1: lr: a value is a number or a word"),
        (f"seed: {list(range(200))}\nepochs: {list(range(1, 100))}\n", "19,800 runs"),
        (
            "- {lr: 0.1}\n- {optimizer: adamw, nesterov: true}\n",
            r"s.yaml, line 2: .*adamw has none",
        ),
    ],
)
def test_a_bad_file_is_told_with_its_line(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        parse(["--sweep", written(tmp_path, text)])


def test_what_contradicts_several_runs_is_refused(tmp_path, monkeypatch):
    file = written(tmp_path, "lr: [0.1]\nseed: [1, 2]\n")
    with refused("contradiction", match="--lr stands in the command and in its rows"):
        parse(["--sweep", file, "--lr", "0.3"])
    with refused("contradiction", match="--seeds both say what seed is"):
        parse(["--sweep", file, "--seeds", "2"])
    with refused("contradiction", match="--resume is of one run"):
        parse(["--seeds", "2", "--resume", "runs/x"])
    with refused("contradiction", match="--side-by-side is of several"):
        parse(["--side-by-side", "2"])
    with refused("contradiction", match="--fold and --split"):
        parse(["--fold", "1/5", "--split", "runs/x"])
    for fold in ("0/5", "6/5", "1/1", "x"):
        with refused("bad-value", match="--fold"):
            parse(["--fold", fold])
    with refused("image-too-small", match="^--image-size"):  # a mistake of all is told as theirs
        parse(["--seeds", "3", "--model", "alexnet", "--image-size", "8"])
    monkeypatch.setenv("RANK", "0")
    with refused("under-a-launcher", match=r"submit\.py"):
        parse(["--seeds", "2"])


def test_the_folder_may_stand_in_a_file_and_be_typed_otherwise_later(tmp_path):
    file = written(tmp_path, f"run_dir: {tmp_path}/mine\nseed: 5\n")
    found = parse(["--config", file, "--seeds", "2"]).rows
    assert found.folder == tmp_path / "mine"
    assert [row.values for row in found.rows] == [{"seed": "5"}, {"seed": "6"}]
    with folders.entered(found):
        pass
    typed = os.path.relpath(tmp_path / "mine")
    words = ["--config", file, "--seeds"]
    with folders.entered(parse([*words, "3", "--run-dir", typed]).rows):  # a row more, at the end
        pass
    kept = json.loads((tmp_path / "mine" / "sweep.json").read_text())
    assert [row["name"] for row in kept["rows"]] == ["000-seed5", "001-seed6", "002-seed7"]
    with (
        refused("other-sweep", match="002-seed7 is not as it was"),
        folders.entered(parse([*words, "2"]).rows),
    ):
        pass


# --- who starts them -----------------------------------------------------------------------------


class Process:
    """A row's process that ends when it is told to, else after a few looks."""

    def __init__(self, words):
        self.words, self.looks, self.told = words, 0, 0

    def poll(self):
        self.looks += 1
        return 0 if self.told or self.looks > 3 else None

    def terminate(self):
        self.told += 1

    def kill(self):
        self.told += 1


class Board:
    """Nobody looks."""

    def started(self, turn):
        pass

    ended = started

    def tick(self):
        pass


def crew(monkeypatch, folder, words=(), side_by_side=2, left=3, board=None, at_start=lambda: 0):
    """The processes that a crew starts of three rows, of which some are left."""
    made = []

    def start(words, output, environment):
        made.append(Process(words))
        at_start()
        return made[-1]

    monkeypatch.setattr(crews, "warm_interpreter", lambda: contextlib.nullcontext(start))
    monkeypatch.setattr(crews, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(crews, "cpus", lambda: 6)
    every = tuple(Row(n, "", {"seed": str(n)}) for n in range(3))
    rows = Rows(folder, tuple(words), every, side_by_side)
    turns = [folders.Turn(row, folder / row.name) for row in every[3 - left :]]
    crews.Crew(rows, turns, min(side_by_side or 1, left), [], board or Board()).work()
    return made


def test_a_signal_that_meets_a_row_while_it_starts_stops_it_too(monkeypatch, tmp_path):
    """It would train to its end otherwise, and the command wait for it."""
    interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    made = crew(monkeypatch, tmp_path, side_by_side=1, at_start=interrupt)
    assert [process.told for process in made] == [1]


@pytest.mark.parametrize("name", SIGNALS)
def test_what_stops_a_run_stops_many(monkeypatch, tmp_path, name):
    """Else the command would be gone at once, and its rows be killed."""
    seen, number = set(), getattr(signal, name, None)
    if number is None:
        pytest.skip("not here")
    before, board = signal.getsignal(number), Board()
    board.tick = lambda: seen.add(signal.getsignal(number))
    crew(monkeypatch, tmp_path, board=board)
    assert seen != {before} and signal.getsignal(number) == before


def threads(made):
    found = [parse(process.words).config.threads for process in made]
    return found[0] if len(set(found)) == 1 else found


def test_a_row_has_the_threads_of_so_many_as_were_asked_for(monkeypatch, tmp_path):
    """However many are left: the bits depend on it, and seeds of other threads stand apart."""
    assert threads(crew(monkeypatch, tmp_path)) == 3
    assert threads(crew(monkeypatch, tmp_path, left=1)) == 3
    assert threads(crew(monkeypatch, tmp_path, side_by_side=9)) == 2
    assert threads(crew(monkeypatch, tmp_path, side_by_side=0)) == 0
    assert threads(crew(monkeypatch, tmp_path, ["--threads", "5"])) == 5
    file = written(tmp_path, "threads: 4\n", "t.yaml")
    assert threads(crew(monkeypatch, tmp_path, ["--config", file])) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="all start cold")
def test_what_is_compiled_starts_cold_whoever_says_so(monkeypatch, tmp_path):
    file, started = written(tmp_path, "compile: true\n", "c.yaml"), []
    warm = contextlib.nullcontext(Board())
    warm.enter_result.start = lambda *words, **more: started.append("warm")
    monkeypatch.setattr("launch.preloaded.Interpreter", lambda environment: warm)
    monkeypatch.setattr(starts, "_cold", lambda *words: started.append("cold"))
    with starts.warm_interpreter() as start:
        for words in ([], ["--compile"], ["--config", file], ["--config", file, "--no-compile"]):
            start(words, tmp_path / "x.txt", {})
    assert started == ["warm", "cold", "cold", "warm"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a terminal's signal")
def test_under_nohup_the_terminal_may_go(monkeypatch, tmp_path):
    seen, board = set(), Board()
    board.tick = lambda: seen.add(signal.getsignal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        crew(monkeypatch, tmp_path, board=board)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == {signal.SIG_IGN}


def test_what_a_row_says_lies_beside_its_folder_under_its_whole_name():
    assert folders.Turn(Row(0, "", {}), Path("s/000-lr0.003")).output == Path("s/000-lr0.003.txt")


# --- folds ---------------------------------------------------------------------------------------


def test_each_picture_tests_in_exactly_one_fold_and_classes_are_spread():
    names = [f"{n}.png".encode() for n in range(1000)]
    labels = [0 if n < 900 else 1 if n < 993 else 2 for n in range(1000)]
    folds = keyed_folds(names, labels, 5)
    assert set(folds) == set(range(5))
    for label, low, high in ((0, 90, 270), (1, 10, 27), (2, 1, 2)):
        counts = [sum(f == k and of == label for f, of in zip(folds, labels, strict=True))
                  for k in range(5)]  # fmt: skip
        assert low <= min(counts) and max(counts) <= high, (label, counts)
    # The first of five is the fifth that tests, where that needs no mending; the order is nothing.
    fifth = keyed_split(names[:900], labels[:900])
    assert [fold == 0 for fold in keyed_folds(names[:900], labels[:900], 5)] == fifth
    assert keyed_folds(names[:900][::-1], labels[:900], 5)[::-1] == folds[:900]
    # What shares a group stays together.
    groups = [str(n % 50) for n in range(1000)]
    grouped = keyed_folds(names, [0] * 1000, 4, groups)
    assert len({*zip(groups, grouped, strict=True)}) == 50


def test_the_folds_of_a_data_set_cover_it_and_keep_its_labels():
    source = load_source("digits")
    known = {f"{side}/{n}": int(label) for side, part in (("train", source.train),
             ("test", source.test)) for n, label in enumerate(part.labels)}  # fmt: skip
    seen = []
    for k in range(1, 4):
        part = folded(source, f"{k}/3")
        seen += part.names["test"]
        assert not {*part.names["test"]} & {*part.names["train"]}
        assert len(part.names["train"]) + len(part.names["test"]) == len(known)
        for side, pictures in (("train", part.train), ("test", part.test)):
            assert [known[name] for name in part.names[side]] == pictures.labels.tolist()
        where, place = part.names["test"][5].split("/")
        theirs = getattr(source, where).images[int(place)]
        assert torch.equal(part.test.images[5], theirs)
        assert part.fingerprint != source.fingerprint
    assert sorted(seen) == sorted(known)
    with refused("no-folds"):
        folded(load_source("line"), "1/3")


def test_a_fold_that_is_stopped_in_its_last_pass_says_so_and_the_next_life_answers(tmp_path):
    """Else it would be finished for ever, and its pictures missing among the suspects."""
    words = [*SMALL, "--epochs", "1", "--fold", "1/3", "--run-dir", "one"]
    first = train(words, tmp_path, LOCKSTEP_FAULT="term@point=fold,life=0")
    status = json.loads((tmp_path / "one" / "status.json").read_text())
    assert first.status == 75 and status["status"] == "stopped", first.out
    assert "SIGTERM" in status["reason"] and not (tmp_path / "one" / FILE).exists()
    assert train(words, tmp_path).status == 0
    assert (tmp_path / "one" / FILE).is_file()
    assert json.loads((tmp_path / "one" / "status.json").read_text())["status"] == "finished"


# --- launches ------------------------------------------------------------------------------------


def same(one, other):
    """Whether two runs gave the same rows and the same best weights, bit for bit."""
    weights = [(folder / "model.safetensors").read_bytes()[-4096:] for folder in (one, other)]
    assert rows(one) == rows(other) and weights[0] == weights[1]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder in which a sweep of three rows ran, of which one must fail."""
    folder = tmp_path_factory.mktemp("swept")
    written(folder, "- {lr: 0.02}\n- {class_weights: '1,2'}\n- {seed: 3}\n")
    sweep = command(["--sweep", "s.yaml", *SMALL, "--max-steps", "4", "--side-by-side", "2"])
    done = finish(*start(sweep, folder))
    assert done.status == 1, done.out
    return folder, sweep, done.out


def test_a_row_is_the_run_that_it_is_alone_and_one_that_fails_stops_nobody(swept):
    folder, _, out = swept
    alone = train([*SMALL, "--max-steps", "4", "--lr", "0.02", "--run-dir", "alone"], folder)
    assert alone.status == 0, alone.out
    first, second, third = (folder / "runs" / "s" / name for name in
                            ("000-lr0.02", "001-class_weights1_2", "002-seed3"))  # fmt: skip
    same(folder / "alone", first)
    assert not list(first.glob("checkpoints/step-*")) and not (first / "last.safetensors").exists()
    assert json.loads((third / "status.json").read_text())["status"] == "finished"
    assert "2 of 3 done, 1 failed" in out and "001-class_weights1_2: " in out, out
    assert "--class-weights" in out.split("failed")[-1] and not (second / "config.json").exists()
    assert "about" in out and "GB free; best weights only" in out
    assert (folder / "runs" / "s" / "compare.html").is_file()


def test_the_same_command_skips_what_is_finished_and_another_is_refused(swept):
    folder, sweep, _ = swept
    before = (folder / "runs" / "s" / "000-lr0.02" / "status.json").read_bytes()
    done = finish(*start(sweep, folder))
    assert done.status == 1 and "2 are finished already" in done.out, done.out
    assert "000-lr0.02  started" not in done.out and "001-class_weights1_2  started" in done.out
    assert (folder / "runs" / "s" / "000-lr0.02" / "status.json").read_bytes() == before
    other = train(["--sweep", "s.yaml", *SMALL, "--max-steps", "5"], folder)
    assert other.status == 2 and "holds other runs" in other.out, other.out


@pytest.mark.slow
def test_stopped_then_killed_with_its_rows_the_same_command_makes_the_undisturbed_runs(tmp_path):
    words = [*SMALL, "--epochs", "12", "--checkpoint-every", "5", "--no-flip"]
    sweep = command(["--seeds", "2", *words, "--side-by-side", "2", "--run-dir", "many"])
    first, second = tmp_path / "many" / "000-seed0", tmp_path / "many" / "001-seed1"
    stopped, log = start(sweep, tmp_path)
    wait_for(begun(second, 8), stopped, log)
    stopped.send_signal(signal.SIGTERM)
    done = finish(stopped, log)
    assert done.status == 75 and "again" in done.out, done.out
    assert json.loads((first / "status.json").read_text())["status"] == "stopped"
    killed, log = start(sweep, tmp_path)
    at = len(rows(first))
    wait_for(lambda: begun(first, at + 8)(), killed, log)
    pids = [json.loads((one / "status.json").read_text())["pid"] for one in (first, second)]
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(60)
    end = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < end, "orphans"
        time.sleep(0.1)
    done = finish(*start(sweep, tmp_path))
    assert done.status == 0 and "2 of 2 done" in done.out, done.out
    for seed, folder in enumerate((first, second)):
        name = f"alone-{seed}"
        assert train([*words, "--seed", seed, "--run-dir", name], tmp_path).status == 0
        same(tmp_path / name, folder)


def test_a_guard_of_train_py_hands_over_before_torch(tmp_path):
    """A wrong sweep is told in a blink: nothing heavy is imported for it."""
    code = "import sys; sys.argv = ['train.py', '--sweep', 'none.yaml']\n"
    code += "import runpy\ntry: runpy.run_path('train.py', run_name='__main__')\n"
    code += "except SystemExit as e: print(e.code, 'torch' in sys.modules, 'rich' in sys.modules)"
    script = tmp_path / "look.py"
    script.write_text(f"import os; os.chdir({str(REPOSITORY)!r}); sys = __import__('sys')\n"
                      f"sys.path.insert(0, {str(REPOSITORY)!r})\n" + code)  # fmt: skip
    import subprocess
    import sys

    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.stdout.strip() == "2 False False", done.stderr
    assert "none.yaml: No such file" in done.stderr


@pytest.mark.slow
def test_a_rehearsal_of_many_processes_has_their_shards_and_warns_of_few_images(tmp_path):
    words = ["--model", "resnet18", "--dataset", "digits", "--image-size", "16", "--threads", "1"]
    with refused("contradiction", match="python train.py --dry-run --as 4"):
        parse([*words, "--as", "4"])
    done = train([*words, "--dry-run", "--as", "16", "--batch-size", "64"], tmp_path)
    assert done.status == 0, done.out
    for said in ("64 = 16 processes x 1 shard x 4 images", "sees 4 images at a time", "estimate"):
        assert said in done.out, done.out
    assert "--nodes 2 --gpus 8 -- --model resnet18" in done.out
    assert not (tmp_path / "runs").exists()
    assert "4 images a step are left" in done.out and "--batch-size 64" in done.out
    odd = train([*words, "--dry-run", "--as", "16", "--batch-size", "60"], tmp_path)
    assert odd.status == 2 and "48 and 64 do" in odd.out, odd.out
