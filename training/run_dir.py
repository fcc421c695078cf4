"""What a run leaves on disk, checkpoints aside: folder, lock, status, metrics, summary."""

import contextlib
import errno
import json
import math
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TextIO

from torch import Tensor

from common.disk import Json, parse_object, read_json, whole, write_json, write_text
from common.errors import UserError
from common.metric import Metric
from common.text import file_name, found_from_here, pasted
from data.cache import write_entry
from data.image_set import Source
from data.splits import SPLIT_FILE, rows_of, write_split
from models.own_file import CODE

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PASSING = {"step", "steps", "left"}  # in status.json: written anew with the next row
EARLY = {"checkpoints", "crash", "train.log", "slurm.log", "STOP", ".probe"}
SKIPPED = "skipped_images.txt"
PICTURES = "pictures.safetensors"  # of photographs: names, sizes, a digest of each
DAMAGED = "damaged.txt"  # names of photographs, as --exclude reads them
UNDECODED = "cannot be decoded"
MOST_DIFF = 1_000_000  # characters of uncommitted changes that a run keeps
WRITTEN_ON = ("lock", "train.log", "metrics.jsonl", "checkpoints", "crash", CODE)
MOST_OWNER = 4096  # bytes of a lock
STALE_SECONDS = 60.0  # a lock whose heartbeat is older belongs to a dead job on another host


def fresh_name(root: Path, model: str, dataset: str) -> Path:
    """The first unused runs/<model>-<dataset>-<n>, claimed by creating it."""
    for number in range(1, 100_000):
        folder = root / f"{file_name(model)}-{file_name(dataset)}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"{root} cannot hold a run ({error.strerror}); name a folder with --run-dir",
                code="run-dir-unwritable",
            ) from None
        return folder
    raise UserError(f"{root} is full of runs; name a folder with --run-dir", code="run-dir-full")


