"""The numbers that make up a model's shape."""

from pydantic import Field, model_validator

from megatron_medllm.config.base import Section


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
