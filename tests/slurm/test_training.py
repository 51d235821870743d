"""The laptop recipe's first stages as a chain on a real Slurm, its training on two nodes of two processes each.

A training that is told to save (USR1), requeued and resumed ends with the very losses of one that is left alone.
"""

import os
import signal
import subprocess
from pathlib import Path

import yaml

from megatron_medllm.config.run import RunConfig, load
from megatron_medllm.launch.jobs import RunFiles
from megatron_medllm.launch.recipe_jobs import recipe_jobs, submit_bench
from megatron_medllm.launch.status import run_status, submitted_jobs
from megatron_medllm.launch.submit import submit
from megatron_medllm.recipe.stages import recipe_stages
from megatron_medllm.storage import read_json, read_jsonl
from tests.slurm.local_slurm import LocalSlurm, ended, starts

STEPS = 50
RECIPE = {
    "model": {
        "shape": {
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 128,
            "vocab_size": 1536,
            "tie_embeddings": True,
        },
        "dtype": "float32",
    },
    "layout": {"nodes": 2, "gpus_per_node": 2, "tp": 2},
    "base": {
        "train_tokens": STEPS * 4 * 256,
        "sequence_length": 256,
        "global_batch_size": 4,
        "optimizer": {"lr": 0.003},
    },
}
WORLD = {"base_documents": 800, "medical_documents": 50, "exam_questions": 24, "development_questions": 24}


def recipe(
    directory: Path, run_dir: Path, *, corpus: Path | None, layout: dict | None = None, watch: dict | None = None
) -> RunConfig:
    """The recipe in `run_dir`; its corpus is built there too, or read from another run's."""
    tokenizer = (corpus or run_dir) / "world" / "tokenizer"
    settings = {
        **RECIPE,
        "run_dir": str(run_dir),
        "tokenizer": str(tokenizer),
        "base": {
            **RECIPE["base"],
            "data": [{"path": str((corpus or run_dir) / "corpus" / "base")}],
            "watch": watch or {},
        },
    }
    if layout is not None:
        settings["layout"] = layout
    if corpus is None:
        source = {"paths": str(run_dir / "world" / "base.jsonl")}
        settings["demo"] = {**WORLD, "train_questions": 24}
        settings["corpora"] = {"base": {"sources": {"base": source}, "tokenizer": str(tokenizer), "eod_id": 1}}
    path = directory / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load(path, [])


def submit_recipe(slurm: LocalSlurm, run: RunConfig, *, only: list[str] | None = None) -> dict[str, str]:
    stages = recipe_stages(run, RunFiles(run.run_dir).config)
    cluster = slurm.cluster()
    jobs = recipe_jobs(run, stages, cluster, only=only)
    config_text = yaml.safe_dump(run.model_dump(mode="json"))
    return submit(run.run_dir, jobs, cluster, config_text=config_text).job_ids


def losses(run_dir: Path) -> dict[int, float]:
    path = run_dir / "base" / "metrics.jsonl"
    return {row["step"]: row["loss"] for row in read_jsonl(path) if "loss" in row} if path.exists() else {}


def test_the_chain_trains_and_a_requeued_training_ends_bitwise_the_same(slurm: LocalSlurm, tmp_path: Path) -> None:
    interrupted, left_alone = tmp_path / "interrupted", tmp_path / "left-alone"
    ids = submit_recipe(slurm, recipe(tmp_path, interrupted, corpus=None))
    assert list(ids) == ["world", "corpus-base", "base", "export"]
    slurm.wait(lambda: len(losses(interrupted)) >= 5, "five steps")
    subprocess.run(["scancel", "--signal=USR1", ids["base"]], check=True)
    slurm.wait(lambda: RunFiles(interrupted).ended("base").exists(), "the requeue")
    assert ended(interrupted, "base")["reason"] == "saved and stopped on a signal or the time limit"
    slurm.wait_for_chain(interrupted, ids)
    assert [s.restarts for s in run_status(interrupted)] == [0, 0, 1, 0]
    assert (run_status(interrupted)[2].step, run_status(interrupted)[2].total_steps) == (STEPS, STEPS)
    assert 5 <= starts(interrupted, "base")[1]["step"] < STEPS

    again = submit_recipe(slurm, recipe(tmp_path, left_alone, corpus=interrupted))
    slurm.wait_for_chain(left_alone, again)
    assert len(starts(left_alone, "base")) == 1
    assert len(losses(left_alone)) == STEPS
    assert losses(interrupted) == losses(left_alone)
    weights = [(run_dir / "hf" / "model.safetensors").read_bytes() for run_dir in (interrupted, left_alone)]
    assert weights[0] == weights[1]


def rank_process(run_dir: Path, rank: int) -> int:
    """The process of a rank of this run's training, as this host numbers it (the nodes have numbers of their own)."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (place / "cmdline").read_bytes(), (place / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"train\0" + str(RunFiles(run_dir).config).encode() in command and f"RANK={rank}".encode() in environment:
            return int(place.name)
    raise AssertionError(f"rank {rank} of {run_dir} does not run")


def test_a_stopped_rank_is_named_and_the_job_starts_again(slurm: LocalSlurm, tmp_path: Path) -> None:
    """Its node has no other rank that could ask it for its stack: the node's agent does, and ends it."""
    corpus, run_dir = tmp_path / "corpus-run", tmp_path / "run"
    settings = {"layout": {"nodes": 2, "gpus_per_node": 1, "dp": 2}, "watch": {"stall_timeout_s": 10}}
    ids = submit_recipe(slurm, recipe(tmp_path, corpus, corpus=None), only=["world", "corpus-base"])
    slurm.wait_for_chain(corpus, ids)
    ids = submit_recipe(slurm, recipe(tmp_path, run_dir, corpus=corpus, **settings), only=["base"])
    slurm.wait(lambda: len(losses(run_dir)) >= 5, "five steps")
    os.kill(rank_process(run_dir, 1), signal.SIGSTOP)
    slurm.wait(lambda: RunFiles(run_dir).ended("base").exists(), "the verdict")
    found = ended(run_dir, "base")
    assert found["reason"].startswith("stalled: rank 1 (process ") and "has not answered for 10 s" in found["reason"]
    assert [row["rank"] for row in found["stall"]["ranks"]] == [1]
    stacks = {path.name: path.read_text() for path in (run_dir / "base" / "watch").glob("*.stack.txt")}
    assert len(stacks) == 2 and all("in _fit" in stack for stack in stacks.values())
    slurm.wait_for_chain(run_dir, ids)
    assert [row["restart"] for row in starts(run_dir, "base")] == [0, 1]
    assert list(losses(run_dir)) == list(range(1, STEPS + 1))


def test_a_benchmark_is_measured_on_two_nodes(slurm: LocalSlurm, tmp_path: Path) -> None:
    run = recipe(tmp_path, tmp_path / "run", corpus=tmp_path)  # the corpus is made up
    run = run.model_copy(update={"cluster": slurm.cluster(), "stage": "base"})
    submit_bench(run, "throughput --synthetic --steps 2 --warmup-steps 1", dry_run=False, force=False)
    slurm.wait_for_chain(run.run_dir, submitted_jobs(RunFiles(run.run_dir)))
    found = read_json(run.run_dir / "bench" / "throughput.json")
    assert (found["world_size"], found["steps"]) == (4, 2) and found["tokens_per_s"] > 0
