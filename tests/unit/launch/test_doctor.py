"""`medllm doctor`: what it says about present, absent and unfit packages."""

import subprocess
from pathlib import Path

import pytest

from megatron_medllm.launch import doctor as module
from megatron_medllm.launch.doctor import Finding, doctor, doctor_report, extra_check, failed, gpu_check


def test_every_part_of_a_machine_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["torch>=2", "pydantic>=2", 'nothere>=1; extra == "vllm"']
    monkeypatch.setattr(module.importlib.metadata, "requires", lambda _: declared)
    checks = {check.name: check for check in doctor(Path("."))}
    assert checks["python"].status == "ok"
    assert checks["packages"].status == "ok" and checks["packages"].found.startswith("2 requirements met")
    assert {"torch", "gpu", "transformer-engine", "apex", "triton", "bitsandbytes", "disk", "cpu", "slurm"} <= set(
        checks
    )


def test_missing_and_outdated_requirements_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["torch>=2.11,<2.14", "nothere>=1", "pydantic>=99", 'vllm>=0.11; extra == "vllm"']
    monkeypatch.setattr(module.importlib.metadata, "requires", lambda _: declared)
    checks = module.requirement_checks()
    assert [(c.name, c.status) for c in checks] == [("nothere", "fail"), ("pydantic", "fail")]
    assert "pydantic>=99" in checks[1].advice and failed(checks)


@pytest.mark.parametrize(
    ("versions", "python", "told"),
    [
        ({"megatron-core": "0.16.1"}, "3.11.7", []),
        ({"megatron-core": "0.16.1"}, "3.12.1", []),
        ({"megatron-core": "0.19.2", "triton": "3.6.0"}, "3.12.1", []),
        ({"megatron-core": "0.19.2", "triton": "3.6.0+cu130"}, "3.13.0", []),
        ({"megatron-core": "0.19.2", "triton": "3.6.0"}, "3.11.7", ["0.19.2 with python 3.11.7"]),
        ({"megatron-core": "0.19.2"}, "3.12.1", ["0.19.2 without triton"]),
        ({"megatron-core": "0.19.2", "triton": "2.1.0"}, "3.12.1", ["0.19.2 with triton 2.1.0"]),
        ({}, "3.11.7", []),
    ],
)  # fmt: skip
def test_versions_that_do_not_go_together_are_named(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], python: str, told: list[str]
) -> None:
    monkeypatch.setattr(module, "installed_version", versions.get)
    monkeypatch.setattr(module.platform, "python_version", lambda: python)
    checks = module.pair_checks()
    assert [check.found for check in checks] == told
    assert all(check.name == "megatron-core" and check.status == "fail" and check.advice for check in checks)


def test_what_is_declared_for_another_python_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ['pydantic>=99; python_version < "3"', 'nothere>=1; python_version < "3"']
    monkeypatch.setattr(module.importlib.metadata, "requires", lambda _: declared)
    assert [check.status for check in module.requirement_checks()] == ["ok"]


def test_te_on_a_machine_without_gpus_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    te = module.EXTRAS[0]
    assert extra_check(te, has_gpu=False).status == "fail"
    assert extra_check(te, has_gpu=True).status == "ok"


def test_absent_apex_says_what_it_adds_and_warns_of_the_namesake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    check = extra_check(module.EXTRAS[1], has_gpu=True)
    assert check.status == "note"
    assert "fused Adam" in check.advice and "unrelated project" in check.advice


def test_pypi_apex_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object() if name == "apex" else None)
    check = module.apex_namesake_check()
    assert check is not None and check.status == "fail"


def test_gpus_are_counted_and_a_cpu_torch_beside_them_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVIDIA H100 80GB HBM3, 81559 MiB, 550.54"
    answer = subprocess.CompletedProcess([], 0, stdout=f"{line}\n{line}\n", stderr="")
    monkeypatch.setattr(module.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: answer)
    gpus = module.visible_gpus()
    assert gpu_check(gpus).found == f"2 x {line}"
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert module.torch_check(gpus).status == "fail"


def test_a_full_disk_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert module.disk_check(tmp_path / "not" / "yet").status in ("ok", "note")
    monkeypatch.setattr(module, "LOW_DISK_BYTES", 2**80)
    assert module.disk_check(tmp_path).status == "note"


def test_report_puts_advice_below_its_finding() -> None:
    text = doctor_report([Finding("gpu", "note", "none", "use one"), Finding("python", "ok", "3.11")])
    assert text.splitlines() == ["note  gpu     none", "              use one", "ok    python  3.11"]
