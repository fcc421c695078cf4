"""The folder of all rows: how far each is, and whether it may hold them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.disk import read_json, write_json
from common.errors import UserError
from config.rows import SWEEP, Row, Rows

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LAST_LINES = 20  # of a row's output, among which its reason is


@dataclass
class Turn:
    """How far a row is; `state` is waits, runs, or what its status.json says of its end."""

    row: Row
    folder: Path
    state: str = "waits"
    reason: str = ""
    place: int = 0  # among those that run side by side: whose device it has
    seconds: float = 0.0  # that it has run, in this command
    began: float = 0.0

    @property
    def output(self) -> Path:
        """What its process says; not in its folder, which it must find empty."""
        return self.folder.with_name(f"{self.folder.name}.txt")

    def look(self) -> None:
        """What its folder says of its end."""
        status = read_json(self.folder / "status.json", {})
        self.state = str(status.get("status", "waits"))
        self.reason = str(status.get("reason") or "")
        if self.state == "running":  # of a life that was killed
            self.state = "waits"


def last_words(output: Path, status: int) -> str:
    """Why a row ended, as far as it has said."""
    try:
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    said = [line.strip() for line in lines[-LAST_LINES:] if line.strip(" ╭╰─│╮╯")]
    if status < 0:
        return f"killed by signal {-status}, as when memory runs out"
    return said[-1] if said else f"exit status {status}"


@contextlib.contextmanager
def entered(rows: Rows) -> Iterator[None]:
    """The folder of all rows, with its sweep.json, for this process alone."""
    folder, content, lock = rows.folder, rows.content(), rows.folder / "lock"
    if not lock.exists():
        _refuse_foreign(folder)  # before a file of ours lies in it
    folder.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        if fcntl is not None:
            try:
                fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another process is making the runs of {folder}; wait for it, or name "
                    "another folder with --run-dir",
                    code="run-dir-in-use",
                ) from None
        _refuse_foreign(folder)  # what is there stays so only while we hold the lock
        _refuse_others(folder, content)
        write_json(folder / SWEEP, content)
        yield


def _refuse_foreign(folder: Path) -> None:
    if read_json(folder / SWEEP) is not None or not folder.is_dir():
        return
    if {path.name for path in folder.iterdir()} - {"lock"}:
        raise UserError(
            f"{folder} holds files that are no sweep; name another folder with --run-dir",
            code="run-dir-foreign",
        )


def _refuse_others(folder: Path, new: dict) -> None:
    if (old := read_json(folder / SWEEP)) is None:
        return
    kept, now = ([_own(row) for row in of.get("rows", [])] for of in (old, new))
    if old.get("base") != new["base"] or kept != now[: len(kept)]:
        raise UserError(
            f"{folder} holds other runs: {_difference(old, new)}; what was there can only "
            "be added to, as rows at the end. Name another folder with --run-dir",
            code="other-sweep",
        )


def _own(row: dict) -> tuple:
    """What a row has of its own: its words also name the folder, which may be typed otherwise."""
    return row.get("name"), row.get("values")


def _difference(old: dict, new: dict) -> str:
    if old.get("base") != new["base"]:
        return f"{' '.join(old.get('base', []))} was typed, now {' '.join(new['base'])}"
    there, now = ([row["name"] for row in of.get("rows", [])] for of in (old, new))
    gone = [name for name in there if name not in now]
    return f"{', '.join(gone[:3] or ['their order'])} is not as it was"
