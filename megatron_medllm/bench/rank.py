"""`medllm bench rank`: one real rank of a layout, without the others, beside its plan.

Builds what that rank builds (its layers, DDP's buffers, its share of the optimizer) and runs training steps on random
tokens; what other ranks would send is made up (`parallel.alone`). So memory and computing time of a rank of hundreds
are known before there are hundreds. Communication takes no time here, and waiting for other stages neither.
"""

import gc
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_medllm.bench.environment import environment_facts
from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import CptConfig, RpoConfig
from megatron_medllm.data.microbatch import MicroBatch
from megatron_medllm.errors import UserError
from megatron_medllm.models.gpt import unwrap
from megatron_medllm.parallel import mcore, runtime
from megatron_medllm.parallel.foreach import leaves
from megatron_medllm.parallel.packed import Segment
from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.parallel.staging import runs_ahead
from megatron_medllm.planner.from_config import workload_of
from megatron_medllm.planner.hardware import load_hardware
from megatron_medllm.planner.memory import optimizer_bytes, stage_memory, weight_bytes
from megatron_medllm.planner.parameters import chunk_layers
from megatron_medllm.planner.step_time import PassTime, accumulation_time, head_time, layer_time
from megatron_medllm.storage import atomic_write, write_json
from megatron_medllm.train.cpt_step import CptStep
from megatron_medllm.train.model import build_chunks, resolve_adapter
from megatron_medllm.train.one_step import forward_backward
from megatron_medllm.train.throughput import StepClock, hardware_of_device, peak_memory_bytes

_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """`rank` of the layout; `micro_batches` of a step, None for two rounds of the pipeline or what the recipe has."""

    rank: int
    output: Path
    steps: int = 3
    warmup_steps: int = 1
    micro_batches: int | None = None


class _RandomRows(CptStep):
    """Continued pretraining on rows of random tokens, each one document."""

    def __init__(self, run: RunConfig, config: CptConfig, ranks: Runtime) -> None:
        self._config, self._runtime, self._backend = config, ranks, run.model.backend
        self._ahead = runs_ahead(run.kernels.copies, ranks.device)
        ranks.layout.check_stream(self.stream_length)
        self._vocab_size = run.model.resolve_shape().vocab_size

    def random_micro_batch(self, seed: int) -> MicroBatch:
        length, rows = self._config.sequence_length, self._config.micro_batch_size
        tokens = np.random.default_rng(seed).integers(0, self._vocab_size, length * rows + 1)
        segments = tuple(Segment(row * length, (row + 1) * length) for row in range(rows))
        return MicroBatch(tokens[:-1], tokens[1:], np.tile(np.arange(length), rows), segments)


def measure_rank(run: RunConfig, settings: RankSettings) -> Path:
    """Build and run one rank, and write OUTPUT/rank-K.json and .md.

    Returns:
        the path of the JSON file.

    Raises:
        UserError: no such rank in the layout, or a stage other than continued pretraining.
    """
    config = run.stage_config()
    if isinstance(config, RpoConfig):
        raise UserError(f"medllm bench rank measures continued pretraining; set stage=cpt (here {run.stage})")
    random_weights = run.model.model_copy(update={"path": None, "size": None, "shape": run.model.resolve_shape()})
    run = run.model_copy(update={"model": random_weights})
    ranks = runtime.start(run.layout, seed=run.seed, alone_as=settings.rank)
    try:
        started = time.monotonic()
        chunks, optimizer = build_rank(run, config, ranks)
        try:
            built_s = time.monotonic() - started
            result = _measure(run, config, ranks, chunks, optimizer, settings) | {"build_s": built_s}
        finally:
            mcore.release(chunks)
    finally:
        runtime.stop()
    path = settings.output / f"rank-{settings.rank}.json"
    settings.output.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    with atomic_write(path.with_suffix(".md")) as stream:
        stream.write((rank_report(result) + "\n").encode())
    return path


