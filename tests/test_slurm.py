"""Jobs on a real SLURM: the same run, stops that lose nothing, ends that are told.

Run with: pytest -m slurm tests/test_slurm.py    (Debian: apt-get install slurm-wlm munge; root)
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import Cluster, why_not

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
ROOT = Path(__file__).resolve().parent.parent
STEPS = 20
TRAIN = ["--model", "resnet18", "--dataset", "digits", "--image-size", "32", "--limit", "128",
         "--batch-size", "16", "--lr", "0.01", "--threads", "1", "--log-every", "1",
         "--max-steps", str(STEPS)]  # fmt: skip
JOB = {"LOCKSTEP_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def require_slurm(apart: bool = False) -> None:
    reason = why_not(apart)
    if reason and os.environ.get("LOCKSTEP_REQUIRE_SLURM") == "1":
        pytest.fail(f"LOCKSTEP_REQUIRE_SLURM=1, but {reason}")
    if reason:
        pytest.skip(reason)


def desk(folder: Path) -> Path:
    """The repository as a cluster's user has it, with a runs/ of its own."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name == "launch":
            shutil.copytree(path, folder / "launch")
        elif path.name not in ("runs", ".git"):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    require_slurm()
    with Cluster(tmp_path_factory.mktemp("slurm"), gpus=2) as cluster:
        cluster.home = desk(tmp_path_factory.mktemp("home") / "lockstep")
        yield cluster


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one process, without SLURM: what all others must equal."""
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, str(ROOT / "train.py"), *TRAIN, "--shards", "2"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    subprocess.run([*command, "--run-dir", "run"], cwd=folder, env={**env, **JOB}, check=True,
                   capture_output=True, timeout=180)  # fmt: skip
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


def restarts(slurm: Cluster, job: str) -> int:
    shown = slurm.run("scontrol", "show", "job", job)
    return int(shown.partition("Restarts=")[2].split()[0])


def test_two_nodes_give_the_run_of_one_process(slurm, alone):
    job = sbatch(slurm, "--nodes=2")
    assert slurm.wait(job) == "COMPLETED", log(slurm, job)
    assert "2 x CPU" in log(slurm, job)
    assert_same_history(slurm.home / "runs" / f"slurm-{job}", alone)


def test_the_time_limits_signal_and_a_requeue_lose_no_step(slurm, alone):
    job = sbatch(slurm, "--nodes=2")
    wait_for_step(slurm, job, 3)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@180 does
    slurm.wait(job, "PENDING", seconds=60)
    saved = status(slurm, job)
    assert saved["status"] == "stopped" and 3 <= saved["step"] < STEPS, saved
    slurm.start_now(job)
    assert slurm.wait(job) == "COMPLETED", log(slurm, job)
    after = status(slurm, job)
    assert (after["life"], after["resumed_at"]) == (1, saved["step"])
    assert restarts(slurm, job) == 1
    told = log(slurm, job)
    assert "start 1" in told and "start 2" in told, "the second life overwrote the first one's log"
    assert_same_history(slurm.home / "runs" / f"slurm-{job}", alone)


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


def test_an_array_trains_three_seeds(slurm):
    flags = [*TRAIN, "--max-steps", "3"]
    job = sbatch(slurm, "--array=0-2", "--nodes=1", flags=flags)
    for task in range(3):
        assert slurm.wait(f"{job}_{task}") == "COMPLETED", log(slurm, f"{job}_{task}")
        run = slurm.home / "runs" / f"slurm-{job}_{task}"
        assert json.loads((run / "config.json").read_text())["config"]["seed"] == task
    losses = {rows(slurm.home / "runs" / f"slurm-{job}_{t}")[0]["train/loss"] for t in range(3)}
    assert len(losses) == 3


def test_hostile_arguments_arrive_byte_for_byte(slurm):
    text = "a b\"'$(touch owned)`touch owned`;touch owned;* \\n é"
    job = sbatch(slurm, "--nodes=1", flags=[*TRAIN, "--max-steps", "1", "--data-dir", text])
    assert slurm.wait(job) == "COMPLETED", log(slurm, job)
    config = json.loads((slurm.home / "runs" / f"slurm-{job}" / "config.json").read_text())
    assert config["config"]["data_dir"] == text
    assert not list(slurm.home.glob("owned"))


def test_a_wrong_flag_fails_at_once_and_does_not_requeue(slurm):
    job = sbatch(slurm, "--nodes=2", flags=["--modell", "alexnet"])
    assert slurm.wait(job) == "FAILED"
    assert "--modell: no such option" in log(slurm, job) and restarts(slurm, job) == 0


def test_a_forgotten_srun_is_named(slurm):
    train = f"{sys.executable} train.py --model resnet18 --dataset digits"
    job = slurm.run("sbatch", "--parsable", "--nodes=2", f"--wrap={train}", cwd=slurm.home).strip()
    assert slurm.wait(job) == "FAILED"
    assert "without srun" in log(slurm, job)


def test_tasks_that_do_not_know_of_each_other_are_named(slurm):
    done = subprocess.run(
        ["srun", "--nodes=2", sys.executable, "train.py", *TRAIN],
        cwd=slurm.home, env=slurm.env, capture_output=True, text=True, timeout=90,
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
    assert "1 nodes x 2 processes" in told, told
    assert "2 GPUs asked for, torch sees 0" in told and "nothing was trained" in told, told


def test_submit_follows_a_job_to_its_end(slurm):
    own = ["--nodes", "1", "--cpus", "1", "--time", "10m", "--follow"]
    command = [sys.executable, "launch/submit.py", *own, "--", *TRAIN, "--max-steps", "1"]
    done = subprocess.run(command, cwd=slurm.home, env={**slurm.env, **JOB}, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for told in ("job  ", "scancel", "--resume runs/slurm-", "finished at step 1", "COMPLETED"):
        assert told in done.stdout, done.stdout + done.stderr


def test_nodes_that_are_separate_hosts_give_the_same_run(alone, tmp_path):
    """Each node in a network namespace of its own, so only the head node's address leads there."""
    require_slurm(apart=True)
    with Cluster(tmp_path / "slurm", apart=True) as cluster:
        cluster.home = desk(tmp_path / "lockstep")
        job = sbatch(cluster, "--nodes=2")
        assert cluster.wait(job) == "COMPLETED", log(cluster, job)
        assert_same_history(cluster.home / "runs" / f"slurm-{job}", alone)
