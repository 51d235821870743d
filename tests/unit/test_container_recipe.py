"""The container's recipe: what it pins is what the package asks for, and an image's own torch is kept or refused."""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_medllm.versions import TESTED

ROOT = Path(__file__).parents[2]


def requirements(path: Path, python: str) -> dict[str, Requirement]:
    texts = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    found = [*map(Requirement, filter(None, texts))]
    return {r.name: r for r in found if r.marker is None or r.marker.evaluate({"python_version": python})}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_requirement_has_a_version_within_its_range(python: str) -> None:
    pinned = requirements(ROOT / "docker" / "versions.txt", python)
    for name, needed in requirements(ROOT / "requirements.txt", python).items():
        (pin,) = pinned[name].specifier
        assert pin.operator == "==" and needed.specifier.contains(pin.version), name


@pytest.mark.parametrize(("python", "accepted"), [
    ("3.11", ["0.16.1"]), ("3.12", ["0.16.1", "0.19.2"]), ("3.13", ["0.16.1", "0.19.2"]),
])  # fmt: skip
def test_pip_finds_tested_versions_of_megatron_alone(python: str, accepted: list[str]) -> None:
    """Of every release from 0.16.0 on; the newest tested one comes first where Python is new enough for it."""
    needed = requirements(ROOT / "requirements.txt", python)["megatron-core"]
    released = ["0.16.0", "0.16.1", "0.17.0", "0.17.1", "0.18.0", "0.18.1", "0.18.2", "0.19.0", "0.19.1", "0.19.2"]
    assert list(needed.specifier.filter([*released, "0.19.3", "0.20.0"])) == accepted
    assert set(accepted) <= set(TESTED)


@pytest.mark.parametrize(("ranged", "status"), [("torch>=2.4", 0), ("torch>=99", 2)])
def test_the_torch_that_is_there_is_kept_or_refused(tmp_path: Path, ranged: str, status: int) -> None:
    pytest.importorskip("pip")
    shutil.copytree(ROOT / "docker", tmp_path / "docker")
    other = "torch>=98; python_version < '3'"  # for another Python
    (tmp_path / "requirements.txt").write_text(f"{ranged}\n{other}\nnumpy\n")
    (tmp_path / "docker" / "versions.txt").write_text("torch==0.1\nnumpy==0.1\nnowhere-to-be-found==1.0\n")
    script = [sys.executable, str(tmp_path / "docker" / "constraints.py")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == status
    if status:
        assert f"torch {version('torch')} is here, torch>=99 is needed" in done.stderr and not done.stdout
    else:
        lines = done.stdout.split()
        assert f"torch=={version('torch')}" in lines and "nowhere-to-be-found==1.0" in lines
        assert not any(line.startswith("numpy") for line in lines)