def build_rank(run: RunConfig, config: CptConfig, ranks: Runtime) -> tuple[list[nn.Module], MegatronOptimizer]:
    """This rank's chunks inside DDP, and its optimizer, as training builds them."""
    adapter = resolve_adapter(config.adapter, run.model.resolve_shape())
    chunks = build_chunks(run, ranks, adapter=adapter, fp8=config.fp8_gemms)
    mcore_config = unwrap(chunks[0]).config
    chunks = mcore.wrap_ddp(chunks, mcore_config, run.layout)
    optimizer = mcore.build_optimizer(chunks, mcore_config, config.optimizer, run.layout, helpers=run.kernels.optimizer)
    return chunks, optimizer


def held_bytes(chunks: list[nn.Module], optimizer: MegatronOptimizer) -> dict[str, int]:
    """Bytes of weights, gradients, fp32 main weights that are no views of the weights, and moments."""
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage() for c in chunks for p in c.parameters()}
    main = moments = 0
    for leaf in leaves(optimizer):
        for group in leaf.optimizer.param_groups:
            for shard in group["params"]:
                state = leaf.optimizer.state[shard]
                moments += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
                if shard.untyped_storage().data_ptr() not in weights:
                    main += shard.nbytes
    return {
        "weights": sum(storage.nbytes() for storage in weights.values()),
        "gradients": sum(buffer.grad_data.nbytes for chunk in chunks for buffer in _ddp(chunk).buffers),
        "main weights": main,
        "optimizer moments": moments,
    }


def _ddp(chunk: nn.Module) -> DistributedDataParallel:
    assert isinstance(chunk, DistributedDataParallel)
    return chunk


def planned_bytes(run: RunConfig, ranks: Runtime, *, overlap_grad_reduce: bool) -> dict[str, int]:
    """What the planner says that `held_bytes` are on this rank."""
    workload = replace(workload_of(run), overlap_grad_reduce=overlap_grad_reduce)
    dp_cp_rank = ranks.dp_rank * ranks.layout.cp + ranks.cp_rank
    weights = sum(weight_bytes(workload, stage=ranks.pp_rank).values())
    return {"weights": weights, **optimizer_bytes(workload, stage=ranks.pp_rank, dp_rank=dp_cp_rank)}


def _measure(
    run: RunConfig,
    config: CptConfig,
    ranks: Runtime,
    chunks: list[nn.Module],
    optimizer: MegatronOptimizer,
    settings: RankSettings,
) -> dict[str, Any]:
    rows = _RandomRows(run, config, ranks)
    batch = [rows.random_micro_batch(index) for index in range(_micro_batches(config, ranks, settings))]
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
    clocks = [_step(rows, chunks, optimizer, batch, config) for _ in range(settings.warmup_steps + settings.steps)]
    timed = clocks[settings.warmup_steps :]
    hardware = hardware_of_device(ranks.device)
    planned_s = None if hardware is None else planned_compute_s(run, hardware, ranks.pp_rank, micro_batches=len(batch))
    embeddings = [
        p for c in chunks for name, p in c.named_parameters() if "embedding" in name or "output_layer" in name
    ]
    workload = workload_of(run)
    stage = stage_memory(workload, stage=ranks.pp_rank, on_cpu=ranks.device.type == "cpu")
    return {
        "bench": "rank",
        "rank": ranks.rank,
        "layout": run.layout.model_dump(),
        "place": {"tp": ranks.tp_rank, "pp": ranks.pp_rank, "dp": ranks.dp_rank, "cp": ranks.cp_rank},
        "model": run.model.resolve_shape().model_dump(),
        "dtype": run.model.dtype,
        "sequence_length": config.sequence_length,
        "micro_batch_size": config.micro_batch_size,
        "micro_batches": len(batch),
        "steps": len(timed),
        "held_bytes": held_bytes(chunks, optimizer),
        "planned_bytes": planned_bytes(run, ranks, overlap_grad_reduce=_ddp(chunks[0]).ddp_config.overlap_grad_reduce),
        "embedding_and_head_bytes": sum(p.nbytes for p in embeddings),
        "peak_memory_bytes": peak_memory_bytes(ranks.device),
        "planned_memory_parts": stage.parts,
        "planned_peak_bytes": stage.total_bytes,
        "planned_forward_backward_s": planned_s,
        "forward_backward_s": statistics.median(clock.parts["forward_backward"] for clock in timed),
        "optimizer_s": statistics.median(clock.parts["optimizer"] for clock in timed),
        "environment": environment_facts(ranks.device),
    }


