"""A rank's file: what stops its writer is named, whatever torch makes of it."""

import resource
from pathlib import Path

import pytest
import torch

from megatron_medllm.checkpoint.state_writer import write_pieces
from megatron_medllm.parallel.shards import StatePiece


@pytest.mark.parametrize("numel", [100, 300_000], ids=["while-flushing", "inside-a-tensor"])
def test_a_full_disk_is_named(tmp_path: Path, numel: int) -> None:
    pieces = [StatePiece(str(i), (numel,), (0,), torch.zeros(numel)) for i in range(3)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a write beyond fails, as on a full disk
    try:
        problem = write_pieces(pieces, tmp_path, 3, are_copies=True).problem
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert problem is not None and problem.startswith("rank 3 on ")
    assert problem.endswith("__3_0.distcp: File too large")
