"""Words of a command line and lines of a YAML file -> Settings; what is wrong, in one sentence."""

import argparse
import os
import signal
import socket
import sys
import textwrap
import time
from pathlib import Path

from common.errors import UserError, all_of
from common.parser import Parser, need_packages
from common.streams import steady_streams
from common.text import did_you_mean
from config.checks import check
from config.fields import (
    DATA,
    DEBUG_PRESET,
    DEBUG_STEPS,
    GROUPS,
    HINTS,
    MAY_CHANGE,
    NUMBER,
    OTHER_DATA,
    TYPES,
    TrainConfig,
    convert,
    flag_of,
    no_such,
)
from config.layers import (
    LATEST,
    Actions,
    Settings,
    __version__,
    known_run_dir,
    own_code,
    read_saved,
    recipe_of,
    refuse_conflicts,
    restarted,
)
from config.rows import MANY, MOST_TOLD, Rows, default_folder, rows_of
from data.sources import NAMES
from models import MODELS, lookup
from models.own_file import is_own_file
from models.recipes import RECIPES

LENGTHS = {"epochs", "max_steps"}


def parse(argv: list[str]) -> Settings:
    """Settings of a command line; every problem is reported together as one UserError."""
    need_packages()
    problems: list[UserError] = []
    given = _words(argv, problems)
    flags = _typed(given, problems)
    file = _in_file(given["config"], problems)
    actions = _actions(given, problems)
    model = {**file, **flags}.get("model")
    if model is not None:
        try:
            lookup(str(model))
        except UserError as error:
            problems.append(error)
    if problems:
        raise all_of(problems)
    if any(given[flag.strip("-")] is not None for flag in MANY):
        rows = several(given, argv, {**file, **flags})
        return Settings({}, actions, tuple(argv), rows=rows)
    if given["side_by_side"] is not None:
        message = f"--side-by-side is of several runs: add {', '.join(MANY)}"
        raise UserError(message, code="contradiction")
    for layer in (file, flags):  # "auto" leaves a value to recipe and machine
        for name in [n for n, v in layer.items() if v == HINTS[n].default == "auto"]:
            del layer[name]
            file.pop(name, None)

    saved, asked = {}, {}
    folder = known_run_dir({**file, **flags}, actions)
    starts_over = actions.fresh and not restarted()
    if folder is not None and not starts_over and (folder / "config.json").is_file():
        saved, asked = _of_saved_run(folder, file, flags, actions)
    if folder is not None:
        saved["run_dir"] = str(folder)
    typed = {**file, **flags}
    layers = _below(typed, saved)
    if saved:
        layers["saved run"] = saved
    if actions.debug:
        layers["--debug"] = dict(DEBUG_PRESET)
    if file:
        layers[f"file {given['config']}"] = file
    layers["flag"] = flags
    settings = Settings(layers, actions, tuple(argv), {**asked, **typed})
    check(settings)
    return settings


def _words(argv: list[str], problems: list[UserError]) -> dict:
    """What argparse makes of a command line, values still as they were typed."""
    parser = build_parser()
    known, unknown = parser.parse_known_args([spell(word) for word in argv])
    every = parser._actions  # noqa: SLF001 - argparse lists them nowhere else
    flags = [s for action in every for s in action.option_strings]
    wrong = [unknown_flag(word, flags) for word in unknown if word.startswith("--")]
    if not wrong and unknown:
        wrong.append(bare_words(unknown))
    problems += wrong
    return vars(known)


def _typed(given: dict, problems: list[UserError]) -> dict[str, object]:
    """The settings among the words of a command line."""
    layer: dict[str, object] = {}
    for name in HINTS:
        if given.get(name) is not None:
            convert(name, given[name], flag_of(name), layer, problems)
    return layer


def _in_file(path: str | None, problems: list[UserError]) -> dict[str, object]:
    """The settings of a YAML file; {} where there is none."""
    layer: dict[str, object] = {}
    for name, value in read_yaml(Path(path)).items() if path else ():
        convert(name, value, f"{path}: {name}", layer, problems)
    return layer


def _actions(given: dict, problems: list[UserError]) -> Actions:
    """What the command does beside training."""
    actions = Actions(
        debug=given["debug"], dry_run=given["dry_run"], eval_only=given["eval_only"],
        find_lr=given["find_lr"], fresh=given["fresh"], resume=given["resume"],
        stop_after=_steps(given["stop_after"], given["debug"], given["max_steps"], problems),
        allow_change=tuple(n.replace("-", "_") for n in given["allow_change"]),
        trust_code=given["trust_code"],
        as_processes=_processes(given["as"], given["dry_run"], problems),
    )  # fmt: skip
    for name in actions.allow_change:
        if name not in HINTS and name != "code":
            message = f"--allow-change {name}: not a setting{did_you_mean(name, HINTS)}"
            problems.append(UserError(message, code="unknown-setting"))
    return actions


