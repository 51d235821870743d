"""The name table against transformers' own model, and the cuts that tensor parallelism makes."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_medllm.checkpoint.names import (
    HFSlice,
    hf_shape,
    hf_shapes,
    local_pieces,
    model_weights,
    stacked_name,
    weight_of_parameter,
)
from megatron_medllm.config.model import SIZES, ModelShape
from tests.worlds.model_dir import PUBLISHED, config_json, twin_shape

SMALL = ModelShape(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=6,
    vocab_size=10,
    tie_embeddings=False,
)


def weight(name: str):
    return next(w for w in model_weights(SMALL) if w.mcore == name)


@pytest.mark.parametrize("size", PUBLISHED)
def test_names_and_shapes_are_those_of_transformers(size: str):
    shape = SIZES[size].model_copy(update={"num_layers": 2})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_json(shape)))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert hf_shapes(shape) == theirs
    untied = ("7b", "14b", "32b", "72b", "qwen3-8b", "qwen3-14b", "qwen3-32b")
    assert ("lm_head.weight" in theirs) == (size in untied)


def test_a_family_has_its_own_rows_only():
    qwen3 = twin_shape("qwen3-8b")
    names = {row.mcore for row in model_weights(qwen3)}
    assert "decoder.layers.1.self_attention.k_layernorm.weight" in names
    assert not any(name.endswith("linear_qkv.bias") for name in names)
    assert weight_of_parameter("decoder.layers.0.self_attention.linear_qkv.bias", qwen3) is None
    assert weight_of_parameter("decoder.layers.0.self_attention.q_layernorm.weight", SMALL) is None
    q_norm = weight_of_parameter("decoder.layers.3.self_attention.q_layernorm.weight", qwen3)
    assert q_norm.hf == ("model.layers.3.self_attn.q_norm.weight",) and q_norm.axis is None
    assert hf_shape(q_norm.hf[0], qwen3) == (8,)


def test_qkv_is_interleaved_by_group():
    qkv = weight("decoder.layers.1.self_attention.linear_qkv.weight")
    q, k, v = (f"model.layers.1.self_attn.{p}_proj.weight" for p in "qkv")
    whole = [
        HFSlice(q, 0, 8),
        HFSlice(k, 0, 4),
        HFSlice(v, 0, 4),
        HFSlice(q, 8, 16),
        HFSlice(k, 4, 8),
        HFSlice(v, 4, 8),
    ]
    assert local_pieces(qkv, SMALL, local_size=32, tp_rank=0, tp_size=1) == whole
    assert local_pieces(qkv, SMALL, local_size=16, tp_rank=1, tp_size=2) == whole[3:]
    # More ranks than groups: Megatron cuts the interleaved rows evenly, through the middle of a group.
    assert local_pieces(qkv, SMALL, local_size=8, tp_rank=3, tp_size=4) == [HFSlice(k, 4, 8), HFSlice(v, 4, 8)]


def test_gate_and_up_are_cut_and_padded_each_on_its_own():
    fc1 = weight("decoder.layers.0.mlp.linear_fc1.weight")
    gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    assert local_pieces(fc1, SMALL, local_size=6, tp_rank=1, tp_size=2) == [HFSlice(gate, 3, 6), HFSlice(up, 3, 6)]
    assert local_pieces(fc1, SMALL, local_size=8, tp_rank=1, tp_size=2) == [
        HFSlice(gate, 4, 6),
        HFSlice(None, 0, 2),
        HFSlice(up, 4, 6),
        HFSlice(None, 0, 2),
    ]


def test_vocabulary_padding_may_fill_whole_ranks():
    output = weight("output_layer.weight")
    name = "lm_head.weight"
    assert local_pieces(output, SMALL, local_size=8, tp_rank=1, tp_size=4) == [
        HFSlice(name, 8, 10),
        HFSlice(None, 0, 6),
    ]
    assert local_pieces(output, SMALL, local_size=8, tp_rank=3, tp_size=4) == [HFSlice(None, 14, 22)]


@pytest.mark.parametrize(
    ("name", "local_size"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.weight", 40),  # would need padding, which attention has none
        ("decoder.layers.0.mlp.linear_fc1.weight", 10),  # narrower than the model
        ("decoder.final_layernorm.weight", 8),
    ],
)
def test_sizes_of_another_model_are_refused(name: str, local_size: int):
    with pytest.raises(ValueError, match="do not fit the model"):
        local_pieces(weight(name), SMALL, local_size=local_size, tp_rank=0, tp_size=1)


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_ranks_together_hold_every_row_once(size: str, tp_size: int):
    shape = twin_shape(size).model_copy(update={"ffn_hidden_size": 96})
    seen: dict[str, list[range]] = {}
    for w in model_weights(shape):
        axis = w.axis or 0
        whole = sum(hf_shape(name, shape)[axis] for name in w.hf)
        local = 512 // tp_size if "word_embeddings" in w.mcore or "output" in w.mcore else whole // tp_size
        for tp_rank in range(tp_size if w.axis is not None else 1):
            local_size = whole if w.axis is None else local
            for piece in local_pieces(w, shape, local_size=local_size, tp_rank=tp_rank, tp_size=tp_size):
                if piece.hf is not None:
                    seen.setdefault(piece.hf, []).append(range(piece.start, piece.stop))
        for name in w.hf:
            rows = sorted(row for run in seen[name] for row in run)
            assert rows == list(range(hf_shape(name, shape)[axis])), name


def test_parameters_of_both_backends_find_their_row():
    torch_name = weight_of_parameter("decoder.layers.7.input_layernorm.weight", SMALL)
    te_name = weight_of_parameter("decoder.layers.7.self_attention.linear_qkv.layer_norm_weight", SMALL)
    assert torch_name == te_name
    assert torch_name.hf == ("model.layers.7.input_layernorm.weight",)
    assert stacked_name(torch_name) == ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", 7)
    assert weight_of_parameter("decoder.layers.0.self_attention.linear_qkv.lora_a", SMALL) is None


def test_tied_head_is_the_embedding():
    tied = SMALL.model_copy(update={"tie_embeddings": True})
    assert weight_of_parameter("output_layer.weight", tied).hf == ("model.embed_tokens.weight",)
    assert "lm_head.weight" not in hf_shapes(tied)
