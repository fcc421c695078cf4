"""What `--augment` says: steps joined by |, read and checked without torch.

`resized_crop|flip|randaugment(2,10)|erase(0.25)`: first how a picture is cut, then what happens to
its pixels, in the order written. What the steps do to pixels is in operators.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import UserError
from common.text import did_you_mean

KINDS = ("none", "flip", "crop", "resized_crop", "translate")  # how a picture is cut and mirrored
CUTS = ("crop", "resized_crop", "translate")  # these mirror too, as they did before there were more


@dataclass(frozen=True)
class Number:
    """A number of a step: its name, what it is where nobody says it, and its limits."""

    name: str
    default: float
    low: float = 0.0
    high: float = 1.0
    whole: bool = False


def chance(default: float) -> Number:
    """The probability with which an image gets a step."""
    return Number("p", default)


# Name -> its numbers, in the order in which they can be written without their names.
STEPS: dict[str, tuple[Number, ...]] = {
    **dict.fromkeys(("none", *CUTS), ()),
    "flip": (chance(0.5),),
    "vflip": (chance(0.5),),
    "randaugment": (
        Number("n", 2, 1, 8, whole=True), Number("m", 9, 0, 30), Number("noise", 0, 0, 30),
        chance(1),
    ),
    "trivialaugment": (chance(1),),
    "jitter": (
        Number("brightness", 0.4), Number("contrast", 0.4), Number("saturation", 0.4),
        Number("hue", 0.1, 0, 0.5), chance(1),
    ),
    "grey": (chance(0.2),),
    "blur": (chance(0.5), Number("low", 0.1, 0.01, 100), Number("high", 2, 0.01, 100)),
    "rotate": (Number("degrees", 15, 0, 180), chance(1)),
    "erase": (chance(0.25), Number("low", 0.02), Number("high", 0.33)),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One step with all of its numbers."""

    name: str
    numbers: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        return self.numbers[name]


@dataclass(frozen=True)
class Policy:
    """How pictures are cut (one of KINDS) and mirrored (a probability); then steps on pixels."""

    kind: str
    flip: float
    steps: tuple[Step, ...] = ()


def parse_policy(text: str) -> Policy:
    """The policy that a text describes; UserError with a mark under what is wrong."""
    kind, flip, steps, place = "none", None, [], 0
    for piece in text.split("|"):
        step, start = _step(text, place, piece), place + len(piece) - len(piece.lstrip())
        if step.name == "none" and "|" in text:
            raise _wrong(text, start, "none stands alone: leave it out beside other steps")
        if step.name in CUTS and place:
            first = f"{step.name} must come first: a picture is cut before anything else is done"
            raise _wrong(text, start, f"{first}, and once")
        if step.name == "flip" and flip is not None:
            raise _wrong(text, start, "flip stands there twice: keep one, as flip(0.5)")
        if step.name in CUTS:
            kind = step.name
        elif step.name == "flip":
            flip = step["p"]
        elif step.name != "none":
            steps.append(step)
        place += len(piece) + 1
    if kind == "none" and flip is not None:
        kind = "flip"
    return Policy(kind, 0.5 if flip is None else flip, tuple(steps))


def _step(text: str, place: int, piece: str) -> Step:
    """The step that a piece of the text names, which begins at `place` there."""
    written = re.fullmatch(r"(\s*)([^\s(]*)\s*(?:\((.*))?", piece)
    assert written is not None  # as this matches anything
    at, name, rest = place + len(written[1]), written[2], written[3]
    if not name:
        raise _wrong(text, at, f"a step is missing here; steps: {', '.join(STEPS)}")
    if name not in STEPS:
        message = f"{name!r} is not a step{did_you_mean(name, STEPS)}; known: {', '.join(STEPS)}"
        raise _wrong(text, at, message, "unknown-augmentation")
    known = {number.name: number for number in STEPS[name]}
    form = f"{name}({', '.join(f'{n.name}={n.default:g}' for n in known.values())})"
    form = form.removesuffix("()")
    numbers = {n.name: n.default for n in known.values()}
    if rest is None:
        return Step(name, numbers)
    if not rest.rstrip().endswith(")"):
        raise _wrong(text, place + len(piece), f"a ) is missing here; write {form}")
    at, given = place + written.start(3), set()
    for position, word in enumerate(rest.rstrip()[:-1].split(",")):
        here, (label, equals, value) = at + len(word) - len(word.lstrip()), word.partition("=")
        at += len(word) + 1
        if not equals:
            label, value = (list(known)[position] if position < len(known) else ""), word
        label, value = label.strip(), value.strip()
        if label not in known or label in given:
            what = "has no such number" if label not in given else f"has {label} twice"
            raise _wrong(text, here, f"{name} {what}; write {form}")
        given.add(label)
        limits = known[label]
        kind = "a whole number" if limits.whole else "a number"
        wanted = f"{label} of {name} must be {kind} from {limits.low:g} to {limits.high:g}"
        if not re.fullmatch(r"\d+" if limits.whole else r"\d+\.?\d*|\.\d+", value, re.ASCII):
            raise _wrong(text, here, f"{wanted}; write {form}")
        if not limits.low <= float(value) <= limits.high:
            raise _wrong(text, here, f"{wanted}; write {form}")
        numbers[label] = float(value)
    if "low" in numbers and numbers["low"] > numbers["high"]:
        raise _wrong(text, place, f"low of {name} must not be above high; write {form}")
    return Step(name, numbers)


def _wrong(text: str, at: int, message: str, code: str = "bad-augmentation") -> UserError:
    return UserError(f"--augment: {message}\n  {text}\n  {' ' * at}^", code=code)