def _of_saved_run(
    folder: Path, file: dict[str, object], flags: dict[str, object], actions: Actions
) -> tuple[dict[str, object], dict[str, object]]:
    """What a run that goes on keeps, and what was typed for it earlier.

    Values of this command that were typed for it before leave `file` and `flags`: what they led to
    stays. Those that differ are a UserError, unless they may change.
    """
    saved, asked = read_saved(folder)
    for layer in (file, flags):
        for name in [n for n, value in layer.items() if asked.get(n, None) == value]:
            if name in saved and name not in MAY_CHANGE:
                del layer[name]
    typed = {**file, **flags}
    for name in ("model", "loss", "optimizer"):
        if name not in typed and is_own_file(str(saved.get(name, ""))):
            saved[name] = own_code(name, str(saved[name]), folder, actions)
    allowed = actions.allow_change
    if actions.eval_only:  # on any data; what concerned the run's own is not asked of others
        allowed += OTHER_DATA
        if any(typed.get(name, saved.get(name)) != saved.get(name) for name in DATA):
            own = set(OTHER_DATA) - {"dataset"}
            saved = {name: value for name, value in saved.items() if name not in own}
    refuse_conflicts(typed, saved, folder, allowed)
    if typed.keys() & LENGTHS:  # the length is what was typed last
        asked = {name: value for name, value in asked.items() if name not in LENGTHS}
        saved["max_steps"] = None
    return saved, asked


def _below(typed: dict[str, object], saved: dict[str, object]) -> dict[str, dict]:
    """The layers of the model's own recipe and of a named one."""
    name = str(typed.get("recipe", saved.get("recipe", "none")))
    named = dict(RECIPES[name].settings) if name in RECIPES else {}
    model = typed.get("model", saved.get("model", named.get("model", TrainConfig.model)))
    weights = typed.get("weights", saved.get("weights", named.get("weights", "none")))
    layers: dict[str, dict] = {"recipe": recipe_of(str(model), str(weights))}
    if named:
        layers[f"recipe {name}"] = named
    return layers


def several(given: dict, argv: list[str], typed: dict) -> Rows:
    """The runs of a command that is more than one; what is wrong with each row is told.

    given: the parser's words; typed: the settings among them, and in a file.
    """
    if under_a_launcher():
        raise UserError(
            f"{', '.join(MANY)} start a process for each run: leave the launcher out and type "
            "python train.py; on a cluster python launch/submit.py makes an array of them",
            code="under-a-launcher",
        )
    beside = given["side_by_side"]
    if beside is not None and not (NUMBER.fullmatch(beside) and int(beside) > 0):
        message = f"--side-by-side {beside}: must be a whole number from 1"
        raise UserError(message, code="bad-value")
    base, rows = rows_of(given, argv, typed.get("seed", TrainConfig.seed))
    problems: dict[str, list[UserError]] = {}  # a mistake that rows share is told once
    found = None
    for row in rows:
        try:
            found = parse([*base, *row.words])
        except UserError as error:
            where = f"{row.place or given['sweep'] or 'row'}: {' '.join(row.words)}"
            placed = UserError(f"{where}: {error}", code=error.code)
            problems.setdefault(str(error), []).append(placed)
    if problems:
        whose = {text: placed[0] for text, placed in problems.items()}
        raise all_of([
            UserError(text, code=placed.code) if len(problems[text]) == len(rows) else placed
            for text, placed in list(whose.items())[:MOST_TOLD]
        ])  # fmt: skip
    assert found is not None
    config = found.config
    folder = typed.get("run_dir") or default_folder(given, config.model, config.dataset)
    keep = found.asked("keep") or any("keep" in row.values for row in rows)
    return Rows(Path(folder), base, tuple(rows), int(beside or 0), keep)


def under_a_launcher() -> bool:
    """Whether a launcher started this process: torchrun, Accelerate, or srun in a job."""
    in_step = "SLURM_STEP_ID" in os.environ and "SLURM_PTY_PORT" not in os.environ
    return "RANK" in os.environ or in_step


