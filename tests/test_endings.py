"""Endings that nobody plans: streams, disks and folders that go away while a run writes to them."""

import io
import json
import os
import runpy
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from launches import (
    REPOSITORY,
    SMALL,
    TRAIN,
    begun,
    command,
    environment,
    finish,
    interpreter,
    newest,
    rows,
    start,
    train,
    wait_for,
)
from rich.console import Console

from common.errors import UserError
from common.text import pasted
from distributed.checkpoint import Progress, card_of, save_tensors, write_checkpoint
from report.screen import Report, show_tracebacks
from training.checkpoints import Checkpoints
from training.run_dir import RunDir, launch_command

LONG = ["--model", "plain.py:Net", *SMALL, "--epochs", "400", "--checkpoint-every", "1000"]
SHORT = ["--model", "plain.py:Net", *SMALL, "--limit", "256", "--epochs", "2"]
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


def status_of(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


# --- streams -------------------------------------------------------------------------------------

SPEAKS = """
import sys
sys.path.insert(0, {repository!r})
from common.streams import lost_words, steady_streams
steady_streams()
first = open({path!r}, "w")
assert first.fileno() > 2
for number in range(3000):
    print("word", number, flush=True)
    print("word", number, file=sys.stderr, flush=True)
first.write(lost_words())
first.close()
"""


@posix
@pytest.mark.parametrize("flags", [[], ["-u"]])
@pytest.mark.parametrize(
    ("streams", "why"),
    [
        ("| true", "Broken pipe"),
        ("2>&1 | head -1", "Broken pipe"),
        ("> /dev/full", "No space left on device"),
        ("> /dev/full 2>&1", "No space left on device"),
        (">&- 2>&-", "it is closed"),
        ("<&- >&- 2>&-", "it is closed"),
        ("> /dev/null", ""),
    ],
)
def test_no_print_ends_a_process_whatever_its_streams_are(tmp_path, streams, why, flags):
    code = SPEAKS.format(repository=str(REPOSITORY), path=str(tmp_path / "told"))
    words = shlex.join([sys.executable, *flags, "-c", code])
    line = f"{{ {words}; echo $? > status; }} {streams}"
    subprocess.run(["sh", "-c", line], cwd=tmp_path, timeout=60)
    assert (tmp_path / "status").read_text() == "0\n"
    assert (tmp_path / "told").read_text() == why


ANSWERS = """
import sys
sys.path.insert(0, {repository!r})
from common.streams import exit_told
def main():
    {does}
    return 0
exit_told(main)
"""
LONG_ANSWER = "print('word ' * 100_000)"


@posix
@pytest.mark.parametrize(
    ("does", "streams", "status", "told"),
    [
        (LONG_ANSWER, "> /dev/null", 0, ""),
        (LONG_ANSWER, "| head -c 1 > /dev/null", 0, ""),
        ("print(1)", "> /dev/full", 1, "stdout cannot be written (No space left on device)\n"),
        (LONG_ANSWER, "> /dev/full", 1, "stdout cannot be written (No space left on device)\n"),
        ("print(1); sys.exit(2)", "> /dev/full", 2, ""),
        ("import _thread; _thread.interrupt_main()", "", 130, "\nstopped\n"),
    ],
)
def test_an_answer_that_a_disk_cuts_is_a_failure_and_one_that_a_reader_cuts_is_none(
    tmp_path, does, streams, status, told
):
    code = ANSWERS.format(repository=str(REPOSITORY), does=does)
    words = shlex.join([sys.executable, "-c", code])
    line = f"{{ {words} 2> told; echo $? > status; }} {streams}"
    subprocess.run(["sh", "-c", line], cwd=tmp_path, timeout=60)
    assert int((tmp_path / "status").read_text()) == status
    assert (tmp_path / "told").read_text() == told


@posix
def test_every_command_that_answers_on_stdout_ends_by_that_law():
    """Those that train, predict and submit have their own."""
    for place in ("config", "data", "export", "models", "report"):
        text = (REPOSITORY / place / "__main__.py").read_text()
        assert "\n    exit_told(" in text and "sys.exit(main" not in text, place


@posix
@pytest.mark.parametrize("words", ["train.py --help", "train.py --version", "predict.py --help"])
def test_help_that_a_disk_cuts_is_a_failure_too(words):
    line = f"{shlex.quote(sys.executable)} {words} > /dev/full"
    done = subprocess.run(["sh", "-c", line], cwd=REPOSITORY, capture_output=True, timeout=60)
    told = b"stdout cannot be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (1, told)


BREAKS = """

class Net(Net):
    def forward(self, images):
        breakpoint()
        return super().forward(images)
"""


def test_leaving_the_debugger_is_no_crash(nets):
    """q at breakpoint(), as here the end of stdin does: it was pages of traceback through pdb."""
    (nets / "breaks.py").write_text((nets / "plain.py").read_text() + BREAKS)
    done = train(["--model", "breaks.py:Net", *SMALL, "--debug"], nets)
    assert done.status == 1 and "(Pdb)" in done.out, done.out
    assert "the debugger was left: the run ends here" in done.out and "BdbQuit" not in done.out


@posix
def test_a_run_whose_reader_goes_away_trains_on_and_says_so(nets, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    process = interpreter().start(
        [TRAIN, *SHORT, "--run-dir", "unheard"], nets, tmp_path / "pipe",
        environment=environment(), errors=tmp_path / "errors",
    )  # fmt: skip
    wait_for(lambda: (nets / "unheard" / "metrics.jsonl").exists(), process, tmp_path / "errors")
    os.close(reader)
    done = finish(process, tmp_path / "errors")
    assert done.status == 0 and status_of(nets / "unheard")["status"] == "finished"
    assert done.out.count("stdout cannot be written (Broken pipe)") == 1
    log = (nets / "unheard" / "train.log").read_text()
    assert "stdout cannot be written (Broken pipe)" in log and "epoch 2/2" in log


@posix
def test_a_hangup_is_left_alone_where_it_was_ignored(monkeypatch):
    from distributed.stop import StopVote

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        vote = StopVote().install()
        os.kill(os.getpid(), signal.SIGHUP)
        assert vote.poll() == 0
        vote.uninstall()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- the folder ----------------------------------------------------------------------------------


def lose(nets: Path, name: str, take_away) -> str:
    """A run whose folder is taken away while it trains; what its end printed."""
    process, log = start(command([*LONG, "--run-dir", name]), nets)
    wait_for(begun(nets / name, 3), process, log)
    take_away(nets / name)
    done = finish(process, log, 120)
    assert done.status == 75 and "Traceback" not in done.out, done.out
    return done.out


@posix
def test_a_folder_that_is_renamed_stops_the_run_with_a_save_where_it_is_now(nets):
    out = lose(nets, "renamed", lambda folder: folder.rename(nets / "elsewhere"))
    assert "renamed was renamed to" in " ".join(out.split()) and not (nets / "renamed").exists()
    status = status_of(nets / "elsewhere")
    assert status["status"] == "stopped" and "renamed" in status["reason"]
    assert newest(nets / "elsewhere").name == f"step-{status['step']:09d}"
    steps = [row["step"] for row in rows(nets / "elsewhere") if "train/loss" in row]
    assert steps == list(range(1, status["step"] + 1))  # also those written meanwhile
    more = str(status["step"] + 2)
    done = train(["--resume", "elsewhere", "--stop-after", more], nets)
    assert done.status == 0 and f"at step {status['step']}" in done.out, done.out


@posix
def test_a_folder_that_is_deleted_or_replaced_stops_the_run_with_a_save_beside_it(nets):
    def replace(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)  # what was written meanwhile
        folder.mkdir()
        (folder / "mine.txt").write_text("another use of the name")

    out = lose(nets, "deleted", replace)
    beside = nets / "deleted.saved-0"
    assert "was deleted while it trained" in " ".join(out.split())
    names = {p.name for p in (nets / "deleted").iterdir()}
    assert "mine.txt" in names and not names & {"checkpoints", "config.json", "last.safetensors"}
    status = status_of(beside)
    assert status["status"] == "stopped"
    assert newest(beside).name == f"step-{status['step']:09d}"
    done = train(["--resume", "deleted.saved-0", "--stop-after", str(status["step"] + 2)], nets)
    assert done.status == 0 and f"at step {status['step']}" in done.out, done.out


def test_a_finished_run_without_its_checkpoints_stays_what_it_is(nets):
    assert train([*SHORT, "--run-dir", "thin"], nets).status == 0
    folder = nets / "thin"
    kept = [folder / name for name in ("model.safetensors", "metrics.jsonl")]
    before = [path.read_bytes() for path in kept]
    shutil.rmtree(folder / "checkpoints")
    done = train(["--resume", "thin"], nets)
    assert done.status == 0 and "this run is finished at step 8" in done.out, done.out
    assert "checkpoints of this run are gone" in " ".join(done.out.split())
    done = train(["--resume", "thin", "--epochs", "4"], nets)
    assert done.status == 2 and "--fresh" in done.out and "last.safetensors" in done.out, done.out
    assert [path.read_bytes() for path in kept] == before
    (folder / "last.safetensors").unlink()  # and a run of which only the status knows
    done = train(["--resume", "thin"], nets)
    assert done.status == 2 and [path.read_bytes() for path in kept] == before, done.out
    assert status_of(folder)["status"] == "finished"


@pytest.mark.slow
def test_weights_suffice_to_go_on_where_updates_need_no_more(nets):
    words = [*SHORT, "--optimizer", "sgd", "--momentum", "0", "--lr", "0.1"]
    words += ["--schedule", "constant"]
    assert train([*words, "--run-dir", "stateless"], nets).status == 0
    shutil.rmtree(nets / "stateless" / "checkpoints")
    assert train(["--resume", "stateless", "--epochs", "4"], nets).status == 0
    assert train([*words, "--run-dir", "straight", "--epochs", "4"], nets).status == 0
    assert rows(nets / "stateless") == rows(nets / "straight")


LEAVES = '''
import sys
from torch import nn
from plain import Net as Plain

class Net(Plain):
    """Ends the process in its fifth step, as a script of an older project does."""
    calls = 0
    def forward(self, x):
        self.calls += self.training
        if self.calls > 5:
            sys.exit(0)
        return super().forward(x)
'''


def test_a_model_that_leaves_python_is_no_run_that_is_running_or_finished(nets):
    (nets / "leaves.py").write_text(LEAVES)
    done = train([*SHORT, "--model", "leaves.py:Net", "--run-dir", "left"], nets)
    assert done.status == 1 and "SystemExit" in done.out, done.out
    status = status_of(nets / "left")
    assert status["status"] == "failed" and "SystemExit" in status["reason"]


@pytest.fixture
def everybodys():
    """A folder that all may enter: pytest's own are closed to other users."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_nobody(work) -> str:
    """The UserError of work() where files of others may not be written; "" for none."""
    if os.geteuid():
        try:
            work()
        except UserError as error:
            return str(error)
        return ""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        told = ""
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            work()
        except UserError as error:
            told = str(error)
        except BaseException as error:
            told = f"no sentence: {error!r}"
        os.write(theirs, told.encode())
        os._exit(0)
    os.close(theirs)
    os.waitpid(child, 0)
    with os.fdopen(ours, encoding="utf-8") as file:
        return file.read()


@posix
@pytest.mark.parametrize(
    "name", ["", "lock", "train.log", "metrics.jsonl", "checkpoints", "crash", "code"]
)
def test_a_folder_of_somebody_else_that_may_not_be_written_in_part_is_a_sentence(everybodys, name):
    folder = everybodys / "theirs"
    for place in (folder, folder / "checkpoints", folder / "crash", folder / "code"):
        place.mkdir(mode=0o777)
        place.chmod(0o777)
    for file in ("lock", "train.log", "metrics.jsonl", "config.json"):
        (folder / file).write_text("{}" if file == "lock" else "")
        (folder / file).chmod(0o666)

    def enter() -> None:
        made = RunDir(folder)
        made.open()
        made.close()

    assert as_nobody(enter) == ""
    (folder / name).chmod(0o555 if (folder / name).is_dir() else 0o444)
    told = as_nobody(enter)
    (folder / name).chmod(0o777)
    place = str(folder / name) if name else str(folder)
    assert told.startswith(f"{place} cannot be written (Permission denied)"), told
    assert "--run-dir" in told and f"cp -r {folder}" in told


@posix
@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_files_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
        files = {"model": {"a": torch.zeros(2)}, "optimizer": {}}
        made = write_checkpoint(tmp_path / "checkpoints", files, Progress(step=1), {})
    finally:
        os.umask(before)
    found = [tmp_path / "model.safetensors", *made.iterdir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o666 & ~mask}


def test_a_checkpoint_makes_no_folder_where_the_run_was(tmp_path):
    files = {"model": {"a": torch.zeros(2)}, "optimizer": {}}
    with pytest.raises(OSError, match="No such file"):
        write_checkpoint(tmp_path / "gone" / "checkpoints", files, Progress(step=1), {})
    assert not (tmp_path / "gone").exists()


@posix
def test_an_end_is_written_on_a_disk_without_room(tmp_path):
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "x", str(tmp_path)])
    if done.returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        made = RunDir(tmp_path / "run")
        made.folder.mkdir()
        made.status(status="running", step=12345, reason="", lives=[{"life": 0}] * 3)
        with (tmp_path / "fill").open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(1024))
        made.status(status="stopped", reason="a stop signal (SIGTERM)")
        found = made.read_status()
        assert (found["status"], found["step"], len(found["lives"])) == ("stopped", 12345, 3)
    finally:
        subprocess.run(["umount", str(tmp_path)])


def test_weights_that_the_disk_refused_are_written_once_there_is_room(tmp_path):
    made = Checkpoints.__new__(Checkpoints)
    made.folder, made.facts, made.card, made._waiting = tmp_path, {}, {"model": "m"}, {}
    made.writer = object()

    class Learner:
        value = 1.0

        def weights(self):
            return {"a": torch.full((2,), self.value)}

    learner = Learner()
    assert made.save_weights("model.safetensors", learner, Progress(step=3)) == ""
    (tmp_path / "model.safetensors.partial").mkdir()  # what cannot be written over
    for step in (6, 9):
        learner.value = float(step)
        told = made.save_weights("model.safetensors", learner, Progress(step=step))
        assert "model.safetensors could not be written" in told
        assert card_of(tmp_path / "model.safetensors")["step"] == 3
    assert "last" not in made.save_weights("last.safetensors", learner, Progress(step=9))
    assert card_of(tmp_path / "last.safetensors")["step"] == 9  # one does not hold up the other
    learner.value = 12.0  # later weights, which are not the best
    (tmp_path / "model.safetensors.partial").rmdir()
    assert made.write_waiting() == "" and not made._waiting
    assert card_of(tmp_path / "model.safetensors")["step"] == 9
    from safetensors.torch import load_file

    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [9.0, 9.0]


# --- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "two words", "a'b", "$(touch planted)", "a;b"])
def test_a_command_that_is_shown_can_be_pasted_where_the_run_was_typed(tmp_path, name):
    for place in (REPOSITORY, tmp_path, REPOSITORY / "docs"):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            words = shlex.split(pasted("predict.py", "PICTURE.png", "--run", Path("runs") / name))
            assert words[0] == "python" and words[2:] == ["PICTURE.png", "--run", f"runs/{name}"]
            assert Path(words[1]).resolve() == REPOSITORY / "predict.py"
    assert pasted("train.py").split()[1] == "train.py" or Path.cwd() != REPOSITORY


@pytest.mark.parametrize("length", [10, 60, 90, 300])
@pytest.mark.parametrize("width", [60, 100, 200])
def test_no_frame_breaks_a_command(tmp_path, length, width):
    file = io.StringIO()
    made = Report(console=Console(file=file, width=width, force_terminal=False))
    made.attach(tmp_path)
    line = "sh " + "x" * length
    made.end_panel("finished", [("a longer name", "1")], True, [("repeat", line), ("go on", "b")])
    made.close()
    for text in (file.getvalue(), (tmp_path / "train.log").read_text()):
        assert line in text and "go on" in text


@posix
def test_the_command_file_works_from_anywhere(tmp_path, monkeypatch):
    typed, elsewhere = tmp_path / "my files", tmp_path / "elsewhere"
    (tmp_path / "bin").mkdir()
    for place in (typed, elsewhere):
        place.mkdir()
    show = tmp_path / "bin" / "python"
    show.write_text(f"#!{sys.executable}\nimport json, os, sys\n")
    with show.open("a") as file:
        file.write("print(json.dumps([os.getcwd(), os.path.realpath(sys.argv[1]), sys.argv[2:]]))")
    show.chmod(0o755)
    monkeypatch.chdir(typed)
    made = RunDir(tmp_path)
    made.write_birth("{}", launch_command(["--model", "net.py:Net"], 1), {})
    path = f"{show.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", str(tmp_path / "command.sh")], capture_output=True, text=True, cwd=elsewhere,
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    assert json.loads(done.stdout) == [str(typed), TRAIN, ["--model", "net.py:Net"]]


def test_a_model_whose_shapes_part_is_told_in_a_sentence_and_in_few_lines_with_debug(nets):
    (nets / "parts.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self, num_classes=10):\n"
        "        super().__init__()\n"
        "        self.head = nn.Linear(5, num_classes)\n\n"
        "    def forward(self, images):\n"
        "        return self.head(images.flatten(1))\n"
    )
    words = ["--model", "parts.py:Net", *SMALL]
    done = train([*words, "--run-dir", "parts"], nets)
    assert done.status == 2 and "python -m models parts.py:Net --image-size 16" in done.out
    debug = train([*words, "--debug"], nets)
    assert "RuntimeError: mat1 and mat2 shapes cannot be multiplied" in debug.last_lines
    assert "return self.head(images.flatten(1))" in debug.out
    assert "images = tensor (16, 3, 16, 16), float32" in debug.out
    for held in ("plan = ", "settings = ", "learner = "):  # by main() and what is around it
        assert held not in debug.out, debug.out


def test_tensors_are_short_in_the_traceback_and_whole_for_a_debugger(tmp_path, monkeypatch, capsys):
    """As with python -m pdb train.py --debug, which looks at them after it."""
    (tmp_path / "own.py").write_text("import torch\nheld = torch.ones(2)\nheld.nothing\n")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    show_tracebacks()
    with pytest.raises(AttributeError) as raised:
        runpy.run_path(str(tmp_path / "own.py"))
    assert repr(torch.ones(2)) == "tensor([1., 1.])"
    sys.excepthook(raised.type, raised.value, raised.tb)
    assert "held = tensor (2,), float32" in capsys.readouterr().err
    assert repr(torch.ones(2)) == "tensor([1., 1.])"
