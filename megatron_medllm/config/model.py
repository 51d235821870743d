"""Which Qwen2.5 is trained: the published sizes, a miniature, or whatever an HF directory's `config.json` says."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    ValidationError,
    model_validator,
)

from megatron_medllm.config.base import Section, first_problem
from megatron_medllm.config.megatron_dirs import find_megatron
from megatron_medllm.config.megatron_yaml import megatron_shape
from megatron_medllm.config.shape import ModelShape
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json

_Count = Annotated[int, Field(strict=True, gt=0, lt=2**31)]
_Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


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

    `path` (an HF directory, or a Megatron checkpoint) gives both. `size` alone names a shape and starts from random
    weights; `shape` spells one out. `backend` picks Transformer Engine's layers or torch's.
    """

    size: str | None = None
    path: Path | None = None
    source: Path | None = Field(
        default=None, description="HF directory with config.json and tokenizer, where `path` is a checkpoint without"
    )
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
        if self.source is not None and self.path is None:
            raise ValueError("source goes with path: it describes the checkpoint there")
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r}; known: {', '.join(SIZES)}")
        return self

    def resolve_shape(self) -> ModelShape:
        """The shape, read from the model's directory where it is given by one.

        Raises:
            UserError: as `shape_of_directory`.
        """
        if self.shape is not None:
            return self.shape
        if self.size is not None:
            return SIZES[self.size]
        assert self.path is not None
        return shape_of_directory(self.path, self.source)

    def files_dir(self) -> Path | None:
        """The folder that may hold the model's tokenizer: an HF directory, or what a checkpoint has in its place."""
        place = None if self.path is None else find_megatron(self.path)
        return self.path if place is None else self.source or place.tokenizer


class _Rope(BaseModel):
    """RoPE in a config.json: `rope_parameters` (transformers 5) or `rope_scaling` (4)."""

    rope_type: StrictStr | None = None
    type: StrictStr | None = None
    rope_theta: _Positive | None = None
    partial_rotary_factor: Annotated[float, Field(strict=True)] | None = None

    def kind(self) -> str:
        """Transformers' name of it."""
        return self.rope_type or self.type or "default"


class _HFConfig(BaseModel):
    """What a Qwen2 config.json says about the computation, with its own names and types. Nothing is converted."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    model_type: StrictStr
    num_hidden_layers: Annotated[int, Field(strict=True, gt=0, lt=10_000)]
    hidden_size: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    intermediate_size: _Count
    vocab_size: _Count
    max_position_embeddings: _Count = 32768
    rms_norm_eps: _Positive = 1e-6
    tie_word_embeddings: StrictBool = False
    hidden_act: StrictStr = "silu"
    attention_dropout: Annotated[float, Field(strict=True)] = 0.0
    attention_bias: StrictBool = True
    mlp_bias: StrictBool = False
    is_causal: StrictBool = True
    use_sliding_window: StrictBool | None = False
    layer_types: list[StrictStr] | None = None
    rope_theta: _Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: Annotated[float, Field(strict=True)] | None = None
    quantization_config: dict[str, Any] | None = None

    def unsupported(self) -> str | None:
        """What this model computes that Qwen2.5 does not, if anything."""
        whole = self.hidden_size // self.num_attention_heads
        kinds = self.layer_types
        other = next((kind for kind in kinds or () if kind != "full_attention"), None)
        checks: tuple[tuple[Any, str], ...] = (
            (self.use_sliding_window, "use_sliding_window is true; sliding-window attention is not supported"),
            (other is not None, f"layer_types holds {other!r}; only full_attention is supported"),
            (kinds is not None and len(kinds) != self.num_hidden_layers, "layer_types has not one entry a layer"),
            (self.hidden_act != "silu", f"hidden_act is {self.hidden_act!r}; Qwen2.5 uses 'silu'"),
            (
                self.head_dim not in (None, whole),
                f"head_dim is {self.head_dim}; Qwen2.5 has hidden_size / heads, {whole}",
            ),
            (not self.attention_bias, "attention_bias is false; Qwen2.5 has biases on q, k and v"),
            (self.mlp_bias, "mlp_bias is true; Qwen2.5 has none"),
            (not self.is_causal, "is_causal is false; this package trains causal models only"),
            (
                self.attention_dropout,
                f"attention_dropout is {self.attention_dropout}; it is not supported: set it to 0.0",
            ),
            (
                self.partial_rotary_factor not in (None, 1.0),
                "partial_rotary_factor is not 1; Qwen2.5 rotates whole heads",
            ),
            (self.quantization_config, "quantization_config is there; take the directory of the unquantized model"),
        )
        return next((why for refused, why in checks if refused), None)

    def rotary_base(self) -> float:
        """RoPE's base, as transformers reads it.

        Raises:
            ValueError: RoPE is scaled, or two places contradict each other.
        """
        given = [_rope(value) for value in (self.rope_scaling, self.rope_parameters) if value]
        kinds = {rope.kind() for rope in given}
        if kinds - {"default"}:
            kind = min(kinds - {"default"})
            raise ValueError(f"RoPE type {kind!r} is not supported; train with the base model's default RoPE")
        if any(rope.partial_rotary_factor not in (None, 1.0) for rope in given):
            raise ValueError("partial_rotary_factor is not 1; Qwen2.5 rotates whole heads")
        places = (self.rope_theta, *(rope.rope_theta for rope in given))
        bases = sorted({float(base) for base in places if base is not None})
        if len(bases) > 1:
            raise ValueError(f"rope_theta is given twice, as {' and '.join(map(str, bases))}")
        return bases[0] if bases else 10_000.0


def _rope(value: dict[str, Any]) -> _Rope:
    """RoPE's settings; transformers 5 may nest them by kind of layer."""
    nested = {name: part for name, part in value.items() if name.endswith("_attention") and part is not None}
    if set(nested) - {"full_attention"}:
        raise ValueError(f"RoPE for {min(set(nested) - {'full_attention'})!r} is not supported")
    if nested and not isinstance(nested["full_attention"], dict):
        raise ValueError("RoPE's 'full_attention' is no JSON object")
    return _Rope.model_validate({**value, **nested.get("full_attention", {})})


