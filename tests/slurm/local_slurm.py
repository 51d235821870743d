"""A handle on the local Slurm: submits to it, waits for jobs, breaks nodes; and what jobs leave behind."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_medllm.config.cluster import ClusterConfig
from megatron_medllm.launch.jobs import RunFiles, StageJob
from megatron_medllm.launch.submit import submit
from megatron_medllm.storage import read_json, read_jsonl

ROOT = Path(__file__).parents[2]
LOCAL_SLURM = ROOT / "tools" / "local_slurm.sh"


@dataclass
class LocalSlurm:
    """The cluster: submits to it, waits for jobs, breaks nodes."""

    directory: Path
    environment_file: Path

    def cluster(self, **changes: object) -> ClusterConfig:
        settings = {"gpus": False, "max_time": "00:20:00", "min_free_disk_gib": 0, "env_file": self.environment_file}
        return ClusterConfig(**{**settings, **changes})

    def submit(self, run: Path, jobs: list[StageJob], **changes: object) -> dict[str, str]:
        return submit(run, jobs, self.cluster(**changes), config_text="{}\n").job_ids

    def crash(self, node: str) -> None:
        subprocess.run([str(LOCAL_SLURM), "crash", str(self.directory), node], check=True)

    def boot(self, node: str) -> None:
        subprocess.run([str(LOCAL_SLURM), "boot", str(self.directory), node], check=True)
        self.wait(lambda: self.node_state(node).startswith("idle"), f"{node} to come back")

    def node_state(self, node: str) -> str:
        return output("sinfo", "--noheader", "--format=%T", f"--nodes={node}")

    def job_state(self, job_id: str) -> str:
        return output("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job_id}")

    def wait(self, condition: Callable[[], bool], what: str, *, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, (
                f"waited {timeout_s} s for {what}\n{output('squeue')}\n{output('sinfo')}"
            )
            time.sleep(0.3)

    def wait_for_state(self, job_id: str, *states: str, timeout_s: float = 120) -> str:
        self.wait(lambda: self.job_state(job_id) in states, f"job {job_id} to be {states}", timeout_s=timeout_s)
        return self.job_state(job_id)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def ended(run: Path, stage: str) -> dict:
    return read_json(RunFiles(run).ended(stage))


def starts(run: Path, stage: str) -> list[dict]:
    return [row for row in read_jsonl(RunFiles(run).history(stage)) if row["event"] == "start"]
