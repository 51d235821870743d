"""Weights survive every layout: HF -> layout -> HF, layout -> checkpoint -> HF, checkpoint -> layout -> HF, bitwise.

One launch of four processes walks all layouts with a tied and an untied model, and two of them with a Qwen3. Tensor-parallel layouts without a
pipeline are also held against transformers' logits, since a wrong cut could undo itself on the way back.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_medllm.checkpoint.convert import import_hf
from megatron_medllm.config.model import ModelShape
from tests.dist.conversion_ranks import CASES
from tests.worlds.ranks import run_ranks
from tests.worlds.model_dir import write_twin
from tests.worlds.shapes import tiny_shape

SHAPE = tiny_shape(num_attention_heads=8, ffn_hidden_size=48, vocab_size=307, tie_embeddings=False)  # padded to 384, 512 and more


@pytest.mark.timeout(500)
def test_every_layout_reads_and_writes_the_same_weights(tmp_path: Path):
    qwen3 = {"family": "qwen3", "head_dim": 12}  # hidden_size / heads is 4
    models = {"untied": {"tie_embeddings": False}, "tied": {"tie_embeddings": True}, "qwen3": qwen3}
    for name, changes in models.items():
        shape = SHAPE.model_copy(update=changes | {"num_layers": 8})
        hf_dir = write_twin(tmp_path / name, shape, dtype=torch.float32)
        import_hf(hf_dir, tmp_path / f"{name}_ckpt", chunk_bytes=3000)
        with torch.no_grad():
            reference = AutoModelForCausalLM.from_pretrained(hf_dir)(torch.arange(40)[None]).logits[0]
        torch.save(reference.float(), tmp_path / f"{name}.logits.pt")
    run_ranks(4, "tests.dist.conversion_ranks", str(tmp_path), timeout_s=450, runtimes=len(CASES))
