"""The house rules of tests: helpers have one home, and tests use what is public."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))
PACKAGE = "megatron_medllm"


def imported(tree: ast.AST) -> list[tuple[str, str | None, str]]:
    """(module, name in it or None, the name it is bound to) of every import."""
    found: list[tuple[str, str | None, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found += [(node.module or ".", alias.name, alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, None, alias.asname or alias.name.split(".")[0]) for alias in node.names]
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_uses(tree: ast.AST) -> list[str]:
    """Private names of the package that are imported, or taken from or set on one of its modules or classes."""
    ours = {bound for module, _, bound in imported(tree) if module.split(".")[0] == PACKAGE}
    found = [
        f"{module}.{name}"
        for module, name, _ in imported(tree)
        if module.split(".")[0] == PACKAGE and any(map(is_private, [*module.split("."), name or ""]))
    ]
    for node in ast.walk(tree):
        owner, name = None, ""
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            owner, key = (*node.args, None, None)[:2]
            name = key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else ""
        if isinstance(owner, ast.Name) and owner.id in ours and is_private(name):
            found.append(f"{owner.id}.{name}")
    return found


def foreign_helpers(path: Path, tree: ast.AST) -> list[str]:
    """Test modules that are imported, and helpers of tests that live neither in tests/worlds nor in the own folder."""
    own = ".".join(path.relative_to(TESTS.parent).parent.parts)
    found = []
    for module, name, _ in imported(tree):
        root = module.split(".")[0]
        # `from tests.fuzz import surface` names a module, `from tests.fuzz.surface import fuzz` a thing in it.
        is_folder = (TESTS.parent / module.replace(".", "/")).is_dir()
        helper = f"{module}.{name}" if is_folder and name else module
        home, _, stem = helper.rpartition(".")
        if root == "tests" and (stem.startswith("test_") or home not in ("tests.worlds", own)):
            found.append(helper)
        elif (path.parent / f"{root}.py").is_file() or (TESTS / f"{root}.py").is_file():
            found.append(f"{root}, without its folder")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_imports_a_private_name_or_another_test(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not private_uses(tree)
    assert not foreign_helpers(path, tree)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from megatron_medllm.corpus.dedup import _join", ["megatron_medllm.corpus.dedup._join"]),
        ("from megatron_medllm.corpus import dedup\ndedup._join()", ["dedup._join"]),
        ("from megatron_medllm.corpus import dedup\nmonkeypatch.setattr(dedup, '_join', None)", ["dedup._join"]),
        ("from megatron_medllm import __version__\nfrom torch._dynamo import utils\nself._own()", []),
    ],
)
def test_private_names_are_seen(line: str, found: list[str]) -> None:
    assert private_uses(ast.parse(line)) == found


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from tests.unit.corpus.test_corpus_read import TEXTS", ["tests.unit.corpus.test_corpus_read"]),
        ("from tests.dist.adapter_ranks import SHAPE", ["tests.dist.adapter_ranks"]),
        ("import test_account", ["test_account, without its folder"]),
        ("from tests.worlds.run import medllm\nfrom tests.worlds import run\nimport json", []),
        ("from tests.unit.test_account import x", ["tests.unit.test_account"]),
    ],
)
def test_other_tests_are_seen(line: str, found: list[str]) -> None:
    assert foreign_helpers(Path(__file__), ast.parse(line)) == found
