"""Where the device's time goes in one step, from torch's profiler: kernels by kind, and waiting for the host."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
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
_LISTED, _LISTED_GAPS = 25, 5
# Calls of CUDA's runtime in which the host waits for the device. A copy from or to pageable memory ends with one.
_SYNCHRONIZING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def profile_step(step: Callable[[], Any]) -> dict[str, Any]:
    """Run one step under the profiler. On CUDA only kernels and runtime calls are recorded: that hardly slows the host.

    Args:
        step: does the work and waits for the device.

    Returns:
        `kinds_s`: seconds of device time by kind of kernel; on a machine without CUDA, of CPU time by operator.
        `top`: the costliest kernels, each with name, calls and seconds.
        `wall_s`: of the step. On CUDA also `busy_s`, in which at least one kernel or copy ran, `gap_s`, the rest of
        wall_s, `gaps`, the longest spans between kernels, and `syncs`, the calls that wait for the device.
    """
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        started = time.perf_counter()
        step()
        wall_s = time.perf_counter() - started
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    # A user's annotation (an optimizer's step, a collective) is drawn over the kernels that it holds: it is none.
    events = [e for e in recorded.key_averages() if e.device_type == wanted and not (cuda and e.is_user_annotation)]
    kinds: defaultdict[str, float] = defaultdict(float)
    rows = []
    for event in events:
        seconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        kinds[_kind(event.key)] += seconds
        rows.append({"name": event.key[:120], "calls": event.count, "seconds": seconds})
    rows.sort(key=lambda row: -row["seconds"])
    profiled = {"kinds_s": dict(sorted(kinds.items(), key=lambda item: -item[1])), "top": rows[:_LISTED]}
    return profiled | {"wall_s": wall_s} | (_timeline(recorded.events() or [], wall_s) if cuda else {})


def _timeline(events: Sequence[Any], wall_s: float) -> dict[str, Any]:
    """Busy and waiting time, the longest gaps and the waiting calls of one recorded step."""
    kernels = [
        (e.time_range.start, e.time_range.end, e.name)
        for e in events
        if e.device_type == DeviceType.CUDA and not e.is_user_annotation
    ]
    busy_us, gaps = busy_and_gaps(kernels)
    syncs = Counter(e.name for e in events if e.device_type == DeviceType.CPU and e.name in _SYNCHRONIZING)
    return {
        "busy_s": busy_us / 1e6,
        "gap_s": wall_s - busy_us / 1e6,
        "gaps": [{"seconds": us / 1e6, "after": a[:80], "before": b[:80]} for us, a, b in gaps[:_LISTED_GAPS]],
        "syncs": dict(syncs),
    }


def busy_and_gaps(kernels: Sequence[tuple[float, float, str]]) -> tuple[float, list[tuple[float, str, str]]]:
    """What the union of spans covers, and the gaps in it.

    Args:
        kernels: (start, end, name) in any order and any one unit; kernels of several streams may overlap.

    Returns:
        the covered time, and the gaps as (length, kernel that ended last before it, kernel that began after it), the
        longest first.
    """
    busy, gaps = 0.0, []
    last_end, last_name = None, ""
    for start, end, name in sorted(kernels):
        if last_end is None or start > last_end:
            if last_end is not None:
                gaps.append((start - last_end, last_name, name))
            busy += end - start
        else:
            busy += max(0.0, end - last_end)
        if last_end is None or end > last_end:
            last_end, last_name = end, name
    return busy, sorted(gaps, key=lambda gap: -gap[0])


def _kind(kernel: str) -> str:
    lowered = kernel.lower()
    return next((kind for part, kind in _KINDS if part in lowered), "element-wise and reductions")


def profile_report(profiled: dict[str, Any]) -> str:
    """The profile as Markdown tables."""
    total = sum(profiled["kinds_s"].values()) or 1.0
    lines = ["| kind | ms | share |", "|---|---|---|"]
    lines += [f"| {kind} | {s * 1e3:.2f} | {100 * s / total:.1f} % |" for kind, s in profiled["kinds_s"].items()]
    lines += ["", "| kernel | calls | ms |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['calls']} | {row['seconds'] * 1e3:.2f} |" for row in profiled["top"]]
    if "busy_s" in profiled:
        wall, busy, gap = (1e3 * profiled[name] for name in ("wall_s", "busy_s", "gap_s"))
        waited = f"waited for {gap:.1f} ({100 * gap / wall:.1f} %)"
        lines += ["", f"Of {wall:.1f} ms the device was busy for {busy:.1f} and {waited}."]
        calls = ", ".join(f"{name} {count}" for name, count in profiled["syncs"].items()) or "none"
        lines += [f"Calls that waited for the device: {calls}.", "", "| gap ms | after | before |", "|---|---|---|"]
        lines += [f"| {gap['seconds'] * 1e3:.2f} | {gap['after']} | {gap['before']} |" for gap in profiled["gaps"]]
    return "\n".join(lines)
