"""Bytes that a forward pass leaves behind for its backward pass, tensor by tensor.

The method is Korthikanti et al. 2022 (arXiv 2205.05198, section 4): list what each operation saves, divide by the
tensor-parallel size inside the parallel region, and by it again outside with sequence parallelism. The list is that
of this package's layers: fused attention (no s x s matrix), grouped KV heads, SwiGLU, no dropout.

h: hidden size, kv: width of all KV heads, f: FFN width, hn: width of a head, t: tensor-parallel size.
"""

from megatron_medllm.planner.workload import Workload

# Row statistics of a norm and of attention's softmax are kept in fp32.
STATISTIC_BYTES = 4


def layer_activations(workload: Workload, *, on_cpu: bool = False) -> dict[str, int]:
    """Bytes per token that one layer saves when nothing is recomputed. `on_cpu`: attention through padded SDPA."""
    shape, tp, e = workload.shape, workload.layout.tp, workload.compute_bytes
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    kv, ffn = shape.num_query_groups * shape.kv_channels, workload.ffn_hidden_size
    outside = tp if workload.layout.sp else 1

    def linear_input(name: str, width: int) -> int:
        if workload.frozen_base and name not in workload.lora_targets:
            return 0
        if workload.precision == "fp8" or (workload.mode == "fp8-lora" and not workload.frozen_base):
            return width
        return width * e

    fused = workload.backend == "te"
    saved = {
        "attention norm input": hidden * e // outside + STATISTIC_BYTES,
        "qkv input": linear_input("linear_qkv", hidden) // outside,
        # Rotated q and k are new tensors; v is a view that keeps the whole fused qkv output alive. SDPA gets copies.
        "q, k, v": (hidden + 2 * kv if on_cpu or fused else 2 * hidden + 3 * kv) * e // tp,
        "rope angles": 0 if fused else 4 * shape.kv_channels * e,
        "attention output": hidden * e // tp * (2 if on_cpu else 1) + heads * STATISTIC_BYTES // tp,
        "mlp norm input": hidden * e // outside + STATISTIC_BYTES,
        "fc1 input": linear_input("linear_fc1", hidden) // outside,
        # Unfused SwiGLU also keeps silu(gate).
        "swiglu": (2 if fused else 3) * ffn * e // tp,
        "fc2 input": linear_input("linear_fc2", ffn) // tp,
    }
    if workload.frozen_base:
        saved["adapters"] = len(workload.lora_targets) * workload.lora_rank * e
    return saved


def saved_per_layer(workload: Workload, *, on_cpu: bool = False) -> int:
    """Bytes per token that one layer keeps for each micro-batch in flight, after recomputation.

    Full recomputation keeps the layer's input alone. Selective drops what attention saves beyond q, k, v and its
    output: with fused attention that is the softmax statistic.
    """
    shape, layout = workload.shape, workload.layout
    if layout.recompute == "full":
        return shape.hidden_size * workload.compute_bytes // (layout.tp if layout.sp else 1)
    total = sum(layer_activations(workload, on_cpu=on_cpu).values())
    if layout.recompute == "selective":
        total -= shape.num_attention_heads * STATISTIC_BYTES // layout.tp
        if on_cpu:  # the second copy of the output, and the padded copies of q, k and v
            total -= shape.hidden_size * workload.compute_bytes // layout.tp
    return total


def working_set_per_token(workload: Workload) -> int:
    """Bytes per token that live only while one layer's backward runs: gradients inside the MLP, recomputed tensors."""
    shape, tp, e = workload.shape, workload.layout.tp, workload.compute_bytes
    gradients = (4 * workload.ffn_hidden_size // tp + 2 * shape.hidden_size) * e
    recomputed = sum(layer_activations(workload).values()) if workload.layout.recompute == "full" else 0
    return gradients + recomputed


def head_activations(workload: Workload) -> dict[str, int]:
    """Bytes per token that the last stage saves outside its layers: the final norm's input and the head's."""
    hidden, e = workload.shape.hidden_size, workload.compute_bytes
    outside = workload.layout.tp if workload.layout.sp else 1
    return {"final norm input": hidden * e // outside + STATISTIC_BYTES, "head input": hidden * e}


def head_workspace_bytes(workload: Workload) -> int:
    """Bytes of the head's chunk: fp32 logits of `head_chunk_tokens` rows on this rank's vocabulary, their gradient."""
    rows = min(workload.head_chunk_tokens, workload.local_tokens)
    vocabulary = -(-workload.shape.vocab_size // workload.layout.tp)
    return rows * vocabulary * (4 + max(workload.compute_bytes, 2))
