"""A run inside a process that lives on: what `fit` of train.py takes, does and gives back."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from common.disk import write_text
from common.errors import FAILED, FINISHED, STOPPED, UserError
from config import TYPES, Settings, TrainConfig, flag_of, parse
from config.command_line import read_yaml
from config.layers import latest_run
from distributed.checkpoint import Progress
from distributed.lent import lent
from distributed.world import World
from models import PARTS, build_from
from models.class_source import standalone_source
from models.own_file import standing_for
from models.state import load_whole_state
from report.screen import Report, quieted
from training.data import Data
from training.learner import Learner
from training.observer import Observer
from training.run_dir import CODE, RunDir, fresh_name
from training.schedule import Schedule

Flag = str | int | float | Path | list[str] | None
Flags = dict[str, Flag]
Model = type[nn.Module] | str | Path | None

NOT_HERE = ("dry_run", "eval_only", "find_lr", "help", "version", "sweep", "seeds", "folds")
SWITCHES = ("debug", "fresh", "resume")  # flags that may stand without a value, beside TYPES
TRIAL_SECONDS = 120.0
# For an interpreter that knows nothing of this one.
TRIAL = """
import json, sys, torch
from models import build_from
facts = json.loads(sys.argv[1])
model = build_from(facts, facts["classes"])
model.eval()(torch.zeros(2, facts["channels"], facts["image_size"], facts["image_size"]))
"""


@dataclass(frozen=True, repr=False)
class Result:
    """What a run left. `plt.plot(*result.history["train/loss"])` draws a curve of it.

    `status` is "finished", "stopped" (as it was asked to; it can go on) or "failed" (the last
    checkpoint could not be written). `history` has each number of metrics.jsonl as (steps, values).
    `model` has the best weights, in evaluation mode, on the CPU, and `metrics` are those of these
    weights on the test images. Of a run that stopped before its first evaluation it has the last
    weights, and there are no metrics.
    """

    status: str
    folder: Path
    history: dict[str, tuple[numpy.ndarray, numpy.ndarray]]
    metrics: dict
    model: nn.Module

    def __repr__(self) -> str:
        numbers = {k: round(v, 4) for k, v in self.metrics.items() if isinstance(v, float)}
        return f"Result(status={self.status!r}, folder={str(self.folder)!r}, metrics={numbers})"


def run_as_guest(main: Callable[[World, Observer], int], model: Model, flags: Flags) -> Result:
    """Run main in this process and leave the process as it was, whatever happens."""
    refuse_what_is_no_fit(model, flags)
    named = {**(read_yaml(Path(str(flags["config"]))) if flags.get("config") else {}), **flags}
    if flags.get("resume"):
        folder = latest_run(Path("latest" if flags["resume"] is True else str(flags["resume"])))
        return _run(main, model, flags, folder.resolve() if folder.is_symlink() else folder)
    if named.get("run_dir"):
        return _run(main, model, flags, Path(str(named["run_dir"])))
    # A folder for each call, also inside a job, which would give all of them the same.
    name = model.__name__ if isinstance(model, type) else model or named.get("model")
    folder = fresh_name(
        Path("runs"), str(name or TrainConfig.model), str(named.get("dataset") or "auto")
    )
    try:
        return _run(main, model, {**flags, "run_dir": folder}, folder)
    finally:
        for place in (folder, folder.parent):
            with contextlib.suppress(OSError):  # it is empty only where no run was born in it
                place.rmdir()


def refuse_what_is_no_fit(model: Model, flags: Flags) -> None:
    """What the command line offers and a call cannot give, or the other way round."""
    together = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_available() and dist.is_initialized():
        together = max(together, dist.get_world_size())
    if together > 1:
        raise UserError(
            f"fit() is one process, and here are {together}: several train together as "
            "torchrun --nproc-per-node N train.py",
            code="one-process",
        )
    for name in NOT_HERE:
        if flags.get(name):
            raise UserError(
                f"fit({name}=...): fit() trains; type python train.py --{name.replace('_', '-')} "
                "with the same flags in a terminal",
                code="not-in-fit",
            )
    if isinstance(model, type) and issubclass(model, nn.Module):
        return
    if not isinstance(model, str | Path | None):
        what = model.__name__ if isinstance(model, type) else f"a {type(model).__name__}"
        raise UserError(
            f"fit(model=...) is given {what}: it takes a class that is an nn.Module (the class "
            'itself, without brackets), a name of python -m models, or "FILE.py:Class"',
            code="not-a-module",
        )


def where_it_runs(folder: Path) -> list[str]:
    """What a hosted notebook would do silently: lose the run folder, leave a GPU idle."""
    place, found = folder.resolve(), []
    if "COLAB_RELEASE_TAG" in os.environ and not place.is_relative_to("/content/drive"):
        found.append(
            f"{place} goes when Colab's session does, which gives no signal: from google.colab "
            "import drive; drive.mount('/content/drive'), then run_dir='/content/drive/MyDrive/"
            f"runs/{folder.name}'"
        )
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ and not place.is_relative_to("/kaggle/working"):
        found.append(
            f"{place} goes when Kaggle's session does, which gives no signal: "
            f"run_dir='/kaggle/working/runs/{folder.name}'"
        )
    if (count := torch.cuda.device_count()) > 1:
        found.append(
            f"fit() is one process and takes one of {count} GPUs; all of them: "
            f"!torchrun --nproc-per-node {count} train.py with the same flags"
        )
    return found


def words(flags: Flags) -> list[str]:
    """Keywords as the words of a command line; None means what leaving it out means."""
    found = []
    for name, value in flags.items():
        flag = flag_of(name)
        if isinstance(value, bool) and (TYPES.get(name) is bool or name in SWITCHES):
            off = [flag.replace("--", "--no-", 1)] if name in TYPES else []
            found += [flag] if value else off
        elif isinstance(value, list | tuple):
            found += [flag, *map(str, value)]
        elif value is not None:
            found.append(f"{flag}={value}")
    return found


def understood(flags: Flags) -> Settings:
    """The settings of a call, with the checks and the sentences of the command line."""
    try:
        return parse(words(flags))
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a name that no file can have
        raise UserError(f"cannot be understood: {error}", code="bad-settings") from None


def _run(
    main: Callable[[World, Observer], int], model: Model, flags: Flags, folder: Path
) -> Result:
    if not isinstance(model, type):
        settings = understood({"model": model, **flags})
        with lent(), quieted():
            return _result(main, settings, Seen(), folder)
    with KeptClass(model, folder) as kept:
        settings = understood({"model": kept.name, **flags})
        with lent(), quieted():
            result = _result(main, settings, Seen(kept), folder)
            if doubt := kept.doubt():
                Report().warn(doubt)
            return result


def _result(
    main: Callable[[World, Observer], int], settings: Settings, seen: "Seen", folder: Path
) -> Result:
    for message in where_it_runs(folder):
        Report().warn(message)
    with World(settings, guest=True) as world:
        code = main(world, seen)
    status = {FINISHED: "finished", STOPPED: "stopped", FAILED: "failed"}[code]
    weights, data = seen.learner.weights(), seen.data
    best = folder / "model.safetensors"
    if seen.progress.best is not None and best.is_file():
        weights = load_file(best)
    # Built anew: without what Accelerate, a compiler or cached features hung on it.
    model = build_from(vars(settings.config), data.num_outputs)
    load_whole_state(model, weights)
    rows = RunDir(folder).read_metrics()
    return Result(status, folder, history(rows), dict(seen.progress.best_metrics), model.eval())


def history(rows: list[dict]) -> dict[str, tuple[numpy.ndarray, numpy.ndarray]]:
    """Each number of the rows as (steps, values)."""
    found = {}
    for key in dict.fromkeys(key for row in rows for key in row if key != "step"):
        points = [(row["step"], row[key]) for row in rows if key in row]
        steps, values = zip(*points, strict=True)
        found[key] = numpy.array(steps), numpy.array(values)
    return found


class KeptClass:
    """A class that is trained as it is in memory, and whose source is kept in the run folder.

    Within the context its name means the class; later, for --resume and predict.py, its file.
    """

    def __init__(self, made: type[nn.Module], folder: Path) -> None:
        self.made = made
        self.file = folder.resolve() / CODE / f"{made.__name__}.py"
        self.name = f"{self.file}:{made.__name__}"
        self._trial: subprocess.Popen | None = None
        self._problem = ""
        self._contexts = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._contexts.enter_context(standing_for(self.name, self.load))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._contexts.close()
        if self._trial is not None:
            self._trial.kill()
            self._trial.communicate()

    def load(self) -> type[nn.Module]:
        """The class; the run, which has locked its folder by now, is given the source."""
        try:
            text = standalone_source(self.made)
            old = self.file.read_text(encoding="utf-8") if self.file.is_file() else None
            if text != old:
                self.file.parent.mkdir(exist_ok=True)
                if old is not None:  # of an earlier life, or mended by hand
                    self.file.replace(self._free_name())
                write_text(self.file, text)
        except (OSError, TypeError, SyntaxError) as error:
            self._problem = str(error)
        return self.made

    def _free_name(self) -> Path:
        number = len(list(self.file.parent.iterdir()))
        return self.file.with_name(f"{self.made.__name__}.old-{number}.py")

    def try_elsewhere(self, facts: dict[str, str | int]) -> None:
        """Start an interpreter that builds the model from its file, beside the training."""
        if not self._problem:
            self._trial = subprocess.Popen(
                [sys.executable, "-c", TRIAL, json.dumps({"model": self.name, **facts})],
                cwd=Path(__file__).resolve().parent.parent, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                start_new_session=True,  # an interrupt of the notebook is none of its business
            )  # fmt: skip

    def doubt(self) -> str:
        """What --resume and predict.py will miss, "" if nothing."""
        name, why = self.made.__name__, self._problem
        if self._trial is not None:
            try:
                _, output = self._trial.communicate(timeout=TRIAL_SECONDS)
                last = (output.strip().splitlines() or ["it ends without a word"])[-1]
                why = last if self._trial.returncode else ""
            except subprocess.TimeoutExpired:
                why = f"trying it takes more than {TRIAL_SECONDS:.0f} s"
        return (
            f"{self.file} does not stand alone ({why}): predict.py and --resume need it; write "
            f"class {name} into that file with all that it uses"
        ) if why else ""  # fmt: skip


class Seen(Observer):
    """Remembers what a run was made of, for its result."""

    learner: Learner
    data: Data
    progress: Progress

    def __init__(self, kept: KeptClass | None = None) -> None:
        self.kept = kept

    def started(self, learner: Learner, data: Data, schedule: Schedule, progress: Progress) -> None:
        self.learner, self.data, self.progress = learner, data, progress
        if self.kept is not None:
            config = learner.config
            facts = {name: getattr(config, name) for name in ("image_size", *PARTS)}
            self.kept.try_elsewhere({**facts, "classes": len(data.classes)})
