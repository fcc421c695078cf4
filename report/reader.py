"""Follows metrics.jsonl while a run writes it: only what is new is read."""

import threading
from pathlib import Path

from common.disk import digest, parse_object, read_json

JUDGED = ("test/", "val/")  # of an evaluation
MOST_BYTES = 2_000_000  # of metrics.jsonl in an answer; the rest comes with the next


def new_rows(file: Path, place: int) -> tuple[int, int, list[dict], bool]:
    """(from, to, rows, whether there are more) of metrics.jsonl from a place in it on.

    From its beginning where it has become shorter. A last line that is half written is not read.
    """
    try:
        size = file.stat().st_size
        place = place if 0 <= place <= size else 0
        with file.open("rb") as opened:
            opened.seek(place)
            data = opened.read(MOST_BYTES)
    except OSError:
        return 0, 0, [], False
    data = data[: data.rfind(b"\n") + 1]
    lines = data.decode("utf-8", "replace").split("\n")
    rows = [row for line in lines if (row := parse_object(line))]
    return place, place + len(data), rows, len(data) > MOST_BYTES // 2


def life_of(status: dict) -> str:
    """Which life of which run writes there: one that --fresh began counts from 0 again."""
    lives = status.get("lives")
    newest = lives[-1] if isinstance(lives, list) and lives else {}
    began = newest.get("began") if isinstance(newest, dict) else ""
    return digest(f"{status.get('life')} {began}")


class Reader:
    """Reads metrics.jsonl once, however often it is asked; keeps evaluations and the last row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._place, self._life = 0, ""
        self._evaluations: list[dict] = []
        self._last: list[dict] = []
        self._lock = threading.Lock()  # each answer has a thread

    def rows(self) -> list[dict]:
        """What the page's words are made of, by now."""
        with self._lock:
            life, more = life_of(read_json(self.folder / "status.json", {})), True
            place, self._life = self._place if life == self._life else 0, life
            while more:
                start, place, rows, more = new_rows(self.folder / "metrics.jsonl", place)
                if not start:
                    self._evaluations, self._last = [], []
                evaluations = [row for row in rows if any(key.startswith(JUDGED) for key in row)]
                self._evaluations += evaluations
                self._last = rows[-1:] or self._last
            self._place = place
            last = [row for row in self._last if self._evaluations[-1:] != [row]]
            return [*self._evaluations, *last]
