"""Which Hugging Face (HF) tensors make up which Megatron-Core tensor, as a table.

A Megatron tensor is a run of *pieces* of HF tensors along one axis, the one that tensor parallelism (TP) splits.
Only two tensors are more than one whole HF tensor: `linear_qkv` holds, group after group, the query heads of a
key/value group, its key head and its value head; `linear_fc1` holds gate and up, and TP splits each of these two
blocks on its own. Every reader and writer of weights works from `local_pieces`, so they cannot disagree.

Names are Transformer Engine's (a norm belongs to the linear behind it), as in Megatron-Core's distributed checkpoints;
`TORCH_BACKEND_NAMES` maps the spelling of models built from separate norms. The table holds the rows of all model
families; `layer_weights` leaves out those that a family lacks.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_medllm.config.model import ModelShape

LAYER_PREFIX = "decoder.layers."


@dataclass(frozen=True)
class Weight:
    """One Megatron tensor: the HF tensors in it, and the axis that TP splits (None: every rank holds all of it)."""

    mcore: str
    hf: tuple[str, ...]
    axis: Literal[0, 1] | None
    fuse: Literal["qkv", "gate_up"] | None = None
    may_pad: bool = False  # the vocabulary for TP, the FFN for FP8's blocks: always with zeros

    def at_layer(self, layer: int) -> "Weight":
        """This row of the table for layer `layer` (from 0, over the whole model)."""
        hf = tuple(name.format(layer=layer) for name in self.hf)
        return replace(self, mcore=self.mcore.format(layer=layer), hf=hf)


@dataclass(frozen=True)
class HFSlice:
    """Entries [start, stop) of HF tensor `hf` along the weight's axis; `hf` None: that many zeros."""

    hf: str | None
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def _layer(mcore: str, *hf: str, axis: Literal[0, 1] | None, fuse: Literal["qkv", "gate_up"] | None = None) -> Weight:
    hf_names = tuple(f"model.layers.{{layer}}.{name}" for name in hf)
    return Weight(
        f"{LAYER_PREFIX}{{layer}}.{mcore}", hf_names, axis, fuse, may_pad="linear_fc" in mcore and axis is not None
    )


EMBEDDING = Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), axis=0, may_pad=True)
OUTPUT = Weight("output_layer.weight", ("lm_head.weight",), axis=0, may_pad=True)
FINAL_NORM = Weight("decoder.final_layernorm.weight", ("model.norm.weight",), axis=None)
_QKV_BIAS = "self_attention.linear_qkv.bias"
_HEAD_NORMS = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")
_LAYER_WEIGHTS = (
    _layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", axis=None),
    _layer("self_attention.linear_qkv.weight", *(f"self_attn.{p}_proj.weight" for p in "qkv"), axis=0, fuse="qkv"),
    _layer(_QKV_BIAS, *(f"self_attn.{p}_proj.bias" for p in "qkv"), axis=0, fuse="qkv"),
    _layer(_HEAD_NORMS[0], "self_attn.q_norm.weight", axis=None),
    _layer(_HEAD_NORMS[1], "self_attn.k_norm.weight", axis=None),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", axis=1),
    _layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", axis=None),
    _layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", axis=0, fuse="gate_up"),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight", axis=1),
)
TORCH_BACKEND_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_BY_LAYER_NAME = {weight.mcore.removeprefix(f"{LAYER_PREFIX}{{layer}}."): weight for weight in _LAYER_WEIGHTS}
_BY_NAME = {weight.mcore: weight for weight in (EMBEDDING, FINAL_NORM, OUTPUT)}
LAYER_NAME = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<rest>.+)")


def layer_weights(shape: ModelShape) -> dict[str, Weight]:
    """The table's rows for a layer of this model's family, by their names within the layer."""
    absent = {*(() if shape.traits.qkv_bias else (_QKV_BIAS,)), *(() if shape.traits.qk_norm else _HEAD_NORMS)}
    return {name: weight for name, weight in _BY_LAYER_NAME.items() if name not in absent}


def model_weights(shape: ModelShape) -> Iterator[Weight]:
    """Every tensor of the whole model once, in the order of the forward pass."""
    yield EMBEDDING
    for layer in range(shape.num_layers):
        yield from (weight.at_layer(layer) for weight in layer_weights(shape).values())
    yield FINAL_NORM
    if not shape.tie_embeddings:
        yield OUTPUT


def weight_of_parameter(name: str, shape: ModelShape) -> Weight | None:
    """The table's row for a parameter, or None for a parameter that HF models lack.

    Args:
        name: as in `models.gpt.global_parameters` (layers numbered over the whole model), in either backend's
            spelling.
        shape: with tied embeddings the last pipeline stage's `output_layer` holds a copy of the embedding.
    """
    match = LAYER_NAME.fullmatch(name)
    if match:
        rest = TORCH_BACKEND_NAMES.get(match["rest"], match["rest"])
        row = layer_weights(shape).get(rest)
        return row and row.at_layer(int(match["layer"]))
    if name == OUTPUT.mcore and shape.tie_embeddings:
        return replace(OUTPUT, hf=EMBEDDING.hf)
    return _BY_NAME.get(name)


