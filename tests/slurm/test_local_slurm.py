"""The local Slurm itself: it shares the machine with another one, and goes when its owner is killed."""

import os
import subprocess
import time
from pathlib import Path

from local_slurm import LOCAL_SLURM, PATIENCE_S, LocalSlurm, output


def lives(pid: int) -> bool:
    """Whether the process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_second_cluster_goes_down_with_its_owner(slurm: LocalSlurm, tmp_path: Path) -> None:
    owner = subprocess.Popen(["sleep", "3600"])
    try:
        environment = os.environ | {"LOCAL_SLURM_OWNER": str(owner.pid)}
        subprocess.run([str(LOCAL_SLURM), "up", str(tmp_path), "1", "1"], check=True, env=environment)
        names = ("slurmctld", "n1.namespace", "watch")
        processes = {name: int((tmp_path / f"{name}.pid").read_text()) for name in names}
        assert all(lives(pid) for pid in processes.values())
        assert output("sinfo", "--noheader", "--format=%D") == "3"  # the first cluster still answers here
    finally:
        owner.kill()
        owner.wait()
    deadline = time.monotonic() + PATIENCE_S
    while any(lives(pid) for pid in processes.values()):
        assert time.monotonic() < deadline, f"still there: {[n for n, pid in processes.items() if lives(pid)]}"
        time.sleep(0.1)
    assert slurm.node_state("n1") == "idle"
