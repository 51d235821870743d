"""What is planned: a model, its layout, and how it is trained."""

from dataclasses import dataclass
from typing import Literal

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelShape
from megatron_medllm.errors import UserError

Mode = Literal["full", "lora", "qlora", "fp8-lora"]
Precision = Literal["bf16", "fp8", "fp32"]

# Side of the square blocks that FP8 weights are scaled by; the FFN is padded to a multiple of it on every TP rank.
FP8_BLOCK = 128
# Weights that share one absolute maximum in NF4 (bitsandbytes' default block).
NF4_BLOCK = 64

LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training job. Lengths are in tokens, batch sizes in packed sequences (for RPO: in packed rows of pairs).

    `attended_length` is how far back attention reaches on average times two: the mean document length of packed
    batches, `sequence_length` when documents fill the sequence. `token_budget` is the whole run's, for its duration.
    """

    shape: ModelShape
    layout: LayoutConfig
    mode: Mode = "full"
    precision: Precision = "bf16"
    objective: Literal["cpt", "rpo"] = "cpt"
    backend: Literal["torch", "te"] = "torch"
    sequence_length: int = 4096
    micro_batch_size: int = 1
    global_batch_size: int = 64
    lora_rank: int = 16
    lora_targets: tuple[str, ...] = LORA_TARGETS
    attended_length: int | None = None
    overlap_grad_reduce: bool = True
    token_budget: int | None = None
    moments_bytes: int = 8  # of Adam's two moments of a weight: 8 in fp32, 4 in bf16

    def __post_init__(self) -> None:
        self.layout.check_model(self.shape)
        self.layout.check_stream(self.micro_batch_size * self.sequence_length)
        per_round = self.micro_batch_size * self.layout.data_parallel_size
        if self.global_batch_size % per_round:
            raise UserError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size x "
                f"data-parallel size = {self.micro_batch_size} x {self.layout.data_parallel_size}"
            )
        unknown = set(self.lora_targets) - set(LORA_TARGETS)
        if unknown:
            raise UserError(f"unknown LoRA target {sorted(unknown)[0]!r}; known: {', '.join(LORA_TARGETS)}")
        group = self.layout.pp
        if self.layout.vpp > 1 and self.num_microbatches % group:
            raise UserError(
                f"the interleaved schedule needs a number of micro-batches that layout.pp={group} divides; "
                f"this batch has {self.num_microbatches}"
            )

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one step on each model replica."""
        return self.global_batch_size // (self.micro_batch_size * self.layout.data_parallel_size)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch, padding included."""
        return self.global_batch_size * self.sequence_length

    @property
    def local_tokens(self) -> int:
        """Tokens of one micro-batch on one context-parallel rank."""
        return self.micro_batch_size * self.sequence_length // self.layout.cp

    @property
    def mean_attended_length(self) -> int:
        """Length of a causal triangle with the same attention work as the mean document."""
        return min(self.attended_length or self.sequence_length, self.sequence_length)

    @property
    def frozen_base(self) -> bool:
        """Whether only adapters are trained."""
        return self.mode != "full"

    @property
    def fp8_products(self) -> bool:
        """Whether the layers' matrix products run in FP8: in full training, or on a frozen FP8 base."""
        return self.precision == "fp8" or self.mode == "fp8-lora"

    @property
    def compute_bytes(self) -> int:
        """Bytes of one activation or unquantised weight."""
        return 4 if self.precision == "fp32" else 2

    @property
    def ffn_hidden_size(self) -> int:
        """The FFN width as held: padded with zeros where FP8 blocks need it."""
        if not self.fp8_products:
            return self.shape.ffn_hidden_size
        multiple = FP8_BLOCK * self.layout.tp
        return -(-self.shape.ffn_hidden_size // multiple) * multiple
