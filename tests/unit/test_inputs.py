"""Paths as people write them: files, folders, globs, and names that look like globs and are none."""

import os

import pytest

from megatron_medllm.errors import UserError
from megatron_medllm.inputs import find_inputs, match_files


@pytest.fixture
def tree(tmp_path):
    for name in ("in/b.jsonl", "in/a.jsonl", "in/deep/er/c.jsonl", "in/notes.md", "in/.hidden.jsonl", "run[1]/x.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "what?.jsonl").write_text("")
    (tmp_path / "run1").mkdir()
    (tmp_path / "run1" / "wrong.jsonl").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("in/*.jsonl", ["in/a.jsonl", "in/b.jsonl"]),
        ("in/[ab].jsonl", ["in/a.jsonl", "in/b.jsonl"]),
        ("in/?.jsonl", ["in/a.jsonl", "in/b.jsonl"]),
        ("*/a.jsonl", ["in/a.jsonl"]),
        ("in/**/*.jsonl", ["in/a.jsonl", "in/b.jsonl", "in/deep/er/c.jsonl"]),
        ("in/**", ["in/a.jsonl", "in/b.jsonl", "in/deep/er/c.jsonl", "in/notes.md"]),
        ("in", ["in/a.jsonl", "in/b.jsonl", "in/deep/er/c.jsonl", "in/notes.md"]),
        ("in/", ["in/a.jsonl", "in/b.jsonl", "in/deep/er/c.jsonl", "in/notes.md"]),
        ("in/*", ["in/a.jsonl", "in/b.jsonl", "in/deep/er/c.jsonl", "in/notes.md"]),
        ("in/d*", ["in/deep/er/c.jsonl"]),
        ("in/.hidden.jsonl", ["in/.hidden.jsonl"]),
        ("run[1]", ["run[1]/x.jsonl"]),
        ("run[1]/x.jsonl", ["run[1]/x.jsonl"]),
        ("run[1]/*.jsonl", ["run[1]/x.jsonl"]),
        ("what?.jsonl", ["what?.jsonl"]),
        ("in/none*", []),
        ("none/a.jsonl", []),
    ],
)
def test_a_pattern_names_its_files(tree, monkeypatch, pattern, expected):
    found = [
        os.path.relpath(path, tree) for path in match_files(tree / pattern if pattern[-1] != "/" else f"{tree}/in/")
    ]
    assert found == expected
    monkeypatch.chdir(tree)
    assert [os.path.normpath(path) for path in match_files(pattern)] == expected


def test_a_home_folder_is_opened(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree))
    assert match_files("~/in/*.md") == [f"{tree}/in/notes.md"]


def test_links_are_followed_and_circles_end(tree):
    (tree / "all").mkdir()
    (tree / "all" / "in").symlink_to(tree / "in")
    (tree / "in" / "back").symlink_to(tree / "all")
    (tree / "all" / "broken.jsonl").symlink_to(tree / "nowhere")
    names = [os.path.basename(path) for path in match_files(tree / "all", suffixes=[".jsonl"])]
    assert names == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_several_patterns_name_each_file_once_and_in_order(tree):
    found = find_inputs([f"{tree}/in/b.jsonl", f"{tree}/in/*.jsonl"], field="sources.s.paths")
    assert [os.path.basename(path) for path in found] == ["b.jsonl", "a.jsonl"]
    with pytest.raises(UserError, match=r"^sources\.s\.paths: .*/no\*\.jsonl matches no file$"):
        find_inputs([f"{tree}/in", f"{tree}/no*.jsonl"], field="sources.s.paths")
    with pytest.raises(UserError, match=r"matches no \.txt file$"):
        find_inputs([f"{tree}/in"], field="exams", suffixes=[".txt"])