def set_aside(folder: Path) -> Path | None:
    """Move an old run out of the way of --fresh; nothing is deleted."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / "config.json").exists():
        return None
    lock = RunDir(folder)
    lock.open()  # not under the feet of a job that trains there
    lock.close()
    for number in range(1, 10_000):
        target = folder.with_name(f"{folder.name}.old-{number}")
        if not target.exists():
            folder.rename(target)
            return target
    raise UserError(f"{folder}: too many old runs beside it; remove some", code="run-dir-full")


def refuse_unshared(folder: Path, owner: str, seconds: float = 10.0) -> None:
    """Any process but the main one: it must see the lock that the main process has just written.

    A disk over the network may show a new file some seconds later; reading the folder asks it.
    """
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            for place in (folder.absolute().parent, folder):
                next(place.iterdir(), None)
            if (folder / "lock").read_text(encoding="utf-8") == owner:
                return
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder.absolute()} is not the folder that the main process writes: all nodes "
                "need one disk for the run; name a folder on it with --run-dir",
                code="run-dir-not-shared",
            )
        time.sleep(0.5)


class RunDir:
    """The folder of one run, owned by the main process.

    Methods write; none of them reads a clock twice or computes: what they are given is what stands
    in the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.metrics_file = folder / "metrics.jsonl"
        self._lock: TextIO | None = None
        self._one_at_a_time = (
            threading.Lock()
        )  # the checkpoint writer's thread tells its status too
        self._pending: list[str] = []

    def open(self) -> None:
        """Create or enter the folder, refuse a foreign one, take the lock."""
        folder, ours = self.folder, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            entries = {p.name for p in folder.iterdir()}
            ours = bool(entries & {"config.json", "status.json", "lock"})
            foreign = entries - EARLY  # what a life that ended before its first step may leave
            if foreign and not ours:
                raise UserError(
                    f"{folder} holds files that are no run ({sorted(foreign)[0]}, ...); "
                    "choose an empty folder for --run-dir",
                    code="run-dir-foreign",
                )
            probe = folder / ".probe"
            probe.write_bytes(b"x")
            probe.unlink()
            for path in [folder / name for name in sorted(entries) if name in WRITTEN_ON]:
                if not os.access(path, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            self._take_lock()
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            where = folder if error.filename == str(folder / ".probe") else error.filename
            message = f"{where or folder} cannot be written ({error.strerror}); choose another "
            message += "--run-dir"
            if ours:
                copy = f"cp -r {shlex.quote(str(folder))} runs/NAME"
                message += f", or go on in a copy of your own: {copy}"
            raise UserError(message, code="run-dir-unwritable") from None

    def _take_lock(self) -> None:
        path = self.folder / "lock"
        job = os.environ.get("SLURM_JOB_ID", "")
        file = path.open("a+", encoding="utf-8")
        file.seek(0)
        text = file.read()
        owner = parse_object(text) or {}
        message = (
            f"{self.folder} is in use by process {owner.get('pid')} on {owner.get('host')} "
            f"since {owner.get('since')}"
            + (f" (job {owner['job']})" if owner.get("job") else "")
            + "; wait for it, stop it with `touch STOP` in that folder, or choose another --run-dir"
        )
        if fcntl is not None:
            try:  # lockf, unlike flock, is not inherited by forked workers that outlive the owner
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(message, code="run-dir-in-use") from None
        # Where there are no POSIX locks between the two, the heartbeat tells who lives.
        elsewhere = owner.get("host") not in (None, fcntl and socket.gethostname())
        same_job = job and owner.get("job") == job
        age = time.time() - path.stat().st_mtime if text else STALE_SECONDS
        if elsewhere and not same_job and age < STALE_SECONDS and not owner.get("released"):
            raise UserError(message, code="run-dir-in-use")
        self._lock = file  # held open: closing it, or a second open, would give the lock away
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": job,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._write_lock()

    def owner(self) -> str:
        """What stands in the lock."""
        return json.dumps(self._owner)

    def _write_lock(self, **extra: bool) -> None:
        lock = self._lock
        assert lock is not None
        lock.seek(0)
        lock.truncate()
        lock.write(json.dumps({**self._owner, **extra}))
        lock.flush()

    def beat(self) -> bool:
        """Keep the lock's heartbeat fresh, for jobs on hosts that do not share POSIX locks.

        Returns whether the folder is where it was, not renamed, deleted or another one by now.
        """
        lock = self._lock  # of the main thread, which may close it meanwhile
        if lock is None:
            return True
        try:
            if not os.path.samestat(Path(lock.name).stat(), os.fstat(lock.fileno())):
                return False
            if hasattr(os, "pread"):  # a second open, once closed, would give the lock away
                text = os.pread(lock.fileno(), MOST_OWNER, 0).decode("utf-8", "replace")
                found = parse_object(text)
                if found is not None and not self._owner.items() <= found.items():
                    return False
            os.utime(lock.name)
        except (FileNotFoundError, NotADirectoryError):
            return (self.folder / "crash").is_dir()  # then only the lock was taken away
        except OSError:
            return True  # a disk that does not answer may come back
        except ValueError:
            return True  # the main thread closed it just now: the run is over
        return True

    def follow(self) -> None:
        """To where the folder was renamed; where that is not to be known, to one beside it."""
        found, lock = None, self._lock
        assert lock is not None
        with contextlib.suppress(OSError):
            place = Path(f"/proc/self/fd/{lock.fileno()}").readlink()
            if os.path.samestat(place.stat(), os.fstat(lock.fileno())):
                found = place.parent
        if found is None:
            lock.close()
            names = (f"{self.folder.name}.saved-{number}" for number in range(10_000))
            found = next(p for p in map(self.folder.with_name, names) if not p.exists())
        self.folder, self.checkpoints = found, found / "checkpoints"
        self.metrics_file = found / "metrics.jsonl"
        if lock.closed:
            self.open()

    def close(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._write_lock(released=True)
            self._lock.close()
            self._lock = None

    # --- status, metrics, summary -------------------------------------------------------------

    def status(self, spent: dict[str, Json] | None = None, **values: Json) -> None:
        """Merge into status.json: what scripts read, since launchers mangle exit codes.

        `spent` is what this life, the last of the list, has come to: goodput.Ledger.
        """
        with self._one_at_a_time:
            old = read_json(self.folder / "status.json", {})
            if spent and isinstance(old.get("lives"), list) and old["lives"]:
                old["lives"][-1] |= spent
            text = json.dumps({**old, **values}, indent=2) + "\n"
            try:
                # The step of each row need not outlive a power cut: no wait for the disk in the
                # loop.
                write_text(self.folder / "status.json", text, sync=not values.keys() <= PASSING)
            except OSError:  # on a full disk its old bytes still have room for the new ones
                with (self.folder / "status.json").open("r+", encoding="utf-8") as file:
                    file.write(text)
                    file.truncate()

    def begin_life(self, life: int, step: int, processes: int = 1, gpus: bool = False) -> None:
        """status.json: it runs, from which step, where, and how the life before this one ended."""
        old = self.read_status()
        lives = old.get("lives")
        after = {key: old.get(key) for key in ("status", "step", "reason")} if life else None
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        this = {"life": life, "began": began, "step": step, "after": after}
        self.status(
            status="running", life=life, step=step, reason="", resumed_at=step, pid=os.getpid(),
            job=job(), log=os.environ.get("LOCKSTEP_LOG", ""),
            go_on=go_on(self.folder, processes, gpus),
            lives=[*(lives if isinstance(lives, list) else []), this],
        )  # fmt: skip

    def read_status(self) -> dict:
        return read_json(self.folder / "status.json", {})

    def append_metrics(self, row: dict) -> str:
        """Add a row; where the disk is full it waits in memory for the next one. Returns why."""
        row = {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
        self._pending.append(json.dumps(row) + "\n")  # NaN is no JSON: such a value is left out
        return self.write_rows()

    def write_rows(self) -> str:
        """Write the rows that wait; returns why they still do."""
        size = self.metrics_file.stat().st_size if self.metrics_file.exists() else 0
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.writelines(self._pending)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.metrics_file, size)  # no half rows
            return str(error)
        self._pending.clear()
        return ""

    def keep_metrics(self, rows: int) -> None:
        """Cut metrics.jsonl to the rows a checkpoint knew: later ones will be written again."""
        kept = "".join(line + "\n" for line in self.metrics_lines()[:rows])
        if self.metrics_file.exists() and self.metrics_file.read_text(encoding="utf-8") != kept:
            write_text(self.metrics_file, kept)

    def metrics_lines(self) -> list[str]:
        try:
            text = self.metrics_file.read_text(encoding="utf-8")
        except OSError:
            return []
        return [line for line in text.split("\n") if parse_object(line) is not None]

    def read_metrics(self) -> list[dict]:
        return [json.loads(line) for line in self.metrics_lines()]

    def write_birth(self, config_json: str, command: list[str], environment: dict) -> None:
        """config.json, command.sh, environment.json; what is not committed, as a diff."""
        write_text(self.folder / "config.json", config_json + "\n")
        lines = ["#!/bin/sh", "# repeats this run, as it was typed"]
        lines += [f"cd {shlex.quote(str(Path.cwd()))} || exit", shlex.join(command)]
        write_text(self.folder / "command.sh", "\n".join(lines) + "\n")
        write_json(self.folder / "environment.json", environment)
        if environment.get("uncommitted_changes") and (text := git("diff", "HEAD", "--", ".")):
            write_text(self.folder / "uncommitted.diff", text[:MOST_DIFF] + "\n")

    def write_source(self, source: Source, places: dict[str, Tensor]) -> None:
        """classes.json, with what images are normalised by; the pictures, in and out."""
        self.write_split(source, places, dict.fromkeys(self.damaged(), UNDECODED))
        content = {"classes": source.classes, "mean": source.mean, "std": source.std}
        write_json(self.folder / "classes.json", content)
        if source.index is not None:
            write_entry(self.folder / PICTURES, *source.index)
        if source.skipped or (source.tally and source.tally.left_out):
            lines = [str(source.tally)] * bool(source.tally) + list(source.skipped)
            write_text(self.folder / SKIPPED, "\n".join(lines) + "\n")

    def write_split(
        self, source: Source, places: dict[str, Tensor], left_out: Mapping[str, str]
    ) -> None:
        """split.csv: which picture is where, and why some of them count for nothing."""
        if rows := rows_of(source, places):
            write_split(self.folder / SPLIT_FILE, rows, left_out)

    def damaged(self) -> list[str]:
        """Photographs that could not be decoded while the run went on, in any life so far."""
        try:
            known = (self.folder / DAMAGED).read_text("utf-8", "surrogateescape")
        except OSError:
            return []
        return list(filter(None, known.split("\n")))

    def write_damaged(self, names: Iterable[str]) -> list[str]:
        """damaged.txt: these photographs too; all that are known."""
        known = self.damaged()
        if new := [name for name in names if name not in known]:
            text = "".join(f"{name}\n" for name in [*known, *new])
            with whole(self.folder / DAMAGED) as partial:
                partial.write_bytes(text.encode("utf-8", "surrogateescape"))
        return [*known, *new]

    def write_metrics(self, metrics: Sequence[Metric], best_is: str) -> None:
        """metrics.json: what the numbers in metrics.jsonl are, for those who have this folder."""
        declared = [asdict(metric) for metric in metrics]
        write_json(self.folder / "metrics.json", {"best_is": best_is, "metrics": declared})

    def write_config(self, config_json: str) -> None:
        write_text(self.folder / "config.json", config_json + "\n")

    def abandon(self, reason: str = "") -> None:
        """Remove the folder again if no run was born in it; none is running from here on."""
        if (self.folder / "config.json").exists():
            if self.read_status().get("status") == "running":  # of a life that was killed
                self.status(status="failed", reason=f"killed, then not started: {reason}")
            return
        self.close()
        for path in (self.checkpoints, self.folder / "crash", self.folder / CODE):
            shutil.rmtree(path, ignore_errors=True)
        for name in ("lock", "STOP", "train.log", "status.json"):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def link_latest(self) -> None:
        """runs/latest -> this run, where the system allows links; in no other folder."""
        if self.folder.resolve().parent.name != "runs":
            return
        link = self.folder.parent / "latest"
        with contextlib.suppress(OSError):
            if link.is_symlink() or not link.exists():
                with whole(link, sync=False) as partial:
                    partial.symlink_to(self.folder.name, target_is_directory=True)


def launch_command(argv: list[str], num_processes: int, gpus: bool = False) -> list[str]:
    """The argument vector that repeats this run in a folder of its own, with its launcher."""
    argv = without(argv, "--run-dir", "--fresh")
    script = found_from_here("train.py")
    if num_processes == 1:
        return ["python", script, *argv]
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(num_processes)))
    if per_node == num_processes:
        return ["torchrun", "--nproc-per-node", str(num_processes), script, *argv]
    return [*sbatch(num_processes, gpus), *argv]


