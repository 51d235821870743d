"""`medllm bench throughput`: how fast a stage trains here, with everything that a reader needs to check the number.

The measured window starts after a warm-up and does what training does: data, forward and backward through the pipeline
schedule, gradient reduction, clipping, optimizer. Checkpoints, validation and logging are left out.
"""

import logging
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_medllm.bench.environment import environment_facts, peak_memory_bytes
from megatron_medllm.bench.synthetic import with_synthetic_data
from megatron_medllm.config.run import RunConfig
from megatron_medllm.data.microbatch import IGNORED, MicroBatch
from megatron_medllm.errors import UserError
from megatron_medllm.parallel import mcore, runtime
from megatron_medllm.parallel.reduce import sum_metrics
from megatron_medllm.planner import load_hardware
from megatron_medllm.planner.flops import model_flops_per_token, packed_flops
from megatron_medllm.planner.from_config import workload_of
from megatron_medllm.storage import write_json
from megatron_medllm.train.setup import Trainer, build_trainer
from megatron_medllm.train.throughput import StepClock

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """`output` is a directory; `hardware` names the peak for MFU (none on an unknown device)."""

    output: Path
    warmup_steps: int = 3
    steps: int = 10
    synthetic: bool = False
    document_length: int = 1024
    hardware: str | None = None


@dataclass(frozen=True)
class Work:
    """What one step's micro-batches hold, over all replicas. `attended` counts (query, key) pairs."""

    tokens: int
    padding: int
    loss_tokens: int
    attended: int


def measure(run: RunConfig, settings: BenchSettings) -> Path:
    """Measure `run.stage` on the ranks that are here, and write OUTPUT/throughput.json. Collective.

    Returns:
        the path of the JSON file.

    Raises:
        UserError: too little data for the steps asked for, or synthetic preference pairs.
    """
    ranks = runtime.start(run.layout, seed=run.seed)
    try:
        if settings.synthetic:
            steps = settings.warmup_steps + settings.steps
            run = with_synthetic_data(
                run, settings.output / "synthetic", steps=steps, document_length=settings.document_length, ranks=ranks
            )
        trainer = build_trainer(run.model_copy(update={"output": settings.output / "work"}), ranks)
        needed = settings.warmup_steps + settings.steps
        if trainer.step.total_steps < needed:
            raise UserError(f"the data fill {trainer.step.total_steps} steps, {needed} are needed; see --synthetic")
        rows = [_step(trainer, index) for index in range(needed)][settings.warmup_steps :]
        result = summarize(run, settings, rows, ranks=ranks)
        path = settings.output / "throughput.json"
        if ranks.is_main:
            write_json(path, result)
        dist.barrier()
        return path
    finally:
        runtime.stop()


def _step(trainer: Trainer, index: int) -> dict[str, Any]:
    """One optimizer step: its seconds by part, and what it worked on."""
    step = trainer.step
    dist.barrier()
    clock = StepClock()
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    trainer.optimizer.zero_grad()
    with clock.part("data"):
        micro_batches = step.micro_batches(index)
    with clock.part("forward_backward"):
        parts = mcore.run_micro_batches(step.forward, trainer.chunks, micro_batches, stream_length=step.stream_length)
    with clock.part("optimizer"):
        mcore.clip_and_step(trainer.optimizer, clip_grad=trainer.config.optimizer.clip_grad)
    seconds = clock.seconds()
    sums = sum_metrics(parts, step.metric_names, trainer.runtime)
    work = total_work([local_work(m, unit=step.unit) for m in micro_batches], trainer.runtime)
    return {"seconds": seconds, "parts": clock.parts, "work": work, "count": sums["count"], "loss": sums["loss"]}


def local_work(micro_batch: MicroBatch, *, unit: str) -> Work:
    """One micro-batch's tokens. Padding is what no segment covers and, among pairs, segments that teach nothing."""
    counted = micro_batch.labels != IGNORED
    prefixes = {(s.prefix_start, s.prefix_end) for s in micro_batch.segments}
    real = attended = 0
    for s in micro_batch.segments:
        length = s.end - s.start
        if unit == "pairs" and not counted[s.start : s.end].any() and (s.start, s.end) not in prefixes:
            continue
        real += length
        attended += length * s.prefix_length + length * (length + 1) // 2
    return Work(real, len(micro_batch.tokens) - real, int(counted.sum()), attended)


def total_work(parts: list[Work], ranks: runtime.Runtime) -> Work:
    """Summed over micro-batches and replicas; of each replica one rank counts."""
    names = ("tokens", "padding", "loss_tokens", "attended")
    sums = torch.tensor([sum(getattr(w, n) for w in parts) for n in names], dtype=torch.int64, device=ranks.device)
    if ranks.tp_rank or ranks.pp_rank or ranks.cp_rank:
        sums.zero_()
    dist.all_reduce(sums)
    return Work(*sums.tolist())


def summarize(
    run: RunConfig, settings: BenchSettings, rows: list[dict[str, Any]], *, ranks: runtime.Runtime
) -> dict[str, Any]:
    """The result: rates over the whole window, medians of the parts, both FLOP conventions, and the circumstances."""
    workload = workload_of(run)
    seconds = [row["seconds"] for row in rows]
    window, world = sum(seconds), ranks.world_size
    tokens = sum(row["work"].tokens for row in rows)
    padding = sum(row["work"].padding for row in rows)
    attended = sum(row["work"].attended for row in rows)
    flops = {
        "packed": packed_flops(workload, tokens=tokens, attended=attended),
        "megatron": model_flops_per_token(workload, causal=False) * (tokens + padding),
    }
    result: dict[str, Any] = {
        "stage": run.stage,
        "steps": len(rows),
        "warmup_steps": settings.warmup_steps,
        "world_size": world,
        "tokens_per_s": tokens / window,
        "tokens_per_s_per_gpu": tokens / window / world,
        "padded_tokens_per_s_per_gpu": (tokens + padding) / window / world,
        "padding_share": padding / (tokens + padding),
        "loss_tokens_per_s": sum(row["work"].loss_tokens for row in rows) / window,
        "step_time_s": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
        "parts_s": {n: statistics.median(r["parts"][n] for r in rows) for n in rows[0]["parts"]},
        "flops_per_s_per_gpu": {name: total / window / world for name, total in flops.items()},
        "peak_memory_bytes": peak_memory_bytes(ranks.device),
        "losses": [row["loss"] / max(row["count"], 1) for row in rows],
        "synthetic": settings.synthetic,
        "layout": run.layout.model_dump(),
        "workload": {"mode": workload.mode, "precision": workload.precision, "objective": workload.objective},
        "environment": environment_facts(ranks.device),
        "config": run.model_dump(mode="json"),
    }
    if run.stage == "rpo":
        result["pairs_per_s"] = sum(row["count"] for row in rows) / window
    if settings.hardware is not None:
        machine = load_hardware(settings.hardware)
        fp8 = workload.precision == "fp8" or workload.mode == "fp8-lora"
        peak = machine.peak_fp8_flops if fp8 and machine.peak_fp8_flops else machine.peak_bf16_flops
        result["mfu"] = {name: rate / peak for name, rate in result["flops_per_s_per_gpu"].items()}
        result["peak_flops"] = peak
    return result
