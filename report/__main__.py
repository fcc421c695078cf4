"""`python -m report page|doctor|live RUN`: its page, what happened, a page that follows it."""

import sys
from pathlib import Path

from common.parser import Parser
from common.text import printable
from errors import USER_ERROR, UserError


def main(arguments: list[str]) -> int:
    """`page`, `doctor` or `live` for a run folder; returns the exit status."""
    parser = Parser("python -m report", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="page|doctor|live")
    for name, summary in (
        ("page", "write report.html into a run's folder, from the files that are there"),
        ("doctor", "what happened to a run, on one screen, and what to type"),
        ("live", "a page on this machine that follows a run while it trains"),
    ):
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.add_argument("run", nargs="?", default="runs/latest", type=Path)
        if name == "live":
            command.add_argument("--port", type=int, default=0, help="of this machine (any free)")
    try:
        given = parser.parse_args(arguments)
        if given.command == "live":
            from report.live import command as serve

            return serve(given.run, given.port)
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
