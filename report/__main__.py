"""`python -m report page RUN` makes a run's page again; `... doctor RUN` tells what happened."""

import sys
from pathlib import Path

from common.parser import Parser
from common.text import printable
from errors import USER_ERROR, UserError


def main(arguments: list[str]) -> int:
    """`page` or `doctor` for a run folder; returns the exit status."""
    parser = Parser("python -m report", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="page|doctor")
    for name, summary in (
        ("page", "write report.html into a run's folder, from the files that are there"),
        ("doctor", "what happened to a run, on one screen, and what to type"),
    ):
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.add_argument("run", nargs="?", default="runs/latest", type=Path)
    try:
        given = parser.parse_args(arguments)
        if given.command == "page":
            from report.page import command as show
        else:
            from report.doctor import command as show
        return show(given.run)
    except (UserError, OSError) as error:
        print(printable(error), file=sys.stderr)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
