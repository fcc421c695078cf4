"""TrainConfig, its command line and its layers.

Later layers win: default < recipe of the model < data set < saved run < --debug < YAML file < flag.
"""

import argparse
import difflib
import json
import os
import re
import socket
import sys
import time
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from errors import UserError
from models import did_you_mean, lookup, told_by_weights

__version__ = "0.1.0"


def setting(default, help: str, *, group: str = "", choices: tuple = (), low=None, high=None):
    """A dataclass field that carries what the command line and the checks need to know."""
    extra = {"help": help, "group": group, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=extra)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a run computes. Plain values; saved as config.json."""

    model: str = setting(
        "alexnet", "a name from `python -m models`, torchvision:NAME or FILE.py:Class", group="what"
    )
    dataset: str = setting(
        "auto", "auto, cifar10, digits, synthetic, line, a folder, a hub name", group="what"
    )
    data_dir: str | None = setting(None, "where a local copy of the data lies", group="what")
    weights: str = setting(
        "auto",
        "auto (imagenet for alexnet where it can be had, else none), none, imagenet, or a "
        ".pth/.safetensors file to start from",
        group="what",
    )
    freeze: str = setting(
        "none", "train everything, or only the head", group="what", choices=("none", "backbone")
    )

    epochs: int = setting(10, "passes over the training images", group="length", low=1)
    max_steps: int | None = setting(
        None, "stop after this many optimizer steps", group="length", low=1
    )
    max_time: str | None = setting(
        None, "save and stop after this long, as 3h50m; the run can go on later", group="length"
    )
    eval_every: int = setting(1, "evaluate every so many epochs", group="length", low=1)

    batch_size: int = setting(
        64, "images per optimizer step, over all processes together", group="batch", low=1
    )
    accumulate: int = setting(
        1, "micro-batches a process adds up per step, to save memory", group="batch", low=1
    )
    shards: str = setting(
        "auto", "parts a batch is cut into, a constant of the run (auto: processes x accumulate)",
        group="batch",
    )  # fmt: skip

    optimizer: str = setting(
        "sgd", "how weights are updated", group="optimizer", choices=("sgd", "adamw", "muon")
    )
    lr: float = setting(0.05, "peak learning rate", group="optimizer", low=0.0)
    momentum: float = setting(0.9, "momentum of sgd and muon", group="optimizer", low=0.0, high=1.0)
    weight_decay: float = setting(
        5e-4, "weight decay (not on biases and norms)", group="optimizer", low=0.0
    )
    schedule: str = setting(
        "cosine", "how the learning rate falls", group="optimizer",
        choices=("constant", "cosine", "linear", "step"),
    )  # fmt: skip
    warmup: float = setting(0.0, "epochs of linear warm-up", group="optimizer", low=0.0, high=1e6)
    label_smoothing: float = setting(
        0.0, "probability spread over the other classes", group="optimizer", low=0.0, high=0.999
    )
    grad_clip: float = setting(
        0.0, "largest gradient norm; 0 does not clip", group="optimizer", low=0.0
    )
    ema: float = setting(
        0.0, "decay of the averaged weights that are evaluated; 0 is off", group="optimizer",
        low=0.0, high=0.999999,
    )  # fmt: skip
    on_nonfinite: str = setting(
        "stop", "a loss or gradient that is not a number: stop, or skip that update",
        group="optimizer", choices=("stop", "skip"),
    )  # fmt: skip

    image_size: int = setting(32, "pixels a side that the model sees", group="images", low=1)
    augment: str = setting(
        "flip", "random changes to training images", group="images",
        choices=("none", "flip", "crop", "resized_crop", "translate"),
    )  # fmt: skip
    cutout: int = setting(0, "side of a square that is blanked, in pixels", group="images", low=0)
    mixup: float = setting(0.0, "mixup's alpha; 0 is off", group="images", low=0.0, high=10.0)
    cutmix: float = setting(0.0, "cutmix's alpha; 0 is off", group="images", low=0.0, high=10.0)
    alternating_flip: bool = setting(
        False, "flip each image every other epoch instead of at random", group="images"
    )
    tta: int = setting(
        0, "test-time augmentation: 1 adds the mirror image, 2 also shifts", group="images",
        choices=(0, 1, 2),
    )  # fmt: skip
    val_fraction: float = setting(
        0.0, "part of the training images that chooses the best epoch", group="images",
        low=0.0, high=0.9,
    )  # fmt: skip
    limit: int = setting(
        0, "use only so many training and test images; 0: all", group="images", low=0
    )
    num_workers: int = setting(
        0, "ignored: images lie in memory, no worker loads them", group="images", low=0
    )
    skip_bad_images: bool = setting(
        False, "leave out images that cannot be read, and list them", group="images"
    )

    mixed_precision: str = setting(
        "auto", "auto is bf16 where the GPU has it", group="machine",
        choices=("auto", "no", "bf16", "fp16"),
    )  # fmt: skip
    compile: bool = setting(False, "compile the model", group="machine")
    deterministic: bool = setting(False, "bit-exact GPU runs, slower", group="machine")
    bitwise: bool = setting(
        False,
        "the same bits on any number of processes; on a GPU with --deterministic; slower",
        group="machine",
    )
    threads: int = setting(
        0, "CPU threads per process; 0: the CPUs shared by the processes", group="machine", low=0
    )
    seed: int = setting(
        0, "decides order, augmentation, dropout and weights", group="machine", low=0,
        high=2**63 - 1,
    )  # fmt: skip

    run_dir: str | None = setting(
        None, "the run's folder; continues if it holds a run", group="run"
    )
    checkpoint_every: str = setting(
        "5m", "steps (500), time (5m) or epoch between checkpoints", group="run"
    )
    keep: int = setting(3, "newest checkpoints kept, besides the best model", group="run", low=2)
    log_every: int = setting(
        0,
        "steps between rows of metrics.jsonl; 0: ten an epoch, at most 50 steps",
        group="run",
        low=0,
    )
    plots: bool = setting(True, "draw the run's pictures at its end", group="run")
    track: str = setting(
        "none", "also report to", group="run", choices=("none", "wandb", "tensorboard")
    )


# What a resumed run may change without being asked twice: length, placement and reporting.
MAY_CHANGE = frozenset(
    {"epochs", "max_steps", "max_time", "eval_every", "keep", "checkpoint_every", "log_every"}
    | {"track", "plots", "data_dir", "num_workers", "accumulate", "run_dir", "tta"}
)
DEBUG_PRESET = {
    "epochs": 1, "max_steps": 8, "limit": 512, "compile": False, "num_workers": 0,
    "track": "none", "log_every": 1,
}  # fmt: skip
GROUPS = {
    "what": "what to train", "length": "how long", "batch": "batch", "optimizer": "optimizer",
    "images": "images", "machine": "machine", "run": "what it leaves",
}  # fmt: skip
NUMBER = re.compile("[0-9]+")  # "²".isdigit() is true
HINTS = {f.name: f for f in fields(TrainConfig)}
TYPES = typing.get_type_hints(TrainConfig)


@dataclass(frozen=True, kw_only=True)
class Actions:
    """What this one command does with the configuration; not part of the run's identity."""

    debug: bool = False
    dry_run: bool = False
    eval_only: bool = False
    find_lr: bool = False
    fresh: bool = False
    resume: str | None = None
    allow_change: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """The layers a configuration was made of; later layers win."""

    layers: Mapping[str, Mapping[str, object]]
    actions: Actions = Actions()
    argv: tuple[str, ...] = ()
    typed: Mapping[str, object] = field(default_factory=dict)  # in this life or an earlier one

    @property
    def config(self) -> TrainConfig:
        merged = {}
        for values in self.layers.values():
            merged |= values
        return TrainConfig(**merged)

    def origin(self, name: str) -> str:
        """Where the value of a field comes from, as the start panel shows it."""
        return next((o for o, v in reversed(self.layers.items()) if name in v), "default")

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


