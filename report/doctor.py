"""What happened to a run, on one screen, and what to type."""

import json
import re
import shlex
import socket
import subprocess
import time
from pathlib import Path

from common.disk import read_json
from common.errors import FAILED, FINISHED, UserError
from common.text import duration, pasted, printable
from data.pack import BEGUN
from distributed.checkpoint import verify, visible
from distributed.watch import alive
from report.screen import WORTH_TELLING, Report
from training.goodput import goodput, in_words, slow_ones
from training.run_dir import free_bytes
from training.snapshots import in_memory

LAST_WORDS = 5  # lines of the log of a job that never ran
RUN_FOLDER = re.compile(r"^lockstep: job .*, run folder (.+)$", re.MULTILINE)  # launch/slurm.sbatch
WAITS_FOR_A_PERSON = {
    "JobHeldUser": "scontrol release {job}  # it is held",
    "JobHeldAdmin": "scancel {job}  # or ask the administrators, who hold it",
    "DependencyNeverSatisfied": "scancel {job}  # what it waits for can no longer come",
    "PartitionConfig": "scancel {job}  # it asks for what the partition does not have",
    "BadConstraints": "scancel {job}  # no node is as it asks for",
    "PartitionNodeLimit": "scancel {job}  # it asks for more nodes than the partition allows",
    "PartitionTimeLimit": "scancel {job}  # it asks for more time than the partition allows",
}  # why SLURM lets a job wait -> what to type


def examine(folder: Path) -> tuple[list[tuple[str, str]], str, bool]:
    """(rows to show, what to type, whether all is well) of a run folder; changes nothing."""
    status = read_json(folder / "status.json", {})
    config = read_json(folder / "config.json")
    if config is None and (found := before_it_ran(folder)):
        return found
    if config is None and status.get("status") == "failed":  # before it had one
        rows = [("status", "failed before its first step"), ("reason", str(status.get("reason")))]
        rows += [("crash", line) for line in crashes(folder / "crash")]
        return rows, "the same command again", False
    if config is None:
        raise UserError(f"{folder} holds no run: it has no readable config.json", code="no-run")
    rows = [("status", describe_status(folder, status))]
    if status.get("reason"):
        rows.append(("reason", status["reason"]))
    rows.append(("lives", f"{(status.get('life') or 0) + 1}, the last from step {resumed(status)}"))
    if spent := goodput(status.get("lives") or []):
        rows.append(("goodput", in_words(spent)))
        rows += [("slow", line) for line in slow_ones(status["lives"])]
        rows += [("images", line) for line in what_helps(spent, config.get("config", {}))]
    if status.get("last_save_error"):
        rows.append(("last save", status["last_save_error"]))
    whole, found = checkpoints(folder / "checkpoints")
    rows += [("checkpoint", line) for line in found]
    rows += [("snapshot", line) for line in in_memory(folder)]
    rows.append(("disk", f"{free_bytes(folder) / 1e9:.1f} GB free"))
    rows += [("crash", line) for line in crashes(folder / "crash")]
    queued = ""
    if job := str(status.get("job") or ""):
        queued = state_in_queue(job)
        rows.append(("job", f"{job}: {queued or 'no longer in the queue'}"))
    if status.get("log"):
        rows.append(("log", str(status["log"])))
    state = rows[0][1].split(",")[0]
    if queued.startswith("PENDING"):
        well, typed = while_it_waits(job, queued, "goes on by itself")
        return rows, typed, well
    if state == "running":
        return rows, shlex.join(["touch", str(folder / "STOP")]) + "  # stops it", True
    if state == "finished":
        return rows, pasted("predict.py", "PICTURE.png", "--run", folder), True
    if not whole and visible(folder / "checkpoints"):
        fresh = pasted("train.py", "--run-dir", folder, "--fresh")
        return rows, f"{fresh}  # the old files stay", False
    typed = str(status.get("go_on") or "")
    typed = typed if typed.startswith("sbatch ") else pasted("train.py", "--resume", folder)
    return rows, typed, state == "stopped"


def before_it_ran(folder: Path) -> tuple[list[tuple[str, str]], str, bool] | None:
    """The same of a SLURM job that has no run yet, or left none; None where it names no job."""
    named = re.fullmatch(r"slurm-(\d+)(_\d+)?", folder.name)
    if named is None:
        return None
    job, log = f"{named[1]}{named[2] or ''}", folder.with_name(f"{folder.name}.log")
    queued, words = state_in_queue(job), ""
    if log.is_file():
        words = log.read_text(encoding="utf-8", errors="replace")
    elif not queued and not (folder.parent / "submitted" / named[1]).exists():
        return None
    ended = "" if queued else "never ran: "
    rows = [("status", f"{ended}{folder} holds no run{' yet' if queued else ''}"),
            ("job", f"{job}: {queued or 'no longer in the queue'}")]  # fmt: skip
    if runs := RUN_FOLDER.findall(words):  # it was given a --run-dir
        run = folder.parent.parent / runs[-1]
        owner = str(read_json(run / "status.json", {}).get("job") or "")
        if owner == job and (run / "config.json").is_file():
            found, typed, well = examine(run)
            return [("folder", str(run)), *found], typed, well
        if owner:
            rows.append(("folder", f"{run}, which job {owner} has"))
    rows.append(("log", str(log) if log.is_file() else f"none: {log} is not there"))
    rows += [("says", printable(line)) for line in words.splitlines()[-LAST_WORDS:] if line.strip()]
    if queued.startswith("PENDING"):
        well, typed = while_it_waits(job, queued, "waits for its turn")
        return rows, typed, well
    if queued:
        return rows, shlex.join(["tail", "-F", str(log)]), True
    if words:
        return rows, shlex.join(["less", str(log)]) + "  # then submit it again", False
    return rows, "the submission again: the job was cancelled, or could not open its log", False