def _processes(text: str | None, dry_run: bool, problems: list[UserError]) -> int | None:
    """How many processes --dry-run rehearses."""
    if text is None:
        return None
    if not NUMBER.fullmatch(text) or int(text) < 1:
        problems.append(UserError(f"--as {text}: must be a whole number from 1", code="bad-value"))
        return None
    if not dry_run or under_a_launcher():
        message = (
            f"--as {text} rehearses on one process: type python train.py --dry-run --as {text}"
        )
        problems.append(UserError(message, code="contradiction"))
    return int(text)


def _steps(
    text: str | None, debug: bool, max_steps: str | None, problems: list[UserError]
) -> int | None:
    """The steps after which this command stops; --debug is a look at a few."""
    if text is None:
        return DEBUG_STEPS if debug and max_steps is None else None
    if not NUMBER.fullmatch(text) or int(text) < 1:
        message = f"--stop-after {text}: must be a whole number from 1"
        problems.append(UserError(message, code="bad-value"))
        return None
    return int(text)


class Wrapped(argparse.HelpFormatter):
    """Lines that end between words: what is typed is never broken at its hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def build_parser() -> argparse.ArgumentParser:
    """Every field of TrainConfig as a flag, in groups, and the actions."""
    parser = Parser(
        prog="train.py",
        description="Train an image classifier: the same run on one process or many.",
        allow_abbrev=False,
        epilog="Start with: python train.py --debug. Models: python -m models.",
        formatter_class=Wrapped,
    )
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    for name, f in HINTS.items():
        flag = flag_of(name)
        default = "" if f.default is None or f.default is False else f" (default {f.default})"
        known = [*map(str, f.metadata["choices"]), *["FILE.py:Class"] * f.metadata["own"]]
        choices = f" [{' | '.join(known)}]" if known else ""
        text = (f.metadata["help"] + choices + default).replace("%", "%%")
        group = groups[f.metadata["group"]]
        if TYPES[name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(flag, default=None, help=text, metavar=name.upper())
    act = parser.add_argument_group("this command")
    act.add_argument("--debug", action="store_true", help="one process, few images, anomaly checks")
    act.add_argument("--dry-run", action="store_true", help="build all, one step, write nothing")
    act.add_argument(
        "--as", metavar="N", help="with --dry-run: as one of N processes, with their shards"
    )
    act.add_argument(
        "--eval-only", action="store_true", help="evaluate the run's best model, or --weights"
    )
    act.add_argument(
        "--stop-after", metavar="N", help="stop after N steps for a look; the run can go on later"
    )
    act.add_argument("--find-lr", action="store_true", help="suggest a learning rate and stop")
    act.add_argument(
        "--resume",
        nargs="?",
        const=LATEST,
        help="run folder to continue (alone, or latest: runs/latest)",
    )
    act.add_argument("--fresh", action="store_true", help="start over in --run-dir")
    act.add_argument(
        "--trust-code", action="store_true",
        help="execute the model's file that the run folder of somebody else holds",
    )  # fmt: skip
    act.add_argument(
        "--allow-change",
        nargs="+",
        default=[],
        metavar="NAME",
        help="settings a resumed run may change; also: code, of your own model",
    )
    act.add_argument("--sweep", metavar="FILE.yaml", help="a run for each row of a file, or each "
                     "combination: lr: [0.1, 0.2]")  # fmt: skip
    act.add_argument("--seeds", metavar="N", help="a run for each of N seeds, from --seed on")
    act.add_argument(
        "--folds", metavar="N", help="a run for each of N parts of the pictures: it tests there"
    )
    act.add_argument(
        "--side-by-side", metavar="N",
        help="of several runs so many at a time (default: as many as there are GPUs, else 1)",
    )  # fmt: skip
    act.add_argument("--config", metavar="FILE.yaml", help="settings from a YAML file")
    act.add_argument("--version", action="version", version=f"lockstep {__version__}")
    return parser


def spell(word: str) -> str:
    """`--batch_size=8` as `--batch-size=8`: both spellings are accepted."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def bare_words(words: list[str]) -> UserError:
    """The mistake of words that no flag stands before, with the flag that the first one lacks."""
    word, meant = words[0], ""
    if word in ("help", "-help", "/?"):
        meant = "; type python train.py --help"
    elif word in MODELS or is_own_file(word) or word.startswith(("torchvision:", "timm:")):
        meant = f"; type --model {word}"
    elif Path(word).is_dir() and (Path(word) / "config.json").is_file():
        meant = f"; type --resume {word}"
    elif Path(word).is_dir() or word in NAMES:
        meant = f"; type --dataset {word}"
    message = f"{' '.join(words)}: not an option; every option starts with --{meant}"
    return UserError(message, code="unknown-flag")


