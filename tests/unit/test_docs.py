"""The documentation agrees with the repository: links, file names, the menu, printed tables, length of sentences."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
import yaml
from pydantic import BaseModel

from megatron_medllm.cli.app import app
from megatron_medllm.config.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
# The log names files as they were on the day of the entry.
OF_TODAY = [page for page in PAGES if page.name != "LOG.md"]
# Benchmarks give figures with their circumstances, which may take longer sentences.
GUIDES = [page for page in OF_TODAY if page.parent.name != "benchmarks"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(r"(?<![\w./{}*…-])((?:[\w-]+/)+[\w.-]+\.(?:py|md|sh|yaml|sbatch|toml))\b")
_PLACES = (ROOT, ROOT / "megatron_medllm", ROOT / "tests", DOCS, DOCS / "benchmarks")
# Names that stand for the reader's own files, other projects' and those that a run makes.
_NOT_OURS = re.compile(r"^(https?|runs|build|home|data|RUN|DIR|NAME)\b|NAME|^[A-Z_]+/")
_LONGEST_SENTENCE = 30


def prose(text: str) -> str:
    return _FENCE.sub("", text)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def sentences(text: str) -> list[str]:
    """Of a Markdown text: headings, list items, cells and paragraphs each begin a new one."""
    lines = [f"\n\n{line}\n\n" if line.startswith("#") else line for line in prose(text).splitlines()]
    lines = [re.sub(r"^([-*]|\d+\.)\s+", "\n\n", line) for line in lines]
    lines = ["\n\n".join(line.split("|")) if line.startswith("|") else line for line in lines]
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(lines))
    return [
        sentence
        for block in re.split(r"\n\s*\n", plain)
        for sentence in re.split(r"(?<=[.!?])\s+|(?<=[.!?]\*\*)\s+", " ".join(block.split()))
    ]


def too_long(text: str) -> list[str]:
    return [sentence for sentence in sentences(text) if len(sentence.split()) > _LONGEST_SENTENCE]


def dead_links(page: Path) -> list[str]:
    found = []
    for target in _LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_and_a_dead_anchor_are_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# A heading\n")
    page = tmp_path / "a.md"
    page.write_text("[x](b.md) [y](b.md#a-heading) [z](c.md) [w](b.md#another)\n```\n[code](d.md)\n```\n")
    assert dead_links(page) == ["c.md", "b.md#another"]


@pytest.mark.parametrize("page", OF_TODAY, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    named = [name for name in _PATH.findall(page.read_text(encoding="utf-8")) if not _NOT_OURS.search(name)]
    assert [name for name in named if not any((place / name).exists() for place in _PLACES)] == []


def options(command: Any, path: str = "medllm") -> Iterator[tuple[str, str]]:
    """Every option of every command."""
    for name, part in getattr(command, "commands", {}).items():
        yield from options(part, f"{path} {name}")
    for parameter in command.params:
        yield from ((path, option) for option in parameter.opts if option.startswith("--"))


def settings(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Every setting of a recipe, with the sections around it."""
    for name, field in model.model_fields.items():
        yield f"{path}{name}"
        for part in (field.annotation, *get_args(field.annotation)):
            inner = next((p for p in (part, *get_args(part)) if isinstance(p, type) and issubclass(p, BaseModel)), None)
            if inner is not None:
                yield from settings(inner, f"{path}{name}.")
                break


def test_every_option_of_every_command_is_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in GUIDES)
    found = [(command, option) for command, option in options(typer.main.get_command(app)) if option != "--help"]
    assert len(found) > 40
    assert [row for row in found if not re.search(rf"{re.escape(row[1])}\b", text)] == []


def test_every_setting_of_a_recipe_is_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in GUIDES)
    found = list(settings(RunConfig))
    assert {"eval.engine.retries", "corpora.sources.clean.nfc", "rpo.guard.max_margin"} <= set(found)
    assert sorted({name.rsplit(".")[-1] for name in found if not re.search(rf"\b{name.rsplit('.')[-1]}\b", text)}) == []


