"""Problems that more than one setting makes, or that a setting's own kind does not show.

Each rule below looks at one corner of a configuration and yields what is wrong in it; `check`
tells all of it together.
"""

import re
from collections.abc import Callable, Iterator

from common.errors import UserError, all_of
from common.metric import selectable
from common.text import seconds
from config.fields import HINTS, NUMBER, TrainConfig, flag_of, mean_and_std, taking, unfreezing
from config.layers import Settings, task_of
from data.policy import parse_policy
from models import lookup, parts_of, size_problem
from models.own_file import check_own_file, is_own_file

FOLD = re.compile("([0-9]{1,4})/([0-9]{1,4})")
# By task, what has no meaning for it, and why.
NOT_OF = {
    "regression": ("mixup", "cutmix", "loss", "class_weights", "sampler", "threshold"),
    "multilabel": ("class_weights", "sampler"),
    "classification": ("threshold",),
}
WHY_NOT = {
    "regression": "of classes; {model} is for regression",
    "multilabel": "of pictures with one class each; --task multilabel has none",
    "classification": "of --task multilabel; the likeliest class is the answer here",
}
NO_TIMES = {"checkpoint_every": ("epoch",), "snapshot_every": ("auto", "off")}  # nor steps


def check(settings: Settings) -> None:
    """Raise all problems of a configuration as one UserError."""
    rules = (_size, _times, _shards, _task, _own_files, _optimizer, _schedule, _frozen, _loss,
             _pictures, _parts, _best, _actions)  # fmt: skip
    if problems := [problem for rule in rules for problem in rule(settings, settings.config)]:
        raise all_of(problems)


def _wrong(message: str, code: str = "bad-value") -> UserError:
    return UserError(message, code=code)


def _both(message: str) -> UserError:
    """Two settings that cannot both be meant."""
    return UserError(message, code="contradiction")


def _raised(read: Callable[[], object]) -> Iterator[UserError]:
    """The problem that reading a value meets, if any."""
    try:
        read()
    except UserError as error:
        yield error


def _size(settings: Settings, c: TrainConfig) -> Iterator[UserError]:
    if problem := size_problem(c.model, lookup(c.model), c.image_size):
        yield _wrong(problem, "image-too-small")


def _times(settings: Settings, c: TrainConfig) -> Iterator[UserError]:
    for name in ("max_time", *NO_TIMES):
        value, words = getattr(c, name), NO_TIMES.get(name, ())
        steps = name in NO_TIMES and NUMBER.fullmatch(value)
        if steps and int(value) < 1:
            yield _wrong(f"{flag_of(name)} 0: must be at least 1 step")
        elif value and not steps and value not in words:
            for error in _raised(lambda value=value: seconds(value)):
                yield _wrong(f"{flag_of(name)} {error}", error.code)


def _shards(settings: Settings, c: TrainConfig) -> Iterator[UserError]:
    if c.shards != "auto" and not (NUMBER.fullmatch(c.shards) and int(c.shards) > 0):
        yield _wrong(f"--shards {c.shards}: must be auto or a whole number from 1")


def _task(settings: Settings, c: TrainConfig) -> Iterator[UserError]:
    task, meant = task_of(c), lookup(c.model).task
    if "regression" in (task, meant) and task != meant:
        yield _both(f"--task {task}: {c.model} is for {meant}: drop one")
    if task == "regression" and (more := parts_of(vars(c))):
        yield _both(f"--{', --'.join(more)}: of images; {c.model} sees none")
    asked = [flag_of(name) for name in NOT_OF[task] if getattr(c, name) != HINTS[name].default]
    if asked:
        yield _both(f"{', '.join(asked)}: {WHY_NOT[task].format(model=c.model)}")
    if task == "multilabel" and c.loss == "cross_entropy" and settings.asked("loss"):
        yield _wrong("--loss cross_entropy: of pictures with one class each; bce or focal here")


def _own_files(settings: Settings, c: TrainConfig) -> Iterator[UserError]:
    for name in ("loss", "optimizer"):
        value = getattr(c, name)
        if is_own_file(value) and not settings.actions.eval_only:
            yield from _raised(lambda name=name, value=value: check_own_file(value, f"--{name}"))


