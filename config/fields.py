"""TrainConfig: every setting with its help, its limits and what a resumed run may change."""

import os
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import TypeVar

from common.errors import UserError
from common.metric import METRICS, selectable
from common.text import did_you_mean
from data.policy import KINDS
from data.sources import NAMES
from models.own_file import is_own_file
from models.recipes import RECIPES

T = TypeVar("T")


def setting(
    default: T, help: str, *, group: str = "", choices: tuple = (), low: float | None = None,
    high: float | None = None, own: bool = False,
) -> T:  # fmt: skip
    """A dataclass field that carries what the command line and the checks need to know.

    own: FILE.py:Class will do, too.
    """
    extra = {"help": help, "group": group, "choices": choices, "low": low, "high": high}
    extra["own"] = own
    return field(default=default, metadata=extra)


# What --optimizer may name, and which settings each takes; one's own take what their __init__ does.
OPTIMIZERS = {
    "sgd": ("momentum", "nesterov"),
    "adamw": ("betas", "eps"),
    "muon": ("momentum",),
    "lion": ("betas",),
    "nadamw": ("betas", "eps"),
    "lamb": ("betas", "eps"),
    "rmsprop": ("momentum", "eps"),
    "schedule_free": ("betas", "eps"),
}


def taking(name: str) -> tuple[str, ...]:
    """The optimizers that take a setting."""
    return tuple(optimizer for optimizer, taken in OPTIMIZERS.items() if name in taken)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a run computes. Plain values; saved as config.json."""

    model: str = setting(
        "alexnet", "a name from `python -m models`, torchvision:NAME, timm:NAME or FILE.py:Class",
        group="what",
    )  # fmt: skip
    recipe: str = setting(
        "none", "settings that belong together, with a claim: see docs/recipes.md", group="what",
        choices=("none", *RECIPES),
    )  # fmt: skip
    dataset: str = setting("auto", f"{', '.join(NAMES)}, a path, a hub name", group="what")
    data_dir: str | None = setting(None, "where a local copy of the data lies", group="what")
    weights: str = setting(
        "auto",
        "auto (imagenet for alexnet where it can be had, else none), none, imagenet, or a "
        ".pth/.safetensors file to start from",
        group="what",
    )
    task: str = setting(
        "auto", "multilabel: pictures have any number of classes, or none; see docs/craft.md",
        group="what", choices=("auto", "classification", "multilabel"),
    )  # fmt: skip
    freeze: str = setting(
        "none", "none, backbone (only the head trains), or what stays as it is, by name: "
        "conv1,layer1.* (parameters or modules, * as in file names)", group="what",
    )  # fmt: skip
    unfreeze: str | None = setting(
        None, "what of --freeze trains from which epoch on, as 3:layer4,5:all; each EPOCH:NAMES as "
        "--freeze names them", group="what",
    )  # fmt: skip
    channels: int = setting(
        3, "that the model sees of an image: 1 is its brightness", group="what", choices=(1, 3)
    )
    blurpool: str = setting(
        "none", "anti-aliased downsampling: conv blurs in front of strided convolutions, all in "
        "max pools, too", group="what", choices=("none", "conv", "all"),
    )  # fmt: skip
    drop_path: float | None = setting(
        None, "stochastic depth: the chance to leave the last block out, less before; none: the "
        "model's own", group="what", low=0.0, high=0.95,
    )  # fmt: skip

    epochs: int = setting(10, "passes over the training images", group="length", low=1)
    max_steps: int | None = setting(
        None, "the length in optimizer steps, instead of --epochs", group="length", low=1
    )
    max_time: str | None = setting(
        None, "save and stop after this long, as 3h50m; the run can go on later", group="length"
    )
    eval_every: int = setting(1, "evaluate every so many epochs", group="length", low=1)
    patience: int = setting(
        0, "end after so many evaluations in a row without a better value, as it is printed; 0: "
        "off", group="length", low=0,
    )  # fmt: skip

    batch_size: int = setting(
        64, "images per optimizer step, over all processes together", group="batch", low=1
    )
    accumulate: int = setting(
        1, "micro-batches a process adds up per step, to save memory", group="batch", low=1
    )
    shards: str = setting(
        "auto", "parts a batch is cut into, a constant of the run, on 1 to as many processes "
        "(auto: processes x accumulate; 12 or 24 where their number may change)",
        group="batch",
    )  # fmt: skip

    optimizer: str = setting(
        "sgd", "how weights are updated", group="optimizer", own=True, choices=tuple(OPTIMIZERS)
    )
    lr: float = setting(0.05, "peak learning rate", group="optimizer", low=0.0)
    layer_decay: float = setting(
        1.0, "each layer's rate is that of the next one times this (0.75 to fine-tune); 1: one "
        "rate for all", group="optimizer", low=0.01, high=1.0,
    )  # fmt: skip
    momentum: float = setting(
        0.9, f"momentum of {', '.join(taking('momentum'))}", group="optimizer", low=0.0, high=1.0
    )
    nesterov: bool = setting(False, "sgd looks ahead along its momentum", group="optimizer")
    betas: str | None = setting(
        None, f"the two of {', '.join(taking('betas'))}, as 0.9,0.95; none: its usual",
        group="optimizer",
    )  # fmt: skip
    eps: float | None = setting(
        None, f"beside the length that {', '.join(taking('eps'))} divide by",
        group="optimizer", low=0.0,
    )  # fmt: skip
    weight_decay: float = setting(
        5e-4, "weight decay (not on biases and norms)", group="optimizer", low=0.0
    )
    decay_all: bool = setting(False, "weight decay on biases and norms, too", group="optimizer")
    schedule: str = setting(
        "cosine", "how the learning rate falls", group="optimizer",
        choices=(
            "constant", "cosine", "linear", "step", "exponential", "one_cycle", "cosine_restarts",
            "plateau",
        ),
    )  # fmt: skip
    plateau: int = setting(
        3, "evaluations without a better value until --schedule plateau divides the rate by ten",
        group="optimizer", low=1,
    )  # fmt: skip
    warmup: float = setting(0.0, "epochs of linear warm-up", group="optimizer", low=0.0, high=1e6)
    loss: str = setting(
        "cross_entropy", "what training minimises, to classify", group="optimizer",
        choices=("cross_entropy", "bce", "focal"), own=True,
    )  # fmt: skip
    focal_gamma: float = setting(
        2.0, "how little the focal loss makes of what is right already; 0: cross entropy",
        group="optimizer", low=0.0, high=20.0,
    )  # fmt: skip
    class_weights: str = setting(
        "none", "what an image weighs by its class: none, balanced, or numbers: 0.2,1,...",
        group="optimizer",
    )  # fmt: skip
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
        "flip",
        f"random changes to training images: {', '.join(KINDS)}, or steps as "
        "'crop|randaugment(2,10)|erase(0.25)'; see docs/augmentation.md",
        group="images",
    )
    flip: bool = setting(
        True, "mirror images where the augmentation does; --no-flip leaves it out", group="images"
    )
    plain_epochs: int = setting(
        0, "the last epochs, in which images are only cut and mirrored", group="images", low=0
    )
    normalize: str = setting(
        "auto", "what pictures are normalised by: data (their own mean and deviation), weights (as "
        "they were trained), or MEAN/STD as 0.5/0.5 or 0.485,0.456,0.406/0.229,0.224,0.225; auto: "
        "weights, where there are some and they say so", group="images",
    )  # fmt: skip
    interpolation: str = setting(
        "auto", "how photographs are scaled; auto: as the weights say, else bilinear",
        group="images", choices=("auto", "bilinear", "bicubic"),
    )  # fmt: skip
    resize: str = setting(
        "crop", "photographs that are no squares: cut the ends off, pad, or squash them",
        group="images", choices=("crop", "pad", "squash"),
    )  # fmt: skip
    eval_size: int = setting(
        0, "pixels a side that evaluation sees; 0: image_size", group="images", low=0
    )
    eval_resize: int = setting(
        0, "what evaluation scales a photograph's shorter side to; 0: its size / 0.875",
        group="images", low=0,
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
    sampler: str = setting(
        "random", "balanced gives every class as many places in an epoch", group="images",
        choices=("random", "balanced"),
    )  # fmt: skip
    val_fraction: float = setting(
        0.0, "part of the training images that chooses the best epoch", group="images",
        low=0.0, high=0.9,
    )  # fmt: skip
    split: str | None = setting(
        None, "train, validate and test on the same pictures as a run, or as its split.csv says",
        group="images",
    )  # fmt: skip
    group_by: str | None = setting(
        None, "pictures of one patient, video, place stay on one side: a column, or a regular "
        "expression (its first group) on their paths", group="images",
    )  # fmt: skip
    fold: str | None = setting(
        None,
        "the part of all pictures that tests, by a hash, as 1/5; the others train",
        group="images",
    )
    select: str = setting(
        "auto",
        "the metric that chooses the best epoch (auto: accuracy; with many labels mAP; of "
        "a regression, loss)",
        group="images",
        choices=("auto", *dict.fromkeys(key for task in METRICS for key in selectable(task))),
    )
    threshold: float = setting(
        0.5, "confidence from which a picture has a class, with --task multilabel", group="images",
        low=0.001, high=0.999,
    )  # fmt: skip
    limit: int = setting(
        0, "use only so many training and test images; 0: all", group="images", low=0
    )
    skip_bad_images: bool = setting(
        False, "leave out images that cannot be read, and list them", group="images"
    )
    exclude: str | None = setting(
        None, "a photograph to leave out, or a .txt with one name on each line", group="images"
    )

    mixed_precision: str = setting(
        "auto", "auto is bf16 to classify where the GPU has it", group="machine",
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
    decode: str = setting(
        "full", "scaled: a JPEG far larger than what is seen of it is decoded at 1/2, 1/4 or 1/8, "
        "never below twice of that: faster, other pixels", group="images",
        choices=("full", "scaled"),
    )  # fmt: skip
    decode_threads: int = setting(
        0, "threads that decode photographs, per process; 0: as many as threads", group="machine",
        low=0,
    )  # fmt: skip
    stage: str | None = setting(
        None, "local folder of each node that a pack is copied to, once, and read from",
        group="machine",
    )  # fmt: skip
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
    snapshot_every: str = setting(
        "auto", "time (10s) or steps between snapshots in the memory of each node, for a restart "
        "after a kill; auto: 2s and at most 1 % of the time, where several processes train or an "
        "agent restarts them; off", group="run",
    )  # fmt: skip
    keep: int = setting(3, "newest checkpoints kept, besides the best model", group="run", low=2)
    log_every: int = setting(
        0,
        "steps between rows of metrics.jsonl; 0: ten an epoch, at most 50 steps; on a GPU by time",
        group="run",
        low=0,
    )
    plots: bool = setting(True, "draw the run's pictures at its end", group="run")
    track: str = setting(
        "none",
        "also report to",
        group="run",
        choices=("none", "wandb", "tensorboard", "trackio", "mlflow"),
    )

    @property
    def may_be_files(self) -> tuple[str, ...]:
        """What FILE.py:Class may stand for."""
        return self.model, self.loss, self.optimizer


# What names the data, and what else of them may differ where a run is evaluated on others.
DATA = ("dataset", "data_dir")
OTHER_DATA = (*DATA, "split", "fold", "group_by", "val_fraction", "limit", "exclude", "stage")
# What a resumed run may change without being asked twice: length, placement and reporting.
MAY_CHANGE = frozenset(
    {"epochs", "max_steps", "max_time", "eval_every", "keep", "checkpoint_every", "log_every"}
    | {"track", "plots", "data_dir", "accumulate", "run_dir", "tta", "select", "threshold"}
    | {"decode_threads", "exclude", "skip_bad_images", "patience", "snapshot_every"}
)
DEBUG_PRESET = {
    "epochs": 1, "limit": 512, "compile": False,
    "track": "none", "log_every": 1,
}  # fmt: skip
DEBUG_STEPS = 8
GROUPS = {
    "what": "what to train", "length": "how long", "batch": "batch", "optimizer": "optimizer",
    "images": "images", "machine": "machine", "run": "what it leaves",
}  # fmt: skip
NUMBER = re.compile("[0-9]+")  # "²".isdigit() is true
HINTS = {f.name: f for f in fields(TrainConfig)}
TYPES = typing.get_type_hints(TrainConfig)


SWITCH_WORDS = {"yes": True, "on": True, "no": False, "off": False}  # as YAML 1.1 reads them
CHOOSES = "GPUs are found by themselves; CUDA_VISIBLE_DEVICES chooses among them"
LAUNCHES = "a launcher starts a process for each GPU: torchrun --nproc-per-node N train.py ..."
FROM_HERE = "type --resume runs/NAME to go on, --weights FILE to begin with"
RUNS_ALONE = "type --eval-only --resume runs/NAME"
PLACES = "a launcher tells ranks and ports in the environment: leave it out"
# What other programs call it, and what it is here. Names are without --, with _.
MEANT = {
    word: meant
    for words, meant in (
        ("pretrained", "type --weights imagenet, or a file of weights"),
        ("early_stopping", "type --patience N"),
        ("criterion", "type --loss"),
        ("scheduler lr_scheduler", "type --schedule"),
        ("learning_rate", "type --lr"),
        ("wd", "type --weight-decay"),
        ("steps iterations", "type --max-steps"),
        ("bs batch", "type --batch-size"),
        ("workers num_workers", "no worker loads images: they lie in memory"),
        ("amp use_amp bf16 half", "type --mixed-precision bf16"),
        ("fp16", "type --mixed-precision fp16"),
        ("fp32", "type --mixed-precision no"),
        ("arch architecture", "type --model"),
        ("models list_models list", "python -m models prints them"),
        ("device gpu gpu_id cuda", CHOOSES),
        ("cpu no_cuda", "the environment decides: ACCELERATE_USE_CPU=1"),
        ("gpus num_gpus", LAUNCHES),
        ("local_rank port master_port", PLACES),
        ("output_dir save_dir save_path log_dir logdir name", "type --run-dir"),
        ("checkpoint ckpt load", FROM_HERE),
        ("test eval evaluate validate", RUNS_ALONE),
        ("data data_path train_dir", "type --dataset"),
        ("val_split", "type --val-fraction 0.1"),
        ("img_size size", "type --image-size"),
        ("print_freq", "type --log-every N"),
        ("ema_decay", "type --ema"),
        ("min_lr", "--schedule chooses how far the rate falls"),
        ("dropout", "the model's own file sets it; --drop-path is stochastic depth"),
        ("wandb project", "type --track wandb"),
        ("num_classes", "the data say how many classes there are"),
        ("cross_validation", "type --folds 5"),
        ("grid", "type --sweep FILE"),
    )
    for word in words.split()
}


def mean_and_std(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The numbers of --normalize MEAN/STD, three of each. Raises UserError."""
    try:
        mean, std = (tuple(map(float, part.split(","))) for part in text.split("/"))
        mean, std = (part * 3 if len(part) == 1 else part for part in (mean, std))
        if len(mean) == len(std) == 3 and all(0 <= m <= 1 for m in mean) and min(std) > 1e-6:
            return mean, std
    except ValueError:
        pass
    raise UserError(
        f"--normalize {text}: must be data, weights, or MEAN/STD of pixels in 0 to 1, one number "
        "or three for each, as 0.5/0.5 or 0.485,0.456,0.406/0.229,0.224,0.225",
        code="bad-value",
    )


