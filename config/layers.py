"""The layers a configuration is made of, and where each value comes from.

Later layers win: default < recipe of the model < --recipe < data set < saved run < --debug < YAML
file < flag.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from common.errors import UserError
from common.mounts import own_disk
from common.text import nearest
from config.fields import HINTS, MAY_CHANGE, TrainConfig, convert, flag_of
from config.rows import Rows
from models import Recipe, card_of_weights, lookup, parts_of, size_problem
from models.own_file import CODE, code_of_weights, refuse_foreign_code

LATEST = "runs/latest"
__version__ = "0.1.0"


@dataclass(frozen=True, kw_only=True)
class Actions:
    """What this one command does with the configuration; not part of the run's identity."""

    debug: bool = False
    dry_run: bool = False
    eval_only: bool = False
    find_lr: bool = False
    fresh: bool = False
    stop_after: int | None = None
    resume: str | None = None
    allow_change: tuple[str, ...] = ()
    trust_code: bool = False
    as_processes: int | None = None  # that --dry-run rehearses, on this one


@dataclass(frozen=True)
class Settings:
    """The layers a configuration was made of; later layers win."""

    layers: Mapping[str, Mapping[str, object]]
    actions: Actions = Actions()
    argv: tuple[str, ...] = ()
    typed: Mapping[str, object] = field(default_factory=dict)  # in this life or an earlier one
    refused: UserError | None = None  # of a command that cannot be understood; see parse_or_exit
    rows: Rows | None = None  # of a command that is several runs; then there are no layers

    @property
    def config(self) -> TrainConfig:
        merged = {}
        for values in self.layers.values():
            merged |= values
        return TrainConfig(**merged)

    def origin(self, name: str) -> str:
        """Where the value of a field comes from, as the start panel shows it."""
        return next((o for o, v in reversed(list(self.layers.items())) if name in v), "default")

    def asked(self, name: str) -> bool:
        """Whether the user typed this value (as a flag or in a file) for this very command."""
        return any(name in v for o, v in self.layers.items() if o == "flag" or o.startswith("file"))

    def with_layer(self, origin: str, values: Mapping[str, object], before: str = "") -> "Settings":
        """A copy with one more layer: on top, or just below the layers a user typed."""
        if origin in self.layers:
            layers = {**self.layers, origin: {**self.layers[origin], **values}}
        elif before in self.layers:
            layers = {}
            for name, old in self.layers.items():
                if name == before:
                    layers[origin] = dict(values)
                layers[name] = old
        else:
            layers = {**self.layers, origin: dict(values)}
        return replace(self, layers=layers)


def recipe_of(model: str, weights: str) -> Recipe:
    """The model's recipe: from scratch, or for fine-tuning where it starts from weights."""
    entry = lookup(model)
    recipe = dict(entry.recipe)
    if weights not in ("none", "auto"):
        recipe |= entry.finetune
        card = card_of_weights(weights)
        recipe |= parts_of(card)
        size = card.get("image_size", 0)
        if size and entry.task == "classification" and not size_problem(model, entry, size):
            recipe["image_size"] = size
    return recipe


def task_of(config: TrainConfig) -> str:
    """What is trained for: what the model is for, unless another task is asked for."""
    return lookup(config.model).task if config.task == "auto" else config.task


def latest_in_words(folder: Path) -> Path:
    """`latest_run` for commands that show no panel; what it falls back to is said on stderr."""
    if (found := latest_run(folder)) != folder:
        print(f"{folder} is no link here: {found} is the newest run", file=sys.stderr)
    return found


def latest_run(folder: Path) -> Path:
    """What "latest" means: runs/latest, or the newest run where the disk takes no links."""
    if folder.as_posix() not in ("latest", LATEST) or (folder / "config.json").is_file():
        return folder
    link, runs = Path(LATEST), Path("runs").glob("*/status.json")
    newest = max(runs, key=lambda file: file.stat().st_mtime, default=link / "status.json").parent
    return link if link.exists() else newest


