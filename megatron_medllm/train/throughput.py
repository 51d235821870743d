"""How fast a step was: its parts in seconds, tokens/s, and model FLOPs utilisation by both conventions."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megatron_medllm.config.run import RunConfig
from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.planner.flops import model_flops_per_token, packed_flops
from megatron_medllm.planner.from_config import workload_of
from megatron_medllm.planner.hardware import load_hardware
from megatron_medllm.planner.workload import Workload

# A point in time: of the host, or on CUDA of the device's queue, which the host does not wait for.
_Mark = float | torch.cuda.Event


class StepClock:
    """Seconds of a step and of its named parts.

    Args:
        on_part: told each part's name as the host begins it, and "" as the host ends it.
    """

    def __init__(self, on_part: Callable[[str], None] | None = None) -> None:
        self._on_part = on_part or (lambda _: None)
        self._started = time.monotonic()
        self._spans: dict[str, tuple[_Mark, _Mark]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block: on CUDA its kernels, and nothing is waited for."""
        start = _mark()
        self._on_part(name)
        yield
        self._spans[name] = (start, _mark())
        self._on_part("")

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each part that has ended; on CUDA this waits for the last one's kernels."""
        return {name: _seconds_between(*span) for name, span in self._spans.items()}

    def seconds(self) -> float:
        """Since the step began."""
        return time.monotonic() - self._started


def _mark() -> _Mark:
    if not torch.cuda.is_available():
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(start: _Mark, end: _Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)  # type: ignore[arg-type]  # both are of one kind
    end.synchronize()
    return start.elapsed_time(end) / 1e3


# What torch calls a device, in full -> the planner's description of it. Others of a family (H100 PCIe and NVL, H800,
# H20, GH200, a slice of a GPU) have other peaks.
_DEVICES = {
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
}


class Throughput:
    """Turns tokens and seconds into rates.

    FLOPs by two conventions: `packed` counts the (query, key) pairs that documents really attend to; `megatron` counts
    full squares over the sequence, masked halves included, as Megatron's logs do. MFU is the rate over the peak of the
    layers' precision, where the device is a known one.
    """

    def __init__(self, run: RunConfig, runtime: Runtime) -> None:
        self._world_size, self._device = runtime.world_size, runtime.device
        self._workload = workload_of(run)
        hardware = hardware_of_device(runtime.device)
        self._peak_flops = None if hardware is None else peak_flops(self._workload, hardware)

    def of(self, metrics: dict[str, float], clock: StepClock) -> dict[str, float]:
        """Rates per second and per GPU, step_time_s and its parts, and peak memory of the main process."""
        parts, seconds = clock.parts, clock.seconds()
        tokens = metrics["tokens"]
        flops = {"megatron": model_flops_per_token(self._workload, causal=False) * tokens}
        if "attended" in metrics:
            flops["packed"] = packed_flops(self._workload, tokens=int(tokens), attended=int(metrics["attended"]))
        flops_per_s = {name: total / seconds / self._world_size for name, total in flops.items()}
        return {
            "tokens_per_s": tokens / seconds,
            "tokens_per_s_per_gpu": tokens / seconds / self._world_size,
            "step_time_s": seconds,
            **{f"{name}_s": value for name, value in parts.items()},
            **{f"tflops_per_s_per_gpu_{name}": rate / 1e12 for name, rate in flops_per_s.items()},
            **(
                {f"mfu_{name}": rate / self._peak_flops for name, rate in flops_per_s.items()}
                if self._peak_flops
                else {}
            ),
            "peak_memory_bytes": float(peak_memory_bytes(self._device)),
        }


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes of this process: allocated on the GPU, else resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def hardware_of_device(device: torch.device) -> str | None:
    """The planner's name of a device; None where it knows none."""
    return _DEVICES.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops(workload: Workload, hardware: str) -> float:
    """FLOP/s that MFU is measured against: the peak of the layers' precision.

    Raises:
        UserError: the planner has no such hardware.
    """
    machine = load_hardware(hardware)
    return machine.peak_fp8_flops if workload.fp8_products and machine.peak_fp8_flops else machine.peak_bf16_flops
