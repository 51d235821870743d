"""Starts this machine's processes when a command needs more than one and nobody else started them."""

import math
import os
import signal
import subprocess
import sys
import time
from types import FrameType

from megatron_medllm.config.cluster import REQUEUE_EXIT_CODE, STALLED_EXIT_CODE
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.errors import UserError

# After a rank has failed the others get this long to end, as srun gives them (slurm/env.sh).
SHUTDOWN_TIMEOUT_S = 120.0


def start_ranks_if_needed(layout: LayoutConfig) -> None:
    """Go on as the one rank there is, or run this command again as every rank of the layout and end with it.

    Raises:
        SystemExit: the ranks have run; with their status.
        UserError: as `needed`.
    """
    processes = needed(layout)
    if processes:
        sys.exit(run_local_ranks(sys.argv[1:], processes=processes))


def needed(layout: LayoutConfig) -> int:
    """Processes to start here: 0 when an outer launcher started them already, or one is enough.

    Raises:
        UserError: the layout spans several nodes, which only srun or torchrun on each can start.
    """
    if "WORLD_SIZE" in os.environ or layout.world_size == 1:
        return 0
    if layout.nodes > 1:
        raise UserError(
            f"layout.nodes={layout.nodes}: start this command on every node (medllm submit, srun or torchrun do)"
        )
    return layout.world_size


def run_local_ranks(arguments: list[str], *, processes: int) -> int:
    """Run `medllm ARGUMENTS` as that many ranks; signals are passed on to them.

    Returns:
        the exit status of the first rank that failed, else 0. (torchrun itself would turn every failure into 1.)
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_medllm", *arguments],
            env=environment | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]

    def pass_on(number: int, _: FrameType | None) -> None:
        for rank in ranks:
            rank.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, pass_on)
    return wait_for_ranks(ranks)


def wait_for_ranks(ranks: list[subprocess.Popen]) -> int:
    """Wait for all ranks; when one fails, end the others, which would wait for it until their timeout.

    Returns:
        STALLED_EXIT_CODE if any rank ended with that (the rank that it found silent has been killed, perhaps before);
        else the exit status of the first that failed, 128 + N for one killed by signal N; else 0.
    """
    status, stalled, deadline = 0, False, math.inf
    waiting = list(ranks)
    while waiting:
        for rank in list(waiting):
            try:
                code = rank.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
            waiting.remove(rank)
            if code == STALLED_EXIT_CODE:
                stalled = True
            if code and not status:
                status = code
                if code != REQUEUE_EXIT_CODE:
                    for other in waiting:
                        other.terminate()
                    deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
        if time.monotonic() > deadline:  # a stopped process never sees SIGTERM, a hung one never acts on it
            for other in waiting:
                other.kill()
    if stalled:
        return STALLED_EXIT_CODE
    return status if status >= 0 else 128 - status


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
