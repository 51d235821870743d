"""The local Slurm itself: it shares the machine with another one, and goes when its owner is killed."""

import os
import subprocess
import time
from pathlib import Path

from megatron_medllm.launch.jobs import StageJob
from tests.slurm.local_slurm import LOCAL_SLURM, PATIENCE_S, LocalSlurm, output


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


def test_a_run_directory_with_spaces_and_percent_signs(slurm: LocalSlurm, tmp_path: Path) -> None:
    run = tmp_path / "a run of 50%j #1"
    job = StageJob(name="corpus", script="corpus", command=("-c", "print('こんにちは')"))
    job_ids = slurm.submit(run, [job])
    slurm.wait_for_chain(run, job_ids)
    log = run / "launch" / "logs" / "corpus" / f"{job_ids['corpus']}.out"
    assert "こんにちは" in log.read_text()
    assert [path.name for path in tmp_path.iterdir()] == [run.name]
