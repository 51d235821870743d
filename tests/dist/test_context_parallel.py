"""Continued pretraining over context-parallel ranks is that of one process: losses, work, validation, checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
from tests.worlds.run import cpt_settings, metrics, run_config, write_recipe

from megatron_medllm.train.loop import train
from tests.worlds.ranks import run_ranks

STEPS = {"train_tokens": 10 * 8 * 64, "checkpoint": {"every_steps": 5, "keep": 10}}
TWO_RANKS = {"cp2": {"cp": 2}}
FOUR_RANKS = {
    "tp2-cp2-sp": {"tp": 2, "cp": 2, "sp": True, "recompute": "full"},
    "cp2-pp2": {"cp": 2, "pp": 2},
    "dp2-cp2": {"dp": 2, "cp": 2, "recompute": "selective"},
}
LAYOUTS = TWO_RANKS | FOUR_RANKS


@pytest.fixture(scope="module")
def directory(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps in one process and in every layout."""
    place = tmp_path_factory.mktemp("context")
    for world_size, layouts in ((2, TWO_RANKS), (4, FOUR_RANKS)):
        recipes = [
            write_recipe(
                cpt_settings(tiny_world, place / name, layout=layout, cpt=STEPS, kernels={"copies": "ahead"}),
                place / name / "recipe.yaml",
            )
            for name, layout in layouts.items()
        ]
        run_ranks(world_size, "tests.dist.train_ranks", *map(str, recipes), timeout_s=300, runtimes=len(recipes))
    assert train(run_config(cpt_settings(tiny_world, place / "one", cpt=STEPS))) == 0
    return place


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_is_that_of_one_process(directory: Path, name: str) -> None:
    one, found = directory / "one" / "cpt", directory / name / "cpt"
    assert len(metrics(one)) == 10
    for metric, tolerance in (("loss", 2e-6), ("grad_norm", 1e-5), ("validation_loss", 2e-6)):
        assert metrics(found, metric) == pytest.approx(metrics(one, metric), rel=tolerance), metric
    assert metrics(one, "tokens") == [8 * 64] * 10
    for metric in ("tokens", "counted_tokens", "attended"):
        assert metrics(found, metric) == metrics(one, metric), metric
    assert (found / "ledger.jsonl").read_bytes() == (one / "ledger.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["cp2", "tp2-cp2-sp"])
def test_one_process_goes_on_from_a_checkpoint(directory: Path, tiny_world: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(directory / name / "cpt", tmp_path / "cpt")
    shutil.rmtree(tmp_path / "cpt" / "checkpoints" / "step-00000010")
    assert train(run_config(cpt_settings(tiny_world, tmp_path, cpt=STEPS))) == 0
    whole, resumed = metrics(directory / "one" / "cpt"), metrics(tmp_path / "cpt")
    assert resumed[:5] == metrics(directory / name / "cpt")[:5]
    assert resumed == pytest.approx(whole, rel=2e-6)
    assert resumed[5:] != metrics(directory / name / "cpt")[5:], "the run was not resumed"
    rows = [json.loads(line)["step"] for line in (tmp_path / "cpt" / "ledger.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 11))