def sbatch(num_processes: int, gpus: bool) -> list[str]:
    """The start of a job like this one."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(num_processes)))
    kind = "gpus" if gpus else "ntasks"
    nodes = [f"--nodes={num_processes // per_node}", f"--{kind}-per-node={per_node}"]
    return ["sbatch", *nodes, "launch/slurm.sbatch"]


def job() -> str:
    """The number by which SLURM's commands know the job or array task of this process; '' else."""
    env = os.environ
    if "SLURM_STEP_ID" not in env or "LOCKSTEP_PORT" not in env:  # no job of ours: a person's shell
        return ""
    if env.get("SLURM_ARRAY_JOB_ID"):
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID', '')}"
    return env.get("SLURM_JOB_ID", "")


def go_on(folder: Path, num_processes: int, gpus: bool) -> str:
    """What to type to continue this run: where it was a job, as a job."""
    if job():
        return shlex.join([*sbatch(num_processes, gpus), "--resume", str(folder)])
    return pasted("train.py", "--resume", folder)


def without(argv: list[str], folder: str, fresh: str) -> list[str]:
    """The arguments without an option that takes a value and a flag that takes none."""
    kept, words = [], iter(argv)
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name == folder and "=" not in word:
            next(words, None)
        elif name not in (folder, fresh):
            kept.append(word)
    return kept


def describe_environment(extra: dict) -> dict:
    """Versions, commit, host and job: what a stranger needs to repeat the run.

    No secrets: the environment's variables are not dumped, only the named few.
    """
    packages = {}
    for name in ("torch", "torchvision", "accelerate", "datasets", "numpy", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "packages": packages,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(
            git("status", "--porcelain", "--untracked-files=no", "--", ".")
        ),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT", ""),
        **extra,
    }


def git(*words: str) -> str:
    """What git says of this code; "" where there is none."""
    here = Path(__file__).resolve().parent.parent
    command = ["git", "--no-optional-locks", "-C", str(here), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5)
        return done.stdout.strip("\n") if done.returncode == 0 else ""
    except (OSError, subprocess.SubprocessError):
        return ""


def free_bytes(folder: Path) -> int:
    """Room on the disk that holds the folder."""
    return shutil.disk_usage(folder).free