def _optimizer(settings: Settings, c: TrainConfig) -> Iterator[UserError]:
    for name in ("nesterov", "betas", "eps"):  # a recipe may give a momentum to all
        other = c.optimizer not in taking(name) and not is_own_file(c.optimizer)
        if other and getattr(c, name) not in (None, False):
            yield _both(f"--{name}: {c.optimizer} has none; {', '.join(taking(name))}")
    if c.layer_decay != 1 and c.optimizer == "muon":
        yield _both("--layer-decay: muon has rates of its own for each kind of layer")
    if c.nesterov and not c.momentum:
        yield _both("--nesterov: needs a --momentum above 0")
    if c.betas is not None:
        try:
            if [0 <= float(beta) < 1 for beta in c.betas.split(",")] != [True, True]:
                raise ValueError
        except ValueError:
            yield _wrong(f"--betas {c.betas}: must be two numbers from 0 to below 1, as 0.9,0.95")
    if c.ema and c.optimizer == "schedule_free":
        yield _both("schedule_free averages its weights itself: type --ema 0")


def _schedule(settings: Settings, c: TrainConfig) -> Iterator[UserError]:
    if c.schedule == "one_cycle" and c.warmup and settings.asked("warmup"):
        yield _both("--warmup: --schedule one_cycle has a rise of its own: drop one")


def _frozen(settings: Settings, c: TrainConfig) -> Iterator[UserError]:
    if c.unfreeze is None:
        return
    yield from _raised(lambda: unfreezing(str(c.unfreeze)))
    if c.freeze == "none":
        yield _both("--unfreeze: nothing is frozen; say what with --freeze")
    if c.compile:
        yield _both(
            "--unfreeze and --compile: a compiled model trains what it began with: drop one"
        )


def _loss(settings: Settings, c: TrainConfig) -> Iterator[UserError]:
    if c.focal_gamma != HINTS["focal_gamma"].default and c.loss != "focal":
        yield _both(f"--focal-gamma: --loss {c.loss} has none; type --loss focal")
    if is_own_file(c.loss) and c.label_smoothing:
        yield _both("a loss of your own smooths for itself: type --label-smoothing 0")
    if c.class_weights not in ("none", "balanced"):
        try:
            if not all(0 < float(word) < 1e6 for word in c.class_weights.split(",")):
                raise ValueError
        except ValueError:
            yield _wrong(
                f"--class-weights {c.class_weights}: must be none, balanced, or a number above 0 "
                "for each class, as 0.2,1,1"
            )


def _pictures(settings: Settings, c: TrainConfig) -> Iterator[UserError]:
    if c.normalize not in ("auto", "data", "weights"):
        yield from _raised(lambda: mean_and_std(c.normalize))
    if c.normalize == "weights" and c.weights == "none":
        yield _both("--normalize weights: there are none; name some with --weights")
    try:
        policy = parse_policy(c.augment)
        if c.alternating_flip and policy.flip != 0.5:
            yield _both(
                "--alternating-flip mirrors every other epoch: write flip without a probability"
            )
    except UserError as error:
        yield error
    if 0 < c.eval_resize < (size := c.eval_size or c.image_size):
        yield _wrong(
            f"--eval-resize {c.eval_resize}: must be at least the {size} pixels that are seen"
        )


def _parts(settings: Settings, c: TrainConfig) -> Iterator[UserError]:
    if c.fold is None:
        return
    part = FOLD.fullmatch(c.fold)
    if part is None or not 1 <= int(part[1]) <= int(part[2]) or int(part[2]) < 2:
        yield _wrong(f"--fold {c.fold}: must be one of several parts, as 1/5 to 5/5")
    if c.split is not None:
        yield _both("--fold and --split both say which pictures test: drop one")


def _best(settings: Settings, c: TrainConfig) -> Iterator[UserError]:
    task = task_of(c)
    known = ("auto", *selectable(task))
    if c.select not in known:
        yield _wrong(f"--select {c.select}: {c.model} is for {task}: {', '.join(known)}")


def _actions(settings: Settings, c: TrainConfig) -> Iterator[UserError]:
    actions = settings.actions
    if actions.eval_only and c.run_dir is None and c.weights in ("none", "auto"):
        yield _wrong(
            "--eval-only needs what to evaluate: --resume runs/NAME, or --weights FILE",
            "nothing-to-evaluate",
        )
    if actions.fresh and actions.resume:
        yield _both("--fresh and --resume contradict each other: drop one")