def parse(argv: list[str]) -> Settings:
    """Settings of a command line; every problem is reported together as one UserError."""
    problems: list[str] = []
    parser = build_parser()
    known, unknown = parser.parse_known_args([spell(word) for word in argv])
    given = vars(known)
    flags = [s for action in parser._actions for s in action.option_strings]
    problems += [unknown_flag(word, flags) for word in unknown if word.startswith("--")]
    if not problems and unknown:
        problems.append(f"{' '.join(unknown)}: not an option; every option starts with --")

    flag_layer = {}
    for name in HINTS:
        if given.get(name) is not None:
            convert(name, given[name], "--" + name.replace("_", "-"), flag_layer, problems)
    file_layer = {}
    if given["config"]:
        for name, value in read_yaml(Path(given["config"])).items():
            convert(name, value, f"{given['config']}: {name}", file_layer, problems)
    actions = Actions(
        debug=given["debug"], dry_run=given["dry_run"], eval_only=given["eval_only"],
        find_lr=given["find_lr"], fresh=given["fresh"], resume=given["resume"],
        allow_change=tuple(n.replace("-", "_") for n in given["allow_change"]),
    )  # fmt: skip
    for name in actions.allow_change:
        if name not in HINTS:
            problems.append(f"--allow-change {name}: not a setting{did_you_mean(name, HINTS)}")
    for layer in (flag_layer, file_layer):
        if "model" in layer:
            try:
                lookup(str(layer["model"]))
            except UserError as error:
                problems.append(str(error))
            break
    if problems:
        raise UserError("\n".join(problems))
    for layer in (file_layer, flag_layer):  # "auto" leaves a value to recipe and machine
        for name in [n for n, v in layer.items() if v == HINTS[n].default == "auto"]:
            del layer[name]
            file_layer.pop(name, None)

    typed = {**file_layer, **flag_layer}
    saved, asked = {}, {}
    folder = known_run_dir(typed, actions)
    starts_over = actions.fresh and not restarted()
    if folder is not None and not starts_over and (folder / "config.json").is_file():
        saved, asked = read_saved(folder)
        for layer in (file_layer, flag_layer):  # the same command again: what it led to stays
            for name in [n for n, value in layer.items() if asked.get(n, None) == value]:
                if name in saved and name not in MAY_CHANGE:
                    del layer[name]
        typed = {**file_layer, **flag_layer}
        refuse_conflicts(typed, saved, folder, actions.allow_change)
    if folder is not None:
        saved["run_dir"] = str(folder)
    layers: dict[str, dict] = {}
    model = typed.get("model", saved.get("model", TrainConfig.model))
    layers["recipe"] = recipe_of(model, typed.get("weights", saved.get("weights", "none")))
    if saved:
        layers["saved run"] = saved
    if actions.debug:
        layers["--debug"] = dict(DEBUG_PRESET)
    if file_layer:
        layers[f"file {given['config']}"] = file_layer
    layers["flag"] = flag_layer
    settings = Settings(layers, actions, tuple(argv), {**asked, **typed})
    check(settings)
    return settings


