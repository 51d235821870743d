"""tools/kernels/one_gpu.py runs from end to end on tiny shapes, and its verdicts say what the figures say."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
TOOL = REPOSITORY / "tools/kernels/one_gpu.py"


@pytest.mark.slow
def test_tiny_run(tmp_path: Path):
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(TOOL), "--tiny", "--out", str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["section"] for row in rows} == {
        "ceiling",
        "head against float64",
        "linear",
        "product",
        "four layers of 7B",
        "head",
    }
    not_here = {"liger", "liger, frozen", "cut cross-entropy", "rows"}  # a CPU's `scaled_mm` knows no scale a row
    assert not [row for row in rows if "failed" in row and row["name"] not in not_here]
    checks = [row for row in rows if row["section"] == "head against float64"]
    assert all(row["max_logprob_error"] < 1e-5 and row["hidden_grad_error"] < 4e-3 for row in checks)
    report = (tmp_path / "report.md").read_text()
    assert "| training head (uniform) <= 40 ms | - | open |" in report


def test_verdicts():
    spec = importlib.util.spec_from_file_location("one_gpu", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["one_gpu"] = module
    spec.loader.exec_module(module)
    at = {"section": "head", "model": "7B", "tokens": 8192}
    rows = [
        at | {"name": "ours, uniform", "ms": 39.0, "peak_gib": 3.5},
        at | {"name": "ours, general", "ms": 52.0, "peak_gib": 2.0},
        at | {"name": "ours, frozen", "ms": 30.0},
        at | {"name": "liger", "ms": 78.0},
        {"section": "linear", "layer": "7B qkv", "name": "bf16", "ms": 3.0},
        {"section": "linear", "layer": "7B qkv", "name": "fp8", "ms": 2.0},
    ]
    lines = module.verdicts(rows)
    assert "| training head (uniform) <= 40 ms | 39.00 | met |" in lines
    assert "| uniform head <= 1 GiB beside dW | 2.48 | missed |" in lines
    assert "| general head <= 1 GiB beside dW | 0.98 | met |" in lines
    assert "| frozen head <= 28 ms | 30.00 | missed |" in lines
    assert "| forward <= 13.5 ms | - | open |" in lines
    assert "| >= 1.5x faster than Liger | 2.00 | met |" in lines
    assert "| FP8 linears of a 7B layer, forward + backward >= 1.4x bf16 | 1.50 | met |" in lines
