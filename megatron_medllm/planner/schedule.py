"""The pipeline schedules of Megatron-Core, simulated: how long a step takes, and how much each stage keeps alive.

`1F1B` and interleaved orders are Narayanan et al. 2021 (arXiv 2104.04473, section 2.2), in the form that
megatron.core's `pipeline_parallel/schedules.py` runs them. With equal stages and no communication the idle share of a
step is (p - 1) / m of the useful time for 1F1B, and (p - 1) / (m v) interleaved; tests hold the simulation to that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Pass(NamedTuple):
    """One micro-batch through one model chunk, forward or backward."""

    forward: bool
    microbatch: int
    chunk: int


@dataclass(frozen=True)
class PipelineTrace:
    """What the simulation found. Times in seconds, `[stage]` lists."""

    step_time_s: float
    busy_time_s: tuple[float, ...]
    peak_in_flight: tuple[int, ...]

    @property
    def bubble_fraction(self) -> float:
        """Idle time of the busiest stage, relative to its busy time: the papers' bubble fraction."""
        busiest = max(self.busy_time_s)
        return (self.step_time_s - busiest) / busiest


def stage_order(*, stage: int, pp: int, vpp: int, num_microbatches: int) -> list[Pass]:
    """The passes that `stage` executes, in order."""
    if pp == 1:
        return [Pass(forward, m, 0) for m in range(num_microbatches) for forward in (True, False)]
    forwards = _chunk_order(pp=pp, vpp=vpp, num_microbatches=num_microbatches)
    total = len(forwards)
    warmup = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    warmup = min(warmup, total)
    order = [Pass(True, m, c) for m, c in forwards[:warmup]]
    backwards = [Pass(False, m, vpp - 1 - c) for m, c in forwards]
    for i, (microbatch, chunk) in enumerate(forwards[warmup:]):
        order += [Pass(True, microbatch, chunk), backwards[i]]
    return order + backwards[total - warmup :]


def _chunk_order(*, pp: int, vpp: int, num_microbatches: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk) in forward order: groups of pp micro-batches, each group through all chunks in turn."""
    order = []
    for first in range(0, num_microbatches, pp):
        group = range(first, min(first + pp, num_microbatches))
        order += [(m, chunk) for chunk in range(vpp) for m in group]
    return order


def simulate(
    *,
    pp: int,
    vpp: int,
    num_microbatches: int,
    pass_time_s: Callable[[bool, int, int], float],
    transfer_time_s: float = 0.0,
) -> PipelineTrace:
    """Run the schedule on a clock.

    Args:
        pass_time_s: seconds of one pass, from (forward, stage, chunk).
        transfer_time_s: seconds until a stage's output is at its neighbour; the sender does not wait.
    """
    orders = [stage_order(stage=s, pp=pp, vpp=vpp, num_microbatches=num_microbatches) for s in range(pp)]
    done: dict[tuple[Pass, int], float] = {}
    clock, busy, position = [0.0] * pp, [0.0] * pp, [0] * pp
    remaining = sum(map(len, orders))
    while remaining:
        progressed = False
        for stage in range(pp):
            while position[stage] < len(orders[stage]):
                work = orders[stage][position[stage]]
                source = _source(work, stage, pp=pp, vpp=vpp)
                if source is not None and source not in done:
                    break
                ready = 0.0 if source is None else done[source] + (transfer_time_s if source[1] != stage else 0.0)
                duration = pass_time_s(work.forward, stage, work.chunk)
                clock[stage] = max(clock[stage], ready) + duration
                busy[stage] += duration
                done[(work, stage)] = clock[stage]
                position[stage] += 1
                remaining -= 1
                progressed = True
        assert progressed, "the schedule waits for itself"
    return PipelineTrace(max(clock), tuple(busy), tuple(peak_in_flight(order) for order in orders))


def _source(work: Pass, stage: int, *, pp: int, vpp: int) -> tuple[Pass, int] | None:
    """The pass, and its stage, whose output `work` on `stage` needs."""
    _, microbatch, chunk = work
    if work.forward:
        if stage > 0:
            return work, stage - 1
        return None if chunk == 0 else (Pass(True, microbatch, chunk - 1), pp - 1)
    if stage < pp - 1:
        return work, stage + 1
    if chunk == vpp - 1:
        return Pass(True, microbatch, chunk), stage
    return Pass(False, microbatch, chunk + 1), 0


def peak_in_flight(order: list[Pass]) -> int:
    """The most forward passes whose activations are alive at once, over all chunks of the stage."""
    alive = peak = 0
    for work in order:
        alive += 1 if work.forward else -1
        peak = max(peak, alive)
    return peak
