"""Bytes that a forward pass leaves behind for its backward pass, tensor by tensor.

The method is Korthikanti et al. 2022 (arXiv 2205.05198, section 4): list what each operation saves, divide by the
tensor-parallel size inside the parallel region, and by it again outside with sequence parallelism. The list is that
of this package's layers: fused attention (no s x s matrix), grouped KV heads, SwiGLU, no dropout. A CPU saves more
than a GPU: its norms are not fused, and its attention works on padded copies.

h: hidden size, q: width of all query heads, kv: of all KV heads, f: FFN width, hn: width of a head, t: tensor-parallel
size.
"""

from megatron_medllm.planner.workload import Workload

# Row statistics of a norm and of attention's softmax, and the tensors of an unfused norm, are kept in fp32.
FP32_BYTES = 4
# The head's buffer for a chunk of fp32 logits on a GPU (kernels/logprob/head.py); half as much again in bf16.
HEAD_BUFFER_BYTES = 512 * 2**20


def layer_activations(workload: Workload, *, on_cpu: bool = False) -> dict[str, int]:
    """Bytes per token that one layer saves between its forward and its backward pass."""
    shape, layout, e = workload.shape, workload.layout, workload.compute_bytes
    outside = layout.tp if layout.sp else 1
    if layout.recompute == "full":
        return {"layer input": shape.hidden_size * e // outside}
    return all_layer_activations(workload, on_cpu=on_cpu)


def all_layer_activations(workload: Workload, *, on_cpu: bool = False) -> dict[str, int]:
    """Bytes per token that one layer saves when it is not recomputed as a whole."""
    shape, tp, e = workload.shape, workload.layout.tp, workload.compute_bytes
    hidden, ffn = shape.hidden_size, workload.ffn_hidden_size
    outside = tp if workload.layout.sp else 1
    saved = {
        "attention norm": norm_bytes(workload, on_cpu=on_cpu),
        "qkv input": linear_input_bytes(workload, "linear_qkv", hidden) // outside,
        "head norms": head_norm_bytes(workload, on_cpu=on_cpu),
        **attention_activations(workload, on_cpu=on_cpu),
        "mlp norm": norm_bytes(workload, on_cpu=on_cpu),
        "fc1 input": linear_input_bytes(workload, "linear_fc1", hidden) // outside,
        # gate and up; on a CPU, where SwiGLU is not fused, silu(gate) and a copy of up as well.
        "swiglu": (4 if on_cpu else 2) * ffn * e // tp,
        "fc2 input": linear_input_bytes(workload, "linear_fc2", ffn) // tp,
    }
    if workload.layout.recompute == "swiglu" and workload.precision != "fp8":  # which keeps a copy in one byte
        saved["fc2 input"] = 0
    if workload.frozen_base:
        saved["adapters"] = len(workload.lora_targets) * workload.lora_rank * e
    return saved


def norm_bytes(workload: Workload, *, on_cpu: bool) -> int:
    """A norm's input and statistic; unfused on a CPU: fp32 copies of the input and, for its weight, of the result."""
    outside = workload.layout.tp if workload.layout.sp else 1
    unfused = FP32_BYTES * (1 if workload.frozen_base else 2)
    width = unfused if on_cpu else workload.compute_bytes
    return width * workload.shape.hidden_size // outside + FP32_BYTES


def head_norm_bytes(workload: Workload, *, on_cpu: bool) -> int:
    """The norms of queries and keys: a statistic a head, and on a CPU fp32 copies; their input is the qkv output."""
    shape = workload.shape
    if not shape.traits.qk_norm:
        return 0
    copies = FP32_BYTES * (1 if workload.frozen_base else 2) * (shape.query_width + shape.kv_width) if on_cpu else 0
    return (copies + FP32_BYTES * (shape.num_attention_heads + shape.num_query_groups)) // workload.layout.tp


def linear_input_bytes(workload: Workload, name: str, width: int) -> int:
    """A linear layer's input: kept for its weight's gradient or its adapter's, in one byte under FP8 training."""
    if workload.frozen_base:
        return width * workload.compute_bytes if name in workload.lora_targets else 0
    return width if workload.precision == "fp8" else width * workload.compute_bytes


def attention_activations(workload: Workload, *, on_cpu: bool) -> dict[str, int]:
    """What core attention keeps per token. The projection keeps attention's output as its own input.

    Rotated q and k are new tensors, v is a view that keeps the whole qkv output alive, except where padded copies
    are attended over (CPU) or the rotation is fused and no norm of q and k lies before it (te). The CPU path keeps its
    output three times: of the kernel, scattered, and gathered. Selective recomputation keeps q, qkv and the gathered
    output alone. Under context parallelism K and V are those of all ranks, unless recomputation gathers them anew.
    """
    cp = workload.layout.cp
    shape, tp, e = workload.shape, workload.layout.tp, workload.compute_bytes
    query, kv = shape.query_width, shape.kv_width
    selective = workload.layout.recompute == "selective"
    copies = on_cpu and not selective
    if selective:
        inputs = 2 * (query + kv)
    elif cp > 1:
        inputs = query + 2 * kv * cp
    else:
        fused = workload.backend == "te" and not shape.traits.qk_norm
        inputs = query + 2 * kv if copies or fused else 2 * query + 3 * kv
    statistic = 0 if selective else FP32_BYTES * shape.num_attention_heads // tp
    projection = linear_input_bytes(workload, "linear_proj", query) // tp
    kernel_output = 0 if selective else query * e // tp
    if copies:
        return {"q, k, v": inputs * e // tp, "attention output": 3 * kernel_output + statistic}
    # In bf16 the kernel's output and the projection's input are one tensor; an FP8 copy is a second.
    shared = projection == kernel_output or kernel_output == 0
    output = max(projection, kernel_output) if shared else projection + kernel_output
    return {"q, k, v": inputs * e // tp, "attention output": output + statistic}


def saved_per_layer(workload: Workload, *, on_cpu: bool = False) -> int:
    """Bytes per token that one layer keeps for each micro-batch in flight."""
    return sum(layer_activations(workload, on_cpu=on_cpu).values())


def working_set_per_token(workload: Workload) -> int:
    """Bytes per token that live only while one layer's backward runs: gradients inside the MLP, recomputed tensors."""
    shape, tp, e = workload.shape, workload.layout.tp, workload.compute_bytes
    gradients = (4 * workload.ffn_hidden_size // tp + 2 * shape.hidden_size) * e
    recomputed = sum(all_layer_activations(workload).values()) if workload.layout.recompute == "full" else 0
    if workload.layout.recompute == "swiglu":  # computed again, then copied to where it was
        recomputed = 2 * workload.ffn_hidden_size * e // tp
    return gradients + recomputed


def head_activations(workload: Workload, *, on_cpu: bool = False) -> dict[str, int]:
    """Bytes per token that the last stage saves outside its layers: the head keeps its input or that one's gradient."""
    head = workload.shape.hidden_size * workload.compute_bytes
    return {"final norm": norm_bytes(workload, on_cpu=on_cpu), "head": head}


def head_gradient_bytes(workload: Workload) -> int:
    """The fp32 gradient of the head's weight, which CPT forms in the forward pass and keeps for the backward pass."""
    if workload.frozen_base or workload.objective == "rpo":
        return 0
    return FP32_BYTES * workload.shape.vocab_size // workload.layout.tp * workload.shape.hidden_size


def head_workspace_bytes(workload: Workload) -> int:
    """Bytes that the head needs on a GPU beside its tokens: logits of a chunk, their gradient, the weight's."""
    rows = workload.shape.vocab_size // workload.layout.tp
    logits = min(HEAD_BUFFER_BYTES, FP32_BYTES * rows * workload.local_tokens)
    gradient = 0 if workload.frozen_base else rows * workload.shape.hidden_size * workload.compute_bytes
    return logits + logits // 2 + gradient + head_gradient_bytes(workload)
