"""What users named is printed as they named it, and a wrong input is one line and exit status 2."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from megatron_medllm.cli import app
from megatron_medllm.config.run import load
from megatron_medllm.errors import UserError
from megatron_medllm.evaluation.run_report.build import table
from megatron_medllm.progress import progress
from megatron_medllm.recipe.runner import run_pipeline

NAMES = ["model[red]x", "[/tmp]", "a[/]b", "[bold]", "\\[x]", "日本[link=x]語"]


@pytest.mark.parametrize("name", NAMES)
def test_an_error_is_printed_as_text_and_ends_with_status_2(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / f"x{name}y" / "recipe.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("run_dir: x\nmodel: {size: mini}\n")
    command = [sys.executable, "-m", "megatron_medllm", "train", str(recipe), "stage=ctp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "40"})
    assert done.returncode == 2, done.stderr
    assert str(recipe) in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert not done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_error_that_main_catches(name: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fail() -> None:
        raise UserError(f"{name}: no such file")

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {name}: no such file\n"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a\nb\r\nc\u2028d", "a b c d"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("half \udc80", "half \\udc80"),
        (" 肝\u3000炎 \x00", "肝\u3000炎 \\x00"),
    ],
)
def test_an_error_is_one_line_that_a_terminal_can_show(message: str, line: str) -> None:
    assert str(UserError(message)) == line


def test_names_in_what_a_pipeline_prints(tmp_path: Path) -> None:
    """A stage that fails, run and corpus named in brackets, and a folder too."""
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "tokenizer.json").write_text("{}")
    corpus = {
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "eod_id": 0,
        "sources": {"s": {"paths": [str(tmp_path / "t.jsonl")]}},
    }
    settings = {"name": "[/]x", "run_dir": str(tmp_path / "[red]run"), "model": {"path": str(tmp_path)}}
    recipe.write_text(yaml.safe_dump({**settings, "tokenizer": "t", "corpora": {"a[red]b": corpus}}))
    console = Console(file=io.StringIO(), width=500)
    assert run_pipeline(load(recipe, []), console=console) == 2
    printed = console.file.getvalue()
    assert "stage corpus-a[red]b failed (exit status 2)" in printed and f"{tmp_path}/[red]run/" in printed


@pytest.mark.parametrize("name", NAMES)
def test_names_in_progress_bars_and_tables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDLLM_PROGRESS_FILE", raising=False)
    drawn = io.StringIO()
    monkeypatch.setattr(sys, "stderr", drawn)
    with progress(name, total=1) as bar:
        bar.update(1, name)
    assert drawn.getvalue().count(name) == 2
    summary = {
        "name": name,
        "questions": 1,
        "effect": {"headline": name, "checks": []},
        "credit": None,
        "invented": False,
        "at_chance": False,
        "models": {"a": {"label": name, "answer_only": None, "explained": None, "gap": None}},
    }
    console = Console(file=io.StringIO(), width=200)
    console.print(table(summary))
    assert console.file.getvalue().count(name) == 3