@functools.cache
def printed_by_the_package() -> str:
    """Every text in the package, with … for what is filled in; without quotes, which depend on what is filled in."""
    found = []
    for path in sorted((ROOT / "megatron_medllm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return re.sub(r"[`'\"]", "", "\n".join(" ".join(re.sub(r"%[.\w]", "…", text).split()) for text in found))


def messages(text: str) -> list[str]:
    """What the tables of a page quote in their first column as what a user sees."""
    found, inside = [], False
    for line in prose(text).splitlines():
        if not line.startswith("|"):
            inside = False
        elif re.match(r"\| (message|what you see) \|", line):
            inside = True
        elif inside:
            found += re.findall(r"`([^`]+)`", re.split(r"(?<!\\)\|", line)[1])
    return found


def unknown_parts(message: str, printed: str) -> list[str]:
    """The parts between … and numbers that the package does not print."""
    plain = re.sub(r"[`'\"]", "", message.replace("\\|", "|"))
    parts = [part.strip(" :;,.()") for part in re.split(r"…|\b\d[\d.]*\b", plain)]
    return [part for part in parts if len(part) > 8 and part not in printed]


def test_pages_quote_messages_that_the_package_prints() -> None:
    printed = printed_by_the_package()
    quoted = [(page.name, message) for page in GUIDES for message in messages(page.read_text(encoding="utf-8"))]
    assert len(quoted) > 100
    wrong = [(page, message, parts) for page, message in quoted if (parts := unknown_parts(message, printed))]
    assert [row for row in wrong if row[0] != "install.md"] == []  # those are pip's and Debian's


def test_a_message_that_nobody_prints_is_found() -> None:
    row = "| `the … engine left 3 requests unanswered`, `it broke badly` | x |"
    text = f"| what you see | what to do |\n|---|---|\n{row}\n"
    found = messages(text)
    assert found == ["the … engine left 3 requests unanswered", "it broke badly"]
    assert [unknown_parts(message, printed_by_the_package()) for message in found] == [[], ["it broke badly"]]


def lists_inside_paragraphs(text: str) -> list[str]:
    """First items of lists that follow a line of text: GitHub shows a list there, mkdocs a paragraph."""
    lines = prose(text).splitlines()
    item, continued = re.compile(r"^([-*]|\d+\.) "), re.compile(r"^ +\S")
    found, inside = [], False
    for before, line in pairwise(["", *lines]):
        if item.match(line):
            if before.strip() and not inside:
                found.append(line)
            inside = True
        elif not continued.match(line):
            inside = False
    return found


@pytest.mark.parametrize("page", OF_TODAY, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_list_and_table_is_one_on_the_site(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    after_heading = re.sub(r"^(#+ .*)$", r"\1\n", text, flags=re.MULTILINE)
    assert lists_inside_paragraphs(after_heading) == []
    assert re.findall(r"`[^`\n]*\\\|[^`\n]*`", prose(text)) == [], "mkdocs shows the backslash in code"


def test_a_list_inside_a_paragraph_is_found() -> None:
    assert lists_inside_paragraphs("Text.\n- one\n- two\n  more\n- three\n\n- four\n") == ["- one"]


def test_the_menu_names_every_page_once() -> None:
    def leaves(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        return [leaf for part in (node.values() if isinstance(node, dict) else node) for leaf in leaves(part)]

    menu = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(menu) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_sentence_is_too_long(page: Path) -> None:
    assert too_long(page.read_text(encoding="utf-8")) == []


def test_long_sentences_are_found_in_prose_lists_and_cells() -> None:
    long = "word " * 31
    text = f"Short. {long}.\n\n- {long}\n\n| cell | {long} |\n\n```\n{long}\n```\n# {'word ' * 20}\n{'word ' * 20}\n"
    assert len(too_long(text)) == 3


def test_the_readme_fits_on_three_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 3 * 40


@pytest.mark.parametrize(
    ("page", "section", "at_least"),
    [("CONTRIBUTING.md", "The reader's test", 5), ("docs/architecture.md", "Where decisions are made", 2)],
)
def test_readers_find_the_functions_that_a_page_points_to(page: str, section: str, at_least: int) -> None:
    table = (ROOT / page).read_text(encoding="utf-8").split(f"## {section}")[1].split("\n## ")[0]
    answers = re.findall(r"`([\w/]+\.py)`: `(\w+)`", table)
    assert len(answers) >= at_least
    for file, name in answers:
        source = next(place / file for place in _PLACES if (place / file).is_file()).read_text(encoding="utf-8")
        assert re.search(rf"\bdef {name}\(", source), f"{file} has no {name}"


def test_contributing_quotes_code_that_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    quoted = re.findall(r"\(`(megatron_medllm/[\w/]+\.py)`\).*?```python\n(.*?)```", text, re.DOTALL)
    assert len(quoted) == 3
    for file, code in quoted:
        source = (ROOT / file).read_text(encoding="utf-8")
        missing = [line for line in code.splitlines() if line.strip() and line not in source]
        assert missing == [], f"{file} does not hold these lines"


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the help text depends on Python's version")
def test_what_commands_print_is_what_the_pages_show() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "docs_tables.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_table_has_a_page_and_a_command_or_kind() -> None:
    tables = tomllib.loads((DOCS / "tables.toml").read_text())
    for name, table in tables.items():
        assert ("command" in table) != ("kind" in table), name
        assert f"<!-- table: {name} -->" in (ROOT / table["page"]).read_text(encoding="utf-8"), name