def split_of(mcore: str) -> tuple[Literal[0, 1] | None, int]:
    """How tensor parallelism cuts a weight: the axis (None: not at all), and into how many blocks each cut alone.

    Args:
        mcore: its name in Transformer Engine's spelling; a name that is not in the table is not cut.
    """
    match = LAYER_NAME.fullmatch(mcore)
    row = _BY_LAYER_NAME.get(match["rest"]) if match else _BY_NAME.get(mcore)
    return (row.axis, 2 if row.fuse == "gate_up" else 1) if row else (None, 1)


def stacked_name(weight: Weight) -> tuple[str, int | None]:
    """A weight's key in a distributed checkpoint, where all layers form one tensor, and its layer in it."""
    match = LAYER_NAME.fullmatch(weight.mcore)
    return (f"{LAYER_PREFIX}{match['rest']}", int(match["layer"])) if match else (weight.mcore, None)


def hf_shape(name: str, shape: ModelShape) -> tuple[int, ...]:
    """The shape of one HF tensor.

    Raises:
        KeyError: `name` is no tensor of any family's models.
    """
    hidden, ffn, query, kv = shape.hidden_size, shape.ffn_hidden_size, shape.query_width, shape.kv_width
    by_suffix: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (shape.vocab_size, hidden),
        "lm_head.weight": (shape.vocab_size, hidden),
        "norm.weight": (hidden,),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "q_proj.weight": (query, hidden),
        "q_proj.bias": (query,),
        "k_proj.weight": (kv, hidden),
        "k_proj.bias": (kv,),
        "v_proj.weight": (kv, hidden),
        "v_proj.bias": (kv,),
        "o_proj.weight": (hidden, query),
        "q_norm.weight": (shape.kv_channels,),
        "k_norm.weight": (shape.kv_channels,),
        "gate_proj.weight": (ffn, hidden),
        "up_proj.weight": (ffn, hidden),
        "down_proj.weight": (hidden, ffn),
    }
    return by_suffix[".".join(name.split(".")[-2:])]


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an HF directory of this model must hold, in writing order."""
    return {name: hf_shape(name, shape) for weight in model_weights(shape) for name in weight.hf}


def _qkv_block(weight: Weight, shape: ModelShape) -> list[HFSlice]:
    """Per key/value group: its query heads, its key head, its value head."""
    q, k, v = weight.hf
    width = shape.kv_channels
    q_width = width * (shape.num_attention_heads // shape.num_query_groups)
    pieces = []
    for group in range(shape.num_query_groups):
        pieces.append(HFSlice(q, group * q_width, (group + 1) * q_width))
        pieces.append(HFSlice(k, group * width, (group + 1) * width))
        pieces.append(HFSlice(v, group * width, (group + 1) * width))
    return pieces


def _blocks(weight: Weight, shape: ModelShape) -> list[list[HFSlice]]:
    """The unpadded weight along its axis, as the blocks that TP splits one by one."""
    if weight.fuse == "qkv":
        return [_qkv_block(weight, shape)]
    axis = weight.axis or 0
    return [[HFSlice(name, 0, hf_shape(name, shape)[axis])] for name in weight.hf]


def local_pieces(weight: Weight, shape: ModelShape, *, local_size: int, tp_rank: int, tp_size: int) -> list[HFSlice]:
    """What the slice of `weight` on one TP rank is made of, in order along its axis.

    Args:
        weight: a row of the table, at its layer.
        shape: the model's shape, unpadded.
        local_size: entries of the rank's tensor along the axis; what it holds beyond the model's own is padding.
        tp_rank: this rank within its tensor-parallel group.
        tp_size: size of that group.

    Raises:
        ValueError: the sizes do not fit the model (a bug of the caller, not of the user).
    """
    if weight.axis is None:
        tp_rank, tp_size = 0, 1
    blocks = _blocks(weight, shape)
    block_size, rest = divmod(local_size, len(blocks))
    pieces = []
    for block in blocks:
        padding = block_size * tp_size - sum(map(len, block))
        if rest or padding < 0 or (padding and not weight.may_pad):
            raise ValueError(f"{weight.mcore}: {local_size} entries on each of {tp_size} ranks do not fit the model")
        pieces += cut_pieces([*block, HFSlice(None, 0, padding)], tp_rank * block_size, (tp_rank + 1) * block_size)
    return pieces


def cut_pieces(pieces: list[HFSlice], start: int, stop: int) -> list[HFSlice]:
    """The part [start, stop) of a run of pieces."""
    found, at = [], 0
    for piece in pieces:
        low, high = max(start, at), min(stop, at + len(piece))
        if low < high:
            found.append(HFSlice(piece.hf, piece.start + low - at, piece.start + high - at))
        at += len(piece)
    return found
