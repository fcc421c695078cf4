"""The lessons 1 to 8 as notebooks, docs/lessons.ipynb and docs/lessons.zh.ipynb, made of the pages.

A script of a page becomes a cell, `python train.py` a call of fit(); what stands between
`<!-- notebook` and `-->` is for the notebook alone. Outputs are left out: the cells make them, but
where a command is only shown.
Without --write the notebooks are only compared; exit status 1 if one differs.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

from bench.measure import REPOSITORY
from report.notebook import NOT_HERE, SWITCHES

DOCS = REPOSITORY / "docs"
LAST = 8  # of the lessons that a notebook has
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n", flags=re.M | re.S)
ONLY = re.compile(r"^<!-- notebook\n(.*?)^-->\n", flags=re.M | re.S)
NEEDS_MORE = re.compile(r"cifar10|imagenet")  # a network, or a data set: shown, not run


def as_call(command: str) -> str:
    """`python train.py --flag value ...` as `name = fit(model, flag=value, ...)`."""
    given: dict[str, str] = {}
    for word in shlex.split(command)[2:]:
        if word.startswith("--"):
            given[name := word[2:].replace("-", "_")] = "True"
        elif re.fullmatch(r"[\d.]+", word):
            given[name] = word
        else:
            given[name] = json.dumps(word)
    model, own = given.pop("model"), re.search(r"\.py:(\w+)", command)
    words = [own[1] if own else model, *(f"{name}={value}" for name, value in given.items())]
    call = f"{Path(given['run_dir'].strip(chr(34))).name.replace('-', '_')} = fit("
    if len(call + ", ".join(words)) < 90:
        return f"{call}{', '.join(words)})"
    return call + "\n" + "".join(f"    {word},\n" for word in words) + ")"


def of_commands(text: str, scripts: set[str]) -> list[str]:
    """Cells for the commands of a block; those of a script are nothing: it is a cell already."""
    found = []
    for command in text.replace("\\\n", " ").splitlines():
        words = shlex.split(command)
        flags = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
        if words[1] in scripts:
            continue
        if words[1] == "train.py" and not flags & {*NOT_HERE, *SWITCHES}:
            found.append(as_call(command))
        else:
            found.append(f"!{{sys.executable}} {' '.join(command.split()[1:])}")
    return found


def cells(text: str) -> list[tuple[str, str]]:
    """(kind, source) of each cell of a page, up to the last lesson of a notebook."""
    text, scripts, found, at = text.split(f"\n## {LAST + 1}. ")[0], set(), [], 0
    shown = False  # a command that is not run; then the page's output is shown, too
    text = ONLY.sub(r"\1", text) + "\n"

    def prose(words: str) -> None:
        if words.strip():
            found.append(("markdown", words.strip()))

    for fence in FENCE.finditer(text):
        language, body = fence.groups()
        if language:
            shown = language == "sh" and bool(NEEDS_MORE.search(body))
        prose(text[at : fence.end() if shown else fence.start()])
        at = fence.end()
        if language == "python":
            scripts |= set(re.findall(r"\A# (\w+\.py)\n", body))
            found.append(("code", body.strip()))
        elif language == "sh" and not shown:
            found += [("code", cell) for cell in of_commands(body, scripts)]
    prose(text[at:])
    return found


def made(page: Path) -> str:
    """The notebook of a page, as a file."""
    book = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    book["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, (kind, source) in enumerate(cells(page.read_text(encoding="utf-8"))):
        if kind == "markdown":  # what comes after the last lesson is on the page
            source = source.replace("](#", f"]({page.name}#")
        cell: dict = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        cell |= {"execution_count": None, "outputs": []} if kind == "code" else {}
        book["cells"].append(cell | {"source": source.splitlines(keepends=True)})
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the notebooks")
    arguments, status = parser.parse_args(), 0
    for page in (DOCS / "lessons.md", DOCS / "lessons.zh.md"):
        notebook, new = page.with_suffix(".ipynb"), made(page)
        if arguments.write:
            notebook.write_text(new, encoding="utf-8")
        elif not notebook.is_file() or notebook.read_text(encoding="utf-8") != new:
            print(f"{notebook}: not what the lessons say; type python -m bench.notebook --write")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
