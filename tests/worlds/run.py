"""A run that takes seconds: a small invented world, its corpora, and recipes over them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from megatron_medllm.config.corpus import CorpusConfig
from megatron_medllm.config.demo import DemoConfig
from megatron_medllm.config.run import RunConfig
from megatron_medllm.corpus.build import build
from megatron_medllm.demo.world import generate
from tests.worlds.shapes import SHAPE

REPOSITORY = Path(__file__).parents[2]
SMALL_WORLD = DemoConfig(
    diseases=16, known_diseases=6, towns=8, base_documents=300, medical_documents=300, exam_questions=24,
    development_questions=12, train_questions=24, vocab_size=700,
)  # fmt: skip


def write_tiny_world(directory: Path) -> Path:
    """World and corpora under `directory`, as the pipeline lays them out."""
    generate(SMALL_WORLD, directory / "world")
    for name in ("base", "medical"):
        config = CorpusConfig(
            sources={name: {"paths": str(directory / "world" / f"{name}.jsonl")}},
            tokenizer=str(directory / "world" / "tokenizer"),
            eod_id=1,
            split=(0.9, 0.1, 0.0),
        )
        build(config, directory / "corpus" / name, workers=1)
    return directory


def cpt_settings(world: Path, run_dir: Path, **changes) -> dict:
    """A recipe's settings for a CPT stage of a few steps from random weights."""
    training = {
        "data": [{"path": str(world / "corpus" / "medical")}],
        "train_tokens": 6 * 8 * 64,
        "sequence_length": 64,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "loss_after": ["\n答え:", "\n考察:"],
        "optimizer": {"lr": 3e-3, "warmup_ratio": 0.0},
        "checkpoint": {"every_steps": 2, "keep": 10},
    }
    settings = {
        "run_dir": str(run_dir),
        "seed": 3,
        "model": {"shape": SHAPE, "dtype": "float32", "init_std": 0.1},
        "tokenizer": str(world / "world" / "tokenizer"),
        "cpt": training | changes.pop("cpt", {}),
    }
    return settings | changes


def small_recipe(run_dir: Path, **changes) -> dict:
    """examples/laptop.yaml, made small."""
    settings = yaml.safe_load((REPOSITORY / "examples" / "laptop.yaml").read_text())
    settings["run_dir"] = str(run_dir)
    settings["model"] = {"shape": SHAPE | {"vocab_size": 1024}, "dtype": "float32", "init_std": 0.1}
    settings["demo"] |= {
        "diseases": 16, "known_diseases": 6, "towns": 8, "base_documents": 300, "medical_documents": 300,
        "exam_questions": 12, "development_questions": 8, "train_questions": 16, "vocab_size": 700,
    }  # fmt: skip
    for stage in ("base", "cpt"):
        settings[stage] |= {"train_tokens": 4 * 1024, "sequence_length": 128, "global_batch_size": 4}
        settings[stage].pop("epochs", None)
    settings["rpo"] |= {"epochs": 1, "global_batch_size": 4}
    settings["pairs"]["sampling"] |= {"samples": 1, "answer_only_samples": 1}
    settings["pairs"]["filters"] = {"truncated": False, "max_length_ratio": 100.0, "min_japanese": 0.0}
    return settings | changes


def run_config(settings: dict) -> RunConfig:
    return RunConfig.model_validate(settings)


def write_recipe(settings: dict, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings, allow_unicode=True))
    return path


def medllm(*arguments: str | Path, **popen) -> subprocess.Popen:
    """`medllm ARGUMENTS` as its own process, its output in one pipe."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "megatron_medllm", *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | popen.pop("env", {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,
    )


def run_medllm(*arguments: str | Path, timeout_s: float = 300) -> tuple[int, str]:
    """Exit status and output of `medllm ARGUMENTS`."""
    process = medllm(*arguments)
    output, _ = process.communicate(timeout=timeout_s)
    return process.returncode, output


def metrics(stage_dir: Path, name: str = "loss") -> list[float]:
    """The values of a metric over the steps."""
    rows = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]
