"""What a submission keeps of the moment it was checked in, and what became of its tasks.

Standard library only. In `runs/submitted/TIME-PID/`, with a link of the job's number to it: the
sweep file, the environment file, with --snapshot the code, and job.json.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
LARGE = 1_000_000  # bytes: no file of code
MANY = 500  # files in one folder without code: data
MOST = 5_000  # files of a snapshot
CODE = {".py", ".sh", ".sbatch", ".md", ".yaml", ".toml"}


class Problem(ValueError):
    """Something the user can mend; printed as one sentence, exit status 2."""


def tell(text: str) -> bool:
    """Print it; where nobody reads stdout any more (`| head`) or its disk is full, on stderr.

    A job's number is not to be lost, nor its submission to end halfway. Whether one took it.
    """
    sys.stdout = sys.stdout or sys.stderr
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter's end flushes once more
        sys.stdout = sys.stderr
        try:
            print(text, file=sys.stderr, flush=True)
        except OSError:
            return False
    return sys.stdout is not None


def as_it_was(undo: contextlib.ExitStack, path: Path) -> Path:
    """The path; what stands there now, or that nothing does, comes back with `undo`."""
    missing = [folder for folder in path.parents if not folder.exists()]
    before = path.read_bytes() if path.is_file() else None

    def put_back() -> None:
        with contextlib.suppress(OSError):
            if before is not None:
                path.write_bytes(before)
            else:
                path.unlink(missing_ok=True)
        for folder in missing:
            with contextlib.suppress(OSError):  # others may have put something there
                folder.rmdir()

    undo.callback(put_back)
    return path


def keep(sweep: str | None, env: str | None, undo: contextlib.ExitStack) -> Path:
    """A folder with copies of what the job reads only when it starts."""
    folder = HERE / "runs" / "submitted" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    as_it_was(undo, folder)
    undo.callback(shutil.rmtree, folder, ignore_errors=True)  # the first that is undone
    try:
        folder.mkdir(parents=True)
        for given, name in ((sweep, "sweep.txt"), (env, "env.sh")):
            if given:
                shutil.copyfile(given, folder / name)
    except OSError as error:
        raise Problem(f"what is submitted cannot be kept in {folder}: {error.strerror}") from None
    return folder


def snapshot(target: Path, run_dirs: list[str], undo: contextlib.ExitStack) -> None:
    """A folder that stands for the repository: its code is copied, everything else is linked.

    So relative paths mean what they mean here. Runs, data and environments are links: folders of
    many files without code among them, large files, `runs`, `.git`, and whatever holds a run.
    """
    linked = {"runs", ".git"}
    for folder in run_dirs:
        first = Path(folder).parts[0]
        if first != "..":
            as_it_was(undo, HERE / first / "run")
            (HERE / first).mkdir(exist_ok=True)
            linked.add(first)
    count = 0

    def copy(source: Path, to: Path) -> None:
        nonlocal count
        to.mkdir()
        for path in sorted(source.iterdir()):
            if path.name == "__pycache__":
                continue
            if (source == HERE and path.name in linked) or is_data(path):
                (to / path.name).symlink_to(path)
            elif path.is_dir():
                copy(path, to / path.name)
            else:
                count += 1
                if count > MOST:
                    raise Problem(f"--snapshot: more than {MOST} files of code below {HERE}; move "
                                  "what is no code to another folder")  # fmt: skip
                shutil.copy2(path, to / path.name)

    try:
        copy(HERE, target)
    except OSError as error:
        raise Problem(f"--snapshot: {error}") from None


def is_data(path: Path) -> bool:
    """Whether it is a large file, a folder of many, a Python environment, or no such thing."""
    if path.is_file():
        return path.stat().st_size > LARGE
    if not path.is_dir() or (path / "pyvenv.cfg").exists():
        return True
    names = [entry.name for entry, _ in zip(os.scandir(path), range(MANY + 1), strict=False)]
    return len(names) > MANY and not any(Path(name).suffix in CODE for name in names)


def name_job(folder: Path, job: str, tasks: list[int], run_dirs: dict[int | None, str]) -> None:
    """The number that SLURM gave leads to what was kept; worth no failure of a queued job."""
    with contextlib.suppress(OSError):
        content = {"job": job, "tasks": tasks, "run_dirs": {str(k): v for k, v in run_dirs.items()}}
        (folder / "job.json").write_text(json.dumps(content), encoding="utf-8")
        link = folder.parent / job
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)


# --- what became of it ---------------------------------------------------------------------------


def queue_of(job: str) -> dict[str, tuple[str, str]] | None:
    """Task ("" where it is no array) -> (state, reason), as SLURM still knows it; None: silent."""
    asked = ["squeue", "--noheader", "--array", "--jobs", job, "--states=all", "--format=%K|%T|%r"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    found = {}
    for line in done.stdout.splitlines():
        task, state, reason = line.split("|", 2)
        found[task if task.isdecimal() else ""] = (state, reason)
    return found


def state_of(run: Path, task: str, queued: tuple[str, str] | None, silent: bool) -> tuple[str, str]:
    """(one word, what more is known) of a task: the queue knows who waits, the folder the rest.

    A folder that another job has tells nothing of this one.
    """
    try:
        status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        status = {}
    state, reason = queued or ("", "")
    other, never = str(status.get("job") or task), "before it began"
    if other != task:
        status, never = {}, f"job {other} has its folder"
        if not queued:
            return "over", never
    step = f"step {status['step']}" if "step" in status else ""
    if state == "PENDING":
        why = "" if reason == "None" else reason  # the scheduler has not looked at it yet
        return "waits", ", ".join(filter(None, [step, why]))
    if state in ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"):
        return "runs", step or "starts"
    ended = status.get("status", "")
    if ended == "running":
        return ("runs", f"{step}, as its folder says") if silent else ("died", step)
    if ended in ("finished", "stopped", "failed"):
        return ended, ", ".join(filter(None, [step, str(status.get("reason") or "")]))
    if state == "CANCELLED":
        return "cancelled", never
    if state == "COMPLETED":  # --eval-only and the like leave no folder
        return "finished", never if other != task else "without a run folder"
    return ("unknown", "") if silent else ("failed", never)


def status_of(job: str) -> int:
    """A line for each task of a job: ran, runs, waits, failed. Status 1 where one failed."""
    if not re.fullmatch("[0-9]+", job):
        raise Problem(f"--status {job}: the number that sbatch gave, e.g. --status 4711")
    runs, kept = HERE / "runs", {}
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads((runs / "submitted" / job / "job.json").read_text(encoding="utf-8"))
    queue = queue_of(job)
    folders = [p for p in [runs / f"slurm-{job}", *runs.glob(f"slurm-{job}_*")] if p.is_dir()]
    there = {p.name.removeprefix(f"slurm-{job}").strip("_") for p in folders} | {*(queue or {})}
    tasks = [str(task) for task in kept.get("tasks", [])] or sorted(there, key=lambda t: t.zfill(9))
    if not tasks and not kept:
        raise Problem(f"--status {job}: neither SLURM nor {runs} knows this job")
    if queue is None:
        tell("squeue does not answer: this is what the run folders say")
    rows = []
    with contextlib.suppress(OSError, ValueError):
        from sweep import read_rows

        rows = list(read_rows(runs / "submitted" / job / "sweep.txt").values())
    counts: dict[str, int] = {}
    for task in tasks or [""]:
        name = f"slurm-{job}_{task}" if task else f"slurm-{job}"
        folder = kept.get("run_dirs", {}).get(task or "None", f"runs/{name}")
        number = f"{job}_{task}" if task else job
        word, more = state_of(HERE / folder, number, (queue or {}).get(task), queue is None)
        counts[word] = counts.get(word, 0) + 1
        words = " ".join(rows[int(task)]) if task and int(task) < len(rows) else ""
        where = f"runs/{name}.log" if word in ("failed", "died") else folder
        tell(f"{task:>5}  {word:9} {more:32} {where}  {words}".rstrip())
    tell(", ".join(f"{count} {word}" for word, count in counts.items()))
    return 1 if counts.keys() & {"failed", "died"} else 0