def while_it_waits(job: str, queued: str, what: str) -> tuple[bool, str]:
    """Whether a job in the queue will start by itself, and what to type."""
    for reason, typed in WAITS_FOR_A_PERSON.items():
        if f"({reason})" in queued:
            return False, typed.format(job=job)
    return True, f"nothing: the job {what} (scancel {job} ends it)"


def what_helps(spent: dict[str, float], config: dict) -> list[str]:
    """What limits a run whose steps waited for photographs, and what is to be done."""
    waited = spent["data"] / max(1e-9, spent["data"] + spent["useful"])
    if waited < WORTH_TELLING:
        return []
    path = Path(str(config.get("data_dir") or config.get("dataset")))
    store = read_json(path / BEGUN, {}).get("store")
    prepare = ["python -m data prepare --dataset", printable(shlex.quote(str(path))), "--out PACK"]
    if store == "raw":
        helps = "they lie decoded, so the disk limits: --stage FOLDER reads them from a local one"
    elif store == "jpeg":
        helps = "decoding or the disk limits: more --decode-threads where CPUs are free, or "
        helps += f"{' '.join(prepare)} --store raw"
    else:
        helps = "decoding or the disk limits: more --decode-threads where CPUs are free, or "
        helps += f"{' '.join(prepare)} (--store raw: no decoding at all)"
    return [f"{100 * waited:.0f} % of the training time waited for them; {helps}"]


def state_in_queue(job: str) -> str:
    """What SLURM says of a job, `PENDING (Resources)`; '' where it knows nothing or is missing."""
    asked = ["squeue", "--noheader", "--jobs", job, "--format=%T (%r)"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().replace(" (None)", "") if done.returncode == 0 else ""


def is_alive(written: dict) -> bool:
    """Whether the process that wrote this is one of this host's."""
    pid = written.get("pid")
    return isinstance(pid, int) and pid > 0 and alive(pid)


def resumed(status: dict) -> int:
    """The step from which the last life went on."""
    return status.get("resumed_at") or 0


def describe_status(folder: Path, status: dict) -> str:
    """The status, corrected by whether its process is still there."""
    state, step = status.get("status", "never started"), status.get("step", 0)
    lock = folder / "lock"
    if state != "running":
        return f"{state}, step {step}"
    quiet = time.time() - lock.stat().st_mtime if lock.exists() else float("inf")
    here = read_json(lock, {}).get("host") == socket.gethostname()
    if (here or quiet > 60) and not is_alive(status):
        return f"died without a word, at step {step} or a little later"
    return f"running, step {step}, last sign of life {duration(quiet)} ago"


def checkpoints(folder: Path) -> tuple[int, list[str]]:
    """How many are whole, and a line for each."""
    whole, lines = 0, []
    for path in visible(folder):
        try:
            verify(path)
            whole += 1
            size = sum(p.stat().st_size for p in path.iterdir())
            lines.append(f"step {int(path.name[5:])}: whole, {size / 1e6:.0f} MB")
        except ValueError as error:
            lines.append(f"step {int(path.name[5:])}: damaged ({error})")
    return whole, lines or ["none"]


def crashes(folder: Path) -> list[str]:
    """The first line of each process's report, and where the last heartbeats were."""
    lines = []
    for path in sorted(folder.glob("rank-*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        lines.append(f"{text.splitlines()[0] if text else 'empty report'}  ({path})")
    for path in sorted(folder.glob("heartbeat-*.json")):
        beat = read_json(path, {})
        quiet = time.time() - beat.get("time", time.time())
        if quiet > 10 if beat.get("host") != socket.gethostname() else not is_alive(beat):
            ago = duration(quiet)
            where = f"step {beat.get('step')}, phase {beat.get('phase')}"
            lines.append(f"rank {beat.get('rank')} on {beat.get('host')}: {where}, {ago} ago")
    bad = read_json(folder / "nonfinite.json")
    if bad:
        lines.append(f"not finite: {json.dumps(bad)[:160]}")
    return lines


def command(folder: Path) -> int:
    """`python -m report doctor`: status 0 where all is well, 1 where something is to be done."""
    rows, advice, well = examine(folder)
    Report().end_panel(f"{folder}", rows, good=well, commands=[("type", advice)])
    return FINISHED if well else FAILED