def unknown_flag(word: str, flags: list[str]) -> UserError:
    """The mistake of a flag that does not exist, with the one that may be meant."""
    flag = word.partition("=")[0]
    message = f"{flag}: no such option{no_such(flag, flags)}; see python train.py --help"
    return UserError(message, code="unknown-flag")


def read_yaml(path: Path) -> dict[str, object]:
    """Settings of a YAML file; duplicate keys and anything but a flat table are refused."""
    import yaml

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, object]:
        keys = [loader.construct_object(key) for key, _ in node.value]
        if not all(isinstance(key, str) for key in keys):
            raise UserError(f"--config {path}: must be lines like `lr: 0.05`", code="bad-yaml")
        keys = [key.replace("-", "_") for key in keys]
        twice = {k for k in keys if keys.count(k) > 1}
        if twice:
            raise UserError(
                f"--config {path}: {', '.join(sorted(twice))} stands there twice", code="bad-yaml"
            )
        return {
            k: loader.construct_object(v, deep=True)
            for k, (_, v) in zip(keys, node.value, strict=True)
        }

    def whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str | int:
        # YAML 1.1 would make 5400 of 1:30:00
        return node.value if ":" in node.value else loader.construct_yaml_int(node)

    def switch(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str | bool:
        # YAML 1.1 would make false of `mixed_precision: no`
        word = node.value.lower()
        return word == "true" if word in ("true", "false") else node.value

    Strict.add_constructor("tag:yaml.org,2002:int", whole)
    Strict.add_constructor("tag:yaml.org,2002:bool", switch)
    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Strict)  # a SafeLoader
    except OSError as error:
        raise UserError(
            f"--config {path}: cannot be read ({error.strerror})", code="no-config-file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UserError(f"--config {path}: not valid YAML{line}", code="bad-yaml") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"--config {path}: must be lines like `lr: 0.05`", code="bad-yaml")
    return {key.replace("-", "_"): value for key, value in content.items()}


def host_name() -> str:
    """What the cluster, or else the machine itself, calls this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def several_nodes() -> bool:
    """Whether a launcher started processes on more than one node, this one among them."""
    return "RANK" in os.environ and int(os.environ.get("GROUP_WORLD_SIZE") or 1) > 1


def has_own_terminal() -> bool:
    """Whether this is the first process of a node whose screen the main process does not write on.

    A SLURM job has one log for all nodes.
    """
    env = os.environ
    first_of_another = env.get("LOCAL_RANK") == "0" and env.get("GROUP_RANK", "0") != "0"
    return several_nodes() and first_of_another and "SLURM_PROCID" not in env


def tell(error: UserError) -> None:
    """Print what one process finds wrong before it can ask the others: once, if all find the same.

    The main process speaks at once, and on several nodes the first of each that has a terminal of
    its own. Else the first process of another node waits: where all meet the same, the launcher
    ends it meanwhile; where only its node is wrong, nobody else can say so.
    """
    env = os.environ
    rank = env.get("RANK") or env.get("SLURM_PROCID") or "0"
    host = host_name()
    if rank == "0":
        print(error, file=sys.stderr, flush=True)
    elif several_nodes():  # all agree on it soon, and it is told then
        if not has_own_terminal():
            return
        print(f"rank {rank} on {host}: {error}", file=sys.stderr, flush=True)
    elif (env.get("LOCAL_RANK") or env.get("SLURM_LOCALID")) == "0":
        time.sleep(2)
        print(f"rank {rank} on {host}: {error}", file=sys.stderr, flush=True)
    error.printed = True


def parse_to_train(argv: list[str]) -> Settings:
    """What parse_or_exit does, then a sign of life: loading torch takes seconds.

    Ctrl-C during the imports ends the process without a traceback.
    """
    settings = parse_or_exit(argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if settings.rows is not None:
        return settings
    if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0":
        print("loading torch ...", file=sys.stderr, flush=True)
    return settings


def parse_or_exit(argv: list[str]) -> Settings:
    """Settings, or a sentence per problem on stderr (once, on many processes) and status 2.

    On several nodes the settings carry the problem to where all meet: else the others would wait
    for a process that has left.
    """
    steady_streams()
    try:
        return parse(argv)
    except (OSError, ValueError) as error:  # a name that no file can have, a number without end
        problem = (
            error
            if isinstance(error, UserError)
            else UserError(f"cannot be understood: {error}", code="bad-settings")
        )
        tell(problem)
        if several_nodes():
            return Settings({}, argv=tuple(argv), refused=problem)
        raise SystemExit(2) from None
