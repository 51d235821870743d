"""Benchmarks of preference training, scoring and generation on a tiny random model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron_medllm.bench.generation import measure_generation
from megatron_medllm.bench.harness import BenchSettings
from megatron_medllm.bench.scoring import measure_scoring
from megatron_medllm.bench.synthetic import RandomTexts, SyntheticData
from megatron_medllm.bench.throughput import measure
from megatron_medllm.config.run import RunConfig, load
from megatron_medllm.data.reference import ReferenceCache
from megatron_medllm.errors import UserError
from megatron_medllm.planner.flops import model_flops_per_token, packed_flops
from megatron_medllm.planner.from_config import workload_of
from megatron_medllm.train.loop import train
from tests.worlds import shapes as tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:megatron")

SHAPE = tiny.SHAPE | {"num_layers": 2, "num_attention_heads": 2, "num_query_groups": 1, "vocab_size": 200}
SHORT = SyntheticData(prompt_length=12, response_length=8)


def recipe(directory: Path, *overrides: str) -> RunConfig:
    settings = {
        "run_dir": str(directory / "run"),
        "stage": "rpo",
        "model": {"shape": SHAPE, "dtype": "float32", "init_std": 0.2},
        "rpo": {"pairs": "none", "sequence_length": 64, "global_batch_size": 4, "optimizer": {"lr": 0.01}},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load(path, list(overrides))


def bench(directory: Path, **changes: object) -> BenchSettings:
    return BenchSettings(**{"output": directory, "warmup_steps": 1, "steps": 2, "synthetic": SHORT} | changes)


@pytest.mark.parametrize("adapter", [(), ("rpo.adapter.rank=4",)])
def test_preference_training_on_made_up_pairs(tmp_path: Path, adapter: tuple[str, ...]) -> None:
    """Nothing on its way is made up but tokens and weights: the first step's margin is checked against the cache."""
    found = json.loads(measure(recipe(tmp_path, *adapter), bench(tmp_path)).read_text())
    pairs = [json.loads(line) for line in (tmp_path / "synthetic" / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 3 * 4
    assert found["bench"] == "throughput" and found["workload"]["mode"] == ("lora" if adapter else "full")
    window = 2 * 4 / found["pairs_per_s"]
    assert found["step_time_s"]["min"] * 2 <= window * 1.0001 <= found["step_time_s"]["max"] * 2 * 1.001
    # The window's pairs are those behind the first step's four, in the run's order; each answer gets an end token.
    order = np.random.default_rng([0, 0]).permutation(12)[4:]
    words = {name: sum(len(pairs[i][name].split()) for i in order) for name in pairs[0]}
    expected = words["prompt"] - 8 + words["chosen"] + 8 + words["rejected"] + 8
    assert found["tokens_per_s"] * window == pytest.approx(expected)
    assert len(list((tmp_path / "synthetic" / "reference").glob("part-*.parquet"))) == 1
    assert found["losses"][0] != found["losses"][1]


def test_a_wrong_reference_is_refused_by_the_benchmark_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ReferenceCache.load
    monkeypatch.setattr(ReferenceCache, "load", lambda *a: {row: (c + 9, r) for row, (c, r) in whole(*a).items()})
    with pytest.raises(UserError, match="before the first update"):
        measure(recipe(tmp_path), bench(tmp_path, warmup_steps=0))


def test_scoring_counts_pairs_and_a_forward_pass_only(tmp_path: Path) -> None:
    run = recipe(tmp_path, "stage=cpt")
    found = json.loads(measure_scoring(run, bench(tmp_path, hardware="h100-sxm")).read_text())
    window = 2 * 4 / found["pairs_per_s"]
    tokens = found["tokens_per_s"] * window
    assert set(found["parts_s"]) == {"data", "forward"} and found["losses"] == [] and found["stage"] == "rpo"
    matrices = 2 * (32 * 64 + 32 * 32 + 3 * 32 * 64) + 200 * 32
    attention = 4 * 2 * 32 * 64  # forward, 2 layers, full square of the row
    per_token = 2 * matrices + attention
    assert found["flops_per_s_per_gpu"]["megatron"] * window == pytest.approx(per_token * tokens)
    assert 2 * matrices * tokens < found["flops_per_s_per_gpu"]["packed"] * window < per_token * tokens
    assert 0 < found["mfu"]["packed"] < 1


def test_generation_counts_what_the_engine_wrote(tmp_path: Path) -> None:
    run = recipe(tmp_path, "layout.tp=2")  # of training; the engine has its own
    settings = {"questions": {"data": ["none"]}, "contamination": "allow", "engine": {"batch_size": 6}}
    run = RunConfig.model_validate(run.model_dump() | {"pairs": settings | {"sampling": {"samples": 3}}})
    found = json.loads(measure_generation(run, bench(tmp_path)).read_text())
    window = 2 * 6 / found["samples_per_s"]
    assert 12 <= round(found["tokens_per_s"] * window) <= 12 * 8
    assert 12 * 6 <= round(found["prompt_tokens_per_s"] * window) <= 12 * 18
    assert found["engine"]["engine"] == "transformers" and found["world_size"] == 1
    assert found["flops_per_s_per_gpu"] == {} and found["losses"] == []
    text = (tmp_path / "generation.md").read_text()
    assert "| samples/s |" in text and "TFLOP" not in text


def test_pairs_must_fit_the_recipes_rows(tmp_path: Path) -> None:
    long = SyntheticData(prompt_length=100, response_length=100)
    with pytest.raises(UserError, match=r"up to 452 tokens, but .* is 64: lower --prompt-length or --response-length"):
        measure(recipe(tmp_path), bench(tmp_path, synthetic=long))


def test_generation_needs_questions_or_made_up_prompts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'pairs' and model\.path, or --synthetic"):
        measure_generation(recipe(tmp_path), bench(tmp_path, synthetic=None))


def test_random_weights_are_no_reference_outside_a_benchmark(tmp_path: Path, tiny_world: Path) -> None:
    run = recipe(tmp_path, f"tokenizer={tiny_world / 'world' / 'tokenizer'}")
    with pytest.raises(UserError, match="not random weights"):
        train(run)


def test_lengths_of_random_texts() -> None:
    texts = RandomTexts(50, seed=3)
    drawn = [[int(word) for word in texts.draw(10).split()] for _ in range(400)]
    lengths = [len(words) for words in drawn]
    assert (min(lengths), max(lengths)) == (5, 15) and 9.5 < np.mean(lengths) < 10.5
    numbers = {word for words in drawn for word in words}
    assert (min(numbers), max(numbers)) == (1, 49)  # 0 ends a text


def test_forward_flops_are_a_third_of_full_training(tmp_path: Path) -> None:
    workload = workload_of(recipe(tmp_path))
    assert 3 * packed_flops(workload, tokens=7, attended=11, forward_only=True) == packed_flops(
        workload, tokens=7, attended=11
    )
    assert 3 * model_flops_per_token(workload, causal=True, forward_only=True) == model_flops_per_token(
        workload, causal=True
    )


def test_weights_may_be_drawn_elsewhere_than_where_they_are(tmp_path: Path) -> None:
    """The same numbers whether the device is named or not; on a GPU machine `tests/gpu` draws there."""
    from megatron_medllm.models.gpt import build_model, global_parameters, unwrap
    from megatron_medllm.models.initialize import initialize_weights
    from megatron_medllm.parallel import runtime

    run = recipe(tmp_path)
    ranks = runtime.start(run.layout, seed=0)
    try:
        drawn = []
        for device in (None, torch.device("cpu")):
            chunks = build_model(run.model, run.layout, device=ranks.device)
            initialize_weights(chunks, seed=1, tp_rank=0, tp_size=1, device=device)
            drawn.append(dict(global_parameters(unwrap(chunks[0]))))
        assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
        assert all(parameter.isfinite().all() for parameter in drawn[0].values())
    finally:
        runtime.stop()
