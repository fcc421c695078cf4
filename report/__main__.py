"""`python -m report page|doctor|live RUN`, `... compare RUN...`; `... FOLDER` lists runs."""

import sys
from pathlib import Path

from common.errors import USER_ERROR, UserError
from common.parser import Parser, need_packages
from common.streams import exit_told
from common.text import printable
from config.layers import LATEST, latest_in_words

COMMANDS = {
    "page": "write report.html into a run's folder, from the files that are there",
    "doctor": "what happened to a run, on one screen, and what to type",
    "live": "a page on this machine that follows a run while it trains",
    "compare": "runs, or a folder of many, beside each other: tables and compare.html",
    "list": "the runs in a folder; a folder alone means this",
}


def main(arguments: list[str]) -> int:
    """Do what is asked of run folders; returns the exit status."""
    parser = Parser("python -m report", description=__doc__, allow_abbrev=False)
    kinds = "|".join(COMMANDS)
    commands = parser.add_subparsers(dest="command", required=True, metavar=kinds)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == "compare":
            command.add_argument("runs", nargs="+", type=Path)
        else:
            usual = "runs" if name == "list" else LATEST
            command.add_argument("run", nargs="?", default=usual, type=Path)
        if name == "live":
            command.add_argument("--port", type=int, default=0, help="of this machine (any free)")
    try:
        need_packages()
        if arguments and arguments[0] not in COMMANDS and arguments[0][0:1] != "-":
            if not Path(arguments[0]).is_dir():
                words = f"{arguments[0]}: no folder, and no command of {', '.join(COMMANDS)}"
                raise UserError(words, code="no-run")
            arguments = ["list", *arguments]
        given = parser.parse_args(arguments)
        if given.command == "compare":
            from report.compare import command as compare

            return compare(given.runs)
        if given.command != "list":
            given.run = latest_in_words(given.run)
        if given.command == "live":
            from report.live import command as serve

            return serve(given.run, given.port)
        if given.command == "page":
            from report.page import command as show
        elif given.command == "doctor":
            from report.doctor import command as show
        else:
            from report.runs import command as show
        return show(given.run)
    except (UserError, OSError) as error:
        print(printable(error), file=sys.stderr)
        return USER_ERROR


if __name__ == "__main__":
    exit_told(lambda: main(sys.argv[1:]))
