"""Training on a real GPU, by the command a user types: bf16 CPT with resume and export, preference training."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.worlds.pairs import random_pairs, rpo_settings, write_model, write_pairs
from tests.worlds.run import cpt_settings, metrics, run_medllm, write_recipe
from tests.worlds.shapes import SHAPE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16 = {
    "shape": SHAPE | {"hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 512},
    "dtype": "bfloat16",
    "init_std": 0.05,
}


def train(recipe: Path) -> None:
    status, output = run_medllm("train", recipe)
    assert status == 0, output


def test_pretraining_learns_resumes_and_exports(tiny_world: Path, tmp_path: Path) -> None:
    recipe = write_recipe(cpt_settings(tiny_world, tmp_path, model=BF16), tmp_path / "recipe.yaml")
    train(recipe)
    losses = metrics(tmp_path / "cpt")
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    for row in (tmp_path / "cpt" / "metrics.jsonl").read_text().splitlines():
        assert json.loads(row).get("peak_memory_bytes", 1) > 0
    shutil.rmtree(tmp_path / "cpt" / "checkpoints" / "step-00000006")
    train(recipe)
    resumed = metrics(tmp_path / "cpt")
    assert resumed[:4] == losses[:4]
    assert resumed[4:] == pytest.approx(losses[4:], rel=1e-3)  # flash attention's backward adds in any order
    (tmp_path / "prompts.txt").write_text("次の病気の第一選択薬はどれか。\n答え:\n")
    checkpoint = tmp_path / "cpt" / "checkpoints" / "step-00000006"
    status, output = run_medllm("verify", checkpoint, tmp_path / "cpt" / "hf", "--prompts", tmp_path / "prompts.txt")
    assert status == 0, output


@pytest.mark.parametrize("adapter", [None, {"rank": 8}, {"rank": 8, "base": "fp8"}, {"rank": 8, "base": "nf4"}])
def test_preference_training_starts_at_margin_zero(adapter: dict | None, tmp_path: Path) -> None:
    if adapter and adapter.get("base") == "nf4":
        pytest.importorskip("bitsandbytes")
    model = write_model(tmp_path / "hf", hidden=256, ffn=512, std=0.05)
    pairs = write_pairs(tmp_path / "pairs.jsonl", random_pairs(40))
    optimizer = {"lr": 2e-3, "warmup_ratio": 0.0}
    settings = rpo_settings(model, pairs, tmp_path, adapter=adapter, optimizer=optimizer, epochs=4)
    settings["model"]["dtype"] = "bfloat16"
    recipe = write_recipe(settings, tmp_path / "recipe.yaml")
    status, output = run_medllm("score", recipe)
    assert status == 0, output
    train(recipe)  # asserts a margin of 0 and a loss of ln 2 before the first update
    assert metrics(tmp_path / "rpo", "chosen_reward")[-1] > 0.05