def planned_compute_s(run: RunConfig, hardware: str, stage: int, *, micro_batches: int) -> float:
    """Seconds that the planner gives a stage's own work on so many micro-batches: no exchange, no waiting."""
    workload, machine = workload_of(run), load_hardware(hardware)
    layers = sum(chunk_layers(run.layout, workload.shape.num_layers)[stage])
    work = sum(layer_time(workload, machine), PassTime()).times(layers)
    if stage == run.layout.pp - 1:
        work = sum(head_time(workload, machine), work)
    own_work = micro_batches * (work.gemm + work.attention + work.memory)
    return own_work + accumulation_time(workload, machine, stage=stage, micro_batches=micro_batches)


def _micro_batches(config: CptConfig, ranks: Runtime, settings: RankSettings) -> int:
    whole = config.global_batch_size // (config.micro_batch_size * ranks.dp_size)
    wanted = settings.micro_batches or min(whole, 2 * ranks.layout.pp)
    if ranks.layout.vpp > 1 and wanted % ranks.layout.pp:
        raise UserError(f"interleaved stages need a multiple of pp={ranks.layout.pp} micro-batches, not {wanted}")
    return wanted


def _step(
    rows: _RandomRows, chunks: list[nn.Module], optimizer: MegatronOptimizer, batch: list[MicroBatch], config: CptConfig
) -> StepClock:
    """One optimizer step."""
    clock = StepClock()
    with clock.part("forward_backward"):
        forward_backward(rows.forward, chunks, optimizer, batch, stream_length=rows.stream_length)
    with clock.part("optimizer"):
        norm = mcore.gradient_norm(optimizer)
        if not math.isfinite(norm):  # the step's time and memory would be missing
            raise UserError(f"the optimizer's step was not taken: the gradient norm is {norm}")
        mcore.clip_and_step(optimizer, norm=norm, clip_grad=config.optimizer.clip_grad)
    return clock


def rank_line(result: dict[str, Any]) -> str:
    """Peak memory and computing time beside the plan, in one line."""
    peak, planned_peak = result["peak_memory_bytes"], result["planned_peak_bytes"]
    took, planned = result["forward_backward_s"], result["planned_forward_backward_s"]
    beside = "no plan for this device" if planned is None else f"planned {planned:.3f}, {_percent(took, planned)}"
    return (
        f"rank {result['rank']}: peak {peak / _GIB:.2f} GiB (planned {planned_peak / _GIB:.2f}, "
        f"{_percent(peak, planned_peak)}); forward and backward {took:.3f} s ({beside}); "
        f"optimizer {1e3 * result['optimizer_s']:.1f} ms; built in {result['build_s']:.1f} s"
    )


def _percent(found: float, planned: float) -> str:
    return f"{100 * (found / planned - 1):+.1f} %"


def rank_report(result: dict[str, Any]) -> str:
    """A result as a page: bytes beside the plan, and times."""
    place = ", ".join(f"{name} {index}" for name, index in result["place"].items())
    held, planned = result["held_bytes"], result["planned_bytes"]
    dynamic = [
        f"{name} {size / _MIB:,.1f}" for name, size in result["planned_memory_parts"].items() if name not in held
    ]
    return "\n".join(
        [
            f"# Rank {result['rank']} ({place}) alone",
            "",
            "| MiB | here | planned |",
            "|---|---:|---:|",
            *(f"| {name} | {held[name] / _MIB:,.2f} | {planned[name] / _MIB:,.2f} |" for name in held),
            f"| all of these | {sum(held.values()) / _MIB:,.2f} | {sum(planned.values()) / _MIB:,.2f} |",
            f"| of the weights, embedding and head | {result['embedding_and_head_bytes'] / _MIB:,.2f} | |",
            f"| peak of the process | {result['peak_memory_bytes'] / _MIB:,.1f} | |",
            "",
            f"Planned beside them, MiB: {'; '.join(dynamic)}.",
            "",
            f"{result['micro_batches']} micro-batches of {result['micro_batch_size']} x {result['sequence_length']} "
            f"tokens, median of {result['steps']} steps: forward and backward {result['forward_backward_s']:.3f} s, "
            f"optimizer {result['optimizer_s']:.3f} s. Communication takes no time here.",
            "",
            rank_line(result),
        ]
    )
