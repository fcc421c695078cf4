"""The Chinese documents say what the English ones say: the same headings, blocks, code, numbers."""

import ast
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from launches import REPOSITORY

PAIRS = [
    (page.with_name(page.name.replace(".zh.md", ".md")), page)
    for page in sorted([*REPOSITORY.glob("*.zh.md"), *(REPOSITORY / "docs").glob("*.zh.md")])
    if page.name != "lessons.zh.md"  # tests/test_lessons.py
]
CODE = re.compile(r"(`+)(.+?)\1")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HAN = "\u4e00-\u9fff"
BIG = {"million": 10**6, "billion": 10**9, "万": 10**4, "亿": 10**8}  # 700 million, 7 亿
# What may be in another language inside a fence: a comment, and the right column of a listing.
REMARK = re.compile(r"(?:^\s*|(?<=\S)\s+)# .*$|(?<=[^\s│]) {4,}[^\s│].*$")


@dataclass
class Block:
    """A heading, a fence, a table, an item of a list, or a paragraph (text)."""

    line: int
    kind: str
    text: str


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    open_, fence = False, ""  # does the next line belong to the last block?
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        begins = None
        if fence:
            found[-1].text += "\n" + line
            fence = "" if line.strip() == fence else fence
        elif begin := re.match(r"\s*(```+)(\w*)$", line):
            fence, begins = begin[1], f"fence of {begin[2] or 'text'}"
        elif not line.strip() or line.startswith("<!--"):
            open_ = False
        elif heading := re.match(r"(#+) ", line):
            begins = f"heading of level {len(heading[1])}"
        elif line.startswith("|"):
            begins = None if open_ and found[-1].kind == "table" else "table"
        elif re.match(r"\s*([-*]|\d+\.) ", line):
            begins = "item"
        elif not open_ and line.startswith("    "):
            begins = "indented code"
        elif not open_ or found[-1].kind == "table":
            begins = "text"
        if begins:
            found.append(Block(number, begins, line))
            open_ = begins in ("table", "item", "text", "indented code")
        elif open_ and not fence and line.strip():
            found[-1].text += "\n" + line
    return found


