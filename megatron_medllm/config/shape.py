"""The numbers that fix a model, whichever file they come from."""

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from megatron_medllm.config.base import Section
from megatron_medllm.config.families import FAMILIES
from megatron_medllm.config.families.family import Family
from megatron_medllm.config.rope import Yarn


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