def unfreezing(text: str | None) -> list[tuple[int, list[str]]]:
    """The epochs of --unfreeze, counted from 0, and what trains from each on. Raises UserError."""
    found: list[tuple[int, list[str]]] = []
    for part in text.split(",") if text else ():
        number, colon, name = part.partition(":") if ":" in part else ("", "", part)
        if colon:
            epoch = int(number) - 1 if NUMBER.fullmatch(number) else 0
            if epoch <= (found[-1][0] if found else 0):
                found.clear()
                break
            found.append((epoch, []))
        if not (found and name):
            found.clear()
            break
        found[-1][1].append(name)
    if text and not found:
        raise UserError(
            f"--unfreeze {text}: must be EPOCH:NAMES, as 3:layer4,5:all; epochs count from 1 and "
            "rise, and the first one is --freeze's",
            code="bad-value",
        )
    return found


def no_such(name: str, known: Iterable[str]) -> str:
    """What to type instead of a name that is none: by meaning, else by its letters."""
    meant = MEANT.get(name.strip("-").replace("-", "_"))
    return f"; {meant}" if meant else did_you_mean(name, known)


def flag_of(name: str) -> str:
    """A setting as it is typed: `batch_size` as `--batch-size`."""
    return "--" + name.replace("_", "-")


def convert(
    name: str, value: object, shown: str, into: dict[str, object], problems: list[UserError]
) -> None:
    """Put the typed value of one setting into a layer, or its problem on the list."""
    if name not in HINTS:
        message = f"{shown}: no such setting{no_such(name, HINTS)}"
        problems.append(UserError(message, code="unknown-setting"))
        return
    f, kind = HINTS[name], TYPES[name]
    optional = type(None) in typing.get_args(kind)
    kind = next((t for t in typing.get_args(kind) if t is not type(None)), kind)
    if value is None and optional:
        into[name] = None
        return
    try:
        if kind is bool:
            value = SWITCH_WORDS.get(str(value).lower(), value)
            if not isinstance(value, bool):
                raise ValueError
        elif isinstance(value, bool):
            raise ValueError
        elif kind is int:
            if isinstance(value, float) and not value.is_integer():
                raise ValueError
            value = int(value)  # pyright: ignore[reportArgumentType] - TypeError is caught
        elif kind is float:
            value = float(value)  # pyright: ignore[reportArgumentType] - here too
            if value != value or value in (float("inf"), float("-inf")):
                raise ValueError
        elif not isinstance(value, str | int | float):
            raise ValueError
        else:
            value = str(value)
            value.encode()  # half a character, of a name that is not UTF-8, can stand in no file
            if not value or any(c < " " for c in value):
                raise ValueError
            if name == "run_dir":  # no shell does it in --run-dir=~/runs
                value = os.path.expanduser(value)  # noqa: PTH111 - Path's own may raise
    except (TypeError, ValueError, OverflowError):
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        message = f"{shown} {value!r}: must be {wanted[kind]}"
        if value == "":
            message = f"{shown} '': is empty (an unset variable?); give a value, or leave it out"
        problems.append(UserError(message, code="bad-value"))
        return
    choices, low, high = (f.metadata[key] for key in ("choices", "low", "high"))
    message = ""
    own = f.metadata["own"]
    if choices and value not in choices and not (own and is_own_file(str(value))):
        hint = did_you_mean(str(value), map(str, choices))
        known = ", ".join([*map(str, choices), *["FILE.py:Class"] * own])
        message = f"not known{hint}; one of: {known}"
    elif low is not None and value < low:
        message = f"must be at least {low}"
    elif high is not None and value > high:
        message = f"must be at most {high}"
    if message:
        problems.append(UserError(f"{shown} {value}: {message}", code="bad-value"))
    else:
        into[name] = value
