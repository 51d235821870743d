"""Planned activation bytes against what autograd really saves in a forward pass of the real model."""

import numpy as np
import pytest
import torch

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig, ModelShape
from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.planner.activations import head_gradient_bytes
from megatron_medllm.planner.memory import activation_bytes
from megatron_medllm.planner.workload import LORA_TARGETS, Mode, Workload
from tests.worlds.shapes import tiny_shape

SHAPE = tiny_shape(hidden_size=256, num_attention_heads=8, ffn_hidden_size=704, vocab_size=1024, tie_embeddings=False)
QWEN3 = tiny_shape(
    hidden_size=256, num_attention_heads=8, ffn_hidden_size=704, vocab_size=1024, tie_embeddings=False, family="qwen3",
    head_dim=64,
)  # fmt: skip
TOKENS = 512


def saved_bytes(shape: ModelShape, layout: LayoutConfig, *, dtype: str, lora_targets: tuple[str, ...]) -> int:
    """Bytes of the distinct storages, parameters apart, that the forward pass packs for its backward pass."""
    from megatron_medllm.data.microbatch import MicroBatch
    from megatron_medllm.models.adapters import add_adapters
    from megatron_medllm.models.gpt import build_model, unwrap
    from megatron_medllm.models.initialize import initialize_weights
    from megatron_medllm.parallel import runtime
    from megatron_medllm.parallel.packed import Segment

    ranks = runtime.start(layout, seed=1)
    try:
        chunks = build_model(ModelConfig(shape=shape, dtype=dtype), layout, device=ranks.device)
        initialize_weights(chunks, seed=1, tp_rank=0, tp_size=1)
        if lora_targets:
            config = AdapterConfig(rank=16, targets=lora_targets)
            add_adapters([unwrap(chunk) for chunk in chunks], config, seed=2, tp_rank=0, tp_size=1)
        parameters = {p.untyped_storage().data_ptr() for p in chunks[0].parameters()}
        kept: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            address = tensor.untyped_storage().data_ptr()
            if address not in parameters:
                kept[address] = tensor  # holding it keeps the address from being used again
            return tensor

        tokens = np.arange(TOKENS) % SHAPE.vocab_size
        batch = MicroBatch(tokens, tokens, np.arange(TOKENS), (Segment(0, TOKENS),))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            chunks[0](**batch.model_inputs(ranks.device, backend="torch", uniform_grad=-1.0))
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    finally:
        runtime.stop()


@pytest.mark.parametrize(
    ("recompute", "mode", "lora_targets"),
    [
        ("none", "full", ()),
        ("selective", "full", ()),
        ("full", "full", ()),
        ("none", "lora", LORA_TARGETS),
        ("full", "lora", LORA_TARGETS),
        ("none", "lora", ("linear_qkv", "linear_proj")),
    ],
)
@pytest.mark.parametrize("shape", [SHAPE, QWEN3], ids=["qwen2", "qwen3"])
@pytest.mark.filterwarnings("ignore::UserWarning:megatron")
def test_activations_are_what_autograd_saves(
    shape: ModelShape, recompute: str, mode: Mode, lora_targets: tuple[str, ...]
) -> None:
    layout = LayoutConfig(recompute=recompute)
    workload = Workload(
        shape=shape,
        layout=layout,
        mode=mode,
        sequence_length=TOKENS,
        global_batch_size=1,
        lora_targets=lora_targets or LORA_TARGETS,
    )
    planned = activation_bytes(workload, stage=0, on_cpu=True) + head_gradient_bytes(workload)
    assert planned == pytest.approx(saved_bytes(shape, layout, dtype="bfloat16", lora_targets=lora_targets), rel=0.05)
