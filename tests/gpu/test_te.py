"""The Transformer Engine backend on a real GPU: the torch backend's numbers, forward and backward, and its FP8."""

import pytest
import torch
from torch import Tensor

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig
from megatron_medllm.models.gpt import build_model, global_parameters, unwrap
from megatron_medllm.models.initialize import initialize_weights
from megatron_medllm.parallel import runtime
from megatron_medllm.parallel.packed import PackedSequences
from tests.worlds.head import relative_error
from tests.worlds.model import documents, positions_of
from tests.worlds.shapes import tiny_shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = tiny_shape(num_layers=2, hidden_size=512, ffn_hidden_size=768, vocab_size=512)


def run(backend: str, device: torch.device, *, fp8: str | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of two packed documents, and the gradient of every parameter under its global name."""
    model = ModelConfig(shape=SHAPE, dtype="bfloat16", init_std=0.05, backend=backend)
    chunks = build_model(model, LayoutConfig(), device=device, fp8=fp8)
    initialize_weights(chunks, seed=1, tp_rank=0, tp_size=1)
    segments = documents(100, 220)
    positions = positions_of(segments).cuda()
    ids = (torch.arange(320) * 7 % 512).cuda()
    packed = PackedSequences.from_segments(segments, positions, backend=backend)
    logprobs, _ = chunks[0](ids[None], positions[None], None, labels=ids.roll(-1)[None], packed_seq_params=packed)
    logprobs.sum().backward()
    gradients = {name: p.grad for name, p in global_parameters(unwrap(chunks[0])) if p.grad is not None}
    return logprobs.detach(), gradients


def canonical(name: str) -> str:
    """Transformer Engine fuses each norm into the linear behind it, and names it so."""
    return name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
        "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
    )


def test_te_gives_the_torch_backends_numbers() -> None:
    pytest.importorskip("transformer_engine.pytorch")
    here = runtime.start(LayoutConfig(), seed=0)
    try:
        expected, expected_gradients = run("torch", here.device)
        found, gradients = run("te", here.device)
        assert relative_error(found, expected) < 0.01
        renamed = {canonical(name): gradient for name, gradient in gradients.items()}
        assert renamed.keys() == expected_gradients.keys()
        for name, gradient in renamed.items():
            assert relative_error(gradient, expected_gradients[name]) < 0.05, name
    finally:
        runtime.stop()


@pytest.mark.parametrize("recipe", ["blockwise", "delayed", "tensorwise"])
def test_te_in_fp8_is_near_bf16(recipe: str) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    here = runtime.start(LayoutConfig(), seed=0)
    try:
        expected, _ = run("te", here.device)
        found, _ = run("te", here.device, fp8=recipe)
        assert 0 < relative_error(found, expected) < 0.1
    finally:
        runtime.stop()
