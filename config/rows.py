"""Many runs of one command: a sweep file, seeds and folds as rows of flags; no torch."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError, all_of
from common.text import file_name
from config.fields import HINTS, SWITCH_WORDS, TYPES, convert, flag_of, no_such

if TYPE_CHECKING:
    import yaml

SWEEP = "sweep.json"  # in the folder of all rows
MOST_ROWS = 10_000
MOST_NAME = 100  # characters of a folder's name
MOST_TOLD = 10  # mistakes
# What makes several runs of a command; each takes a value.
MANY = ("--sweep", "--seeds", "--folds")
OWN = (*MANY, "--side-by-side", "--run-dir")
ALONE = ("resume", "debug", "eval_only", "find_lr", "fresh", "dry_run")  # of one run
PLACES = ("run_dir", "max_time")  # settings that no row can have of its own
Values = dict[str, str]  # setting -> its value, as it is typed


@dataclass(frozen=True)
class Row:
    """One of several runs: its number, where its flags stand, and what it has of its own."""

    number: int
    place: str  # for a person
    values: Values

    @property
    def name(self) -> str:
        """Of its folder: the number, then what is its own."""
        words = {key: value.replace("/", "of") if key == "fold" else file_name(value)
                 for key, value in self.values.items()}  # fmt: skip
        own = (key + value for key, value in words.items())
        return "-".join([f"{self.number:03}", *own])[:MOST_NAME]

    @property
    def words(self) -> list[str]:
        """Its own flags."""
        found = []
        for name, value in self.values.items():
            flag = name.replace("_", "-")
            if TYPES[name] is bool:
                off = SWITCH_WORDS.get(value.lower(), value.lower() != "false") is False
                found.append(f"--{'no-' * off}{flag}")
            else:
                found += [f"--{flag}", value]
        return found


@dataclass(frozen=True)
class Rows:
    """The runs of a command, in their order; `base` are the flags that all of them share."""

    folder: Path
    base: tuple[str, ...]
    rows: tuple[Row, ...]
    side_by_side: int = 0  # 0: as many as there are devices
    keep: bool = False  # checkpoints too, not the best weights alone

    def words(self, row: Row) -> list[str]:
        """The flags of a row, as one would type them for it alone."""
        return [*self.base, *row.words, "--run-dir", str(self.folder / row.name)]

    def content(self) -> dict:
        """What sweep.json says: scripts, array jobs and comparisons read it."""
        rows = [
            {"row": row.number, "name": row.name, "values": row.values, "words": self.words(row)}
            for row in self.rows
        ]
        return {"folder": str(self.folder), "base": list(self.base), "rows": rows}


def rows_of(given: dict, argv: Sequence[str], seed: int) -> tuple[tuple[str, ...], list[Row]]:
    """(flags that all share, rows) of a command; `given` are the parser's words, by name.

    A sweep file, seeds and folds multiply. Raises UserError.
    """
    for name in ALONE:
        if given[name]:
            flag = flag_of(name)
            raise UserError(
                f"{flag} is of one run, and this command is several: drop one", code="contradiction"
            )
    parts: list[list[tuple[str, Values]]] = []
    if given["sweep"] is not None:
        parts.append(read_sweep(Path(given["sweep"])))
    for flag, low in (("seeds", 1), ("folds", 2)):
        if given[flag] is not None:
            count = _whole(f"--{flag}", given[flag], low)
            name = flag.removesuffix("s")
            texts = [str(seed + n) if name == "seed" else f"{n + 1}/{count}" for n in range(count)]
            parts.append([("", {name: text}) for text in texts])
    if math.prod(map(len, parts)) > MOST_ROWS:
        raise _too_many(math.prod(map(len, parts)))
    rows = []
    for number, together in enumerate(itertools.product(*parts)):
        values: Values = {}
        for _, own in together:
            if twice := values.keys() & own.keys():
                flag = {"seed": "--seeds", "fold": "--folds"}[min(twice)]
                raise UserError(
                    f"{given['sweep']} and {flag} both say what {min(twice)} is: drop one",
                    code="contradiction",
                )
            values |= own
        rows.append(Row(number, "".join(place for place, _ in together), values))
    typed = {name for row in rows for name in row.values if given.get(name) is not None}
    typed -= {"seed"} if given["seeds"] is not None else set()  # the first of them
    if typed:
        flags = ", ".join(flag_of(name) for name in sorted(typed))
        raise UserError(
            f"{flags} stands in the command and in its rows: drop one", code="contradiction"
        )
    dropped = (*OWN, *(["--seed"] if given["seeds"] is not None else []))
    return tuple(_without(argv, dropped)), rows


def _whole(flag: str, text: str, low: int) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < low:
        raise UserError(f"{flag} {text}: must be a whole number from {low}", code="bad-value")
    if int(text) > MOST_ROWS:
        raise _too_many(int(text))
    return int(text)


def _too_many(count: int) -> UserError:
    return UserError(
        f"these are {count:,} runs, and {MOST_ROWS:,} are the most", code="too-many-rows"
    )


def _without(argv: Iterable[str], dropped: Sequence[str]) -> list[str]:
    """The words without these options and their values."""
    kept, words = [], iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if name.startswith("--") and name.replace("_", "-") in dropped:
            if not equals:
                next(words, None)
        else:
            kept.append(word)
    return kept


def default_folder(given: dict, model: str, dataset: str) -> Path:
    """Where the runs of a command lie that names no --run-dir: the same command, the same place."""
    named = [f"{flag}{given[flag]}" for flag in ("seeds", "folds") if given[flag] is not None]
    if given["sweep"] is not None:
        return Path("runs") / "-".join([file_name(Path(given["sweep"]).stem), *named])
    return Path("runs") / "-".join([file_name(model), file_name(dataset), *named])


# --- a sweep file --------------------------------------------------------------------------------


def read_sweep(path: Path) -> list[tuple[str, Values]]:
    """(where it stands, its settings) of each row of a YAML file.

    `lr: [0.1, 0.2]` lines are a grid: each value with each; the last line turns fastest. Lines that
    begin with - are rows: `- {lr: 0.1, momentum: 0.9}`. A value is read as a flag's would be.
    """
    import yaml

    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--sweep {path}: {error.strerror}", code="no-sweep-file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UserError(f"--sweep {path}{line}: is no valid YAML", code="bad-sweep-file") from None
    file = _File(path)
    if isinstance(root, yaml.MappingNode):
        axes = file.settings(root, several=True)
        rows = [("", values) for values in _grid(axes)] if not file.problems else []
    elif isinstance(root, yaml.SequenceNode):
        rows = []
        for node in root.value:
            if isinstance(node, yaml.MappingNode):
                values = {name: value for name, (value,) in file.settings(node).items()}
                rows.append((f"{path}, line {node.start_mark.line + 1}", values))
            else:
                file.wrong(node, "a row is written as - {lr: 0.1, momentum: 0.9}")
    else:
        raise UserError(
            f"--sweep {path}: write a grid, lines like lr: [0.1, 0.2], or rows, lines like "
            "- {lr: 0.1, momentum: 0.9}",
            code="bad-sweep-file",
        )
    if file.problems:
        raise all_of(file.problems[:MOST_TOLD])
    if not rows:
        raise UserError(f"--sweep {path}: holds no row", code="bad-sweep-file")
    return rows


def _grid(axes: dict[str, list[str]]) -> list[Values]:
    count = math.prod(map(len, axes.values()))
    if count > MOST_ROWS:
        raise _too_many(count)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


class _File:
    """Reads nodes of a file and collects what is wrong with them, each with its line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[UserError] = []

    def wrong(self, node: "yaml.Node", message: str) -> None:
        where = f"{self.path}, line {node.start_mark.line + 1}"
        self.problems.append(UserError(f"{where}: {message}", code="bad-sweep-file"))

    def settings(self, mapping: "yaml.MappingNode", several: bool = False) -> dict[str, list[str]]:
        """Setting -> its values, of which a row has one."""
        import yaml

        found: dict[str, list[str]] = {}
        for key, value in mapping.value:
            name = str(key.value).replace("-", "_")
            if name not in HINTS:
                self.wrong(key, f"{key.value}: no such setting{no_such(name, HINTS)}")
            elif name in PLACES:
                self.wrong(key, f"{key.value}: is no row's own; leave it out")
            elif name in found:
                self.wrong(key, f"{key.value} stands there twice")
            else:
                listed = isinstance(value, yaml.SequenceNode)
                nodes = value.value if listed else [value]
                if listed and not several:
                    self.wrong(value, f"{key.value}: a row has one value, not a list")
                elif not nodes:
                    self.wrong(value, f"{key.value}: the list is empty")
                found[name] = [self._value(name, node) for node in nodes[: None if several else 1]]
                if len(set(found[name])) < len(found[name]):
                    self.wrong(value, f"{key.value}: a value stands there twice")
        return found

    def _value(self, name: str, node: "yaml.Node") -> str:
        import yaml

        text = node.value if isinstance(node, yaml.ScalarNode) else ""
        if not text or node.tag == "tag:yaml.org,2002:null":
            self.wrong(node, f"{name}: a value is a number or a word")
            return ""
        where = f"{self.path}, line {node.start_mark.line + 1}: {name}"
        switch = {"true": True, "false": False} if TYPES[name] is bool else {}
        convert(name, switch.get(text.lower(), text), where, {}, self.problems)
        return text
