"""Where the device's time goes in one step: its kernels by kind, communication among them, from torch's profiler."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Part of a kernel's (on a CPU: an operator's) name -> kind; the first that fits counts. cuBLAS names its Hopper kernels
# nvjet.
_KINDS = (
    ("nccl", "communication"),
    ("gloo", "communication"),
    ("c10d", "communication"),
    ("flash", "attention"),
    ("fmha", "attention"),
    ("nvjet", "matrix products"),
    ("gemm", "matrix products"),
    ("cutlass", "matrix products"),
    ("xmma", "matrix products"),
    ("::mm", "matrix products"),
    ("::addmm", "matrix products"),
    ("::bmm", "matrix products"),
    ("memcpy", "copies and fills"),
    ("memset", "copies and fills"),
)
_LISTED = 25


def profile_step(step: Callable[[], Any]) -> dict[str, Any]:
    """Run one step under the profiler, which slows the host down: read shares from it, not rates.

    Args:
        step: does the work and waits for the device.

    Returns:
        `kinds_s`: seconds of device time by kind of kernel; on a machine without CUDA, of CPU time by operator.
        `top`: the costliest kernels, each with name, calls and seconds.
    """
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        step()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [event for event in recorded.key_averages() if event.device_type == wanted]
    kinds: defaultdict[str, float] = defaultdict(float)
    rows = []
    for event in events:
        seconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        kinds[_kind(event.key)] += seconds
        rows.append({"name": event.key[:120], "calls": event.count, "seconds": seconds})
    rows.sort(key=lambda row: -row["seconds"])
    return {"kinds_s": dict(sorted(kinds.items(), key=lambda item: -item[1])), "top": rows[:_LISTED]}


def _kind(kernel: str) -> str:
    lowered = kernel.lower()
    return next((kind for part, kind in _KINDS if part in lowered), "element-wise and reductions")


def profile_report(profiled: dict[str, Any]) -> str:
    """The profile as two Markdown tables."""
    total = sum(profiled["kinds_s"].values()) or 1.0
    lines = ["| kind | ms | share |", "|---|---|---|"]
    lines += [f"| {kind} | {s * 1e3:.2f} | {100 * s / total:.1f} % |" for kind, s in profiled["kinds_s"].items()]
    lines += ["", "| kernel | calls | ms |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['calls']} | {row['seconds'] * 1e3:.2f} |" for row in profiled["top"]]
    return "\n".join(lines)
