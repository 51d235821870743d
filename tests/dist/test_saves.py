"""Saves over several ranks: each writes its own share, and one that cannot write leaves no other waiting."""

import json
from pathlib import Path

import pytest

from megatron_medllm.storage import digest_file
from tests.worlds.ranks import run_ranks


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (2, {"dp": {"dp": 2}, "replicated": {"dp": 2, "distributed_optimizer": False}}),
        (4, {"vpp": {"pp": 2, "vpp": 2, "dp": 2}, "tp": {"tp": 2, "sp": True, "dp": 2}}),
    ],
    ids=["two", "four"],
)
def test_what_is_saved_comes_back_and_no_rank_writes_anothers(tmp_path: Path, ranks: int, layouts: dict) -> None:
    arguments = ("round_trip", str(tmp_path), json.dumps(layouts))
    run_ranks(ranks, "tests.dist.save_ranks", *arguments, timeout_s=300, runtimes=len(layouts))


def test_a_rank_that_cannot_write_tells_the_others(tmp_path: Path) -> None:
    run_ranks(2, "tests.dist.save_ranks", "failures", str(tmp_path), timeout_s=240, runtimes=2)
    ranks = [json.loads((tmp_path / f"failures-{rank}.json").read_text()) for rank in range(2)]
    for found in ranks:
        for full, blocked in (found[:2], found[2:]):
            assert full.startswith("rank 1 on ") and full.endswith("__1_0.distcp: File too large")
            assert blocked.startswith("rank 0 on ") and ".metadata" in blocked
    assert ranks[0] == ranks[1]


def test_a_slow_disk_outlasts_no_timeout(tmp_path: Path) -> None:
    run_ranks(2, "tests.dist.save_ranks", "slow_disk", str(tmp_path), timeout_s=240, runtimes=1)
    assert (tmp_path / "slow" / ".metadata").is_file()


def test_what_was_hashed_on_the_way_is_the_files_digest(tmp_path: Path) -> None:
    """Of a file that its writer hashed, the checkpoint's digest is the one that reading it gives."""
    run_ranks(2, "tests.dist.save_ranks", "digests", str(tmp_path), timeout_s=240, runtimes=1)
    digests = json.loads((tmp_path / "digests.json").read_text())
    assert sorted(digests) == ["__0_0.distcp", "__1_0.distcp"]
    assert digests == {name: digest_file(tmp_path / "whole" / name) for name in digests}
