"""How fast a step was: its parts in seconds, tokens/s, and model FLOPs utilisation by both conventions."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_medllm.config.run import RunConfig
from megatron_medllm.parallel.runtime import Runtime


class StepClock:
    """Seconds of a step and of its named parts."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block; on CUDA up to the end of its kernels."""
        started = time.monotonic()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.parts[name] = time.monotonic() - started

    def seconds(self) -> float:
        """Since the step began."""
        return time.monotonic() - self._started


class Throughput:
    """Turns tokens and seconds into rates."""

    def __init__(self, run: RunConfig, runtime: Runtime) -> None:
        self._world_size, self._device = runtime.world_size, runtime.device

    def of(self, metrics: dict[str, float], clock: StepClock) -> dict[str, float]:
        """tokens_per_s, tokens_per_s_per_gpu, step_time_s, its parts, and peak memory of the main process."""
        seconds = clock.seconds()
        rate = metrics["tokens"] / seconds
        return {
            "tokens_per_s": rate,
            "tokens_per_s_per_gpu": rate / self._world_size,
            "step_time_s": seconds,
            **{f"{name}_s": value for name, value in clock.parts.items()},
            "peak_memory_bytes": self._peak_memory_bytes(),
        }

    def _peak_memory_bytes(self) -> float:
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
