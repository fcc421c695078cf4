"""The tables of README.md and bench/README.md, made from the numbers in bench/results.

A place for one is `<!-- bench.NAME.FUNCTION: FILE.json -->`, up to the next `<!-- end -->`; what
stands between is replaced by the line of where and when, and by what that function makes of the
numbers. Without --write the pages are only compared; exit status 1 if one differs.
"""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

from bench.measure import REPOSITORY

NAMES = ("README.md", "bench/README.md", "docs/failures.md")
PAGES = tuple(REPOSITORY / name for name in NAMES)
PLACE = re.compile(r"(<!-- bench\.(\w+)\.(\w+): ([\w./-]+\.json) -->\n).*?(<!-- end -->)", re.S)


def made(page: Path) -> str:
    """The page with its tables as the numbers are now."""

    def table(place: re.Match) -> str:
        begin, module, function, file, end = place.groups()
        content = json.loads((page.parent / file).read_text(encoding="utf-8"))
        about, make = (
            content["machine"],
            getattr(importlib.import_module(f"bench.{module}"), function),
        )
        where = (
            f"`{content['command']}`, {about['date']}, {about['device']}, torch {about['torch']}:"
        )
        return f"{begin}\n{where}\n\n{make(content['results'])}\n\n{end}"

    return PLACE.sub(table, page.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the tables into the pages")
    arguments = parser.parse_args()
    status = 0
    for page in PAGES:
        new = made(page)
        if arguments.write:
            page.write_text(new, encoding="utf-8")
        elif new != page.read_text(encoding="utf-8"):
            print(f"{page}: not what the results say; type python -m bench.tables --write")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
