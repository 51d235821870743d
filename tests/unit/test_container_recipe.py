"""The container's recipe: what it pins is what the package asks for, and an image's own torch is kept or refused."""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def requirements(path: Path) -> dict[str, Requirement]:
    texts = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return {found.name: found for found in map(Requirement, filter(None, texts))}


def test_every_requirement_has_a_version_within_its_range() -> None:
    pinned = requirements(ROOT / "docker" / "versions.txt")
    for name, needed in requirements(ROOT / "requirements.txt").items():
        (pin,) = pinned[name].specifier
        assert pin.operator == "==" and needed.specifier.contains(pin.version), name


@pytest.mark.parametrize(("ranged", "status"), [("torch>=2.4", 0), ("torch>=99", 2)])
def test_the_torch_that_is_there_is_kept_or_refused(tmp_path: Path, ranged: str, status: int) -> None:
    pytest.importorskip("pip")
    shutil.copytree(ROOT / "docker", tmp_path / "docker")
    (tmp_path / "requirements.txt").write_text(f"{ranged}\nnumpy\n")
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
