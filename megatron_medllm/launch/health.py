"""A short distributed job before the real one: can all ranks talk, do they share the file system and the time?

    torchrun ... -m megatron_medllm.launch.health RUN MAX_CLOCK_SKEW_S

Ends with an error that names what is wrong; the batch job then fails in seconds instead of hanging for an hour.
"""

import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=180)
SHARED_FILE_WAIT_S = 30.0


def main(run: Path, max_clock_skew_s: float) -> None:
    """Check as one rank of the job.

    Raises:
        SystemExit: with a sentence that says what is wrong.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    device = torch.device("cuda" if cuda else "cpu")
    check_all_reduce(device)
    check_clocks(device, max_clock_skew_s)
    check_shared_files(run)
    dist.barrier()
    dist.destroy_process_group()


def check_all_reduce(device: torch.device) -> None:
    """Sum a vector over all ranks."""
    world = dist.get_world_size()
    values = torch.ones(1 << 20, device=device)
    dist.all_reduce(values)
    if not bool((values == world).all()):
        raise SystemExit(f"health: all-reduce over {world} ranks gave {values.min().item()}..{values.max().item()}")


def check_clocks(device: torch.device, max_clock_skew_s: float) -> None:
    """Compare the wall clocks right after a barrier."""
    dist.barrier()
    now = torch.tensor([time.time()], dtype=torch.float64, device=device)
    clocks = [torch.empty_like(now) for _ in range(dist.get_world_size())]
    dist.all_gather(clocks, now)
    skew = max(c.item() for c in clocks) - min(c.item() for c in clocks)
    if skew > max_clock_skew_s:
        raise SystemExit(f"health: the nodes' clocks differ by {skew:.1f} s, {max_clock_skew_s:g} allowed")


def check_shared_files(run: Path) -> None:
    """Rank 0 writes a file in the run directory; every rank must find it there."""
    token = run / "launch" / f".health-{os.environ.get('SLURM_JOB_ID', '0')}-{os.environ.get('TORCHELASTIC_RUN_ID')}"
    if dist.get_rank() == 0:
        token.write_text(socket.gethostname())
    dist.barrier()
    deadline = time.monotonic() + SHARED_FILE_WAIT_S
    while not token.exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"health: {socket.gethostname()} does not see {token}; is {run} on a shared file system?")
        time.sleep(0.5)
    dist.barrier()
    if dist.get_rank() == 0:
        token.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
