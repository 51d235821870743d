"""Which model is trained: a published size, a miniature, or whatever an HF directory's `config.json` says."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    StrictStr,
    ValidationError,
    model_serializer,
    model_validator,
)

from megatron_medllm.config.base import Section, first_problem
from megatron_medllm.config.families import FAMILIES
from megatron_medllm.config.families.family import Family, Size
from megatron_medllm.config.rope import HFRope, Positive, Yarn
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json

_Count = Annotated[int, Field(strict=True, gt=0, lt=2**31)]


class ModelShape(Section):
    """The numbers that fix a model's parameters and what it computes, in Megatron-Core's spelling."""

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
    family: str = Field(default="qwen2", description="Hugging Face's model_type: qwen2 (Qwen2.5) or qwen3")
    head_dim: int | None = Field(
        default=None, gt=0, description="width of a head; default: 128 for qwen3; qwen2's is hidden_size / heads"
    )
    yarn: Yarn | None = Field(default=None, description="RoPE scaled by YaRN; default: not scaled")

    @model_validator(mode="before")
    @classmethod
    def _family_head_dim(cls, values: Any) -> Any:
        """A family's own head width is written out: equal models are equal shapes."""
        if isinstance(values, dict) and values.get("head_dim") is None:
            family = FAMILIES.get(str(values.get("family", "qwen2")))
            if family is not None and family.head_dim is not None:
                return values | {"head_dim": family.head_dim}
        return values

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelShape":
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}; known: {', '.join(FAMILIES)}")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(f"{self.num_attention_heads} heads are not a multiple of {self.num_query_groups} KV heads")
        if self.head_dim is not None and self.traits.head_dim is None:
            raise ValueError(f"head_dim: {self.traits.name}'s heads are hidden_size / heads wide")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        if self.kv_channels % 2:
            raise ValueError(f"heads of {self.kv_channels} numbers; RoPE rotates halves, so the width must be even")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What Qwen2.5 leaves at its default is not written: a run resumes from checkpoints older than these fields."""
        written: dict[str, Any] = handler(self)
        defaults = {"family": "qwen2", "head_dim": None, "yarn": None}
        return {name: value for name, value in written.items() if name not in defaults or value != defaults[name]}

    @property
    def traits(self) -> Family:
        """What holds of the whole family."""
        return FAMILIES[self.family]

    @property
    def kv_channels(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def query_width(self) -> int:
        """Width of all query heads, and of attention's output: the hidden size, unless heads have their own width."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_width(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_query_groups * self.kv_channels


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
            UserError: `path` holds no config.json of a known family.
        """
        if self.shape is not None:
            return self.shape
        if self.size is not None:
            return SIZES[self.size]
        assert self.path is not None
        return shape_from_hf_config(self.path)


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
