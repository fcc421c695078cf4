"""Many runs of one command, in turn or side by side: the rows of a sweep, seeds, folds.

Each row is the run that its own flags would start alone; it comes from a warm interpreter
(launch/preloaded.py), which imports the packages once and never looks for a GPU. What there is of
the rows stands in their folders and nowhere else, so the same command goes on with what is left.
"""

import sys

from common.errors import USER_ERROR, UserError
from common.text import pasted, printable
from config import Settings
from config.rows import Rows
from many.crew import Crew
from many.folder import Turn, entered
from many.room import devices_there, disk_in_words

INTERRUPTED = 130


def hand_over(settings: Settings) -> None:
    """Where a command is several runs: make them and leave with their status."""
    if settings.rows is None:
        return
    try:
        status = run_all(settings.rows)
    except (UserError, OSError) as error:
        print(printable(error), file=sys.stderr)
        status = USER_ERROR
    raise SystemExit(status)


def run_all(rows: Rows) -> int:
    """All rows that are not finished; the exit status: 75 if stopped, 1 if any failed."""
    from report.board import Board  # brings rich

    with entered(rows):
        turns = [Turn(row, rows.folder / row.name) for row in rows.rows]
        for turn in turns:
            turn.look()
        board = Board(rows.folder, turns)
        left = [turn for turn in turns if turn.state != "finished"]
        try:
            if left:
                print("loading torch ...", file=sys.stderr, flush=True)
                devices = devices_there()
                beside = min(rows.side_by_side or max(1, len(devices)), len(left))
                board.begin(disk_in_words(rows, left, beside), beside, devices)
                crew = Crew(rows, left, beside, devices, board)
                crew.work()
                if crew.asked > 1:
                    return INTERRUPTED
        finally:
            board.close()
        return board.end(pasted("train.py", *sys.argv[1:]))
