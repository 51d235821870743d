"""Starts the processes of a distributed test: a module of its own, run once per rank as torchrun would run it."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

REPOSITORY = Path(__file__).parents[2]
_PORTS = "MEDLLM_TEST_PORTS"


def run_ranks(world_size: int, module: str, *arguments: str, timeout_s: float, runtimes: int = 1) -> None:
    """Run `python -m module arguments...` as that many ranks on this machine.

    Args:
        world_size: number of ranks.
        module: importable from the repository's root.
        arguments: the same for every rank.
        timeout_s: after which the ranks are ended.
        runtimes: how many process groups the module starts one after the other, each after `next_rendezvous`.

    Raises:
        AssertionError: a rank failed or the time ran out; shows the output of the rank that failed first.
    """
    # The stores live here: a port picked now and bound later could be lost, and a store used twice holds stale keys.
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(runtimes)]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(stores[0].port),
        _PORTS: ",".join(str(store.port) for store in stores),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    with tempfile.TemporaryDirectory() as directory:
        logs = [Path(directory, f"rank{rank}.log") for rank in range(world_size)]
        ranks = [_start(rank, log, module, arguments, shared) for rank, log in enumerate(logs)]
        try:
            culprit = _first_failure(ranks, deadline=time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if culprit is not None:
            reason = "failed" if culprit.returncode != -signal.SIGKILL else f"gave no answer in {timeout_s} s"
            rank = ranks.index(culprit)
            raise AssertionError(f"rank {rank} of {world_size} {reason}:\n{logs[rank].read_text()[-6000:]}")


def next_rendezvous() -> None:
    """In a rank: give the next process group a store of its own."""
    port, _, rest = os.environ[_PORTS].partition(",")
    os.environ["MASTER_PORT"], os.environ[_PORTS] = port, rest


def _start(rank: int, log: Path, module: str, arguments: tuple[str, ...], shared: dict[str, str]) -> subprocess.Popen:
    with open(log, "wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=REPOSITORY,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


def _first_failure(ranks: list[subprocess.Popen], *, deadline: float) -> subprocess.Popen | None:
    """Wait for all; the first that fails, or one that still runs at the deadline."""
    while time.monotonic() < deadline:
        states = [process.poll() for process in ranks]
        for process, state in zip(ranks, states, strict=True):
            if state:
                return process
        if None not in states:
            return None
        time.sleep(0.05)
    return next(process for process in ranks if process.poll() is None)
