"""What Linux says about this process and its processor, for the benchmarks in `tools/`."""

import platform
import resource
from pathlib import Path


def cpu_model() -> str:
    """As /proc/cpuinfo calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_seconds() -> float:
    """User + system time of all threads so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def system_seconds() -> float:
    """The kernel's part of `cpu_seconds`: mostly pages handed out and zeroed."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_stime


def resident_mib() -> float:
    """Memory that the process holds now."""
    return _status_mib("VmRSS")


def peak_mib() -> float:
    """The most that it held since it began or since `reset_peak`."""
    return _status_mib("VmHWM")


def reset_peak() -> None:
    """Forget the peak: it starts again at what the process holds."""
    Path("/proc/self/clear_refs").write_text("5")


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
