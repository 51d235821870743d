"""Which model is trained: a published size, a miniature, or whatever an HF directory's `config.json` says."""

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
from megatron_medllm.config.families import FAMILIES
from megatron_medllm.config.families.family import Family, Size
from megatron_medllm.config.megatron_dirs import find_megatron
from megatron_medllm.config.megatron_yaml import megatron_shape
from megatron_medllm.config.rope import HFRope, Positive, Yarn
from megatron_medllm.config.shape import ModelShape
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json

_Count = Annotated[int, Field(strict=True, gt=0, lt=2**31)]


def _shape(size: Size, family: Family) -> ModelShape:
    return ModelShape(
        num_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        num_query_groups=size.kv_heads,
        ffn_hidden_size=size.ffn,
        vocab_size=size.vocab,
        tie_embeddings=size.tied,
        layernorm_epsilon=size.epsilon,
        rotary_base=size.rotary_base,
        max_position_embeddings=size.max_positions,
        family=family.model_type,
    )


SIZES: dict[str, ModelShape] = {
    name: _shape(size, family) for family in FAMILIES.values() for name, size in family.sizes.items()
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


class _HFConfig(BaseModel):
    """What a config.json says about the computation, with its own names and types. Nothing is converted."""

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
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: StrictBool = False
    hidden_act: StrictStr = "silu"
    attention_dropout: Annotated[float, Field(strict=True)] = 0.0
    attention_bias: StrictBool | None = None
    mlp_bias: StrictBool = False
    is_causal: StrictBool = True
    use_sliding_window: StrictBool | None = False
    layer_types: list[StrictStr] | None = None
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: Annotated[float, Field(strict=True)] | None = None
    quantization_config: dict[str, Any] | None = None

    def unsupported(self, family: Family) -> str | None:
        """What this model computes that its family, as it is trained here, does not; None: nothing."""
        name, whole = family.name, self.hidden_size // self.num_attention_heads
        kinds = self.layer_types
        other = next((kind for kind in kinds or () if kind != "full_attention"), None)
        bias = self.attention_bias
        checks: tuple[tuple[Any, str], ...] = (
            (self.use_sliding_window, "use_sliding_window is true; sliding-window attention is not supported"),
            (other is not None, f"layer_types holds {other!r}; only full_attention is supported"),
            (kinds is not None and len(kinds) != self.num_hidden_layers, "layer_types has not one entry a layer"),
            (self.hidden_act != "silu", f"hidden_act is {self.hidden_act!r}; {name} uses 'silu'"),
            (
                family.head_dim is None and self.head_dim not in (None, whole),
                f"head_dim is {self.head_dim}; {name} has hidden_size / heads, {whole}",
            ),
            (bias is False and family.qkv_bias, f"attention_bias is false; {name} has biases on q, k and v"),
            (bias is True and not family.qkv_bias, f"attention_bias is true; {name} has no biases"),
            (self.mlp_bias, f"mlp_bias is true; {name} has none"),
            (not self.is_causal, "is_causal is false; this package trains causal models only"),
            (
                self.attention_dropout,
                f"attention_dropout is {self.attention_dropout}; it is not supported: set it to 0.0",
            ),
            (
                self.partial_rotary_factor not in (None, 1.0),
                f"partial_rotary_factor is not 1; {name} rotates whole heads",
            ),
            (self.quantization_config, "quantization_config is there; take the directory of the unquantized model"),
        )
        return next((why for refused, why in checks if refused), None)

    def rope(self) -> tuple[float, Yarn | None]:
        """RoPE's base and scaling, as transformers reads them.

        Raises:
            ValueError: RoPE is scaled in a way that is not computed here, or two places contradict each other.
        """
        context = self.max_position_embeddings
        given = [HFRope.read(value, context=context) for value in (self.rope_scaling, self.rope_parameters) if value]
        if len({rope.yarn for rope in given}) > 1:
            raise ValueError("rope_scaling and rope_parameters scale RoPE differently")
        places = (self.rope_theta, *(rope.rope_theta for rope in given))
        bases = sorted({float(base) for base in places if base is not None})
        if len(bases) > 1:
            raise ValueError(f"rope_theta is given twice, as {' and '.join(map(str, bases))}")
        return bases[0] if bases else 10_000.0, given[0].yarn if given else None


def shape_from_hf_config(hf_dir: Path) -> ModelShape:
    """Read `hf_dir`/config.json, in transformers 4's spelling or 5's.

    Settings that no field here names (token ids, dtype, versions) do not change what the weights compute.

    Raises:
        UserError: the file is missing, is of no family known here, computes what its family does not (a sliding
            window, RoPE scaled otherwise than by YaRN and the like), lacks a field, or a value is of the wrong type.
    """
    path = hf_dir / "config.json"
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    found = raw.get("model_type")
    family = FAMILIES.get(found) if isinstance(found, str) else None
    if family is None:
        known = ", ".join(f"{each.model_type!r} ({each.name})" for each in FAMILIES.values())
        raise UserError(f"{path}: model_type is {str(found)[:80]!r}; this package trains {known} only")
    try:
        config = _HFConfig.model_validate(raw)
        if (why := config.unsupported(family)) is not None:
            raise UserError(f"{path}: {why}")
        rotary_base, yarn = config.rope()
        return ModelShape(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_key_value_heads or config.num_attention_heads,
            ffn_hidden_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            tie_embeddings=config.tie_word_embeddings,
            layernorm_epsilon=config.rms_norm_eps,
            rotary_base=rotary_base,
            max_position_embeddings=config.max_position_embeddings,
            family=family.model_type,
            head_dim=config.head_dim if family.head_dim is not None else None,
            yarn=yarn,
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
