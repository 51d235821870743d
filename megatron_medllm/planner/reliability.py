"""Failures and checkpoints: how often to save, and how much of the wall clock still trains.

Young 1974 gives the interval sqrt(2 C M) for a save of C seconds and a mean time M between failures; Daly 2006
(Future Generation Computer Systems 22, eq. 37 and 20) refines it and gives the expected wall time with restarts.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Reliability:
    """Seconds, for the whole job; `efficiency` is training time over expected wall time."""

    mtbf_s: float
    young_interval_s: float
    daly_interval_s: float
    efficiency: float


def young_interval(*, save_time_s: float, mtbf_s: float) -> float:
    """Young's first-order optimum of the time between saves, in seconds."""
    return math.sqrt(2 * save_time_s * mtbf_s)


def daly_interval(*, save_time_s: float, mtbf_s: float) -> float:
    """Daly's higher-order optimum of the time between saves, in seconds (his eq. 37)."""
    if save_time_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_time_s / (2 * mtbf_s)
    return math.sqrt(2 * save_time_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_time_s


def expected_efficiency(*, interval_s: float, save_time_s: float, restart_time_s: float, mtbf_s: float) -> float:
    """Training time over expected wall time with exponential failures (Daly's eq. 20), 0 to 1."""
    wall = mtbf_s * math.exp(restart_time_s / mtbf_s) * math.expm1((interval_s + save_time_s) / mtbf_s)
    return interval_s / wall


def reliability(*, gpus: int, mtbf_gpu_hours: float, save_time_s: float, restart_time_s: float) -> Reliability:
    """The optimum for `gpus` GPUs that each fail once in `mtbf_gpu_hours`, independently."""
    mtbf = mtbf_gpu_hours * 3600 / gpus
    interval = daly_interval(save_time_s=save_time_s, mtbf_s=mtbf)
    efficiency = expected_efficiency(
        interval_s=interval, save_time_s=save_time_s, restart_time_s=restart_time_s, mtbf_s=mtbf
    )
    return Reliability(mtbf, young_interval(save_time_s=save_time_s, mtbf_s=mtbf), interval, efficiency)
