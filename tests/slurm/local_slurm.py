"""A handle on the local Slurm: submits to it, waits for jobs, breaks nodes; and what jobs leave behind."""

import json
import re
import subprocess
import sys
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
# No test depends on how fast the machine is: waiting ends with what is waited for, with a dead job, or only so late.
PATIENCE_S = 900
DEAD = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


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

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            queue = f"{output('squeue')}\n{output('sinfo')}"
            assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}\n{queue}"
            time.sleep(0.2)

    def wait_for_state(self, job_id: str, state: str) -> None:
        """Wait until the job is in that state; fail as soon as it is dead in another one."""

        def reached() -> bool:
            found = self.job_state(job_id)
            assert found == state or found not in (*DEAD, "COMPLETED"), f"job {job_id} is {found}, not {state}"
            return found == state

        self.wait(reached, f"job {job_id} to be {state}")

    def wait_for_chain(self, run: Path, job_ids: dict[str, str]) -> None:
        """Wait until every stage has ended well; fail as soon as one has not, with its reason."""

        def all_completed() -> bool:
            # Of an array, every task has a line.
            states = {stage: self.job_state(job_id).splitlines() for stage, job_id in job_ids.items()}
            dead = [stage for stage, found in states.items() if set(found) & set(DEAD)]
            reasons = {s: ended(run, s) for s in dead if RunFiles(run).ended(s).exists()}
            assert not dead, f"{states}\n{json.dumps(reasons, indent=1)}"
            return all(set(found) == {"COMPLETED"} for found in states.values())

        self.wait(all_completed, f"the chain of {run.name}")


def medllm_submit(recipe: Path, *options: str) -> dict[str, str]:
    """`medllm submit` as a user calls it; the job ids that it prints, by stage."""
    command = [sys.executable, "-m", "megatron_medllm", "submit", str(recipe), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^(\S+) +job (\d+)$", done.stdout, re.MULTILINE))


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def ended(run: Path, stage: str) -> dict:
    return read_json(RunFiles(run).ended(stage))


def starts(run: Path, stage: str) -> list[dict]:
    return [row for row in read_jsonl(RunFiles(run).history(stage)) if row["event"] == "start"]
