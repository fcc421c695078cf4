"""`python -m report runs/`: the runs in a folder, the newest first."""

import time
from pathlib import Path

from common.disk import read_json
from common.errors import FINISHED, UserError
from common.text import duration
from config.rows import SWEEP
from report.compare import Run, shown, table
from report.doctor import describe_status
from report.page import Files
from report.screen import Report

HEAD = ["run", "status", "best", "began", "#took"]


def list_runs(folder: Path) -> list[list[str]]:
    """A row for each run, and one for each folder of many; the newest first."""
    rows = []
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_dir():
            continue
        if (path / "config.json").is_file():
            rows.append(_of_run(path))
        elif content := read_json(path / SWEEP):
            inside = [path / str(row["name"]) for row in content.get("rows", [])]
            states = [read_json(one / "status.json", {}).get("status", "waits") for one in inside]
            done = f"{states.count('finished')} of {len(states)} runs finished"
            began = min((_began(one) for one in inside if one.is_dir()), default="")
            rows.append([f"{path.name}/", done, _best_of(inside), began, ""])
    return sorted(rows, key=lambda row: row[3], reverse=True)


def _of_run(folder: Path) -> list[str]:
    run = Run(folder.name, Files(folder))
    metric = run.files.deciding
    best = shown(metric, run.best(metric))
    seconds = run.seconds
    state = describe_status(folder, run.files.status)
    took = duration(seconds) if seconds is not None else ""
    return [run.name, state, f"{best} {metric.title}" * bool(best), _began(folder), took]


def _best_of(folders: list[Path]) -> str:
    """The best that any of many runs has come to, and which."""
    runs = [Run(one.name, Files(one)) for one in folders if (one / "config.json").is_file()]
    bests = [(value, run) for run in runs if (value := run.best(run.files.deciding)) is not None]
    if not bests:
        return ""
    metric = bests[0][1].files.deciding
    pick = max if metric.higher_is_better else min
    value, run = pick(bests, key=lambda pair: pair[0])
    return f"{shown(metric, value)} {metric.title} ({run.name})"


def _began(folder: Path) -> str:
    lives = read_json(folder / "status.json", {}).get("lives") or [{}]
    if began := lives[0].get("began"):
        return str(began)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.stat().st_mtime))


def command(folder: Path) -> int:
    """Show the table; UserError where there is no run."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", code="no-run")
    rows = list_runs(folder)
    if not rows:
        raise UserError(f"{folder} holds no run: no config.json in any folder there", code="no-run")
    Report().show(table(HEAD, rows))
    return FINISHED
