"""Decisions that every process must take alike."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

LONGEST_PAUSE_S = 0.5


def all_say(yes: bool) -> bool:
    """Whether every process says yes. Collective."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor([int(yes)], dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def wait_for_all(done: Callable[[], bool]) -> None:
    """Return once `done` is true on every process. Collective.

    They ask each other again and again: one that is done would otherwise wait in a single collective for as long as the
    slowest takes, and a large file on a slow disk takes longer than a process group's timeout.
    """
    pause_s = 0.002
    while not all_say(done()):
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