def numbers(text: str) -> Counter[str]:
    """Every number in digits; 1,797 is 1797, and 700 million is 7 亿."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    found = re.findall(r"(\d+(?:\.\d+)*) ?(million|billion|万|亿)?", text)
    return Counter(f"{float(n) * BIG[unit]:.0f}" if unit else n for n, unit in found)


def facts(text: str) -> dict[str, Counter[str]]:
    """What both languages must have in a paragraph, an item, a cell."""
    text = " ".join(text.split())
    text = re.sub(r"^\d+\. ", "", text)  # the number of an item
    code = Counter(" ".join(c.split()) for _, c in CODE.findall(text))
    prose = CODE.sub(" ", text)
    return {
        "code": code,
        "numbers": numbers(LINK.sub("]", prose)),
        "links": Counter(re.sub("#.*", "#", target) for target in LINK.findall(prose)),
        "bold": Counter({"**": prose.count("**")}),
    }


def unlike(mine: dict[str, Counter[str]], theirs: dict[str, Counter[str]]) -> str:
    told = []
    for kind in mine:
        for side, more in (("English", mine[kind] - theirs[kind]),
                           ("Chinese", theirs[kind] - mine[kind])):  # fmt: skip
            if more:
                told.append(f"{kind} in the {side} only: {', '.join(sorted(more.elements()))}")
    return "; ".join(told)


def cells(row: str) -> list[str]:
    return re.split(r"(?<!\\)\|", row.strip().strip("|"))


def in_chinese(page: Path, target: str) -> str:
    """Where a Chinese page links in the place of this link: to the twin, where there is one."""
    twin = target.replace(".md", ".zh.md")
    file = (page.parent / twin.partition("#")[0]).is_file()
    return twin if file and not target.endswith((".zh.md", ".zh.md#")) else target


def differences(english: Path, chinese: Path) -> list[str]:
    """Each with file and line in both; nothing where the pages say the same."""
    told, here, there = [], blocks(english), blocks(chinese)

    def tell(a: Block, b: Block, what: str) -> None:
        told.append(f"{english.name}:{a.line} and {chinese.name}:{b.line}: {what}")

    for a, b in zip(here, there, strict=False):
        if a.kind != b.kind:
            tell(a, b, f"here the {a.kind} {a.text[:60]!r}, there the {b.kind} {b.text[:60]!r}")
            return told  # what follows is out of step
    if len(here) != len(there):
        tell(here[-1], there[-1], f"{len(here)} blocks (headings, paragraphs...), {len(there)}")

    for a, b in zip(here, there, strict=False):
        if a.kind.startswith("fence") or a.kind == "indented code":
            mine, theirs = a.text.splitlines(), b.text.splitlines()
            if len(mine) != len(theirs):
                tell(a, b, f"{len(mine)} and {len(theirs)} lines of code")
            for one, other in zip(mine, theirs, strict=False):
                if REMARK.sub("", one) != REMARK.sub("", other):
                    tell(a, b, f"{one!r} is not {other!r}")
                rest = [numbers("".join(REMARK.findall(line))) for line in (one, other)]
                if rest[0] != rest[1] or bool(REMARK.search(one)) != bool(REMARK.search(other)):
                    tell(a, b, f"the remarks of {one!r} and {other!r} differ")
        elif a.kind == "table":
            mine, theirs = a.text.splitlines(), b.text.splitlines()
            if len(mine) != len(theirs):
                tell(a, b, f"tables of {len(mine)} and {len(theirs)} lines")
            for place, (row, other) in enumerate(zip(mine, theirs, strict=False)):
                at = Block(a.line + place, "", ""), Block(b.line + place, "", "")
                if len(cells(row)) != len(cells(other)):
                    tell(*at, f"{len(cells(row))} and {len(cells(other))} cells")
                pairs = zip(cells(row), cells(other), strict=False)
                if what := [
                    u for one, two in pairs if (u := unlike(said(english, one), facts(two)))
                ]:
                    tell(*at, "; ".join(what))
                if what and len(mine) != len(theirs):
                    break  # a line is missing from here on
        elif (to := f"]({chinese.name})") in a.text or f"]({english.name})" in b.text:
            if to not in a.text or f"]({english.name})" not in b.text:  # the line of languages
                tell(a, b, "one page links its twin here, the other does not link back")
        elif what := unlike(said(english, a.text), facts(b.text)):
            tell(a, b, what)
    return told


def said(page: Path, text: str) -> dict[str, Counter[str]]:
    """The facts of an English text as its twin must have them."""
    found = facts(text)
    links = (in_chinese(page, target) for target in found["links"].elements())
    return found | {"links": Counter(links)}


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=lambda page: page.name)
def test_a_chinese_page_says_what_its_english_one_says(english, chinese):
    told = differences(english, chinese)
    assert not told, "\n".join(told)


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=lambda page: page.name)
def test_each_page_links_the_other_language_at_its_top(english, chinese):
    for page, other in ((english, chinese), (chinese, english)):
        first = page.read_text(encoding="utf-8").partition("\n## ")[0]
        assert f"]({other.name})" in first, f"{page.name} does not link {other.name} at its top"


def test_an_anchor_is_the_name_of_a_heading():
    for page in {page for pair in PAIRS for page in pair}:
        for target in re.findall(r"\]\(([^)\s]*#[^)\s]+)\)", page.read_text(encoding="utf-8")):
            file, _, anchor = target.partition("#")
            if "://" not in file:
                there = blocks(page.parent / file if file else page)
                names = [b.text.lstrip("# ").lower() for b in there if "heading" in b.kind]
                slugs = {re.sub(r"[^\w -]", "", name).replace(" ", "-") for name in names}
                assert anchor in slugs, f"{page.name} links {target}, which has no such heading"


@pytest.mark.parametrize("page", [chinese for _, chinese in PAIRS], ids=lambda page: page.name)
def test_a_chinese_page_is_written_in_chinese(page):
    """No English left, no half-width punctuation, nothing that a Markdown reader shows wrong."""
    for block in blocks(page):
        if "code" in block.kind or "fence" in block.kind:
            continue
        prose = LINK.sub("]", CODE.sub("", block.text))
        english = re.search("[a-z]{2,}(?: [a-z]+){3}", re.sub("“.*?”", "", prose))
        assert not english, f"{page.name}:{block.line} is not in Chinese: {english and english[0]}"
        torn = re.search(f"[{HAN}，。；：、]\n *[{HAN}]", block.text)
        assert not torn, (
            f"{page.name}:{block.line}: a line break within a sentence shows as a blank"
        )
        for mark in re.finditer(r"(\*\*?)([^*]+)\1(?=(.?))", re.sub(r"^ *\* ", "", prose)):
            stars = mark[2][-1] in "，。；：、？！”）" and mark[3].isalnum()
            assert not stars, (
                f"{page.name}:{block.line}: {mark[0]} shows as stars: 。 goes behind them"
            )
        half = re.search(f"[{HAN}][,;:?!].{{0,9}}", prose)
        assert not half, f"{page.name}:{block.line}: punctuation of half width: {half and half[0]}"


# --- what the program says about its documents ---------------------------------------------------

# Help that points to a whole document; all that is said while something goes wrong names a place.
HELP = ("config/fields.py", "models/__main__.py")
MENTION = re.compile(r"docs/([\w-]+\.md)")
PLACE = re.compile(r'(?:question (\d+)|the row "([^"]+)"|"([^"]+)") in docs/([\w-]+\.md)')


def sentences() -> list[tuple[str, str]]:
    """(file:line, text) of every string in the sources but docstrings; an f-string as a whole."""
    found = []
    for path in sorted(REPOSITORY.rglob("*.py")):
        place = path.relative_to(REPOSITORY)
        if place.parts[0] in ("tests", "bench", "build") or place.parts[0].startswith(
            (".", "venv")
        ):
            continue
        if "docs/" not in (source := path.read_text(encoding="utf-8")):
            continue
        tree = ast.parse(source)
        parts = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
        parts |= {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(v.value) for v in node.values if isinstance(v, ast.Constant))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = "" if id(node) in parts else node.value
            else:
                continue
            if MENTION.search(text):
                found.append((f"{place.as_posix()}:{node.lineno}", text))
    return found


def test_the_places_in_documents_that_the_program_names_exist_in_both_languages():
    said = sentences()
    assert len(said) >= 5
    for where, text in said:
        for name in MENTION.findall(text):
            assert (REPOSITORY / "docs" / name).is_file(), f"{where} names docs/{name}"
        if not where.startswith(HELP):
            named = {place[3] for place in PLACE.findall(text)}
            assert named == set(MENTION.findall(text)), (
                f"{where} names a document, but no place in it (question N, the row "
                f'"...", or "HEADING" in docs/...): {text}'
            )
        for question, row, heading, name in PLACE.findall(text):
            english = REPOSITORY / "docs" / name
            chinese = english.with_name(name.replace(".md", ".zh.md"))
            assert chinese.is_file(), f"{where} names {name}, which has no {chinese.name}"
            here, there = blocks(english), blocks(chinese)
            if row:  # what the program prints is the same in both
                for page, found in ((name, here), (chinese.name, there)):
                    rows = [b for b in found if b.kind == "table" and f"| `{row}` |" in b.text]
                    assert rows, f"{where} names the row {row!r}, which {page} has not"
                continue
            start = f"### {question}. " if question else f"# {heading}"
            at = [n for n, b in enumerate(here) if "heading" in b.kind and start in b.text]
            assert len(at) == 1, f"{where} names {start!r}, which {name} has {len(at)} times"
            assert at[0] < len(there) and there[at[0]].kind == here[at[0]].kind, (
                f"{where} names {start!r} of {name}: {chinese.name} has no heading there"
            )
            if question:
                assert there[at[0]].text.startswith(start), f"{chinese.name}: {there[at[0]]}"
