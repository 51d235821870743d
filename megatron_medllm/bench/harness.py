"""What every benchmark shares: a warm-up, a measured window, and everything that a reader needs to check the number."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_medllm.bench.environment import environment_facts
from megatron_medllm.bench.profile import profile_report, profile_step
from megatron_medllm.bench.report import throughput_report, write_bench_page
from megatron_medllm.bench.synthetic import SyntheticData
from megatron_medllm.config.run import RunConfig
from megatron_medllm.data.microbatch import IGNORED, MicroBatch
from megatron_medllm.errors import UserError
from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.planner.flops import model_flops_per_token, packed_flops
from megatron_medllm.planner.from_config import workload_of
from megatron_medllm.planner.workload import Workload
from megatron_medllm.storage import atomic_write, write_json
from megatron_medllm.train.throughput import hardware_of_device, peak_flops, peak_memory_bytes

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """`output` is a directory; `synthetic` makes up data and weights; `hardware` names the peak for MFU.

    `profile` adds a step behind the window, and where its time went as OUTPUT/profile.md and .json.
    """

    output: Path
    warmup_steps: int = 3
    steps: int = 10
    synthetic: SyntheticData | None = None
    hardware: str | None = None
    profile: bool = False

    @property
    def all_steps(self) -> int:
        """Steps that are run."""
        return self.warmup_steps + self.steps + int(self.profile)


@dataclass(frozen=True)
class Work:
    """What one step's micro-batches hold, over all replicas. `attended` counts (query, key) pairs."""

    tokens: int
    padding: int
    loss_tokens: int
    attended: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One step: its seconds, as a whole and by part, and what was done in them, over all replicas."""

    seconds: float
    parts: dict[str, float]
    tokens: int
    padding: int
    counts: dict[str, float]  # what else is reported per second: pairs, samples, ...
    flops: dict[str, float]  # by convention; empty where they say little
    loss: float | None = None


def measured_window(step: Callable[[int], T], settings: BenchSettings, device: torch.device) -> list[T]:
    """Run the warm-up and the window, and return the window's steps. Peak memory counts from the window's start."""
    for index in range(settings.warmup_steps):
        step(index)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    end = settings.warmup_steps + settings.steps
    rows = [step(index) for index in range(settings.warmup_steps, end)]
    if settings.profile:
        profiled = profile_step(lambda: step(end))
        if not dist.is_initialized() or dist.get_rank() == 0:
            write_json(settings.output / "profile.json", profiled)
            with atomic_write(settings.output / "profile.md") as stream:
                stream.write((profile_report(profiled) + "\n").encode())
    return rows


def free_device_memory() -> None:
    """Give back what a model that nobody holds any more took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def require_steps(available: int, settings: BenchSettings) -> None:
    """Raises UserError where the data do not last for the steps asked for."""
    if available < settings.all_steps:
        raise UserError(f"the data fill {available} steps, {settings.all_steps} are needed; see --synthetic")


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


def total_work(parts: list[Work], ranks: Runtime) -> Work:
    """Summed over micro-batches and replicas; of each replica one rank counts."""
    names = ("tokens", "padding", "loss_tokens", "attended")
    sums = torch.tensor([sum(getattr(w, n) for w in parts) for n in names], dtype=torch.int64, device=ranks.device)
    if ranks.tp_rank or ranks.pp_rank or ranks.cp_rank:
        sums.zero_()
    dist.all_reduce(sums)
    return Work(*sums.tolist())


def both_flops(workload: Workload, work: Work, *, forward_only: bool) -> dict[str, float]:
    """A step's FLOPs by both conventions."""
    per_token = model_flops_per_token(workload, causal=False, forward_only=forward_only)
    return {
        "packed": packed_flops(workload, tokens=work.tokens, attended=work.attended, forward_only=forward_only),
        "megatron": per_token * (work.tokens + work.padding),
    }


def summarize(
    name: str,
    run: RunConfig,
    settings: BenchSettings,
    rows: list[Measured],
    *,
    device: torch.device,
    world_size: int,
    facts: dict[str, Any],
    peak: float | None = None,
) -> dict[str, Any]:
    """The result: rates over the whole window, medians of the parts, and the circumstances.

    Args:
        name: what was measured: throughput (of training), scoring or generation.
        run: as it was measured.
        settings: of the benchmark.
        rows: the window's steps.
        device: of this process.
        world_size: devices that did the work.
        facts: what this kind of benchmark adds.
        peak: FLOP/s of a device, for MFU.
    """
    seconds = [row.seconds for row in rows]
    window = sum(seconds)
    tokens, padding = sum(row.tokens for row in rows), sum(row.padding for row in rows)
    rates = {n: sum(row.flops[n] for row in rows) / window / world_size for n in rows[0].flops}
    result: dict[str, Any] = {
        "bench": name,
        **facts,
        "steps": len(rows),
        "warmup_steps": settings.warmup_steps,
        "world_size": world_size,
        "tokens_per_s": tokens / window,
        "tokens_per_s_per_gpu": tokens / window / world_size,
        "padded_tokens_per_s_per_gpu": (tokens + padding) / window / world_size,
        "padding_share": padding / (tokens + padding),
        **{f"{n}_per_s": sum(row.counts[n] for row in rows) / window for n in rows[0].counts},
        "step_time_s": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
        "parts_s": {n: statistics.median(row.parts[n] for row in rows) for n in rows[0].parts},
        "flops_per_s_per_gpu": rates,
        "peak_memory_bytes": peak_memory_bytes(device),
        "losses": [row.loss for row in rows if row.loss is not None],
        "synthetic": settings.synthetic and asdict(settings.synthetic),
        "environment": environment_facts(device),
        "config": run.model_dump(mode="json"),
    }
    if peak is not None:
        result |= {"mfu": {n: rate / peak for n, rate in rates.items()}, "peak_flops": peak}
    return result


def write_model_result(
    name: str, run: RunConfig, settings: BenchSettings, rows: list[Measured], ranks: Runtime
) -> Path:
    """Write what was measured of a Megatron model: its layout and workload too, and MFU on a known device. Collective.

    Raises:
        UserError: the planner does not know the hardware that was named.
    """
    workload = workload_of(run)
    hardware = settings.hardware or hardware_of_device(ranks.device)
    facts = {
        "stage": run.stage,
        "layout": run.layout.model_dump(),
        "workload": {"mode": workload.mode, "precision": workload.precision, "objective": workload.objective},
    }
    peak = None if hardware is None else peak_flops(workload, hardware)
    result = summarize(
        name, run, settings, rows, device=ranks.device, world_size=ranks.world_size, facts=facts, peak=peak
    )
    if ranks.is_main:
        write_result(result, settings.output)
    dist.barrier()
    return result_path(name, settings.output)


def result_path(name: str, output: Path) -> Path:
    """Where a benchmark's result lies."""
    return output / f"{name}.json"


def write_result(result: dict[str, Any], output: Path) -> Path:
    """Write OUTPUT/NAME.json, and beside it the table as NAME.md and NAME.html; the JSON file's path."""
    path = result_path(result["bench"], output)
    write_json(path, result)
    with atomic_write(path.with_suffix(".md")) as stream:
        stream.write((throughput_report(result) + "\n").encode())
    write_bench_page(path.with_suffix(".html"), result)
    return path
