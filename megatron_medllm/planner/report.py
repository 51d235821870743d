"""A plan as text for people, and as JSON-able values for machines."""

from typing import Any

from megatron_medllm.planner.plan import Plan
from megatron_medllm.planner.scale import ScalePoint
from megatron_medllm.planner.search import describe_layout

GIB = 2**30

ASSUMPTIONS = (
    "weights and activations in bf16 (fp32 when asked), gradients accumulated and reduced in fp32, Adam in fp32",
    "fused attention: no s x s matrix; packed documents cost attention by their mean length",
    "the head keeps no logits: a chunk of fp32 logits and its gradient at a time",
    "5 % of activations and workspaces lost to fragmentation; context, cuBLAS and NCCL as the hardware file reserves",
    "kernels reach the hardware file's efficiencies; tensor- and data-parallel communication overlap by its shares",
    "failures are independent and exponential; restart = 300 s + reading the checkpoint",
)


def plan_report(found: Plan) -> str:
    """The plan in lines of plain text."""
    work, step = found.workload, found.step
    peak = found.peak_stage
    lines = [
        f"{work.layout.world_size} x {found.hardware.name}: {describe_layout(work)}; {work.mode}, {work.precision}, "
        f"sequences of {work.sequence_length}, batch {work.global_batch_size} ({work.tokens_per_step:,} tokens)",
        "",
        f"Memory of the fullest GPU (pipeline stage {peak.stage} of {work.layout.pp})",
        *(f"  {name:<32}{size / GIB:>9.2f} GiB" for name, size in peak.parts.items()),
        f"  {'total':<32}{peak.total_bytes / GIB:>9.2f} GiB of {found.hardware.memory_bytes / GIB:.2f}: "
        + ("fits" if found.fits else "DOES NOT FIT"),
        "",
        "Time of one step",
        *(f"  {name:<32}{1e3 * s:>9.1f} ms {100 * s / step.total_s:>6.1f} %" for name, s in step.parts_s.items() if s),
        f"  {'total':<32}{1e3 * step.total_s:>9.1f} ms",
        "",
        f"Throughput: {found.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, MFU {100 * found.mfu():.1f} % "
        f"(causal; {100 * found.mfu(causal=False):.1f} % counting masked attention) of "
        f"{found.peak_flops / 1e12:,.0f} TFLOP/s",
        *_duration_lines(found),
        "",
        "Assumptions",
        *(f"  - {line}" for line in ASSUMPTIONS),
    ]
    return "\n".join(lines)


def _duration_lines(found: Plan) -> list[str]:
    saved, failures, cpu = found.checkpoint, found.reliability, found.cpu_stage
    part, size = max(cpu.parts.items(), key=lambda item: item[1])
    lines = [
        f"Checkpoint: {saved.total_bytes / GIB:,.1f} GiB in about {saved.save_time_s:,.0f} s; Hugging Face export "
        f"{saved.hf_export_bytes / GIB:,.1f} GiB",
        f"Host memory that a save adds: {saved.background_host_bytes / GIB:,.2f} GiB a process in the background "
        f"(async_save), {saved.host_bytes / GIB:,.2f} GiB otherwise",
        f"Without GPUs: {cpu.total_bytes / GIB:,.1f} GiB a process, {size / GIB:,.1f} of them {part} "
        "(a stream of micro_batch_size x sequence_length tokens; layout.recompute=full lowers it)",
        f"Failures: one in {failures.mtbf_s / 3600:,.0f} h; save every {failures.daly_interval_s / 60:,.0f} min; "
        f"{100 * failures.efficiency:.1f} % of the wall clock trains",
    ]
    if found.training_time_s is not None:
        wall = found.training_time_s / failures.efficiency
        gpu_hours = wall / 3600 * found.workload.layout.world_size
        lines.append(
            f"Run: {found.workload.token_budget:,} tokens in {wall / 86400:,.2f} days, {gpu_hours:,.0f} GPU-hours"
        )
    return lines


def plan_values(found: Plan) -> dict[str, Any]:
    """The plan as JSON-able values; bytes, seconds, tokens/s/GPU and fractions."""
    return {
        "hardware": found.hardware.name,
        "layout": found.workload.layout.model_dump(),
        "micro_batch_size": found.workload.micro_batch_size,
        "fits": found.fits,
        "memory_bytes": {str(stage.stage): stage.parts for stage in found.stages},
        "memory_limit_bytes": found.hardware.memory_bytes,
        "step_time_s": found.step.total_s,
        "step_parts_s": found.step.parts_s,
        "tokens_per_s_per_gpu": found.tokens_per_s_per_gpu,
        "mfu_causal": found.mfu(),
        "mfu_full_attention": found.mfu(causal=False),
        "checkpoint_bytes": found.checkpoint.total_bytes,
        "cpu_memory_bytes": found.cpu_stage.parts,
        "save_host_bytes": found.checkpoint.host_bytes,
        "background_save_host_bytes": found.checkpoint.background_host_bytes,
        "checkpoint_save_time_s": found.checkpoint.save_time_s,
        "daly_interval_s": found.reliability.daly_interval_s,
        "training_time_s": found.training_time_s,
        "assumptions": list(ASSUMPTIONS),
    }


def search_report(plans: list[Plan]) -> str:
    """The ranked layouts, one a line."""
    lines = [f"{'tokens/s/GPU':>12}  {'MFU':>6}  {'memory':>9}  layout"]
    for found in plans:
        lines.append(
            f"{found.tokens_per_s_per_gpu:>12,.0f}  {100 * found.mfu():>5.1f}%  "
            f"{found.peak_stage.total_bytes / GIB:>5.1f} GiB  {describe_layout(found.workload)}"
        )
    return "\n".join(lines)


def scale_report(points: list[ScalePoint]) -> str:
    """A scaling curve, one world size a line: what failures and saves leave of the wall time, and the job's rate."""
    lines = [f"{'GPUs':>8}  micro-batches  tokens/s/GPU  save every  wall time that trains  tokens/s"]
    for p in points:
        lines.append(
            f"{p.gpus:>8,}  {p.num_microbatches:>13,}  {p.tokens_per_s_per_gpu:>12,.0f}  "
            f"{p.save_every_s / 60:>6,.0f} min  {100 * p.failure_efficiency:>19.1f} %  {p.tokens_per_s:>12,.0f}"
        )
    return "\n".join(lines)
