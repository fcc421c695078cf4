"""The documents are tests: links lead somewhere, commands parse, the twelve-line model trains."""

import re
import shlex

import pytest
from launches import REPOSITORY, train

from config import parse

PAGES = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
PAGES += [*(REPOSITORY / "launch").glob("*.md"), *(REPOSITORY / "bench").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_relative_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links {target}"


def commands(page):
    text = page.read_text(encoding="utf-8")
    code = re.findall(r"```sh\n(.*?)```", text, flags=re.S) + re.findall(r"`([^`\n]+)`", text)
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        found = re.search(r"train\.py (--?.*)$", line.split("  #")[0])
        if found and "..." not in line and not re.search(r"--\s|\bNAME\b", found[1]):
            yield found[1].split(" && ")[0].split(" > ")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_train_command_parses(page, tmp_path, monkeypatch, nets):
    monkeypatch.chdir(tmp_path)
    for name in ("my_net.py", "net.py"):
        (tmp_path / name).write_text("from torch import nn\nclass MyNet(nn.Module): pass\n")
    for flags in commands(page):
        words = [w for w in shlex.split(flags) if w not in ("&&", "pytest")]
        if "--resume" in words or "--config" in words:
            continue  # they need a run or a file that the reader makes first
        if not {"--help", "--version"} & set(words):
            parse(words)


@pytest.mark.slow
def test_the_twelve_line_model_of_the_page_trains(tmp_path):
    page = (REPOSITORY / "docs" / "adding_a_model.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n# my_net.py\n(.*?)```", page, flags=re.S)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    (tmp_path / "my_net.py").write_text(code)
    command = re.search(r"```sh\npython train.py (.*?)\n```", page)[1]
    done = train([*command.split(), "--run-dir", "mine"], tmp_path)
    assert done.status == 0, done.out
    assert float(re.search(r"last +([\d.]+) %", done.out)[1]) > 80


def test_the_map_in_the_readme_names_every_file_and_folder():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for path in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*/")]:
        name = path.name + "/" if path.is_dir() else path.name
        if name.startswith((".", "__")) or name in ("runs/", "tests/", "wandb/", "errors.py"):
            continue
        if path.is_dir() and not any(path.glob("*.py")) and name not in ("launch/", "docs/"):
            continue
        assert f"`{name}`" in readme, f"the README does not name {name}"
