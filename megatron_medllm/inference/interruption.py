"""Ending in time: Slurm says with USR1 that the time limit nears, and another start goes on where this one stopped."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_medllm.config.cluster import REQUEUE_EXIT_CODE


@contextmanager
def resumable() -> Iterator[None]:
    """While the block runs, USR1 ends it with the exit status that asks for another start; answers lie in their log."""
    before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(REQUEUE_EXIT_CODE))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
