"""Reasons to stop early, agreed on by all processes: a signal from Slurm, or the end of the allotted time."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from megatron_medllm.config.cluster import seconds_of
from megatron_medllm.config.train import GuardConfig
from megatron_medllm.errors import UserError
from megatron_medllm.parallel.runtime import Runtime

WALLTIME_VARIABLE = "MEDLLM_WALLTIME_S"
_MARGIN = 1.5  # a save and a step may take this much longer than any before


class StopRequests:
    """Collects signals and watches the clock.

    Args:
        started: `time.monotonic()` where the allotted time began.
    """

    def __init__(self, guard: GuardConfig, started: float) -> None:
        walltime = guard.walltime_s or allotted_s()
        self._deadline = started + walltime
        self._signal: str | None = None
        self._longest_step_s = 0.0
        self._longest_save_s = 0.0
        self._longest_validation_s = 0.0

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Remember the signal; the loop acts on it after the step."""
        self._signal = signal.Signals(number).name

    def note_step(self, seconds: float) -> None:
        """Learn how long a step takes."""
        self._longest_step_s = max(self._longest_step_s, seconds)

    def note_save(self, seconds: float) -> None:
        """Learn how long a save takes."""
        self._longest_save_s = max(self._longest_save_s, seconds)

    def note_validation(self, seconds: float) -> None:
        """Learn how long a validation takes; one may come before the next save."""
        self._longest_validation_s = max(self._longest_validation_s, seconds)

    def is_late(self) -> bool:
        """Whether one more step, a validation and a save might not fit the allotted time."""
        needed_s = _MARGIN * (self._longest_step_s + self._longest_validation_s + self._longest_save_s)
        return time.monotonic() + needed_s > self._deadline

    def reason(self, runtime: Runtime) -> str | None:
        """Why the run should save and stop now; the same answer on every process. Collective."""
        votes = torch.tensor([self._signal is not None, self.is_late()], dtype=torch.int32, device=runtime.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        signalled, late = votes.tolist()
        if signalled:
            return self._signal or "a signal on another process"
        return "the time limit" if late else None


def allotted_s() -> float:
    """Seconds that the environment allots to this run, in seconds or as 12:00:00; infinite if it says nothing.

    Raises:
        UserError: it says something else.
    """
    text = os.environ.get(WALLTIME_VARIABLE, "inf")
    try:
        seconds = float(seconds_of(text))
    except ValueError:
        seconds = float("nan")
    if not seconds > 0:
        raise UserError(f"{WALLTIME_VARIABLE}={text}: expected seconds, or a time such as 12:00:00")
    return seconds


@contextmanager
def stop_requests(guard: GuardConfig, started: float) -> Iterator[StopRequests]:
    """Listen for SIGTERM and SIGUSR1 while the block runs; the allotted time began at `time.monotonic()` `started`."""
    requests = StopRequests(guard, started)
    previous = {number: signal.signal(number, requests.on_signal) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
