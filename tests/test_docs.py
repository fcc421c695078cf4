"""The documents are tests: links lead somewhere, commands parse, the twelve-line model trains."""

import re
import shlex
import sys

import pytest
from launches import REPOSITORY, SMALL, finish, start, train
from safetensors.torch import load_file
from test_lessons import not_printed, run_in

from config import parse
from data.__main__ import build_parser as build_data_parser

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
        if {"--resume", "--config", "--sweep"} & set(words):
            continue  # they need a run or a file that the reader makes first
        if not {"--help", "--version"} & set(words):
            parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_on_data_parses(page):
    """In exercises, too: one of a lesson named a flag that its command had not."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    code = re.findall(r"```sh\n(.*?)```", text, flags=re.S) + re.findall(r"`([^`\n]+)`", text)
    for line in "\n".join(code).splitlines():
        found = re.search(r"python -m data (\w.*)$", line.split("  #")[0])
        if found and "..." not in line and not re.search(r"[|&>]", found[1]):
            build_data_parser().parse_args(shlex.split(found[1]))


@pytest.mark.slow
def test_the_small_net_of_the_readme_prints_what_it_shows(tmp_path):
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.search(
        r"```sh\n(python train.py --model my_cnn .*)\n```\n\n```\n(.*?)```", text, re.S
    )
    done = run_in(tmp_path, found[1])
    assert done.status == 0 and not not_printed(found[2], done.out), done.out


def loop_page(name: str) -> tuple[list[str], list[list[str]]]:
    """Its blocks of Python, and the first two columns of its table."""
    text = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")]
    return re.findall(r"```python\n(.*?)```", text, flags=re.S), rows[1:]


def test_ours_on_the_page_of_the_loop_is_train_py_as_it_is():
    source = (REPOSITORY / "train.py").read_text(encoding="utf-8")
    blocks, rows = loop_page("loop.md")
    ours = [block for block in blocks if block.startswith("# train.py\n")]
    assert len(ours) == 2 and len(rows) == 18
    for block in ours:
        assert block.removeprefix("# train.py\n") in source, block
    for _, cell in rows:
        assert cell.strip("| `") in source, cell
    chinese_blocks, chinese_rows = loop_page("loop.zh.md")
    assert chinese_blocks == blocks
    assert [row[1] for row in chinese_rows] == [row[1] for row in rows]


@pytest.mark.slow
def test_the_l1_penalty_of_the_page_of_the_loop_trains(tmp_path, nets):
    [*_, penalty], _ = loop_page("loop.md")
    source = (REPOSITORY / "train.py").read_text(encoding="utf-8")
    at = "        loss = task.loss(logits, labels)  # summed over the shard\n"
    assert source.count(at) == 1
    lengths = []
    for name, more in (("without", ""), ("with", penalty.replace("1e-4", "1e-2"))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.py").write_text(source.replace(at, at + more))
        words = [sys.executable, "train.py", "--model", nets / "plain.py:Net", *SMALL]
        words += ["--epochs", "2", "--run-dir", "run"]
        done = finish(*start(words, folder, PYTHONPATH=str(REPOSITORY)))
        assert done.status == 0, done.out
        weights = load_file(folder / "run" / "last.safetensors")
        lengths.append(sum(float(tensor.abs().sum()) for tensor in weights.values()))
    assert lengths[1] < 0.8 * lengths[0], lengths


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
        if name.startswith((".", "__")) or name in ("runs/", "tests/", "wandb/"):
            continue
        if path.is_dir() and not any(path.glob("*.py")) and name not in ("launch/", "docs/"):
            continue
        assert f"`{name}`" in readme, f"the README does not name {name}"
