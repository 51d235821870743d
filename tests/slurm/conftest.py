"""A Slurm of three nodes on this machine, shared by the tests of this folder."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_medllm.config.cluster import ClusterConfig
from megatron_medllm.launch.jobs import RunFiles, StageJob
from megatron_medllm.launch.submit import submit
from megatron_medllm.storage import read_json, read_jsonl

ROOT = Path(__file__).parents[2]
LOCAL_SLURM = ROOT / "tools" / "local_slurm.sh"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = None if shutil.which("slurmctld") and os.geteuid() == 0 else "slurmctld, and root to start it"
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.xdist_group("slurm"))
            if lacking:
                item.add_marker(pytest.mark.skip(reason=f"needs {lacking}: apt-get install slurm-wlm, make test-slurm"))


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


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    directory = tmp_path_factory.mktemp("slurm")
    environment = directory / "env.sh"
    site = (ROOT / "slurm" / "env.sh").read_text()
    tests = f"MEDLLM_PYTHON={sys.executable}\nexport FAKE_TRAINER={Path(__file__).parent / 'fake_trainer.py'}\n"
    environment.write_text(tests + site)
    subprocess.run([str(LOCAL_SLURM), "up", str(directory), "3", "2"], check=True, timeout=60)
    previous = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(directory / "slurm.conf")
    try:
        yield LocalSlurm(directory, environment)
    finally:
        subprocess.run([str(LOCAL_SLURM), "down", str(directory)], check=False)
        if previous is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = previous
