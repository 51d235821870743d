"""Qwen3: what its config.json may say, what Megatron-Core is told, and which parameters a model then has."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from megatron_medllm.checkpoint.foreign.bridge_out import import_to_bridge
from megatron_medllm.checkpoint.hf_target import hf_config
from megatron_medllm.config.families import FAMILIES
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import SIZES, ModelConfig, ModelShape, shape_from_hf_config
from megatron_medllm.errors import UserError
from megatron_medllm.models.config import transformer_config
from megatron_medllm.planner.flops import attention_flops_per_token
from megatron_medllm.planner.parameters import chunk_weights
from megatron_medllm.planner.workload import Workload
from tests.worlds.model import build_tiny
from tests.worlds.model_dir import PUBLISHED, twin_shape, write_config
from tests.worlds.shapes import SHAPE, tiny_shape

# As published with Qwen/Qwen3-8B-Base, in transformers 4's spelling.
PUBLISHED_8B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 12288, "max_position_embeddings": 32768, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip


def read(directory: Path, **changes: object) -> ModelShape:
    """The shape of the published 8B with changes; a key set to "absent" is left out."""
    config = {key: value for key, value in (PUBLISHED_8B | changes).items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(config))
    return shape_from_hf_config(directory)


def test_the_published_config_in_every_spelling(tmp_path: Path):
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000}, "rope_theta": "absent"}
    by_5 = rope | {"rope_scaling": "absent", "dtype": "bfloat16", "torch_dtype": "absent"}
    by_5 |= {"layer_types": ["full_attention"] * 36}
    for changes in ({}, by_5, {"head_dim": "absent"}, {"attention_bias": "absent"}):
        assert read(tmp_path, **changes) == SIZES["qwen3-8b"]


@pytest.mark.parametrize("size", PUBLISHED)
def test_an_exported_config_is_the_same_shape(tmp_path: Path, size: str):
    written = hf_config(SIZES[size], torch.bfloat16, None)
    assert ("head_dim" in written) == size.startswith("qwen3")
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert shape_from_hf_config(tmp_path) == SIZES[size]


def test_another_familys_config_lends_nothing_to_an_export(tmp_path: Path):
    read(tmp_path)
    written = hf_config(SIZES["7b"], torch.bfloat16, tmp_path)
    assert written["model_type"] == "qwen2" and written["architectures"] == ["Qwen2ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert shape_from_hf_config(tmp_path) == SIZES["7b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window is true"),
        ({"layer_types": ["full_attention"] * 35 + ["sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ({"attention_bias": True}, "attention_bias is true; Qwen3 has no biases"),
        ({"mlp_bias": True}, "mlp_bias is true; Qwen3 has none"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; Qwen3 uses 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; it is not supported"),
        ({"head_dim": 127}, "heads of 127 numbers; RoPE rotates halves, so the width must be even"),
        ({"head_dim": "128"}, "head_dim: Input should be a valid integer"),
        ({"num_key_value_heads": 5}, "32 heads are not a multiple of 5 KV heads"),
        ({"model_type": "qwen3_moe"}, r"model_type is 'qwen3_moe'; this package trains 'qwen2' \(Qwen2.5\), 'qwen3'"),
        ({"model_type": "qwen3_next"}, "model_type is 'qwen3_next'"),
        ({"model_type": ["qwen3"]}, r"model_type is \"\['qwen3'\]\""),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "RoPE type 'linear' is not supported"),
    ],
    ids=str,
)
def test_what_qwen3_may_have_and_is_not_computed(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_shapes_spelled_out_in_a_recipe():
    with pytest.raises(ValidationError, match=r"head_dim: Qwen2\.5's heads are hidden_size / heads wide"):
        tiny_shape(head_dim=16)
    with pytest.raises(ValidationError, match="unknown family 'llama'; known: qwen2, qwen3"):
        tiny_shape(family="llama")
    assert tiny_shape(family="qwen3").head_dim == 128  # as every published one
    odd = tiny_shape(family="qwen3", head_dim=10, num_attention_heads=6, num_query_groups=3)
    assert (odd.kv_channels, odd.query_width, odd.kv_width) == (10, 60, 30)  # hidden_size 32 is no multiple of 6


def test_what_older_checkpoints_recorded_of_a_shape_still_holds():
    recorded = tiny_shape().model_dump()
    assert set(recorded) == {*SHAPE, "layernorm_epsilon", "rotary_base", "max_position_embeddings"}
    qwen3 = twin_shape("qwen3-4b")
    assert ModelShape.model_validate(qwen3.model_dump()) == ModelShape.model_validate_json(qwen3.model_dump_json())
    assert ModelShape.model_validate(qwen3.model_dump()) == qwen3


def test_sizes_are_named_once():
    names = [name for family in FAMILIES.values() for name in family.sizes]
    assert len(names) == len(set(names)) == len(SIZES)
    assert all(SIZES[name].family == family.model_type for family in FAMILIES.values() for name in family.sizes)


def test_megatron_is_told():
    config = transformer_config(SIZES["qwen3-32b"], LayoutConfig(tp=8), ModelConfig(size="qwen3-32b"))
    assert (config.hidden_size, config.num_attention_heads, config.kv_channels) == (5120, 64, 128)
    assert config.qk_layernorm and not config.add_qkv_bias and not config.add_bias_linear
    qwen25 = transformer_config(SIZES["32b"], LayoutConfig(tp=8), ModelConfig(size="32b"))
    assert not qwen25.qk_layernorm and qwen25.add_qkv_bias


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("size", ["0.5b", "qwen3-0.6b", "qwen3-8b"])
def test_the_planner_knows_every_parameter_in_the_models_order(size: str):
    shape = twin_shape(size)
    model = build_tiny(shape)
    planned = chunk_weights(Workload(shape=shape, layout=LayoutConfig()), stage=0, chunk=0)
    built = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert [weight.name for weight in planned] == list(built)
    assert [weight.numel for weight in planned] == list(built.values())


def test_attentions_work_goes_by_the_width_of_the_heads():
    assert attention_flops_per_token(SIZES["qwen3-32b"], 100.0) == 4 * 100 * 64 * 128  # hidden_size is 5120


def test_a_config_of_the_4_spelling_is_what_the_twins_have(tmp_path: Path):
    assert shape_from_hf_config(write_config(tmp_path, SIZES["qwen3-8b"])) == SIZES["qwen3-8b"]


@pytest.mark.parametrize(
    ("changes", "what"), [({}, "Qwen3"), ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "YaRN")]
)
def test_a_checkpoint_for_bridge_is_refused_before_anything_is_written(tmp_path: Path, changes: dict, what: str):
    read(tmp_path, **changes)
    with pytest.raises(UserError, match=f"{what}; Bridge's settings are written for Qwen2.5"):
        import_to_bridge(tmp_path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
