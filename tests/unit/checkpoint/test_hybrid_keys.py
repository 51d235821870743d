"""Upstream's successor of GPTModel finds our weights: its own translation of a HybridModel's keys ends at ours."""

import re

import pytest
import torch

from megatron_medllm.checkpoint.names import FINAL_NORM, Weight, model_weights, stacked_name
from megatron_medllm.config.model import ModelShape
from tests.worlds.shapes import SHAPE


def hybrid_key(weight: Weight) -> str:
    """The key in a model whose attention and MLP are layers of their own: layer k's are number 2k and 2k + 1."""
    if weight.mcore == FINAL_NORM.mcore:
        return "decoder.final_norm.weight"
    return re.sub(
        r"layers\.(\d+)\.(self_attention|mlp)\.",
        lambda match: f"layers.{2 * int(match[1]) + (match[2] == 'mlp')}.{match[2]}.",
        weight.mcore,
    )


def test_upstreams_translation_of_hybrid_keys_ends_at_ours() -> None:
    interop = pytest.importorskip(
        "megatron.core.dist_checkpointing.gpt_checkpoint_interop", reason="this Megatron-Core has no such translation"
    )
    from megatron.core.dist_checkpointing import ShardedTensor

    shape = ModelShape.model_validate(SHAPE)
    weights = list(model_weights(shape))
    state = {w.mcore: ShardedTensor.from_rank_offsets(hybrid_key(w), torch.zeros(4, 4)) for w in weights}
    assert len({entry.key for entry in state.values()}) == len(weights)
    interop.retarget_sharded_state_dict_to_gpt_checkpoint(
        state, interop.gpt_compatible_layer_maps("*-" * shape.num_layers)
    )
    for weight in weights:
        key, layer = stacked_name(weight)
        entry = state[weight.mcore]
        assert entry.key == key
        if layer is not None:
            assert (entry.global_offset[0], entry.global_shape[0]) == (layer, shape.num_layers)
