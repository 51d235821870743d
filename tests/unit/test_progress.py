"""The file that `medllm pipeline` shows, written by several threads at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_medllm import progress
from megatron_medllm.storage import read_json


def test_threads_may_report_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "UPDATES_PER_S", float("inf"))  # every update is written
    path = tmp_path / "stage.progress"
    file = progress.ProgressFile(path, title="export", total=3000)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(file.update, range(3000)))
    file.update(3000, "done")
    assert read_json(path) == {"title": "export", "done": 3000, "total": 3000, "note": "done"}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
