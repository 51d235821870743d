"""Five steps of CPT, then five of RPO from their result: Qwen3, and YaRN in both families, beside transformers."""

import json
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from megatron_medllm.checkpoint.verify import compare_checkpoints
from megatron_medllm.config.corpus import CorpusConfig
from megatron_medllm.corpus.build import build
from megatron_medllm.train.loop import train
from megatron_medllm.train.scoring import score
from tests.worlds.pairs import random_pairs, rpo_settings, write_model, write_pairs
from tests.worlds.run import metrics, run_config

PAIRS = random_pairs(8, seed=4)
# A short first context, so that these documents lie beyond it.
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "qwen3": {"family": "qwen3", "head_dim": 16},  # hidden_size / heads is 8
    "qwen2 yarn": {"rope_parameters": YARN},
    "qwen3 yarn": {"family": "qwen3", "head_dim": 16, "rope_parameters": YARN},
}


@pytest.mark.parametrize("name", MODELS)
def test_five_steps_of_cpt_and_five_of_rpo(tmp_path: Path, name: str):
    start = write_model(tmp_path / "start", seed=3, **MODELS[name])
    texts = [f"{pair['prompt']}{pair['chosen']} {pair['rejected']}" for pair in random_pairs(120, seed=1)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = {"words": {"paths": str(tmp_path / "words.jsonl")}}
    build(CorpusConfig(sources=words, tokenizer=str(start), eod_id=0), tmp_path / "corpus", workers=1)
    training = {
        "data": [{"path": str(tmp_path / "corpus")}],
        "train_tokens": 5 * 8 * 64,
        "sequence_length": 64,
        "global_batch_size": 8,
        "optimizer": {"lr": 1e-2, "warmup_ratio": 0.0},
    }
    model = {"path": str(start), "dtype": "float32"}
    assert train(run_config({"run_dir": str(tmp_path / "run"), "seed": 2, "model": model, "cpt": training})) == 0
    losses = metrics(tmp_path / "run" / "cpt")
    assert len(losses) == 5 and losses[-1] < losses[0]
    trained = tmp_path / "run" / "cpt" / "hf"
    assert_config_is_kept(start, trained)
    check_export(tmp_path / "run" / "cpt", tmp_path)

    pairs = write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    run = run_config(rpo_settings(trained, pairs, tmp_path / "rpo", epochs=5))
    table = parquet.read_table(score(run) / "part-00000.parquet")
    for side in ("chosen", "rejected"):
        ours = dict(zip(table["row"].to_pylist(), table[f"{side}_logprob"].to_pylist(), strict=True))
        assert [ours[row] for row in range(len(PAIRS))] == pytest.approx(logprobs(trained, side), rel=1e-5)
    assert train(run) == 0
    losses = metrics(tmp_path / "rpo" / "rpo")
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert_config_is_kept(start, tmp_path / "rpo" / "rpo" / "hf")
    check_export(tmp_path / "rpo" / "rpo", tmp_path)


def assert_config_is_kept(start: Path, exported: Path) -> None:
    """What decides the computation, through transformers' eyes."""
    before, after = (AutoModelForCausalLM.from_pretrained(path).config for path in (start, exported))
    assert type(after) is type(before)
    for key in ("head_dim", "rope_parameters", "rms_norm_eps", "num_key_value_heads", "max_position_embeddings"):
        assert getattr(after, key, None) == getattr(before, key, None), key


def check_export(stage: Path, place: Path) -> None:
    """The newest checkpoint and the exported directory are the same model."""
    prompts = place / "prompts.jsonl"
    prompts.write_text(json.dumps({"ids": [(7 * n) % 96 for n in range(60)]}) + "\n")
    newest = sorted((stage / "checkpoints").iterdir())[-1]
    result = compare_checkpoints(newest, stage / "hf", prompts, new_tokens=4)
    assert result.agree, result.lines()


@torch.no_grad()
def logprobs(directory: Path, side: str) -> list[float]:
    """Sum over each answer's tokens and its end token, by transformers in float64."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    sums = []
    for pair in PAIRS:
        prompt, answer = tokenizer.encode(pair["prompt"]).ids, [*tokenizer.encode(pair[side]).ids, 0]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        sums.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item())
    return sums
