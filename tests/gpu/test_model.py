"""The model on a real GPU: flash attention against SDPA, bf16 and FP8 layers against fp32."""

import math

import numpy as np
import pytest
import torch

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig
from megatron_medllm.models.attention import flash_varlen, padded_sdpa
from megatron_medllm.parallel import runtime
from megatron_medllm.parallel.context import ContextSplit
from megatron_medllm.parallel.packed import PackedSequences, Segment
from tests.worlds.head import relative_error
from tests.worlds.model import documents, positions_of
from tests.worlds.shapes import tiny_shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SEGMENTS = (Segment(0, 50), Segment(50, 250), Segment(250, 300, 50, 250), Segment(300, 420, 50, 250), Segment(420, 421))
SHAPE = tiny_shape(num_layers=2, hidden_size=256, ffn_hidden_size=320, vocab_size=512)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_flash_attention_equals_sdpa_on_shared_prompts(kv_heads: int):
    packed = PackedSequences.from_segments(SEGMENTS, positions_of(SEGMENTS).cuda(), backend="torch")
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(421, heads, 128, generator=generator).cuda().bfloat16() for heads in (8, kv_heads, kv_heads)]
    upstream = torch.randn(421, 8, 128, generator=generator).cuda()
    upstream[300:420] = 0  # of the second answer: its own keys must get no gradient, the prompt's must
    results = []
    for attend, dtype in ((flash_varlen, torch.bfloat16), (padded_sdpa, torch.float32)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = attend(*leaves, packed, 1 / math.sqrt(128))
        out.backward(upstream.to(dtype))
        results.append((out, *(leaf.grad for leaf in leaves)))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 0.01
    assert not results[0][2][300:420].any() and not results[0][3][300:420].any()


@pytest.mark.parametrize("rank", [0, 1])
def test_flash_attention_of_a_context_rank_is_that_of_the_whole_stream(rank: int):
    """As under context parallelism: this rank's queries, and keys and values as halves of one gathered tensor."""
    segments = (*SEGMENTS[:-1], Segment(420, 424))
    whole = PackedSequences.from_segments(segments, positions_of(segments).cuda(), backend="torch")
    split = ContextSplit(rank, 2)
    own = torch.from_numpy(split.take(np.arange(424))).cuda()
    part = PackedSequences.from_segments(segments, positions_of(segments).cuda()[own], backend="torch", split=split)
    generator = torch.Generator().manual_seed(0)
    query, both = (torch.randn(424, 8, 128, generator=generator).cuda().bfloat16() for _ in range(2))
    upstream = torch.zeros(424, 8, 128).cuda()
    upstream[own] = torch.randn(len(own), 8, 128, generator=generator).cuda()
    results = []
    for attend, dtype, packed, rows in (
        (flash_varlen, torch.bfloat16, part, own),
        (padded_sdpa, torch.float32, whole, torch.arange(424).cuda()),
    ):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (query, both)]
        out = attend(leaves[0][rows], *leaves[1].chunk(2, dim=1), packed, 1 / math.sqrt(128))
        out.backward(upstream[rows].to(dtype))
        results.append((out if len(out) < 424 else out[own], leaves[0].grad[own], leaves[1].grad))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 0.01


def test_bf16_and_fp8_models_are_near_the_fp32_one():
    from megatron_medllm.models.gpt import build_model, unwrap
    from megatron_medllm.models.initialize import initialize_weights

    here = runtime.start(LayoutConfig(), seed=0)
    try:
        ids = (torch.arange(320) * 7 % 512).cuda()
        segments = documents(100, 220)
        packed_positions = positions_of(segments).cuda()
        found = {}
        for name, dtype, fp8 in (
            ("fp32", "float32", None),
            ("bf16", "bfloat16", None),
            ("fp8", "bfloat16", "blockwise"),
        ):
            model = ModelConfig(shape=SHAPE, dtype=dtype, init_std=0.05, ffn_multiple=128)
            chunks = build_model(model, LayoutConfig(), device=here.device, fp8=fp8)
            initialize_weights(chunks, seed=1, tp_rank=0, tp_size=1)
            chunk = unwrap(chunks[0])
            packed = PackedSequences.from_segments(segments, packed_positions, backend="torch")
            logprobs, _ = chunk(
                ids[None], packed_positions[None], None, labels=ids.roll(-1)[None], packed_seq_params=packed
            )
            logprobs.sum().backward()
            gradient = chunk.decoder.layers[0].mlp.linear_fc1.weight.grad
            assert not gradient.view(2, 384, 256)[:, 320:].any()
            found[name] = (logprobs.detach(), gradient)
        for name, limit in (("bf16", (0.01, 0.03)), ("fp8", (0.06, 0.25))):
            for value, expected, most in zip(found[name], found["fp32"], limit, strict=True):
                assert 0 < relative_error(value, expected) < most, name
    finally:
        runtime.stop()


def test_random_weights_are_drawn_on_the_gpu():
    """The same in any layout, and of the configured spread."""
    from megatron_medllm.models.gpt import build_model, global_parameters, unwrap
    from megatron_medllm.models.initialize import initialize_weights

    here = runtime.start(LayoutConfig(), seed=0)
    try:
        model = ModelConfig(shape=SHAPE, dtype="bfloat16", init_std=0.05)
        drawn = []
        for device in (here.device, torch.device("cpu")):  # a base to be quantized stays on the CPU
            chunks = build_model(model, LayoutConfig(), device=device)
            initialize_weights(chunks, seed=1, tp_rank=0, tp_size=1, device=here.device)
            drawn.append({name: p.detach().cpu() for name, p in global_parameters(unwrap(chunks[0]))})
        assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
        assert abs(drawn[0]["decoder.layers.0.mlp.linear_fc1.weight"].float().std().item() - 0.05) < 0.002
    finally:
        runtime.stop()
