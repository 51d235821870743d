"""The checks before the first step, each made to fail, in a world of one rank."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_medllm.launch import health

CPU = torch.device("cpu")


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=20))
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_healthy_rank_passes_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    health.check_all_reduce(CPU)
    health.check_clocks(CPU, 1.0)
    health.check_shared_files(tmp_path)
    assert list((tmp_path / "launch").iterdir()) == []


@pytest.mark.usefixtures("alone")
def test_wrong_sums_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health.dist, "all_reduce", lambda tensor: tensor[0].add_(3))
    with pytest.raises(SystemExit, match=r"all-reduce over 1 ranks gave 1.0\.\.4.0"):
        health.check_all_reduce(CPU)


@pytest.mark.usefixtures("alone")
def test_clocks_that_differ_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(clocks: list[torch.Tensor], now: torch.Tensor) -> None:
        clocks[:] = [now, now + 7]

    monkeypatch.setattr(health.dist, "all_gather", gather)
    with pytest.raises(SystemExit, match=r"clocks differ by 7.0 s, 5 allowed"):
        health.check_clocks(CPU, 5.0)


@pytest.mark.usefixtures("alone")
def test_a_run_directory_that_is_not_shared_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "SHARED_FILE_WAIT_S", 0.1)
    monkeypatch.setattr(health.dist, "get_rank", lambda: 1)  # another node: rank 0's file never shows up
    with pytest.raises(SystemExit, match=r"is .* on a shared file system"):
        health.check_shared_files(tmp_path)
