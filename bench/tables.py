"""The tables of bench/README.md, made from the numbers in bench/results.

A place for one is `<!-- bench.NAME: results/FILE.json -->`, up to the next `<!-- end -->`; what
stands between is replaced by the line of where and when, and by what bench/NAME.py makes of the
numbers. Without --write the page is only compared; exit status 1 if it differs.
"""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent / "README.md"
PLACE = re.compile(r"(<!-- bench\.(\w+): (results/[\w./-]+\.json) -->\n).*?(<!-- end -->)", re.S)


def made(place: re.Match) -> str:
    """The place with its table as the numbers are now."""
    begin, module, file, end = place.groups()
    content = json.loads((PAGE.parent / file).read_text(encoding="utf-8"))
    told = content["machine"]
    where = f"`{content['command']}`, {told['date']}, {told['device']}, torch {told['torch']}:"
    table = importlib.import_module(f"bench.{module}").markdown(content["results"])
    return f"{begin}\n{where}\n\n{table}\n\n{end}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the tables into the page")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    new = PLACE.sub(made, page)
    if arguments.write:
        PAGE.write_text(new, encoding="utf-8")
    elif new != page:
        print(f"{PAGE.name} is not what the results say; python -m bench.tables --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
