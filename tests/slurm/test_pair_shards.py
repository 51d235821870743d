"""Pair sampling in three shards on three nodes of a real Slurm: one killed, then told that its time limit nears."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import yaml

from megatron_medllm.config.exam import EngineConfig, ExamConfig, MaxNewTokens
from megatron_medllm.config.pairs import FilterConfig, PairsConfig, SamplingConfig
from megatron_medllm.launch.jobs import RunFiles
from megatron_medllm.launch.live import find_status
from megatron_medllm.preference.pairs import build_pairs
from megatron_medllm.shard import Shard
from tests.slurm.local_slurm import LocalSlurm, medllm_submit, starts

FILES = ("samples.jsonl", "dropped.jsonl", "pairs.jsonl", "manifest.json", "report.md", "report.html")


def test_pairs_sampled_in_shards_outlive_a_kill_and_equal_one_process(
    slurm: LocalSlurm, exam_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = PairsConfig(
        questions=ExamConfig(name="invented", data=(exam_dir,)),
        contamination="allow",
        # One request at a time and long answers: the kill falls in the middle.
        engine=EngineConfig(device="cpu", unit_requests=1, replicas=3),
        sampling=SamplingConfig(
            samples=1, answer_only_samples=1, max_new_tokens=MaxNewTokens(answer_only=20, explained=700)
        ),
        filters=FilterConfig(min_gold_chars=5, min_japanese=0, max_length_ratio=1e6),
        min_explained_share=0,
    )
    run_dir, whole, told = tmp_path / "run", tmp_path / "whole", tmp_path / "told"
    cluster = slurm.cluster(extra_options=("--exclusive",), on_end=f'printf "%s|" "$@" >{told}')
    settings = {
        "run_dir": str(run_dir),
        "model": {"path": str(tiny_model)},
        "pairs": config.model_dump(mode="json"),
        "rpo": {"pairs": "none", "sequence_length": 512, "global_batch_size": 4, "optimizer": {"lr": 1e-6}},
        "cluster": cluster.model_dump(mode="json"),
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    log = run_dir / "pairs" / "sample_answers.jsonl"
    logs = [Shard(number, 3).file(log) for number in (1, 2, 3)]

    jobs = medllm_submit(recipe, "--stages", "pairs")
    assert list(jobs) == ["pairs-shards", "pairs", "on-end"]
    slurm.wait(lambda: answers(logs[2]) >= 1, "an answer of shard 3/3")
    os.kill(process_of(run_dir, "3/3"), signal.SIGKILL)  # as the kernel does when the memory is used up
    slurm.wait_for_state(jobs["on-end"], "COMPLETED")
    kept = answers(logs[2])
    assert 1 <= kept < 6 and [answers(path) for path in logs[:2]] == [6, 6]
    verdict = "shard 3/3: the command failed with exit code 137"
    assert told.read_text().startswith(f"{run_dir}|failed|pairs-shards|{verdict}")
    found = find_status(run_dir)
    assert (found.state, found.exit_status) == ("failed", 1)
    shards, merge = found.stages[:2]
    assert (shards.state, merge.state) == ("failed", "CANCELLED") and shards.reason.startswith(verdict)

    begun = [path.read_bytes() for path in logs]
    jobs = medllm_submit(recipe, "--stages", "pairs")
    slurm.wait(lambda: answers(logs[2]) > kept, "another answer of shard 3/3")
    # What Slurm sends when the time limit nears. The array's last task has the array's own job id.
    subprocess.run(["scancel", "--signal=USR1", f"{jobs['pairs-shards']}_2"], check=True)
    slurm.wait_for_chain(run_dir, jobs)
    assert told.read_text() == f"{run_dir}|finished|||"
    restarts = [
        [row["restart"] for row in starts(run_dir, f"pairs-shards.{task}") if row["array_id"] == jobs["pairs-shards"]]
        for task in range(3)
    ]
    assert restarts == [[0], [0], [0, 1]]  # that task alone
    for path, before in zip(logs, begun, strict=True):  # nothing was asked twice
        assert answers(path) == 6 and path.read_bytes().startswith(before)
    assert find_status(run_dir).exit_status == 0
    build_pairs(config, tiny_model, whole)
    for name in FILES:
        assert (run_dir / "pairs" / name).read_bytes() == (whole / name).read_bytes(), name


def process_of(run_dir: Path, shard: str) -> int:
    """The process that samples this shard; other processes' namespaces are seen from here."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().decode().split("\0")
            if str(RunFiles(run_dir).config) in words and shard in words:
                return int(path.parent.name)
    raise AssertionError(f"no process samples shard {shard}")


def answers(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0