def recipe_of(model: str, weights: str) -> dict[str, object]:
    """The model's recipe: from scratch, or for fine-tuning where it starts from weights."""
    entry = lookup(model)
    recipe = dict(entry.recipe)
    if weights not in ("none", "auto"):
        recipe |= entry.finetune
        size = told_by_weights(weights).get("image_size", 0)
        if size >= entry.min_image_size and entry.task == "classification":
            recipe["image_size"] = size
    return recipe


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one sentence, without its page of usage."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see python {self.prog.removeprefix('python ')} --help")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="train.py",
        description="Train an image classifier: the same run on one process or many.",
        allow_abbrev=False,
        epilog="Start with: python train.py --debug     Models: python -m models",
    )
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    for name, f in HINTS.items():
        flag = "--" + name.replace("_", "-")
        default = "" if f.default in (None, False) else f" (default {f.default})"
        choices = f" [{'|'.join(map(str, f.metadata['choices']))}]" if f.metadata["choices"] else ""
        text = (f.metadata["help"] + choices + default).replace("%", "%%")
        group = groups[f.metadata["group"]]
        if TYPES[name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(flag, default=None, help=text, metavar=name.upper())
    act = parser.add_argument_group("this command")
    act.add_argument("--debug", action="store_true", help="one process, few images, anomaly checks")
    act.add_argument("--dry-run", action="store_true", help="build all, one step, write nothing")
    act.add_argument("--eval-only", action="store_true", help="evaluate the run's best model")
    act.add_argument("--find-lr", action="store_true", help="suggest a learning rate and stop")
    act.add_argument(
        "--resume",
        nargs="?",
        const="runs/latest",
        help="run folder to continue (alone: runs/latest)",
    )
    act.add_argument("--fresh", action="store_true", help="start over in --run-dir")
    act.add_argument(
        "--allow-change",
        nargs="+",
        default=[],
        metavar="NAME",
        help="settings a resumed run may change",
    )
    act.add_argument("--config", metavar="FILE.yaml", help="settings from a YAML file")
    act.add_argument("--version", action="version", version=f"lockstep {__version__}")
    return parser


def spell(word: str) -> str:
    """`--batch_size=8` as `--batch-size=8`: both spellings are accepted."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def unknown_flag(word: str, flags: list[str]) -> str:
    flag = word.partition("=")[0]
    if flag == "--pretrained":  # torchvision's word of old
        return "--pretrained: no such option; type --weights imagenet, or a file of weights"
    return f"{flag}: no such option{did_you_mean(flag, flags)}; see python train.py --help"


def convert(name: str, value, shown: str, into: dict, problems: list[str]) -> None:
    """Put the typed value of one setting into a layer, or its problem on the list."""
    if name not in HINTS:
        problems.append(f"{shown}: no such setting{did_you_mean(name, HINTS)}")
        return
    f, kind = HINTS[name], TYPES[name]
    optional = type(None) in typing.get_args(kind)
    kind = next((t for t in typing.get_args(kind) if t is not type(None)), kind)
    if value is None and optional:
        into[name] = None
        return
    try:
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError
        elif isinstance(value, bool):
            raise ValueError
        elif kind is int:
            if isinstance(value, float) and not value.is_integer():
                raise ValueError
            value = int(value)
        elif kind is float:
            value = float(value)
            if value != value or value in (float("inf"), float("-inf")):
                raise ValueError
        elif not isinstance(value, str | int | float):
            raise ValueError
        else:
            value = str(value)
            value.encode()  # half a character, of a name that is not UTF-8, can stand in no file
            if not value or any(c < " " for c in value):
                raise ValueError
    except (TypeError, ValueError, OverflowError):
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        problems.append(f"{shown} {value!r}: must be {wanted[kind]}")
        return
    choices, low, high = (f.metadata[key] for key in ("choices", "low", "high"))
    if choices and value not in choices:
        hint = did_you_mean(str(value), map(str, choices))
        problems.append(f"{shown} {value}: not known{hint}; one of: {', '.join(map(str, choices))}")
    elif low is not None and value < low:
        problems.append(f"{shown} {value}: must be at least {low}")
    elif high is not None and value > high:
        problems.append(f"{shown} {value}: must be at most {high}")
    else:
        into[name] = value


def read_yaml(path: Path) -> dict[str, object]:
    """Settings of a YAML file; duplicate keys and anything but a flat table are refused."""
    import yaml

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader, node):
        keys = [loader.construct_object(key) for key, _ in node.value]
        if not all(isinstance(key, str) for key in keys):
            raise UserError(f"--config {path}: must be lines like `lr: 0.05`")
        keys = [key.replace("-", "_") for key in keys]
        twice = {k for k in keys if keys.count(k) > 1}
        if twice:
            raise UserError(f"--config {path}: {', '.join(sorted(twice))} stands there twice")
        return {
            k: loader.construct_object(v, deep=True)
            for k, (_, v) in zip(keys, node.value, strict=True)
        }

    def whole(loader, node):  # YAML 1.1 would make 5400 of 1:30:00
        return node.value if ":" in node.value else loader.construct_yaml_int(node)

    Strict.add_constructor("tag:yaml.org,2002:int", whole)
    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Strict)  # a SafeLoader
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UserError(f"--config {path}: not valid YAML{line}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"--config {path}: must be lines like `lr: 0.05`")
    return {key.replace("-", "_"): value for key, value in content.items()}


def known_run_dir(typed: dict, actions: Actions) -> Path | None:
    """The run folder as far as the command or the job decides it; None: a fresh one is chosen.

    A SLURM job (or array task), and the lives under one restarting launcher, share a folder.
    """
    if actions.resume is not None:
        folder = Path(actions.resume)
        if typed.get("run_dir") and Path(str(typed["run_dir"])) != folder:
            raise UserError(
                f"--resume {folder} and --run-dir {typed['run_dir']} name two folders: drop one"
            )
        if not (folder / "config.json").is_file():
            others = sorted(p.parent.name for p in folder.parent.glob("*/config.json"))
            near = difflib.get_close_matches(folder.name, others, n=1)
            hint = f" (did you mean {folder.parent / near[0]}?)" if near else ""
            raise UserError(
                f"--resume {folder}: holds no run{hint}; a run folder has a config.json"
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
            "by: add --run-dir runs/NAME, or start it with launch/torchrun.sh"
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
        return saved, dict(content.get("asked", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{folder / 'config.json'} cannot be read; mend it, or start over with --fresh"
        ) from None


def refuse_conflicts(typed: dict, saved: dict, folder: Path, allowed: tuple[str, ...]) -> None:
    """A resumed run keeps its settings; what the user typed differently is listed, all at once."""
    conflicts = [
        f"--{name.replace('_', '-')} {value} (the run has {saved[name]})"
        for name, value in typed.items()
        if name in saved and value != saved[name]
        and name not in MAY_CHANGE and name not in allowed
    ]  # fmt: skip
    if conflicts:
        names = " ".join(c.split()[0][2:] for c in conflicts)
        raise UserError(
            f"{folder} is a run with other settings: {', '.join(conflicts)}. Drop them to go on, "
            f"add --allow-change {names}, or start a new run with another --run-dir"
        )


def check(settings: Settings) -> None:
    """Problems that more than one field makes, all in one UserError."""
    c, problems = settings.config, []
    entry = lookup(c.model)
    if c.image_size < entry.min_image_size:
        problems.append(
            f"--image-size {c.image_size}: {c.model} needs at least {entry.min_image_size}"
        )
    for name in ("max_time", "checkpoint_every"):
        value = getattr(c, name)
        if value and not (
            name == "checkpoint_every" and (value == "epoch" or NUMBER.fullmatch(value))
        ):
            try:
                seconds(value)
            except UserError as error:
                problems.append(f"--{name.replace('_', '-')} {error}")
    if NUMBER.fullmatch(c.checkpoint_every) and int(c.checkpoint_every) < 1:
        problems.append("--checkpoint-every 0: must be at least 1 step")
    if c.shards != "auto" and not (NUMBER.fullmatch(c.shards) and int(c.shards) > 0):
        problems.append(f"--shards {c.shards}: must be auto or a whole number from 1")
    if (c.mixup or c.cutmix) and entry.task == "regression":
        problems.append(f"--mixup and --cutmix blend classes; {c.model} is for regression")
    if c.mixup and c.cutmix:
        problems.append("--mixup and --cutmix: choose one of them")
    if settings.actions.fresh and settings.actions.resume:
        problems.append("--fresh and --resume contradict each other: drop one")
    if problems:
        raise UserError("\n".join(problems))


def seconds(text: str) -> float:
    """`3h50m`, `90s`, `1d` or `1:30:00` as seconds."""
    if re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text) and text:
        units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
        total = sum(int(n) * units[u] for n, u in re.findall(r"(\d+)([dhms])", text))
    elif re.fullmatch(r"\d+(:\d\d){1,2}", text):
        total = 0
        for part in text.split(":"):
            total = total * 60 + int(part)
    else:
        total = 0
    if total <= 0:
        raise UserError(f"{text}: not a length of time; write 3h50m, 90s or 1:30:00")
    return float(total)


@dataclass(frozen=True)
class BatchPlan:
    """How a batch is shared out: batch_size = num_processes x per_process x micro_batch_size."""

    batch_size: int
    shards: int
    num_processes: int
    note: str = ""

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // self.shards

    @property
    def shards_per_process(self) -> int:
        return self.shards // self.num_processes


def plan_batch(settings: Settings, num_processes: int, num_images: int) -> BatchPlan:
    """The batch that is possible: recipes are rounded, what a user typed is checked."""
    c, note = settings.config, ""
    shards = num_processes * c.accumulate if c.shards == "auto" else int(c.shards)
    if shards % num_processes:
        possible = [n for n in range(1, shards + 1) if shards % n == 0]
        raise UserError(
            f"{num_processes} processes cannot share {shards} shards evenly; numbers that can: "
            f"{', '.join(map(str, possible))}"
        )
    batch = c.batch_size
    if batch % shards:
        low, high = batch // shards * shards, (batch // shards + 1) * shards
        if settings.asked("batch_size"):
            options = f"{low} and {high} do" if low else f"{high} does"
            raise UserError(
                f"--batch-size {batch} does not divide over {shards} shards "
                f"({num_processes} processes x {shards // num_processes} each); {options}"
            )
        batch = low or high
        note = (
            f"batch {c.batch_size} of the recipe rounded to {batch}, which {shards} shards divide"
        )
    if num_images < shards:
        raise UserError(
            f"{num_images} training images are fewer than the {shards} shards of a batch; "
            "use fewer processes or less --accumulate"
        )
    if batch > num_images:
        smaller = num_images // shards * shards
        note = f"batch {batch} lowered to {smaller}: there are only {num_images} training images"
        batch = smaller
    return BatchPlan(batch, shards, num_processes, note)


def to_json(settings: Settings) -> str:
    """config.json: the values and where each came from."""
    config = asdict(settings.config)
    origins = {name: settings.origin(name) for name in config}
    content = {"version": __version__, "config": config, "origins": origins}
    return json.dumps({**content, "asked": dict(settings.typed)}, indent=2)


def tell(error: UserError) -> None:
    """Print what one process finds wrong before it can ask the others: once, if all find the same.

    The main process speaks at once. The first process of each other node waits: where all meet the
    same, the launcher ends it meanwhile; where only its node is wrong, nobody else can say so.
    """
    env = os.environ
    rank = env.get("RANK") or env.get("SLURM_PROCID") or "0"
    if rank == "0":
        print(error, file=sys.stderr, flush=True)
    elif (env.get("LOCAL_RANK") or env.get("SLURM_LOCALID")) == "0":
        time.sleep(2)
        host = env.get("SLURMD_NODENAME") or socket.gethostname()
        print(f"rank {rank} on {host}: {error}", file=sys.stderr, flush=True)


def parse_or_exit(argv: list[str]) -> Settings:
    """Settings, or a sentence per problem on stderr (once, on many processes) and status 2."""
    try:
        return parse(argv)
    except (OSError, ValueError) as error:  # a name that no file can have, a number without end
        tell(error if isinstance(error, UserError) else UserError(f"cannot be understood: {error}"))
        raise SystemExit(2) from None


if __name__ == "__main__":
    as_json = sys.argv[1:2] == ["--json"]  # for scripts; before the flags, so none can be mistaken
    shown = parse_or_exit(sys.argv[2:] if as_json else sys.argv[1:])
    if as_json:
        print(to_json(shown))
        raise SystemExit
    for key, value in asdict(shown.config).items():
        print(f"{key:18} {value!s:24} {shown.origin(key)}")
