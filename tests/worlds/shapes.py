"""The shapes of tiny models."""

from megatron_medllm.config.model import ModelShape

# As a recipe spells it.
SHAPE = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 64,
    "vocab_size": 1280,
    "tie_embeddings": True,
}
# No size is a power of two or a multiple of a GPU's tile: what pads shows.
ODD_SHAPE = SHAPE | {"hidden_size": 72, "ffn_hidden_size": 100, "vocab_size": 300, "tie_embeddings": False}


def tiny_shape(**changes: object) -> ModelShape:
    """`SHAPE` with changes, as the models' code takes it."""
    return ModelShape.model_validate(SHAPE | changes)
