"""What tells one family of dense decoders from another: a few facts about a layer, and the published sizes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A published model's numbers, from its config.json."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool
    epsilon: float = 1e-6
    rotary_base: float = 1e6
    max_positions: int = 32768


@dataclass(frozen=True)
class Family:
    """What holds of every model of a family, whatever its size.

    All of them are Llama's kind of decoder: RMSNorm before each part, grouped KV heads, RoPE in halves, SwiGLU.
    """

    name: str  # in messages and documents
    model_type: str  # in config.json
    architecture: str  # transformers' class
    qkv_bias: bool  # q, k and v have biases
    qk_norm: bool  # an RMSNorm over each query and key head, before RoPE
    head_dim: int | None  # width of a head where config.json names none; None: always hidden_size / heads
    licence: str
    sizes: dict[str, Size]  # `model.size` -> numbers