def known_run_dir(typed: dict, actions: Actions) -> Path | None:
    """The run folder as far as the command or the job decides it; None: a fresh one is chosen.

    A SLURM job (or array task), and the lives under one restarting launcher, share a folder.
    """
    if actions.resume is not None:
        folder = latest_run(Path(os.path.expanduser(actions.resume)))  # noqa: PTH111 - as in convert
        if typed.get("run_dir") and Path(str(typed["run_dir"])) != folder:
            raise UserError(
                f"--resume {folder} and --run-dir {typed['run_dir']} name two folders: drop one",
                code="two-run-dirs",
            )
        if not (folder / "config.json").is_file():
            others = sorted(p.parent.name for p in folder.parent.glob("*/config.json"))
            near = nearest(folder.name, others)
            hint = f" (did you mean {folder.parent / near}?)" if near else ""
            raise UserError(
                f"--resume {folder}: holds no run{hint}; a run folder has a config.json",
                code="no-run",
            )
        return folder.resolve() if folder.is_symlink() else folder
    if typed.get("run_dir"):
        return Path(str(typed["run_dir"]))
    if actions.dry_run or actions.debug or actions.eval_only or actions.find_lr:
        return None
    env = os.environ
    if env.get("SLURM_ARRAY_JOB_ID"):
        return Path("runs") / f"slurm-{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    in_step = env.get("SLURM_STEP_ID") and not env.get("SLURM_PTY_PORT")  # no shell of a person
    if env.get("SLURM_JOB_ID") and in_step:
        return Path("runs") / f"slurm-{env['SLURM_JOB_ID']}"
    restarts = env.get("TORCHELASTIC_MAX_RESTARTS", "0")
    launch = re.sub(r"[^A-Za-z0-9_-]", "_", env.get("TORCHELASTIC_RUN_ID", "none"))
    if restarts != "0" and launch in ("none", ""):
        raise UserError(
            "this launcher restarts what fails, but gives its lives no name to find their folder "
            "by: add --run-dir runs/NAME, or start it with launch/torchrun.sh",
            code="nameless-launch",
        )
    if restarts != "0":
        return Path("runs") / f"launch-{launch}"
    return None


def restarted() -> bool:
    """Whether a launcher, not a person, typed this command again."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") not in ("", "0") for name in names)


def read_saved(folder: Path) -> tuple[dict[str, object], dict[str, object]]:
    """What a run's settings became, and what was typed for it in any of its lives."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        saved, problems = {}, []
        for name, value in content["config"].items():
            if name in HINTS:
                convert(name, value, name, saved, problems)
        if problems:
            raise ValueError(problems)
        return saved, {n: v for n, v in content.get("asked", {}).items() if n in HINTS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{folder / 'config.json'} cannot be read; mend it, or start over with --fresh",
            code="bad-config-json",
        ) from None


def own_code(setting: str, model: str, folder: Path, actions: Actions) -> str:
    """The file of a saved run's own class: to evaluate what was trained, to train on as it is."""
    if actions.eval_only:
        if setting != "model":  # nothing will be trained
            return str(HINTS[setting].default)
        card = card_of_weights(str(folder / "model.safetensors"))
        return code_of_weights(model, card.get("code", {}), folder, actions.trust_code)
    file, _, name = model.rpartition(":")
    if Path(file).resolve().is_relative_to(folder.resolve()) and not actions.trust_code:
        refuse_foreign_code(model, folder)
    copy = folder / CODE / Path(file).name
    if not Path(file).expanduser().is_file() and copy.is_file():
        raise UserError(
            f"{file}, the {setting} of {folder}, is not here ({Path.cwd()}); the run keeps a copy "
            f"of it: add --{setting} {shlex.quote(f'{copy}:{name}')} --allow-change {setting}",
            code="no-model-file",
        )
    return model


def refuse_conflicts(typed: dict, saved: dict, folder: Path, allowed: tuple[str, ...]) -> None:
    """A resumed run keeps its settings; what the user typed differently is listed, all at once."""
    conflicts = [
        f"{flag_of(name)} {value} (the run has {saved[name]})"
        for name, value in typed.items()
        if name in saved and value != saved[name]
        and name not in MAY_CHANGE and name not in allowed
    ]  # fmt: skip
    if conflicts:
        names = " ".join(c.split()[0][2:] for c in conflicts)
        raise UserError(
            f"{folder} is a run with other settings: {', '.join(conflicts)}. Drop them to go on, "
            f"add --allow-change {names}, or start a new run with another --run-dir",
            code="other-settings",
        )


def own_disks(config: TrainConfig) -> list[str]:
    """What of a run lies where other nodes may not see it, in words; for who asks for several."""
    given = {
        "--dataset": config.dataset, "--data-dir": config.data_dir, "--weights": config.weights
    }  # fmt: skip
    paths = {k: Path(v).expanduser() for k, v in given.items() if v}
    paths = {k: path for k, path in paths.items() if path.exists()}  # others are names
    paths["--run-dir"] = Path(config.run_dir or "runs")
    found = {flag: (path, own_disk(path)) for flag, path in paths.items()}
    return [
        f"{flag} {path} lies on this machine's own disk ({disk}): other nodes see it only if it "
        "is exported to them"
        for flag, (path, disk) in found.items()
        if disk
    ]


def to_json(settings: Settings) -> str:
    """config.json: the values and where each came from."""
    config = asdict(settings.config)
    origins = {name: settings.origin(name) for name in config}
    content = {"version": __version__, "config": config, "origins": origins}
    return json.dumps({**content, "asked": dict(settings.typed)}, indent=2)