def shape_from_hf_config(hf_dir: Path) -> ModelShape:
    """Read `hf_dir`/config.json, in transformers 4's spelling or 5's.

    Settings that no field here names (token ids, dtype, versions) do not change what the weights compute.

    Raises:
        UserError: the file is missing, is not a Qwen2 model, computes what Qwen2.5 does not (a sliding window, scaled
            RoPE and the like), lacks a field, or holds a value of the wrong type.
    """
    path = hf_dir / "config.json"
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    if raw.get("model_type") != "qwen2":
        found = raw.get("model_type")
        raise UserError(f"{path}: model_type is {str(found)[:80]!r}; this package trains 'qwen2' (Qwen2.5) only")
    try:
        config = _HFConfig.model_validate(raw)
        if (why := config.unsupported()) is not None:
            raise UserError(f"{path}: {why}")
        return ModelShape(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_key_value_heads or config.num_attention_heads,
            ffn_hidden_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            tie_embeddings=config.tie_word_embeddings,
            layernorm_epsilon=config.rms_norm_eps,
            rotary_base=config.rotary_base(),
            max_position_embeddings=config.max_position_embeddings,
        )
    except ValidationError as error:
        first = error.errors()[0]
        why = f"missing field {first['loc'][0]!r}" if first["type"] == "missing" else first_problem(error)
        raise UserError(f"{path}: {why}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def shape_of_directory(path: Path, source: Path | None = None) -> ModelShape:
    """The shape of the model in an HF directory or a Megatron checkpoint.

    Args:
        path: of the directory.
        source: HF directory whose config.json describes a Megatron checkpoint; default: what that carries. An HF
            directory describes itself, so a recipe's later stages start from theirs whatever its `source` is.

    Raises:
        UserError: no configuration is there, it cannot be read, or it is not a Qwen2.5 model's or not the checkpoint's.
    """
    place = find_megatron(path)
    if place is None:
        return shape_from_hf_config(path)
    given = None if source is None else shape_from_hf_config(source)
    if place.writer != "medllm":
        return megatron_shape(place, given)
    assert place.tokenizer is not None
    return given or shape_from_hf_config(place.tokenizer)
