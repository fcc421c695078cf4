"""The rows of a sweep file: further flags of train.py, one line per run.

Standard library only. For the job: `python launch/sweep.py FILE N` prints the words of row N, one
a line, and a last line with a dot, so that an empty last word is not lost.
"""

import shlex
import sys
from pathlib import Path


def read_rows(path: Path) -> dict[int, list[str]]:
    """Line -> its words, a row each; blank lines and lines that start with # do not count.

    Quotes keep blanks together, as in a shell; nothing is expanded and nothing is run. ValueError
    names the line whose quotes do not close, or that holds a control character.
    """
    rows = {}
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")  # editors on Windows begin a file with a mark
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: is not UTF-8; save the file as UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):  # as an editor counts
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if any(c < " " and c != "\t" for c in line):
            raise ValueError(f"{path}, line {number}: holds a control character")
        try:
            rows[number] = shlex.split(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}: {line}") from None
    return rows


def main(argv: list[str]) -> int:
    if len(argv) != 2 or not argv[1].isdecimal():
        print("sweep.py FILE ROW", file=sys.stderr)
        return 2
    path, number = Path(argv[0]), int(argv[1])
    try:
        rows = list(read_rows(path).values())
    except (OSError, ValueError) as error:
        print(f"lockstep: {error}", file=sys.stderr)
        return 2
    if number >= len(rows):
        known = f"rows 0 to {len(rows) - 1}" if rows else "no rows"
        print(f"lockstep: {path} has {known}, none for array task {number}", file=sys.stderr)
        return 2
    print("\n".join([*rows[number], "."]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
