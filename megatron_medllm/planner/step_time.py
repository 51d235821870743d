"""Seconds of one optimizer step: each pass from its parts, the pipeline by simulation, then what is left exposed."""

from dataclasses import dataclass

from megatron_medllm.errors import UserError
from megatron_medllm.planner.flops import attention_flops_per_token
from megatron_medllm.planner.hardware import Hardware
from megatron_medllm.planner.memory import optimizer_bytes, trainable_buffers
from megatron_medllm.planner.parameters import PlannedWeight, chunk_layers, chunk_weights, layer_weights
from megatron_medllm.planner.schedule import PipelineTrace, simulate
from megatron_medllm.planner.workload import Workload

# Fused attention's backward does 2.5 forwards of matrix products (recomputes QK^T; Dao 2023, arXiv 2307.08691).
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class PassTime:
    """Seconds of one forward or backward of one layer (or the head) over one micro-batch, by part."""

    gemm: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0

    @property
    def total(self) -> float:
        """All parts: they run one after the other; overlap is already in each part."""
        return self.gemm + self.attention + self.memory + self.tensor_parallel + self.context_parallel

    def __add__(self, other: "PassTime") -> "PassTime":
        return PassTime(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def times(self, factor: float) -> "PassTime":
        """Every part multiplied."""
        return PassTime(*(getattr(self, f) * factor for f in self.__dataclass_fields__))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, where they go on the busiest stage, and the pipeline's trace."""

    total_s: float
    parts_s: dict[str, float]
    trace: PipelineTrace


def layer_time(workload: Workload, hardware: Hardware) -> tuple[PassTime, PassTime]:
    """Forward and backward of one transformer layer over one micro-batch on one rank."""
    shape, layout = workload.shape, workload.layout
    tokens, e = workload.local_tokens, workload.compute_bytes
    hidden, kv = shape.hidden_size, shape.kv_width
    parameters = (2 * hidden * (shape.query_width + kv) + 3 * hidden * workload.ffn_hidden_size) / layout.tp
    gemm = 2 * parameters * tokens / gemm_flops_rate(workload, hardware)
    rate = hardware.peak_bf16_flops * hardware.efficiency_attention
    length = workload.mean_attended_length / 2
    attention = attention_flops_per_token(shape, length) * tokens / layout.tp / rate
    traffic = tokens * elementwise_bytes_per_token(workload)
    if workload.mode == "qlora":  # every use reads 4 bits, writes bf16, and the product reads it again
        traffic += parameters * (0.5 + 2 * e)
    memory = traffic / (hardware.memory_bandwidth * hardware.efficiency_memory)
    adapter = [
        tokens * moved / (hardware.memory_bandwidth * hardware.efficiency_memory)
        for moved in adapter_bytes_per_token(workload)
    ]
    tensor_parallel = tensor_parallel_time(workload, hardware)
    # K and V of the other ranks are gathered before attention begins, and their gradients go back after it.
    others = 2 * tokens * kv * e / layout.tp * (layout.cp - 1)
    context_parallel = others / link_bandwidth(hardware, layout.tp * layout.cp) if layout.cp > 1 else 0.0
    forward = PassTime(gemm, attention, memory + adapter[0], tensor_parallel, context_parallel)
    products = 1.0 if workload.frozen_base else 2.0
    backward = PassTime(
        products * gemm,
        ATTENTION_BACKWARD * attention,
        2 * memory + adapter[1],
        tensor_parallel,
        context_parallel,
    )
    if layout.recompute == "full":
        backward = backward + forward
    elif layout.recompute == "swiglu":  # gate and up are read, the result is written, and copied to where it was
        again = tokens * 5 * workload.ffn_hidden_size * e / layout.tp
        backward = backward + PassTime(memory=again / (hardware.memory_bandwidth * hardware.efficiency_memory))
    elif layout.recompute == "selective":
        backward = backward + PassTime(attention=attention, context_parallel=context_parallel)
    return forward, backward


def gemm_flops_rate(workload: Workload, hardware: Hardware) -> float:
    """FLOP/s that the layers' matrix products reach: per-tensor scales under TE, block scales under torch."""
    if workload.fp8_products:
        if hardware.peak_fp8_flops is None:
            raise UserError(f"{hardware.name} has no FP8 units; use precision bf16, or mode lora or qlora")
        te = workload.backend == "te"
        return hardware.peak_fp8_flops * (hardware.efficiency_gemm_fp8 if te else hardware.efficiency_gemm_fp8_blocks)
    return hardware.peak_bf16_flops * hardware.efficiency_gemm_bf16


def elementwise_bytes_per_token(workload: Workload) -> float:
    """HBM traffic of a layer's norms, residuals, RoPE and SwiGLU in the forward pass, per token on one rank.

    Two norms and two residual additions move 2 and 3 hidden vectors each; RoPE reads and writes q and k, and so do
    their norms where there are any; SwiGLU reads two FFN vectors and writes one (two more unfused). FP8 adds reading
    bf16 and writing one byte for each GEMM input.
    """
    shape, layout, e = workload.shape, workload.layout, workload.compute_bytes
    hidden, query, kv = shape.hidden_size, shape.query_width, shape.kv_width
    outside = layout.tp if layout.sp else 1
    swiglu = 3 if workload.backend == "te" else 5
    rotated_and_normed = (4 if shape.traits.qk_norm else 2) * (query + kv)
    moved = 10 * hidden * e / outside + (rotated_and_normed + swiglu * workload.ffn_hidden_size) * e / layout.tp
    if workload.fp8_products:
        inputs = 2 * hidden / outside + (query + workload.ffn_hidden_size) / layout.tp
        moved += inputs * (e + 1)
    return moved


def adapter_bytes_per_token(workload: Workload) -> tuple[float, float]:
    """HBM traffic of a layer's low-rank products, forward and backward, per token on one rank: memory bounds them.

    k inputs and n outputs: forward reads x once and reads and writes y once more; backward reads dy twice (for B and
    for x A^T), x once, and reads and writes dx once more. What is r wide is left out.
    """
    e = workload.compute_bytes
    k = sum(half.columns for half in _adapter_halves(workload, "lora_a"))
    n = sum(half.rows for half in _adapter_halves(workload, "lora_b"))
    return (k + 2 * n) * e, (2 * n + 3 * k) * e


def _adapter_halves(workload: Workload, name: str) -> list[PlannedWeight]:
    return [weight for weight in layer_weights(workload, 0) if weight.name.endswith(name)]


def link_bandwidth(hardware: Hardware, group_size: int) -> float:
    """Bytes/s of a collective over `group_size` neighbouring GPUs: the slowest link it crosses."""
    inside = group_size <= hardware.gpus_per_node
    return (hardware.intra_node_bandwidth if inside else hardware.inter_node_bandwidth) * hardware.efficiency_link


def tensor_parallel_time(workload: Workload, hardware: Hardware) -> float:
    """Exposed seconds of a layer's two all-gather and reduce-scatter pairs (or all-reduces: the same bytes).

    An adapter adds one collective, r wide, for each linear: nothing overlaps it, and its latency is what it costs.
    Without sequence parallelism row layers need theirs in the forward pass only and column layers in the backward one.
    """
    tp = workload.layout.tp
    if tp == 1:
        return 0.0
    a_value_a_token = workload.local_tokens * workload.compute_bytes * (tp - 1) / tp / link_bandwidth(hardware, tp)
    overlap = hardware.overlap_tensor_parallel if workload.layout.sp else 0.0
    base = 4 * (workload.shape.hidden_size * a_value_a_token * (1 - overlap) + hardware.collective_latency_s)
    adapters = len(_adapter_halves(workload, "lora_a"))
    narrow = workload.lora_rank * a_value_a_token + hardware.collective_latency_s
    return base + narrow * (adapters if workload.layout.sp else adapters / 2)


def head_time(workload: Workload, hardware: Hardware) -> tuple[PassTime, PassTime]:
    """Forward and backward of the output layer over one micro-batch: bf16 always; logits are made again in backward."""
    tp = workload.layout.tp
    flops = 2 * workload.shape.hidden_size * workload.shape.vocab_size / tp * workload.local_tokens
    gemm = flops / (hardware.peak_bf16_flops * hardware.efficiency_gemm_bf16)
    return PassTime(gemm=gemm), PassTime(gemm=gemm * (2.0 if workload.frozen_base else 3.0))


def step_time(workload: Workload, hardware: Hardware) -> StepTime:
    """Time one optimizer step.

    Raises:
        UserError: FP8 was asked for on hardware without it.
    """
    layout, shape = workload.layout, workload.shape
    layers = chunk_layers(layout, shape.num_layers)
    forward, backward = layer_time(workload, hardware)
    head = head_time(workload, hardware)

    def one_pass(is_forward: bool, stage: int, chunk: int) -> PassTime:
        time = (forward if is_forward else backward).times(layers[stage][chunk])
        last = stage == layout.pp - 1 and chunk == layout.vpp - 1
        return time + head[0 if is_forward else 1] if last else time

    table = {(f, s, v): one_pass(f, s, v) for f in (True, False) for s in range(layout.pp) for v in range(layout.vpp)}
    trace = simulate(
        pp=layout.pp,
        vpp=layout.vpp,
        num_microbatches=workload.num_microbatches,
        pass_time_s=lambda f, s, v: table[f, s, v].total,
        transfer_time_s=pipeline_transfer_time(workload, hardware),
    )
    busiest = max(range(layout.pp), key=lambda s: trace.busy_time_s[s])
    work = sum((table[f, busiest, v] for f in (True, False) for v in range(layout.vpp)), PassTime())
    work = work.times(workload.num_microbatches)
    accumulation = accumulation_time(workload, hardware, stage=busiest, micro_batches=workload.num_microbatches)
    data_parallel = data_parallel_time(workload, hardware, backward_s=trace.step_time_s / workload.num_microbatches)
    parts = {
        "matrix products": work.gemm,
        "attention": work.attention,
        "memory-bound kernels": work.memory + accumulation,
        "tensor-parallel communication": work.tensor_parallel,
        "context-parallel communication": work.context_parallel,
        "pipeline bubble and transfers": trace.step_time_s - trace.busy_time_s[busiest],
        "data-parallel communication": data_parallel,
        "optimizer": optimizer_time(workload, hardware),
        "waiting for the host": hardware.host_step_s,
    }
    return StepTime(sum(parts.values()), parts, trace)


def pipeline_transfer_time(workload: Workload, hardware: Hardware) -> float:
    """Seconds for one micro-batch's activations to reach the next stage."""
    layout = workload.layout
    if layout.pp == 1:
        return 0.0
    tensor = workload.local_tokens * workload.shape.hidden_size * workload.compute_bytes
    tensor //= layout.tp if layout.sp else 1
    return tensor / link_bandwidth(hardware, layout.tp * layout.cp * layout.pp) + hardware.collective_latency_s


def data_parallel_time(workload: Workload, hardware: Hardware, *, backward_s: float) -> float:
    """Exposed seconds of the gradients' reduce-scatter (fp32) and the parameters' all-gather.

    A ring moves (d - 1) / d of the buffer over the slowest link. What overlaps the last backward pass
    (`backward_s`, seconds) is hidden up to the hardware's overlap share.
    """
    layout = workload.layout
    ranks = layout.data_parallel_size * layout.cp
    if ranks == 1:
        return 0.0
    numel = max(sum(b.numel for b in trainable_buffers(workload, stage=s)) for s in {0, layout.pp - 1})
    bandwidth = link_bandwidth(hardware, ranks * layout.tp)
    seconds = numel * (4 + workload.compute_bytes) * (ranks - 1) / ranks / bandwidth
    if not workload.overlap_grad_reduce:
        return seconds
    return seconds - min(seconds, backward_s) * hardware.overlap_data_parallel


def accumulation_time(workload: Workload, hardware: Hardware, *, stage: int, micro_batches: int) -> float:
    """Seconds of adding a stage's weight gradients to their fp32 sums on the torch backend.

    Of every micro-batch: a gradient is written and read as the model holds it, its sum read and written. Transformer
    Engine's products add it as they end; adapters' gradients are too small to matter.
    """
    if workload.backend == "te" or workload.frozen_base:
        return 0.0
    chunks = range(workload.layout.vpp)
    numel = sum(w.numel for chunk in chunks for w in chunk_weights(workload, stage=stage, chunk=chunk))
    moved = numel * (2 * workload.compute_bytes + 8) * micro_batches
    return moved / (hardware.memory_bandwidth * hardware.efficiency_memory)


# HBM traffic of stochastic rounding of both moments, op by op, in bytes a parameter: 280 ms of 7.6e9 on an H200.
_ROUNDING_BYTES = 110


def optimizer_time(workload: Workload, hardware: Hardware) -> float:
    """Seconds of the gradients' norm, clipping and zeroing, of Adam, and of the copy back into the model.

    Adam reads every state byte and gradient once and writes every state byte once. The norm reads the gradients,
    clipping reads and writes them, zeroing writes them; the copy reads fp32 and writes the model's type.
    """
    sizes = max(
        (optimizer_bytes(workload, stage=s, dp_rank=0) for s in {0, workload.layout.pp - 1}),
        key=lambda parts: parts["optimizer moments"],
    )
    numel = sizes["optimizer moments"] // workload.moments_bytes
    state = sizes["main weights"] + sizes["optimizer moments"]
    moved = 2 * state + numel * (4 + 4 * 4 + 4 + workload.compute_bytes)
    if workload.moments_bytes < 8 and workload.backend == "torch":
        moved += numel * _ROUNDING_BYTES
    return moved / (hardware.memory_bandwidth * hardware.efficiency_memory)
