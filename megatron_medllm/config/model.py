"""Which Qwen2.5 is trained: the published sizes, a miniature, or whatever an HF directory's `config.json` says."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_medllm.config.base import Section
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json


class ModelShape(Section):
    """The numbers that fix a Qwen2.5 model's parameters, in Megatron-Core's spelling."""

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_query_groups: int = Field(gt=0, description="key/value heads")
    ffn_hidden_size: int = Field(gt=0)
    vocab_size: int = Field(
        gt=0, description="rows of the embedding as published, before padding for tensor parallelism"
    )
    tie_embeddings: bool
    layernorm_epsilon: float = 1e-6
    rotary_base: float = 1_000_000.0
    max_position_embeddings: int = 32768

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelShape":
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(f"{self.num_attention_heads} heads are not a multiple of {self.num_query_groups} KV heads")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        return self

    @property
    def kv_channels(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


def _shape(
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    ffn: int,
    vocab: int,
    *,
    tied: bool,
    eps: float = 1e-6,
    rotary_base: float = 1e6,
) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
        vocab_size=vocab,
        tie_embeddings=tied,
        layernorm_epsilon=eps,
        rotary_base=rotary_base,
    )


# From the published config.json of each Qwen/Qwen2.5-* base model. `mini` is the miniature world's own.
SIZES: dict[str, ModelShape] = {
    "mini": _shape(2, 64, 4, 2, 192, 1024, tied=True, rotary_base=1e4),
    "0.5b": _shape(24, 896, 14, 2, 4864, 151936, tied=True),
    "1.5b": _shape(28, 1536, 12, 2, 8960, 151936, tied=True),
    "3b": _shape(36, 2048, 16, 2, 11008, 151936, tied=True),
    "7b": _shape(28, 3584, 28, 4, 18944, 152064, tied=False),
    "14b": _shape(48, 5120, 40, 8, 13824, 152064, tied=False, eps=1e-5),
    "32b": _shape(64, 5120, 40, 8, 27648, 152064, tied=False, eps=1e-5),
    "72b": _shape(80, 8192, 64, 8, 29568, 152064, tied=False, eps=1e-5),
}


class ModelConfig(Section):
    """Where the model's shape and starting weights come from.

    `path` (an HF directory) gives both. `size` alone names a shape and starts from random weights; `shape` spells
    one out. `backend` picks Transformer Engine's layers or torch's.
    """

    size: str | None = None
    path: Path | None = None
    shape: ModelShape | None = None
    backend: Literal["torch", "te"] = "torch"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    swiglu: Literal["auto", "compiled", "eager"] = Field(
        default="auto", description="the FFN's activation, compiled by torch or op by op; auto: compiled on CUDA"
    )
    init_std: float = Field(
        default=0.02, gt=0, description="standard deviation of random weights (used without `path`)"
    )
    ffn_multiple: int | None = Field(
        default=None,
        gt=0,
        description="the FFN is padded with zeros to a multiple of this; default: 128 x layout.tp where weights are "
        "FP8, else none. Fix it where such a run is to resume under another tp",
    )

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        given = [name for name in ("size", "path", "shape") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of size, path and shape (found: {', '.join(given) or 'none'})")
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r}; known: {', '.join(SIZES)}")
        return self

    def resolve_shape(self) -> ModelShape:
        """The shape, reading `path`/config.json where the model is given by directory.

        Raises:
            UserError: `path` holds no Qwen2 config.json.
        """
        if self.shape is not None:
            return self.shape
        if self.size is not None:
            return SIZES[self.size]
        assert self.path is not None
        return shape_from_hf_config(self.path)


def shape_from_hf_config(hf_dir: Path) -> ModelShape:
    """Read `hf_dir`/config.json, in transformers 4's spelling or 5's.

    Raises:
        UserError: the file is missing, is not a Qwen2 model, uses a sliding window, scales its RoPE, or lacks a field.
    """
    path = hf_dir / "config.json"
    config = read_json(path)
    if config.get("model_type") != "qwen2":
        raise UserError(
            f"{path}: model_type is {config.get('model_type')!r}; this package trains 'qwen2' (Qwen2.5) only"
        )
    if config.get("use_sliding_window"):
        raise UserError(f"{path}: use_sliding_window is true; sliding-window attention is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act is {config['hidden_act']!r}; Qwen2.5 uses 'silu'")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UserError(f"{path}: RoPE type {rope_type!r} is not supported; train with the base model's default RoPE")
    try:
        return ModelShape(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_attention_heads=config["num_attention_heads"],
            num_query_groups=config.get("num_key_value_heads") or config["num_attention_heads"],
            ffn_hidden_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            tie_embeddings=config.get("tie_word_embeddings", False),
            layernorm_epsilon=config.get("rms_norm_eps", 1e-6),
            rotary_base=rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
            max_position_embeddings=config.get("max_position_embeddings", 32768),
        )
    except KeyError as error:
        raise UserError(f"{path}: missing field {error.args[0]!r}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
