"""Optimizer steps of a run inside this process, as the loop takes them, with nothing written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_medllm.config.run import RunConfig


@contextmanager
def steps_of(run: RunConfig) -> Iterator[Callable[[int], Any]]:
    """A function that takes step number k and gives its result (`StepResult`); the runtime ends with the block."""
    from megatron_medllm.parallel import mcore, runtime
    from megatron_medllm.train.one_step import run_step
    from megatron_medllm.train.setup import build_trainer
    from megatron_medllm.train.throughput import StepClock

    ranks = runtime.start(run.layout, seed=run.seed, timeout_s=60)
    try:
        trainer = build_trainer(run, ranks)
        try:
            yield lambda step: run_step(trainer, step, StepClock())
        finally:
            mcore.release(trainer.chunks)
    finally:
        runtime.stop()
