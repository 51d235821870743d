"""Which model of a run is released, and what led to it."""

from pathlib import Path

import pytest

from megatron_medllm.config.train import RpoConfig
from megatron_medllm.errors import UserError
from megatron_medllm.release.finished_run import FinishedRun
from tests.worlds.run import small_recipe, write_recipe


def run_with(directory: Path, *models: str, **changes: object) -> Path:
    """A run directory with a recipe and these trainings' models, of which nothing but the names is there."""
    write_recipe(small_recipe(directory, **changes), directory / "run.yaml")
    for name in models:
        (directory / name / "hf").mkdir(parents=True)
        (directory / name / "hf" / "config.json").write_text("{}")
    return directory


def test_the_last_model_of_the_recipe_is_taken(tmp_path: Path) -> None:
    assert FinishedRun.open(run_with(tmp_path / "a", "base", "cpt", "rpo")).model == "rpo"
    assert FinishedRun.open(run_with(tmp_path / "b", "base", "cpt")).model == "cpt"
    two = FinishedRun.open(run_with(tmp_path / "c", "base", "cpt", "rpo", "rpo-2", rounds=2))
    assert two.model == "rpo-2" and two.lineage() == ["base", "cpt", "rpo", "rpo-2"]
    assert two.start("rpo-2") == tmp_path / "c" / "rpo" / "hf" and two.start("base") is None
    assert [two.round_suffix(name) for name in two.lineage()] == [None, None, "", "-2"]
    with pytest.raises(UserError, match="holds no finished model"):
        FinishedRun.open(run_with(tmp_path / "d"))


def test_a_control_starts_from_what_the_last_round_did_and_has_its_own_loss(tmp_path: Path) -> None:
    models = ("base", "cpt", "rpo", "rpo-2", "rpo-sft", "rpo-dpo")
    directory = run_with(tmp_path / "a", *models, rounds=2, controls=True)
    assert FinishedRun.open(directory).model == "rpo-2"  # never a control, unless it is asked for
    found = FinishedRun.open(directory, "rpo-sft")
    assert found.lineage() == ["base", "cpt", "rpo", "rpo-sft"] and found.round_suffix("rpo-sft") == "-2"
    sft, dpo, rpo = (found.section(name) for name in ("rpo-sft", "rpo-dpo", "rpo"))
    assert isinstance(sft, RpoConfig) and isinstance(dpo, RpoConfig) and isinstance(rpo, RpoConfig)
    assert (sft.loss.kind, dpo.loss.alpha, rpo.loss.kind, rpo.loss.alpha) == ("sft", 0.0, "rpo", 1.0)


def test_a_run_that_was_moved_finds_its_files(tmp_path: Path) -> None:
    before = run_with(tmp_path / "before", "base", "cpt")
    after = before.rename(tmp_path / "after")
    found = FinishedRun.open(after)
    assert found.place(tmp_path / "before" / "world" / "a") == after / "world" / "a"
    assert found.place(tmp_path / "beforehand" / "a") == tmp_path / "beforehand" / "a"
    assert found.corpora() == {"base": after / "corpus" / "base", "medical": after / "corpus" / "medical"}
