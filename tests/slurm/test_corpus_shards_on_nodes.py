"""A corpus in four shards on three nodes of a real Slurm, one of them lost in the middle, another told to stop."""

import random
import subprocess
from pathlib import Path

import tokenizers
import yaml
from tokenizers import models, pre_tokenizers

from megatron_medllm.config.corpus import CorpusConfig
from megatron_medllm.config.run import load
from megatron_medllm.corpus.build import build
from megatron_medllm.launch.jobs import RunFiles
from megatron_medllm.launch.recipe_jobs import submit_recipe
from megatron_medllm.launch.status import run_status, submitted_jobs
from tests.slurm.local_slurm import LocalSlurm, output, starts
from tests.worlds.corpus import SENTENCES, contents, write_jsonl


def test_a_corpus_in_shards_outlives_a_node_and_equals_one_process(
    slurm: LocalSlurm, tiny_model: Path, tmp_path: Path
) -> None:
    rng = random.Random(11)
    texts = [chr(rng.randrange(0x4E00, 0x9000)) * 40 + rng.choice(SENTENCES) + str(rng.random()) for _ in range(1200)]
    write_jsonl(tmp_path / "a.jsonl", [*texts, *texts[:50]])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = CorpusConfig.model_validate(
        {
            "sources": {"a": {"paths": [str(tmp_path / "a.jsonl")]}},
            "tokenizer": str(tmp_path / "tokenizer.json"),
            "eod_id": 0,
            "dedup": {"near": True},
            "chunk_mb": 0.002,  # many units: the crash falls in the middle
        }
    )
    run_dir, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    settings = {
        "run_dir": str(run_dir),
        "model": {"path": str(tiny_model)},
        "corpora": {"medical": config.model_dump(mode="json")},
        "cluster": slurm.cluster(corpus_tasks=4, extra_options=("--exclusive",)).model_dump(mode="json"),
    }
    recipe.write_text(yaml.safe_dump(settings))
    submit_recipe(load(recipe, []), stages=["corpus-medical"], dry_run=False, force=False)
    jobs = submitted_jobs(RunFiles(run_dir))
    assert list(jobs) == ["corpus-medical-shards", "corpus-medical"]
    parts = run_dir / "corpus" / "medical" / ".work" / "parts"
    # Shard 2/4 makes the parts 1, 5, 9, ...
    slurm.wait(lambda: sum(int(part.stem) % 4 == 1 for part in parts.glob("0*.json")) >= 3, "parts of shard 2/4")
    victim = output("squeue", "--noheader", "--format=%B", f"--jobs={jobs['corpus-medical-shards']}_1")
    slurm.crash(victim)
    # What Slurm sends when the time limit nears: a corpus does not listen, and goes on from its parts in another start.
    subprocess.run(["scancel", "--signal=USR1", f"{jobs['corpus-medical-shards']}_2"], check=True)
    try:
        slurm.wait_for_state(jobs["corpus-medical"], "COMPLETED")
    finally:
        slurm.boot(victim)
    lost = starts(run_dir, "corpus-medical-shards.1")
    assert [row["restart"] for row in lost] == [0, 1] and lost[0]["nodes"] == victim != lost[1]["nodes"]
    told = starts(run_dir, "corpus-medical-shards.2")
    assert [row["restart"] for row in told] == [0, 1] and 0 == told[0]["step"] < told[1]["step"]
    assert [s.state for s in run_status(run_dir)] == ["finished", "finished"]
    build(config, tmp_path / "whole", workers=2)
    assert contents(run_dir / "corpus" / "medical") == contents(tmp_path / "whole")
