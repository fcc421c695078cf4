"""`python -m config FLAGS`: each value and where it comes from; `--json` first, for scripts."""

import json
import shlex
import sys
from dataclasses import asdict

from common.streams import exit_told
from config import own_disks, parse_or_exit, to_json


def main(arguments: list[str]) -> int:
    """The exit status; what was asked for is on the screen."""
    as_json = arguments[:1] == ["--json"]  # before the flags, so none can be mistaken
    shown = parse_or_exit(arguments[1:] if as_json else arguments)
    if shown.refused:
        return 2
    if shown.rows is not None:
        content = shown.rows.content()
        lines = [shlex.join(["python", "train.py", *row["words"]]) for row in content["rows"]]
        print(json.dumps(content) if as_json else "\n".join(lines))
        return 0
    if as_json:
        content = json.loads(to_json(shown))
        print(json.dumps({**content, "own_disks": own_disks(shown.config)}, indent=2))
        return 0
    for key, value in asdict(shown.config).items():
        print(f"{key:18} {value!s:24} {shown.origin(key)}")
    return 0


if __name__ == "__main__":
    exit_told(lambda: main(sys.argv[1:]))
