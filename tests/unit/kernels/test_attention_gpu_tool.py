"""tools/kernels/attention_gpu.py runs from end to end on tiny shapes; what cannot run here says why in its row."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.slow
def test_tiny_run(tmp_path: Path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "tools/kernels/attention_gpu.py", "--tiny", "--out", str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPOSITORY)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    streams = {"one document", "packed 8k", "8 shared prompts", "one-token documents", "packed 4k"}
    flash = [row for row in rows if row["variant"] == "flash"]
    assert {row["stream"] for row in flash} == streams and all(row["passed"] for row in flash)
    assert [row["passed"] for row in rows if row["variant"] == "dense cuDNN"] == [True]
    ragged = [row for row in rows if row["variant"].startswith("ragged")]
    assert len(ragged) == 5
    assert {row["failed"] for row in ragged} == {"ImportError: needs a CUDA device (this one is cpu)"}
    assert f"torch {torch.__version__}" in run.stdout and "one document         4:2    flash" in run.stdout
