"""Which Megatron-Core is accepted, and what is said of another."""

import os
import subprocess
import sys

import pytest

from megatron_medllm import versions
from megatron_medllm.errors import UserError


@pytest.mark.parametrize("version", ["0.16.1", "0.19.2", "0.19.2+23d5ab7", "0.16.1+nv26.05"])
def test_tested_versions_pass(version: str) -> None:
    versions.refuse_untested(version, {})
    assert versions.is_tested(version)


@pytest.mark.parametrize("version", ["0.15.3", "0.16.0", "0.17.1", "0.18.2", "0.19.1", "0.20.0", "0.19.2rc1"])
def test_others_are_refused_in_one_line_with_the_tested_ones(version: str) -> None:
    with pytest.raises(UserError) as refused:
        versions.refuse_untested(version, {"MEDLLM_UNTESTED_MCORE": "0"})
    assert str(refused.value) == (
        f"megatron-core {version} is installed, tested are 0.16.1 and 0.19.2: pip install megatron-core==0.19.2 "
        "(on Python 3.11 0.16.1); on CUDA MEDLLM_UNTESTED_MCORE=1 runs it all the same"
    )
    versions.refuse_untested(version, {"MEDLLM_UNTESTED_MCORE": "1"})


@pytest.mark.parametrize("package", ["parallel", "models.gpt", "train.setup", "checkpoint.state_writer"])
def test_it_is_refused_before_a_line_of_it_runs(package: str) -> None:
    code = f"""
import importlib.metadata, sys
importlib.metadata.version = lambda name: "0.20.0"
import megatron_medllm.{package}
"""
    environment = {name: value for name, value in os.environ.items() if name != "MEDLLM_UNTESTED_MCORE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1].startswith(
        "megatron_medllm.errors.UserError: megatron-core 0.20.0 is installed"
    )
    assert "/megatron/core/" not in done.stderr


def test_a_missing_one_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise versions.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "installed", missing)
    with pytest.raises(UserError, match="megatron-core is not installed: pip install megatron-core=="):
        versions.refuse_untested(environment={})
