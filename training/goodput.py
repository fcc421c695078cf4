"""Goodput: the part of a run's wall time, over all its lives, that computed steps that stayed."""

import itertools
import time
from collections.abc import Callable

import psutil

from common.disk import Json
from common.text import duration

LOST = {
    "start": "starting",
    "compile": "compiling",
    "data": "waiting for data",
    "evaluation": "evaluating",
    "saving": "saving",
    "repeated": "steps made again after a kill",
    "still": "standing still before an end",
    "end": "ending",
    "between": "between lives",
}
SLOW = {  # what a process that the others wait for is slow in: distributed/pace.py
    "data": "waiting for its data",
    "forward": "its forward",
    "backward": "its backward",
    "all": "all that it computes (a busy host, a hot GPU)",
    "core": "all that it computes (its core does other work too)",
}


class Ledger:
    """The seconds of one life by what they went to; whatever is not charged was steps."""

    def __init__(self, own_process: bool, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.born = psutil.Process().create_time() if own_process else clock()
        self.seconds: dict[str, float] = {}
        self.slow: list[Json] = []  # pace.Slow, as dicts
        self._closed: dict[str, Json] = {}
        self.step = 0  # after the latest one that a row tells of

    def begin_steps(self) -> None:
        """All up to here that was nothing else was the start; once."""
        if "start" not in self.seconds:
            self.seconds["start"] = self.clock() - self.born - sum(self.seconds.values())

    def close(self) -> None:
        """What comes now, pictures and a page that tells of all this, is not counted."""
        self._closed = self.entry()

    def charge(self, cause: str, seconds: float) -> None:
        """So many seconds were no step: one of LOST."""
        self.seconds[cause] = self.seconds.get(cause, 0.0) + seconds

    def entry(self) -> dict[str, Json]:
        """What status.json keeps of this life: its birth, its latest word and its step then."""
        if self._closed:
            return self._closed
        now, spent = self.clock(), dict(self.seconds)
        spent.setdefault("start", now - self.born - sum(spent.values()))
        seconds: dict[str, Json] = {cause: round(s, 3) for cause, s in spent.items()}
        entry = {"born": self.born, "until": now, "at": self.step, "seconds": seconds}
        return {**entry, "slow": self.slow} if self.slow else entry


def goodput(lives: list[dict]) -> dict[str, float]:
    """Seconds by cause of all lives, "useful" among them, and "wall", their sum; {} if unknown.

    A life that was killed counts until its last row. Steps that the next life made again are lost
    at the speed of the life that had made them first.
    """
    known = [life for life in lives if isinstance(life.get("seconds"), dict)]
    spent = dict.fromkeys(("useful", *LOST), 0.0)
    for life, after in itertools.zip_longest(known, known[1:]):
        for cause, seconds in life["seconds"].items():
            spent[cause] += seconds
        steps = max(0.0, life["until"] - life["born"] - sum(life["seconds"].values()))
        made, again = life["at"] - life["step"], 0.0
        if after is not None and made > 0:
            again = steps * max(0, life["at"] - after["step"]) / made
            spent["between"] += max(0.0, after["born"] - life["until"])
        spent["useful"] += steps - again
        spent["repeated"] += again
    spent["wall"] = sum(spent.values())
    return spent if spent["wall"] else {}


def in_words(spent: dict[str, float]) -> str:
    """`83 % of 1h02m computed steps; 9 % starting, 5 % evaluating, 3 % saving`."""
    parts = {name: spent[cause] / spent["wall"] for cause, name in LOST.items()}
    largest = sorted(parts.items(), key=lambda part: -part[1])
    lost = ", ".join(f"{100 * part:.0f} % {name}" for name, part in largest if part >= 0.005)
    useful = f"{100 * spent['useful'] / spent['wall']:.0f} % of {duration(spent['wall'])}"
    return f"{useful} computed steps" + (f"; {lost}" if lost else "")


def slow_in_words(slow: dict) -> str:
    """A sentence about a process that the others waited for, a Slow as a dict."""
    lasts = f"is slow from step {slow['since']} on"
    if slow["until"] is not None:
        lasts = f"was slow from step {slow['since']} to {slow['until']}"
    return (
        f"{slow['where']} {lasts}: {SLOW[slow['reason']]} takes {1e3 * slow['seconds']:.0f} ms "
        "of a step longer than the others'; without that the run would be about "
        f"{100 * slow['faster']:.0f} % faster (estimate)"
    )


def slow_ones(lives: list[dict]) -> list[str]:
    """What status.json keeps of all lives' slow processes, in sentences."""
    return [slow_in_words(slow) for life in lives for slow in life.get("slow") or []]
