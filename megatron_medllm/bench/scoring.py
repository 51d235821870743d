"""`medllm bench scoring`: how fast the reference's log-probabilities are computed, as `medllm score` does it."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_medllm.bench.harness import (
    BenchSettings,
    Measured,
    both_flops,
    local_work,
    measured_window,
    require_steps,
    total_work,
    write_model_result,
)
from megatron_medllm.bench.synthetic import with_synthetic_data
from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import RpoConfig
from megatron_medllm.parallel import runtime
from megatron_medllm.planner.from_config import workload_of
from megatron_medllm.train.scoring import build_reference, load_run_pairs, pack_batch, score_streams
from megatron_medllm.train.throughput import StepClock


def measure_scoring(run: RunConfig, settings: BenchSettings) -> Path:
    """Score `rpo.global_batch_size` pairs a step on the ranks that are here; write OUTPUT/scoring.json. Collective.

    Raises:
        UserError: the recipe has no section rpo, or fewer pairs than the steps need.
    """
    run = run.model_copy(update={"stage": "rpo"})
    ranks = runtime.start(run.layout, seed=run.seed)
    try:
        if settings.synthetic is not None:
            run = with_synthetic_data(
                run, settings.output / "synthetic", settings.synthetic, steps=settings.all_steps, ranks=ranks
            )
        config = run.stage_config()
        assert isinstance(config, RpoConfig)
        rows = measured_window(_scorer(run, config, settings, ranks), settings, ranks.device)
        return write_model_result("scoring", run, settings, rows, ranks)
    finally:
        runtime.stop()


def _scorer(
    run: RunConfig, config: RpoConfig, settings: BenchSettings, ranks: runtime.Runtime
) -> Callable[[int], Measured]:
    """A function that scores a step's pairs."""
    pairs, size = load_run_pairs(run, config).pairs, config.global_batch_size
    require_steps(len(pairs) // size, settings)
    chunks = build_reference(run, config, ranks)
    workload = workload_of(run)

    def step(index: int) -> Measured:
        batch = pairs[index * size : (index + 1) * size]
        dist.barrier()
        clock = StepClock()
        with clock.part("data"):
            streams = pack_batch(batch, run, config, ranks)
        with clock.part("forward"):
            score_streams(streams, [pair.row for pair in batch], run, config, ranks, chunks)
        seconds = clock.seconds()
        work = total_work([local_work(stream, unit="pairs") for stream in streams], ranks)
        return Measured(
            seconds=seconds,
            parts=clock.parts,
            tokens=work.tokens,
            padding=work.padding,
            counts={"pairs": len(batch), "loss_tokens": work.loss_tokens},
            flops=both_flops(workload, work, forward_only=True),
        )

    return step
