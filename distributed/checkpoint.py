"""Checkpoints: whole or not there. Progress, save in the background, newest valid, load.

`step-000123.partial/` -> safetensors and JSON, each fsynced -> MANIFEST.json (bytes and blake2b of
every file) -> rename -> fsync of the parent -> prune. No pickle anywhere, no random state: order,
augmentation and dropout are functions of (seed, epoch, step, shard).
"""

import atexit
import contextlib
import errno
import hashlib
import json
import math
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from common.disk import digest
from common.errors import UserError
from distributed import faults
from models.state import load_whole_state, whole_state

Files = dict[str, dict[str, Tensor]]  # name of a file without its suffix -> tensors by name

FORMAT = 1
MANIFEST = "MANIFEST.json"
NUMBER = "#"  # behind the name of a state that is no tensor but a number of Python's
IN_STEPS = "no thread could be started (memory, or a limit on processes: ulimit -u): "
REQUIRED = {"model.safetensors", "optimizer.safetensors", "progress.json"}


@dataclass
class Progress:
    """Where a run stands.

    `step` counts updates, `images` what they saw; `evaluated` is the step last evaluated. `ahead`
    is by how many steps of the present batch the place in the order is ahead of `step`: 0 until
    batch or data change (`settle`).
    """

    step: int = 0
    images: int = 0
    ahead: int = 0
    batch_size: int = 0  # of the latest update; 0: not known
    steps_per_epoch: int = 0
    lr: float = 0.0  # of the latest update
    average_warms_up: bool = True  # not so in checkpoints of old
    evaluated: int = 0
    best: float | None = None  # of the split that chooses
    best_epoch: float = 0
    best_step: int = 0
    best_of: dict = field(default_factory=dict)  # what it was measured on: training/best.py
    best_metrics: dict = field(default_factory=dict)  # on the test split, at the best epoch
    stale: int = 0  # evaluations in a row that, as printed, were no better than one before
    flat: int = 0  # those since the learning rate last fell, with --schedule plateau
    drops: int = 0  # how often it fell
    metrics_rows: int = 0
    seconds: float = 0.0  # of training and evaluation, over all lives
    last: dict = field(default_factory=dict)  # the latest evaluation's metrics
    sums: list[float] = field(default_factory=list)  # what the next metrics row adds up
    right: int = 0  # and the right answers
    summed: int = 0  # steps in those sums

    @property
    def last_epoch(self) -> int:
        """The epoch, from 0, of the latest update."""
        return max(0, self.step - 1 + self.ahead) // max(1, self.steps_per_epoch)

    def settle(self, batch_size: int, steps_per_epoch: int) -> None:
        """Go on with this batch and so many steps an epoch: at the same place, in epochs seen."""
        if self.batch_size and self.step:
            epoch, step = divmod(self.step + self.ahead, self.steps_per_epoch)
            if (batch_size, steps_per_epoch) != (self.batch_size, self.steps_per_epoch):
                step = min(step * self.batch_size // batch_size, steps_per_epoch)
                self.ahead = epoch * steps_per_epoch + step - self.step
            if batch_size != self.batch_size:
                self.summed = 0  # a row adds up updates of one size
        self.images = self.images or self.step * batch_size  # checkpoints of old did not count
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch

    def count_step(self, lr: float = 0.0) -> None:
        """An update was made, at this rate; the next row counts it."""
        self.lr = lr
        self.images += self.batch_size
        self.step += 1
        self.summed += 1

    def take_summed(self) -> int:
        """The updates of a row; the next row begins."""
        summed, self.summed = self.summed, 0
        return summed


def _exact(value: float) -> torch.dtype:
    """A tensor that holds a Python number as it is."""
    return torch.float64 if isinstance(value, float) else torch.int64


def _group_numbers(optimizer: Optimizer) -> list[tuple[int, str, float]]:
    """What an optimizer of one's own counts in its groups beside its settings: group, key, number.

    The rates and the like of our own are settings, all of them.
    """
    ours = getattr(optimizer, "set_by_us", None)
    return [
        (number, key, value)
        for number, group in enumerate(optimizer.param_groups if ours is not None else ())
        for key, value in group.items()
        if isinstance(value, int | float) and key not in (ours or ())
    ]


# --- what is saved: plain CPU tensors, taken in one go -------------------------------------------


def capture(
    model: nn.Module,
    optimizer: Optimizer,
    average: nn.Module | None = None,
    scaler: GradScaler | None = None,
) -> Files:
    """Host copies of all state, file name -> tensors; the only part a step has to wait for."""

    def host(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True).contiguous()

    files = {"model": {k: host(v) for k, v in whole_state(model).items()}}
    files["optimizer"] = {
        f"{name}|{key}" if torch.is_tensor(value) else f"{name}|{key}{NUMBER}":
            host(value if torch.is_tensor(value) else torch.tensor(value, dtype=_exact(value)))
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
        if value is not None
    }  # fmt: skip
    files["optimizer"] |= {
        f"|{number}|{key}": torch.tensor(value, dtype=_exact(value))
        for number, key, value in _group_numbers(optimizer)
    }
    files["optimizer"][f"|{type(optimizer).__name__}"] = torch.zeros(1)  # whose state this is
    if average is not None:
        files["ema"] = {k: host(v) for k, v in whole_state(average).items()}
    if scaler is not None:
        numbers = {k: float(v) for k, v in scaler.state_dict().items()}
        files["scaler"] = {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}
    return files


@torch.no_grad()
def restore(
    files: Files,
    model: nn.Module,
    optimizer: Optimizer,
    average: nn.Module | None = None,
    scaler: GradScaler | None = None,
) -> None:
    """Put captured state back into existing objects, keeping their devices and memory layouts."""
    if average is not None and "ema" not in files:
        raise UserError(
            "this checkpoint has no averaged weights: it was made without --ema; leave --ema out, "
            "or start a new run from its weights: --weights runs/NAME/last.safetensors",
            code="checkpoint-without-average",
        )
    if f"|{type(optimizer).__name__}" not in files["optimizer"]:
        raise UserError(
            "this checkpoint belongs to another optimizer, whose state says nothing to this one; "
            "start a new run from its weights: --weights runs/NAME/last.safetensors --run-dir ...",
            code="checkpoint-of-other-optimizer",
        )
    copy_state(model, files["model"], "model")
    if average is not None:
        copy_state(average, files["ema"], "averaged model")
    parameters = dict(model.named_parameters())
    for key, value in files["optimizer"].items():
        name, _, field_name = key.partition("|")
        if not name:
            number, of_group, entry = field_name.partition("|")
            if of_group:
                optimizer.param_groups[int(number)][entry] = value.item()
            continue
        p = parameters[name]
        if field_name.endswith(NUMBER):
            optimizer.state[p][field_name.removesuffix(NUMBER)] = value.item()
            continue
        if value.shape == p.shape:
            value = torch.empty_like(p, dtype=value.dtype).copy_(value)
        else:
            value = value.to(p.device)
        optimizer.state[p][field_name] = value
    if scaler is not None and "scaler" in files:
        scaler.load_state_dict({
            k: int(v) if k.startswith(("growth_interval", "_growth")) else float(v)
            for k, v in files["scaler"].items()
        })  # fmt: skip


@torch.no_grad()
def copy_state(model: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Put a model's saved state into it; UserError, and nothing done, where it does not fit."""
    if wrong := load_whole_state(model, tensors):
        raise UserError(
            f"this checkpoint belongs to another {what}: {', '.join(wrong[:3])} "
            f"{'and others ' if len(wrong) > 3 else ''}do not fit",
            code="checkpoint-of-other-model",
        )


# --- writing -------------------------------------------------------------------------------------


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, complete on the disk under its name or not there at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        _save(tensors, partial, metadata)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # half a file would fill the disk further
            partial.unlink(missing_ok=True)
        raise


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, synced, that may be read by whom the umask lets: its own are 0600."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)
    sync(path)


def card_of(path: Path) -> dict:
    """What a file of weights says of itself; {} where it is missing, damaged or not a run's."""
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads(file.metadata()["lockstep"])
            return found if isinstance(found, dict) else {}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return {}


def sync(path: Path) -> None:
    """fsync a file or, where the system allows it, a folder."""
    folder = path.is_dir()
    with contextlib.suppress(*([OSError] if folder else [])):  # Windows cannot open a folder
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def digest_of(path: Path) -> str:
    """blake2b of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_of_manifest(manifest: dict) -> str:
    """blake2b of all a manifest says but this digest itself."""
    rest = {key: value for key, value in manifest.items() if key != "self"}
    return digest(json.dumps(rest, sort_keys=True), size=16)


def write_checkpoint(
    folder: Path, files: Files, progress: Progress, facts: dict, what: str = "save"
) -> Path:
    """Write one checkpoint and return its final path; leaves nothing behind when it fails.

    `what` is the first word of its points for planned faults: save, snapshot.
    """
    target = folder / f"step-{progress.step:09d}"
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        folder.mkdir(exist_ok=True)  # the run folder must be there: it may have been renamed
        partial.mkdir()
        faults.hit(f"{what}:begin", progress.step)
        for name, tensors in files.items():
            _save(tensors, partial / f"{name}.safetensors")
            faults.hit(f"{what}:written", progress.step)
        path = partial / "progress.json"
        path.write_text(json.dumps(vars(progress)), encoding="utf-8")
        sync(path)
        manifest = {
            "format": FORMAT,
            "step": progress.step,
            "facts": facts,
            "files": {
                p.name: {"bytes": p.stat().st_size, "blake2b": digest_of(p)}
                for p in sorted(partial.iterdir())
            },
        }
        manifest["self"] = digest_of_manifest(manifest)
        faults.hit(f"{what}:manifest", progress.step)
        path = partial / MANIFEST
        path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync(path)
        sync(partial)
        old = target.with_name(target.name + ".replaced")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():  # the same step again, with a later phase: rename cannot overwrite
            target.rename(old)
        partial.rename(target)
        faults.hit(f"{what}:renamed", progress.step)
        sync(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def prune(folder: Path, keep: int, what: str = "save") -> None:
    """Remove all but the newest `keep`; called only after a newer one is whole on the disk."""
    for path in visible(folder)[keep:]:
        doomed = path.with_name(path.name + ".removed")
        with contextlib.suppress(OSError):
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    faults.hit(f"{what}:pruned")


def sweep(folder: Path) -> int:
    """Remove what interrupted saves left; only the owner of the run's lock may."""
    count = 0
    for path in folder.glob("step-*.replaced"):
        whole = path.with_name(path.name.removesuffix(".replaced"))
        if not whole.exists():
            path.rename(whole)
    for path in folder.glob("step-*.*"):
        shutil.rmtree(path, ignore_errors=True)
        count += 1
    return count


class Writer:
    """Writes checkpoints in a thread of its own; one save in flight.

    The thread is there from the beginning: where memory has run out, one that is to begin may die
    before it says that it has, and whoever began it would wait for ever. `end` lets it go.
    `cpu_seconds` is what the latest save took of a CPU, `problem` why steps wait for saves.
    """

    def __init__(
        self, folder: Path, keep: int, on_done: Callable[[str], None], what: str = "save"
    ) -> None:
        self.folder, self.keep, self.on_done, self.what = folder, keep, on_done, what
        self.cpu_seconds = 0.0
        self.error = ""  # why the latest save failed; "" once one succeeds
        self._saves: queue.SimpleQueue[tuple[Files, Progress, dict] | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        with contextlib.suppress(RuntimeError):  # no memory for one: steps wait instead
            self._thread.start()
        self.problem = "" if self._thread.is_alive() else f"{IN_STEPS}steps wait for each {what}"
        atexit.register(self.wait)

    def start(self, files: Files, progress: Progress, facts: dict) -> None:
        """Begin a save of captured state."""
        self.wait()
        progress = replace(progress, sums=list(progress.sums))  # metrics are never changed
        if not self._thread.is_alive():
            self._run(files, progress, facts)
            return
        self._idle.clear()
        self._saves.put((files, progress, facts))

    def _work(self) -> None:
        while (save := self._saves.get()) is not None:
            try:
                self._run(*save)
            except Exception as error:  # of who was told: the next save finds this thread there
                found = type(error), error, error.__traceback__, self._thread
                threading.excepthook(threading.ExceptHookArgs(found))
                del found  # with its frames
            finally:
                del save  # the copy of the state
                self._idle.set()

    def _run(self, files: Files, progress: Progress, facts: dict) -> None:
        began, spent = time.monotonic(), time.thread_time()
        try:
            target = write_checkpoint(self.folder, files, progress, facts, self.what)
            prune(self.folder, self.keep, self.what)
            self.error, self.cpu_seconds = "", time.thread_time() - spent
            words = f"saved {target.name} in {time.monotonic() - began:.1f} s"
        except Exception as error:
            name = "checkpoint" if self.what == "save" else self.what
            self.error = words = explain_failure(error, self.folder, files, name)
        self.on_done(words)

    def busy(self) -> bool:
        """Whether a save is under way."""
        return not self._idle.is_set() and self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Until the save under way is done, or for so long."""
        until = math.inf if seconds is None else time.monotonic() + seconds
        while self.busy() and (left := until - time.monotonic()) > 0:
            self._idle.wait(min(left, 1.0))

    def end(self) -> None:
        """Wait for the save under way; there is none afterwards, and no thread."""
        self._saves.put(None)  # first: an interrupt may cut the wait short
        self.wait()
        if self._thread.is_alive():
            self._thread.join(1.0)
        atexit.unregister(self.wait)


def explain_failure(error: Exception, folder: Path, files: Files, name: str = "checkpoint") -> str:
    """Why a save failed, in words; a full disk hides behind several exception types."""
    need = sum(t.numel() * t.element_size() for part in files.values() for t in part.values())
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        free = 0
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or (isinstance(error, SafetensorError) and free < need):
        return (
            f"{name} not saved: needs {need / 1e6:.0f} MB, {free / 1e6:.0f} MB free in "
            f"{folder}; the previous one stays"
        )
    return f"{name} not saved in {folder} ({error}); the previous one stays"


# --- reading -------------------------------------------------------------------------------------


def visible(folder: Path) -> list[Path]:
    """Checkpoint folders, newest step first; stray files do not count."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def verify(path: Path) -> dict:
    """The manifest of a checkpoint whose bytes are all as written; ValueError says what is not."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, listed = manifest["format"], manifest["files"]
        if manifest["self"] != digest_of_manifest(manifest) or not listed.keys() >= REQUIRED:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{MANIFEST} is missing or damaged") from None
    if version > FORMAT:
        raise UserError(
            f"{path} was written by a newer version (format {version}, this one reads {FORMAT}); "
            "update the program",
            code="checkpoint-too-new",
        )
    for name, expected in listed.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise ValueError(f"{name} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{name} has {size} bytes instead of {expected['bytes']}")
        if digest_of(file) != expected["blake2b"]:
            raise ValueError(f"{name} was changed after it was written (checksum)")
    return manifest


def newest_valid(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The newest whole checkpoint and its manifest; damaged ones are skipped with a reason.

    None where there is none at all; an error where all are damaged, never a silent fresh start.
    """
    candidates, damaged = visible(folder), []
    for path in candidates:
        try:
            manifest = verify(path)
        except UserError:
            raise
        except ValueError as error:
            warn(f"{path.name} is damaged, going back to the one before: {error}")
            damaged.append(path)
            continue
        for bad in damaged:  # or it would count as one of the newest that are kept
            with contextlib.suppress(OSError):
                bad.rename(bad.with_name(f"damaged-{bad.name}-{time.time_ns()}"))
        return path, manifest
    if candidates:
        count = len(candidates)
        message = f"none of the {count} checkpoints in {folder} is whole"
        raise UserError(
            f"{message if count > 1 else f'the only checkpoint in {folder} is not whole'}; "
            "start over with --fresh (the old files are kept aside)",
            code="no-whole-checkpoint",
        )
    return None


def read_checkpoint(path: Path) -> tuple[Files, Progress]:
    """All tensors and the progress of a verified checkpoint."""
    listed = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    files = {
        name.removesuffix(".safetensors"): load_file(path / name)
        for name in sorted(listed)
        if name.endswith(".safetensors")
    }
    content = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    return files, read_progress(content)


def read_progress(content: dict) -> Progress:
    """Progress as another version may have written it."""
    known = {k: v for k, v in content.items() if k in Progress.__dataclass_fields__}
    return Progress(**{"average_warms_up": False, **known})
