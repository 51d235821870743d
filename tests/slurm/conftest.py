"""A Slurm of three nodes on this machine, shared by the tests of this folder."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.local_slurm import LOCAL_SLURM, PATIENCE_S, ROOT, LocalSlurm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = subprocess.run([str(LOCAL_SLURM), "check"], capture_output=True, text=True, check=False).stdout.strip()
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.xdist_group("slurm"))
            item.add_marker(pytest.mark.timeout(PATIENCE_S + 300))
            if lacking:
                item.add_marker(pytest.mark.skip(reason=f"a local Slurm needs {lacking}; make test-slurm"))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    directory = tmp_path_factory.mktemp("slurm")
    environment = directory / "env.sh"
    site = (ROOT / "slurm" / "env.sh").read_text()
    tests = f"MEDLLM_PYTHON={sys.executable}\nexport FAKE_TRAINER={Path(__file__).parent / 'fake_trainer.py'}\n"
    environment.write_text(tests + site)
    # The cluster ends with this process, even if it is killed and never comes to the end of this fixture.
    owner = os.environ | {"LOCAL_SLURM_OWNER": str(os.getpid())}
    subprocess.run([str(LOCAL_SLURM), "up", str(directory), "3", "2"], check=True, timeout=300, env=owner)
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
