"""Jobs on a real SLURM: the same run, stops that lose nothing, ends that are told.

Run with: pytest -m slurm tests/test_slurm.py    (Debian: apt-get install slurm-wlm munge; root)
"""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launches import linked_repository
from safetensors.torch import load_file
from slurm_cluster import Cluster, why_not

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
ROOT = Path(__file__).resolve().parent.parent
STEPS = 20
TRAIN = ["--model", "resnet18", "--dataset", "digits", "--image-size", "16", "--limit", "128",
         "--batch-size", "16", "--lr", "0.01", "--threads", "1", "--log-every", "1",
         "--no-plots", "--max-steps", str(STEPS)]  # fmt: skip
JOB = {"LOCKSTEP_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def require_slurm(apart: bool = False) -> None:
    reason = why_not(apart)
    if reason and os.environ.get("LOCKSTEP_REQUIRE_SLURM") == "1":
        pytest.fail(f"LOCKSTEP_REQUIRE_SLURM=1, but {reason}")
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    require_slurm()
    with Cluster(tmp_path_factory.mktemp("slurm"), gpus=2) as cluster:
        cluster.home = linked_repository(tmp_path_factory.mktemp("home") / "lockstep")
        yield cluster


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one process, without SLURM: what all others must equal."""
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, str(ROOT / "train.py"), *TRAIN, "--shards", "2"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    subprocess.run([*command, "--run-dir", "run"], cwd=folder, env={**env, **JOB}, check=True,
                   capture_output=True, timeout=600)  # fmt: skip
    return folder / "run"


def sbatch(slurm: Cluster, *words: str, flags: list[str] = TRAIN, **env: str) -> str:
    command = ["sbatch", "--parsable", *words, "launch/slurm.sbatch", *flags]
    return slurm.run(*command, cwd=slurm.home, env={**JOB, **env}).strip()


def log(slurm: Cluster, job: str) -> str:
    path = slurm.home / f"slurm-{job}.out"
    return path.read_text() if path.exists() else "no log"


def status(slurm: Cluster, job: str) -> dict:
    try:
        return json.loads((slurm.home / "runs" / f"slurm-{job}" / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def wait_for_step(slurm: Cluster, job: str, step: int) -> None:
    deadline = time.monotonic() + 90
    while not (
        status(slurm, job).get("status") == "running" and status(slurm, job)["step"] >= step
    ):
        assert time.monotonic() < deadline, log(slurm, job)
        time.sleep(0.1)


def wait_for_life(slurm: Cluster, job: str, life: int) -> None:
    deadline = time.monotonic() + 240
    while not (
        status(slurm, job).get("life") == life and status(slurm, job)["status"] == "running"
    ):
        assert time.monotonic() < deadline, log(slurm, job)
        time.sleep(0.1)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_history(run: Path, other: Path, relative: float = 1e-6) -> None:
    mine, theirs = rows(run), rows(other)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for a, b in zip(mine, theirs, strict=True):
        for name in ("train/loss", "test/loss", "lr"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=relative), (a, b)
        assert a.get("test/accuracy") == b.get("test/accuracy")


# Of bash, of srun: of ends that are none.
NOISE = (" line ", "Terminated", "Exited with exit code", "ended with exit status")


def doctor(slurm: Cluster, job: str) -> str:
    command = [sys.executable, "-m", "report", "doctor", f"runs/slurm-{job}"]
    told = subprocess.run(command, cwd=slurm.home, env={**slurm.env, "COLUMNS": "200"}, text=True,
                          capture_output=True, timeout=600)  # fmt: skip
    return " ".join(told.stdout.split())


def slow_until(step: int, seconds: int = 2) -> str:
    """A fault that makes each step of the first life last so much longer, from the third on."""
    return ";".join(f"hang@step={n},life=0,seconds={seconds}" for n in range(3, step))


def wandb_history(path: Path) -> dict[int, list[dict]]:
    """wandb's step -> rows of one .wandb file: a log of protobuf records in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, part, found = path.read_bytes(), 7, b"", {}
    while place + 7 < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            record, part = Record.FromString(part), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                found.setdefault(record.history.step.num, []).append(row)
    return found


def assert_wandb_is_metrics(run: Path, lives: int) -> None:
    """One run id in all lives; the newest file alone holds each row of metrics.jsonl once."""
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == lives and len({path.name for path in files}) == 1, files
    assert (run / "wandb" / "latest-run").resolve() == files[-1].parent
    history = wandb_history(files[-1])
    assert all(len(told) == 1 for told in history.values())
    told = [{k: v for k, v in history[n][0].items() if k[0] != "_"} for n in sorted(history)]
    assert told == rows(run)


def restarts(slurm: Cluster, job: str) -> int:
    shown = slurm.run("scontrol", "show", "job", job)
    return int(shown.partition("Restarts=")[2].split()[0])


def test_two_nodes_give_the_run_of_one_process_and_hostile_words_arrive_whole(slurm, alone):
    text = "a b\"'$(touch owned)`touch owned`;touch owned;* \\n é"
    job = sbatch(slurm, "--nodes=2", flags=[*TRAIN, "--data-dir", text])
    assert slurm.wait(job) == "COMPLETED", log(slurm, job)
    assert "2 x CPU" in log(slurm, job)
    run = slurm.home / "runs" / f"slurm-{job}"
    assert_same_history(run, alone)
    assert json.loads((run / "config.json").read_text())["config"]["data_dir"] == text
    assert not list(slurm.home.glob("owned"))


def test_slurms_own_time_limit_saves_requeues_and_wandb_stays_one_run(slurm, alone):
    """The signal comes from SLURM itself, 50 s before a limit that is set once it trains."""
    own = ["--nodes=2", "--time=60", "--signal=B:USR1@50"]
    job = sbatch(slurm, *own, flags=[*TRAIN, "--track", "wandb"], WANDB_MODE="offline",
                 LOCKSTEP_FAULT=slow_until(STEPS, 3))  # fmt: skip
    wait_for_step(slurm, job, 1)
    minutes, _ = slurm.run("squeue", "-h", "-j", job, "-o", "%M").strip().split(":")
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={int(minutes) + 1}")
    slurm.wait(job, "PENDING")
    saved = status(slurm, job)
    assert saved["status"] == "stopped" and saved["step"] < STEPS, (saved, log(slurm, job))
    told = log(slurm, job)
    assert "the time limit (or a preemption) is near" in told
    assert "asks SLURM to requeue it" in told and "--resume" not in told, told
    assert not any(word in told for word in NOISE), told
    assert f"job {job}: PENDING" in doctor(slurm, job) and "nothing:" in doctor(slurm, job)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    slurm.start_now(job)
    assert slurm.wait(job) == "COMPLETED", log(slurm, job)
    after = status(slurm, job)
    assert (after["life"], after["resumed_at"], restarts(slurm, job)) == (1, saved["step"], 1)
    told = log(slurm, job)
    assert "start 1" in told and "start 2" in told, "the second life overwrote the first one's log"
    run = slurm.home / "runs" / f"slurm-{job}"
    assert_same_history(run, alone)
    assert not list(run.parent.glob(f"slurm-{job}.requeues"))
    assert_wandb_is_metrics(run, lives=2)


def test_a_preempted_job_saves_and_goes_on_by_itself(slurm, alone):
    """Another job takes the nodes twice: with a grace time, and without one."""
    slow = slow_until(16)
    job = sbatch(slurm, "--nodes=2", "--partition=low",
                 LOCKSTEP_FAULT=f"{slow};{slow.replace('life=0', 'life=1')}")  # fmt: skip
    saved = {"step": 0}
    for partition, life in (("low", 0), ("lowest", 1)):
        slurm.run("scontrol", "update", f"JobId={job}", f"Partition={partition}", check=life)
        if life:
            slurm.start_now(job)
        wait_for_step(slurm, job, saved["step"] + 2)
        other = ["sbatch", "--parsable", "--nodes=2", "--exclusive", "--wrap=sleep 1"]
        assert slurm.wait(slurm.run(*other, cwd=slurm.home).strip()) == "COMPLETED"
        slurm.wait(job, "PENDING")
        saved = status(slurm, job)
        assert (saved["status"], saved["life"]) == ("stopped", life), log(slurm, job)
    slurm.start_now(job)
    assert slurm.wait(job) == "COMPLETED", log(slurm, job)
    assert status(slurm, job)["resumed_at"] == saved["step"] < STEPS
    assert_same_history(slurm.home / "runs" / f"slurm-{job}", alone)


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(slurm, alone):
    flags = [*TRAIN, "--checkpoint-every", "2", "--track", "wandb"]
    job = sbatch(slurm, "--nodes=2", flags=flags, WANDB_MODE="offline",
                 LOCKSTEP_FAULT=slow_until(9))  # fmt: skip
    wait_for_step(slurm, job, 5)
    slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    slurm.wait(job, "PENDING")
    slurm.start_now(job)
    assert slurm.wait(job) == "COMPLETED", log(slurm, job)
    assert not any(word in log(slurm, job) for word in (" line ", "refused")), log(slurm, job)
    assert status(slurm, job)["life"] == 1 and status(slurm, job)["resumed_at"] >= 2
    run = slurm.home / "runs" / f"slurm-{job}"
    assert_same_history(run, alone)
    assert_wandb_is_metrics(run, lives=2)


def test_scancel_saves_and_does_not_requeue(slurm):
    job = sbatch(slurm, "--nodes=2")
    wait_for_step(slurm, job, 3)
    slurm.run("scancel", job)
    assert slurm.wait(job) == "CANCELLED"
    deadline = time.monotonic() + 40  # the state changes at once, the processes still save
    while status(slurm, job).get("status") == "running" and time.monotonic() < deadline:
        time.sleep(0.3)
    saved = status(slurm, job)
    assert saved["status"] == "stopped" and saved["step"] >= 3, log(slurm, job)
    run = slurm.home / "runs" / f"slurm-{job}"
    assert (run / "checkpoints" / f"step-{saved['step']:09d}" / "MANIFEST.json").exists()
    time.sleep(2)
    assert slurm.state(job) == "CANCELLED" and restarts(slurm, job) == 0


def test_scancel_while_it_saves_for_its_limit_does_not_requeue(slurm):
    job = sbatch(slurm, "--nodes=2", LOCKSTEP_FAULT=slow_until(9))
    wait_for_step(slurm, job, 3)
    slurm.run("scancel", "--signal=USR1", "--batch", job)  # as SLURM does before the limit
    deadline = time.monotonic() + 30
    while "is near" not in log(slurm, job) and time.monotonic() < deadline:
        time.sleep(0.1)
    slurm.run("scancel", job)
    deadline = time.monotonic() + 40
    while "not requeued" not in log(slurm, job) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert "was cancelled: not requeued" in log(slurm, job), log(slurm, job)
    assert slurm.wait(job) == "CANCELLED" and restarts(slurm, job) == 0
    assert status(slurm, job)["status"] == "stopped"


def test_a_killed_rank_is_named_and_a_crash_loop_ends(slurm):
    """Rank 1 dies at step 5 of every life: one requeue, since step 4 was new, and no second one."""
    flags = [*TRAIN, "--checkpoint-every", "2"]
    job = sbatch(slurm, "--nodes=2", flags=flags, LOCKSTEP_FAULT="kill@step=5,rank=1")
    deadline = time.monotonic() + 150
    while "not requeued" not in log(slurm, job) and time.monotonic() < deadline:
        if restarts(slurm, job) == 1:
            slurm.start_now(job)
        time.sleep(1)
    assert slurm.wait(job) == "FAILED", log(slurm, job)
    told = log(slurm, job)
    assert "rank 1 on n2 was killed by signal 9" in told, told
    assert restarts(slurm, job) == 1, told
    assert "without a checkpoint after step 4: not requeued" in told, told


def test_an_array_trains_its_seeds(slurm):
    flags = [*TRAIN, "--max-steps", "2"]
    job = sbatch(slurm, "--array=0-1", "--nodes=1", flags=flags)
    for task in range(2):
        assert slurm.wait(f"{job}_{task}") == "COMPLETED", log(slurm, f"{job}_{task}")
        run = slurm.home / "runs" / f"slurm-{job}_{task}"
        assert json.loads((run / "config.json").read_text())["config"]["seed"] == task
    losses = {rows(slurm.home / "runs" / f"slurm-{job}_{t}")[0]["train/loss"] for t in range(2)}
    assert len(losses) == 2


def test_the_last_task_of_an_array_saves_for_its_limit_and_stops_no_other(slurm):
    """It has the number of the whole array."""
    job = sbatch(slurm, "--array=0-1", "--nodes=1", LOCKSTEP_FAULT=slow_until(9, seconds=1))
    for task in range(2):
        wait_for_step(slurm, f"{job}_{task}", 3)
    slurm.run("scancel", "--signal=USR1", "--batch", f"{job}_1")  # as SLURM does before the limit
    deadline = time.monotonic() + 60
    while "requeued as" not in log(slurm, f"{job}_1") and time.monotonic() < deadline:
        time.sleep(0.3)
    assert f"requeued as job {job}_1" in log(slurm, f"{job}_1"), log(slurm, f"{job}_1")
    assert slurm.wait(f"{job}_0") == "COMPLETED", log(slurm, f"{job}_0")
    assert status(slurm, f"{job}_1")["log"].endswith(f"slurm-{job}_1.out")
    slurm.run("scancel", job)


def test_submit_trains_a_sweeps_rows_where_and_how_it_was_told(slurm, tmp_path):
    """Account, partition, constraint, environment, further flags; the site exports nothing.

    Rows, environment file and code are changed while it waits: what was checked is what runs.
    """
    env, place = tmp_path / "activate.sh", tmp_path / "bin"
    place.mkdir()
    (place / "python").write_text(
        f'#!/bin/bash\ntouch "{place}/used"\nexec {sys.executable} "$@"\n'
    )
    (place / "python").chmod(0o755)
    env.write_text(f'export PATH="{place}:$PATH$THIS_IS_UNSET"\n')
    sweep = tmp_path / "sweep.txt"
    sweep.write_text(
        "# lr, then seed\n--lr 0.02\n\n--lr 0.03 --data-dir 'a b$(touch owned)' --seed 7\n"
    )
    own = ["--sweep", str(sweep), "--env", str(env), "--account", "science", "--qos", "normal",
           "--partition", "low", "--constraint", "number2&cpu", "--mem", "1500M", "--cpus", "1",
           "--time", "10m", "--name", "sweep", "--sbatch=--nice=7", "--sbatch=--hold",
           "--sbatch=--signal=B:USR1@240", "--snapshot"]  # fmt: skip
    command = [sys.executable, "launch/submit.py", *own, "--", *TRAIN, "--max-steps", "1"]
    given = {**slurm.env, "OMP_NUM_THREADS": "1", "SBATCH_EXPORT": "NONE"}
    done = subprocess.run(
        command, cwd=slurm.home, env=given, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.partition("job     ")[2].split()[0]
    sweep.write_text("--lr 9\n")
    env.write_text("exit 1\n")
    task = slurm.home / "launch" / "slurm_task.sh"
    code = task.read_text()
    task.write_text("exit 1\n")
    ask = [sys.executable, "launch/submit.py", "--status", job]
    told = subprocess.run(ask, cwd=slurm.home, env=slurm.env, capture_output=True, text=True)
    assert told.returncode == 0 and "2 waits" in told.stdout and "--lr 0.02" in told.stdout, told
    slurm.run("scontrol", "release", job)
    shown = slurm.run("scontrol", "show", "job", f"{job}_0")
    for told in ("Account=science", "Partition=low", "Features=number2&cpu", "JobName=sweep",
                 "MinMemoryNode=1500M", "TimeLimit=00:10:00", "Nice=7"):  # fmt: skip
        assert told in shown, shown
    for number, lr, seed in ((0, 0.02, 0), (1, 0.03, 7)):
        ended = slurm.wait(f"{job}_{number}")
        text = (slurm.home / "runs" / f"slurm-{job}_{number}.log").read_text()
        assert ended == "COMPLETED", text
        assert "(n2)" in text
        assert "env" in text and "was changed after the job was submitted" in text
        saved = (slurm.home / "runs" / f"slurm-{job}_{number}" / "config.json").read_text()
        config = json.loads(saved)["config"]
        assert (config["lr"], config["seed"]) == (lr, seed)
    task.write_text(code)
    told = subprocess.run(ask, cwd=slurm.home, env=slurm.env, capture_output=True, text=True)
    assert told.returncode == 0 and "2 finished" in told.stdout, told
    assert config["data_dir"] == "a b$(touch owned)" and not list(slurm.home.glob("owned"))
    assert (place / "used").exists(), "the environment was not activated"


def test_a_node_with_another_command_is_named_at_once(slurm, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/bash
if [ "$1" = train.py ] && [ "$SLURMD_NODENAME" = n2 ]; then set -- "$@" --lr 0.3; fi
exec {sys.executable} "$@"
""")
    python.chmod(0o755)
    job = sbatch(slurm, "--nodes=2", LOCKSTEP_PYTHON=str(python))
    assert slurm.wait(job) == "FAILED" and restarts(slurm, job) == 0
    told = log(slurm, job)
    assert "disagree about the --lr: rank 1 on n2 with 0.3, the others with 0.01" in told, told
    assert "same command" in told and not (slurm.home / "runs" / f"slurm-{job}").exists()


def test_a_wrong_flag_fails_at_once_and_does_not_requeue(slurm):
    job = sbatch(slurm, "--nodes=2", flags=["--modell", "alexnet"])
    assert slurm.wait(job) == "FAILED"
    assert "--modell: no such option" in log(slurm, job) and restarts(slurm, job) == 0


def test_a_job_that_only_evaluates_weights_succeeds_and_leaves_no_run(slurm, alone):
    flags = [*TRAIN, "--eval-only", "--weights", str(alone / "model.safetensors")]
    job = sbatch(slurm, "--nodes=2", flags=flags)
    assert slurm.wait(job) == "COMPLETED", log(slurm, job)
    best = json.loads((alone / "summary.json").read_text())["best/test/accuracy"]
    assert f"accuracy {best:g}" in log(slurm, job), (best, log(slurm, job))
    assert not (slurm.home / "runs" / f"slurm-{job}").exists()


def test_a_forgotten_srun_is_named(slurm):
    train = f"{sys.executable} train.py --model resnet18 --dataset digits"
    job = slurm.run("sbatch", "--parsable", "--nodes=2", f"--wrap={train}", cwd=slurm.home).strip()
    assert slurm.wait(job) == "FAILED"
    assert "without srun" in log(slurm, job)


def test_tasks_that_do_not_know_of_each_other_are_named(slurm):
    done = subprocess.run(
        ["srun", "--nodes=2", sys.executable, "train.py", *TRAIN],
        cwd=slurm.home, env=slurm.env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2 and "do not know of each other" in done.stderr


def test_preflight_says_go_on_two_nodes_and_then_the_run_starts(slurm):
    job = sbatch(slurm, "--nodes=2", flags=[*TRAIN, "--max-steps", "1"], LOCKSTEP_PREFLIGHT="1")
    assert slurm.wait(job) == "COMPLETED", log(slurm, job)
    told = log(slurm, job)
    assert "preflight of n1, n2" in told and "\nGO" in told and "2 processes" in told, told


def test_preflight_stops_a_job_whose_gpus_torch_does_not_see(slurm):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs: they would be seen")
    job = sbatch(slurm, "--nodes=1", "--gpus-per-node=2", LOCKSTEP_PREFLIGHT="1")
    assert slurm.wait(job) == "FAILED"
    told = log(slurm, job)
    assert "1 node x 2 processes" in told, told
    assert "2 GPUs asked for, torch sees 0" in told and "nothing was trained" in told, told


def test_submit_follows_a_job_to_its_end(slurm):
    own = ["--nodes", "1", "--cpus", "1", "--time", "10m", "--follow"]
    command = [sys.executable, "launch/submit.py", *own, "--", *TRAIN, "--max-steps", "1"]
    done = subprocess.run(command, cwd=slurm.home, env={**slurm.env, **JOB}, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for told in ("job  ", "scancel", "--resume runs/slurm-", "finished at step 1", "COMPLETED"):
        assert told in done.stdout, done.stdout + done.stderr


# --- a node is lost, and the run goes on with fewer -----------------------------------------------

FEWER = ["--model", "my_cnn", "--dataset", "digits", "--image-size", "16", "--limit", "128",
         "--batch-size", "24", "--lr", "0.001", "--threads", "1", "--log-every", "1", "--shards",
         "6", "--no-plots", "--max-steps", str(STEPS), "--checkpoint-every", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    require_slurm()
    with Cluster(tmp_path_factory.mktemp("three"), nodes=3) as cluster:
        cluster.home = linked_repository(tmp_path_factory.mktemp("home") / "lockstep")
        done = subprocess.run(
            [sys.executable, "train.py", *FEWER, "--run-dir", "runs/undisturbed"],
            cwd=cluster.home, env={**cluster.env, **JOB}, capture_output=True, text=True,
            timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        yield cluster


def assert_undisturbed(slurm: Cluster, job: str) -> None:
    """Weights within rounding of the run on one process: six shards, added up in another order."""
    one, other = (
        load_file(slurm.home / "runs" / name / "last.safetensors")
        for name in ("undisturbed", f"slurm-{job}")
    )
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() <= 1e-5 * tensor.abs().max().clamp(min=1), name


def test_where_a_node_is_lost_that_is_not_the_first_the_others_go_on_in_the_same_job(three):
    """SLURM does not know yet that it is gone; with --no-kill it leaves the job the others."""
    job = sbatch(three, "--nodes=1-3", "--no-kill", flags=FEWER, LOCKSTEP_LEAST="1",
                 LOCKSTEP_FAULT=f"{slow_until(15)};hang@step=15,life=1,seconds=8")  # fmt: skip
    wait_for_step(three, job, 5)
    three.lose("n3")
    wait_for_life(three, job, 1)
    three.run("scontrol", "update", "NodeName=n3", "State=DOWN", "Reason=lost")  # or SlurmdTimeout
    assert three.wait(job) == "COMPLETED", log(three, job)
    three.bring_back("n3")
    told = log(three, job)
    assert "lost n3: going on with 2 nodes, n1,n2" in told and restarts(three, job) == 0, told
    assert "3 x CPU" in told and "2 x CPU" in told, told
    after = status(three, job)
    assert after["life"] == 1 and after["resumed_at"] >= 4, after
    assert_undisturbed(three, job)


def test_where_the_first_node_is_lost_slurm_requeues_the_job_on_those_that_are_left(three):
    """The node of the batch shell, of the store and of rank 0; the job asked for one to three."""
    job = sbatch(three, "--nodes=1-3", flags=FEWER, LOCKSTEP_LEAST="1",
                 LOCKSTEP_FAULT=slow_until(15))  # fmt: skip
    wait_for_step(three, job, 5)
    three.lose("n1")
    three.run("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=lost")  # or SlurmdTimeout
    three.wait(job, "PENDING")
    three.start_now(job)
    assert three.wait(job) == "COMPLETED", log(three, job)
    three.bring_back("n1")
    told = log(three, job)
    assert "3 nodes x 1 process" in told and "2 nodes x 1 process (n[2-3])" in told, told
    after = status(three, job)
    assert after["life"] == 1 and after["resumed_at"] >= 4 and restarts(three, job) == 1, after
    assert_undisturbed(three, job)


def test_a_job_with_no_kill_that_slurm_itself_ended_goes_on_when_a_person_says_so(three):
    """Its first node is set DOWN while its daemon lives: SLURM ends all, nobody is left to ask."""
    job = sbatch(three, "--nodes=1-3", "--no-kill", flags=FEWER, LOCKSTEP_LEAST="1",
                 LOCKSTEP_FAULT=slow_until(15))  # fmt: skip
    wait_for_step(three, job, 5)
    three.run("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")
    assert three.wait(job) == "FAILED" and restarts(three, job) == 0, log(three, job)
    assert "JobLaunchFailure" in three.run("scontrol", "show", "job", job)
    assert status(three, job)["life"] == 0 and status(three, job)["step"] < STEPS
    three.run("scontrol", "update", "NodeName=n1", "State=RESUME", check=False)
    again = sbatch(three, "--nodes=1-3", flags=["--resume", f"runs/slurm-{job}"])
    assert three.wait(again) == "COMPLETED", log(three, again)
    after = status(three, job)
    assert after["life"] == 1 and after["resumed_at"] >= 4, after
    assert_undisturbed(three, job)


def test_nodes_that_are_separate_hosts_give_the_same_run(alone, tmp_path):
    """Each node in a network namespace of its own, so only the head node's address leads there."""
    require_slurm(apart=True)
    with Cluster(tmp_path / "slurm", apart=True) as cluster:
        cluster.home = linked_repository(tmp_path / "lockstep")
        job = sbatch(cluster, "--nodes=2")
        assert cluster.wait(job) == "COMPLETED", log(cluster, job)
        assert_same_history(cluster.home / "runs" / f"slurm-{job}", alone)
