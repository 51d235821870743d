"""Every tensor that one rank holds: which layers a pipeline stage has, and each weight's shape after the TP split.

The lists follow Megatron-Core's registration order, because the distributed optimizer lays its buffers out in it.
"""

from dataclasses import dataclass

from megatron_medllm.config.layout import LayoutConfig, padded_vocab_size
from megatron_medllm.config.model import ModelShape
from megatron_medllm.planner.workload import FP8_BLOCK, NF4_BLOCK, Workload


@dataclass(frozen=True)
class PlannedWeight:
    """One parameter on one rank: rows x columns (columns 1 for vectors)."""

    name: str
    rows: int
    columns: int
    quantisable: bool = False
    adapter: bool = False
    shared_embedding: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.columns


def chunk_layers(layout: LayoutConfig, num_layers: int) -> list[list[int]]:
    """Layers of each model chunk: `[stage][virtual chunk]`."""
    if layout.vpp > 1:
        return [[num_layers // (layout.pp * layout.vpp)] * layout.vpp for _ in range(layout.pp)]
    counts: list[int | None] = [None] * layout.pp
    counts[0] = layout.first_stage_layers
    if layout.last_stage_layers is not None:
        counts[-1] = layout.last_stage_layers
    free = counts.count(None)
    rest = num_layers - sum(n for n in counts if n is not None)
    return [[n if n is not None else rest // free] for n in counts]


def layer_weights(workload: Workload, index: int) -> list[PlannedWeight]:
    """One transformer layer's tensors on one tensor-parallel rank, adapters after the weight they adapt."""
    shape, tp = workload.shape, workload.layout.tp
    hidden, ffn = shape.hidden_size, workload.ffn_hidden_size
    qkv = (shape.query_width + 2 * shape.kv_width) // tp
    prefix = f"decoder.layers.{index}."
    linears = [
        ("self_attention.linear_proj", hidden, shape.query_width // tp),
        ("self_attention.linear_qkv", qkv, hidden),
        ("mlp.linear_fc1", 2 * ffn // tp, hidden),
        ("mlp.linear_fc2", hidden, ffn // tp),
    ]
    weights = [PlannedWeight(prefix + "input_layernorm.weight", hidden, 1)]
    for name, rows, columns in linears:
        if name == "mlp.linear_fc1":
            weights.append(PlannedWeight(prefix + "pre_mlp_layernorm.weight", hidden, 1))
        weights.append(PlannedWeight(f"{prefix}{name}.weight", rows, columns, quantisable=True))
        if name.endswith("linear_qkv") and shape.traits.qkv_bias:
            weights.append(PlannedWeight(f"{prefix}{name}.bias", rows, 1))
        if workload.frozen_base and name.rpartition(".")[2] in workload.lora_targets:
            # Column layers replicate A and split B; row layers split A and replicate B: `rows` and `columns` are
            # already this rank's, so both cases read the same.
            rank = workload.lora_rank
            weights.append(PlannedWeight(f"{prefix}{name}.lora_a", rank, columns, adapter=True))
            weights.append(PlannedWeight(f"{prefix}{name}.lora_b", rows, rank, adapter=True))
        if name.endswith("linear_qkv") and shape.traits.qk_norm:
            for norm in ("q_layernorm", "k_layernorm"):
                weights.append(PlannedWeight(f"{prefix}self_attention.{norm}.weight", shape.kv_channels, 1))
    return weights


def chunk_weights(workload: Workload, *, stage: int, chunk: int) -> list[PlannedWeight]:
    """The tensors of one model chunk of a pipeline stage, on one tensor-parallel rank."""
    shape, layout = workload.shape, workload.layout
    vocab_rows = padded_vocab_size(shape.vocab_size, layout.vocab_multiple) // layout.tp
    first = stage == 0 and chunk == 0
    last = stage == layout.pp - 1 and chunk == layout.vpp - 1
    shared = shape.tie_embeddings and layout.pp > 1
    weights = []
    if first:
        name = "embedding.word_embeddings.weight"
        weights.append(PlannedWeight(name, vocab_rows, shape.hidden_size, shared_embedding=shared))
    for index in range(chunk_layers(layout, shape.num_layers)[stage][chunk]):
        weights += layer_weights(workload, index)
    if last:
        weights.append(PlannedWeight("decoder.final_layernorm.weight", shape.hidden_size, 1))
        if not shape.tie_embeddings or layout.pp > 1:
            weights.append(PlannedWeight("output_layer.weight", vocab_rows, shape.hidden_size, shared_embedding=shared))
    return weights


def stored_bytes(weight: PlannedWeight, workload: Workload) -> int:
    """Bytes of the weight as the forward pass reads it: quantised where the mode freezes it so."""
    if weight.quantisable and workload.mode == "fp8-lora":
        blocks = -(-weight.rows // FP8_BLOCK) * -(-weight.columns // FP8_BLOCK)
        return weight.numel + 4 * blocks
    if weight.quantisable and workload.mode == "qlora":
        return -(-weight.numel // 2) + 4 * -(-weight.numel // NF4_BLOCK)
    return weight.numel * workload.compute_bytes


def matmul_parameters(shape: ModelShape) -> int:
    """Parameters that every token is multiplied by: the layers' and the head's, not the embedding's."""
    hidden = shape.hidden_size
    per_layer = 2 * hidden * (shape.query_width + shape.kv_width) + 3 * hidden * shape.ffn_hidden_size
    return shape.num_layers * per_layer + hidden * shape.vocab_size


def total_parameters(shape: ModelShape) -> int:
    """All parameters of the published model (vocabulary unpadded)."""
    hidden = shape.hidden_size
    biases = shape.query_width + 2 * shape.kv_width if shape.traits.qkv_bias else 0
    head_norms = 2 * shape.kv_channels if shape.traits.qk_norm else 0
    vectors = shape.num_layers * (2 * hidden + biases + head_norms) + hidden
    embedding = 0 if shape.tie_embeddings else hidden * shape.vocab_size
    return matmul_parameters(shape) + embedding + vectors
