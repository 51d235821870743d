"""Logits of every size's twin: Megatron-Core's model, loaded from an imported checkpoint, against transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_medllm.checkpoint.convert import import_hf
from megatron_medllm.checkpoint.verify import compare_checkpoints
from megatron_medllm.errors import UserError
from tests.worlds.model_dir import PUBLISHED, twin_shape, write_twin
from tests.worlds.running import assert_close, megatron_logits, running, transformers_logits


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"ids": [5, 300, 17, 42, 8]}\n{"ids": [1]}\n')
    return path


@pytest.mark.parametrize("size", PUBLISHED)
def test_logits_of_every_size_read_straight_from_safetensors(tmp_path: Path, size: str):
    hf_dir = write_twin(tmp_path / "hf", twin_shape(size))
    with running(hf_dir) as (chunk, _):
        assert_close(megatron_logits(chunk), transformers_logits(hf_dir))


@pytest.mark.parametrize("size", ["1.5b", "72b"])
def test_imported_checkpoint_is_the_same_model(tmp_path: Path, prompts: Path, size: str):
    hf_dir = write_twin(tmp_path / "hf", twin_shape(size))
    import_hf(hf_dir, tmp_path / "ckpt", chunk_bytes=3000)
    result = compare_checkpoints(hf_dir, tmp_path / "ckpt", prompts, new_tokens=4)
    assert result.agree
    assert result.prompts == result.same_continuations == 2
    assert result.tokens == 5 + 1 + 2 * 4
    assert result.logit_scale > 1
    assert result.lines()[0] == "same model: 2 prompts, 14 tokens"


def test_one_changed_weight_is_seen(tmp_path: Path, prompts: Path):
    hf_dir = write_twin(tmp_path / "hf", twin_shape("7b"), shards=1)
    other = write_twin(tmp_path / "other", twin_shape("7b"), shards=1)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.bias"][3] += 1.0
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    result = compare_checkpoints(hf_dir, other, prompts, new_tokens=4)
    assert not result.agree
    assert result.max_difference > result.mean_difference > 0
    assert result.lines()[0].startswith("DIFFERENT")


def test_unusable_prompts_are_named(tmp_path: Path):
    hf_dir = write_twin(tmp_path / "hf", twin_shape("7b"))
    rows = {"empty.jsonl": "", "no_key.jsonl": json.dumps({"text": "x"}), "text.txt": "心不全\n"}
    messages = {"empty.jsonl": "no prompts", "no_key.jsonl": ":1: neither", "text.txt": ":1: text, but neither"}
    for name, content in rows.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=messages[name]):
            compare_checkpoints(hf_dir, hf_dir, tmp_path / name)


def test_other_vocabulary(tmp_path: Path, prompts: Path):
    shape = twin_shape("7b")
    hf_dir = write_twin(tmp_path / "hf", shape)
    other = write_twin(tmp_path / "other", shape.model_copy(update={"vocab_size": 311}))
    with pytest.raises(UserError, match=r"vocabulary of 311, but .* has 307"):
        compare_checkpoints(hf_dir, other, prompts, new_tokens=1, dtype=torch.float32)
