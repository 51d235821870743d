from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_medllm import shipped
from megatron_medllm.cli.app import app
from megatron_medllm.errors import UserError


def test_examples_are_listed_and_copied(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["examples"])
    assert listed.exit_code == 0
    assert "laptop  " in listed.stdout and "cpt-qwen2.5-7b-1n1g-lora" in listed.stdout
    copied = CliRunner().invoke(app, ["examples", "laptop", str(tmp_path)])
    assert copied.exit_code == 0
    assert (tmp_path / "laptop.yaml").read_text() == (shipped.shipped("examples") / "laptop.yaml").read_text()


def test_a_copy_never_overwrites_and_an_unknown_example_is_named(tmp_path: Path) -> None:
    (tmp_path / "laptop.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"laptop\.yaml: exists already"):
        CliRunner().invoke(app, ["examples", "laptop", str(tmp_path)], catch_exceptions=False)
    assert (tmp_path / "laptop.yaml").read_text() == "mine"
    with pytest.raises(UserError, match="no example 'lapdog'; there are: cpt-"):
        CliRunner().invoke(app, ["examples", "lapdog"], catch_exceptions=False)


def test_a_wheels_own_files_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "megatron_medllm"
    (package / "shipped_files" / "slurm").mkdir(parents=True)
    monkeypatch.setattr(shipped, "PACKAGE", package)
    assert shipped.shipped("slurm") == package / "shipped_files" / "slurm"
    assert shipped.shipped("examples") == tmp_path / "site-packages" / "examples"
