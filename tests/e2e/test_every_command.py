"""Every command of `medllm` is run once as a user runs it: exit status, what it prints, what it leaves.

The commands are listed from the command line itself, so that a new one without a test here fails. What one leaves, the
next ones use; each is made once. What the results are worth is tested elsewhere.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from megatron_medllm.cli.app import app
from megatron_medllm.launch.jobs import RunFiles, StageJob, write_specification
from megatron_medllm.shipped import shipped
from megatron_medllm.storage import read_json, write_json
from tests.worlds.run import small_recipe, write_recipe

LORA = "cpt.adapter={rank: 2, alpha: 4}"
SHORT = ("--synthetic", "--steps", 1, "--warmup-steps", 0)
SHORT_PAIRS = (*SHORT, "--prompt-length", 8, "--response-length", 8)


def leaf_commands(group: Any, prefix: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaf_commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name


COMMANDS = list(leaf_commands(typer.main.get_command(app)))
DRIVEN: dict[str, Callable[["Made"], None]] = {}


def drives(command: str) -> Callable[[Callable[["Made"], None]], Callable[["Made"], None]]:
    """The test of that command."""

    def register(test: Callable[["Made"], None]) -> Callable[["Made"], None]:
        DRIVEN[command] = test
        return test

    return register


def medllm(*arguments: object, status: int = 0) -> str:
    """Run a command in this process; what it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.output


@dataclass
class Made:
    """What commands have left in one run directory; each is run when somebody first needs what it makes."""

    directory: Path

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @cached_property
    def recipe(self) -> Path:
        settings = small_recipe(self.run_dir)
        for stage in ("base", "cpt"):
            settings[stage] |= {"train_tokens": 2 * 4 * 128, "checkpoint": {"every_steps": 1}}
        settings["demo"] |= {"base_documents": 100, "medical_documents": 100}
        settings["stage"] = "cpt"
        return write_recipe(settings, self.directory / "recipe.yaml")

    @cached_property
    def demo(self) -> str:
        return medllm("demo", self.recipe)

    @cached_property
    def corpora(self) -> str:
        assert self.demo
        return medllm("corpus", "build", self.recipe, "--workers", 1)

    @cached_property
    def training(self) -> str:
        assert self.corpora
        return medllm("train", self.recipe)

    @cached_property
    def checkpoints(self) -> Path:
        assert self.training is not None
        return self.run_dir / "cpt" / "checkpoints"

    @cached_property
    def model(self) -> Path:
        """The exported Hugging Face directory of the training's end."""
        target = self.directory / "hf"
        medllm("export", self.checkpoints, target)
        return target

    def from_model(self) -> tuple[str, ...]:
        return (f"model.path={self.model}", "model.shape=null")

    @cached_property
    def pairs(self) -> str:
        return medllm("pairs", self.recipe, *self.from_model())

    @cached_property
    def answers(self) -> Path:
        """What an exam leaves."""
        folder = self.run_dir / "eval" / "cpt"
        self.exam = medllm("eval", self.recipe, *self.from_model(), f"output={folder}")
        return folder

    @cached_property
    def throughput(self) -> Path:
        medllm(
            "bench", "throughput", self.recipe, *SHORT, "--document-length", 64, "--output", self.directory / "bench"
        )
        return self.directory / "bench" / "throughput.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("commands"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command(command: str, made: Made) -> None:
    assert command in DRIVEN, f"no test runs `medllm {command}`: add one to {Path(__file__).name}"
    DRIVEN[command](made)


def test_no_command_is_tested_that_does_not_exist() -> None:
    assert set(DRIVEN) == set(COMMANDS)


@drives("demo")
def demo(made: Made) -> None:
    assert json.loads(made.demo)
    assert (made.run_dir / "world" / "exam").is_dir() and (made.run_dir / "world" / "tokenizer").is_dir()


@drives("corpus build")
def corpus_build(made: Made) -> None:
    assert "medical/medical: " in made.corpora and "base/base: " in made.corpora
    assert read_json(made.run_dir / "corpus" / "medical" / "manifest.json")["sources"]["medical"]["documents"] > 50


@drives("corpus inspect")
def corpus_inspect(made: Made) -> None:
    assert made.corpora
    index = next((made.run_dir / "corpus" / "medical").glob("*.idx"))
    assert "documents" in medllm("corpus", "inspect", index, "--samples", 2)


@drives("train")
def train(made: Made) -> None:
    assert len(list(made.checkpoints.glob("step-*"))) >= 1


@drives("export")
def export(made: Made) -> None:
    assert (made.model / "model.safetensors").is_file() and (made.model / "tokenizer.json").is_file()
    assert read_json(made.model / "generation_config.json") == {"eos_token_id": 1}
    assert made.corpora
    adapted = made.directory / "adapted"
    medllm("train", made.recipe, LORA, f"run_dir={made.run_dir}", f"output={adapted}", *made.from_model())
    medllm("export", adapted / "checkpoints", made.directory / "peft", "--peft", "--base", made.model)
    assert read_json(made.directory / "peft" / "adapter_config.json")["r"] == 2
    medllm("export", adapted / "checkpoints", made.directory / "merged", "--base", made.model)
    assert (made.directory / "merged" / "config.json").is_file()


@drives("import")
def import_(made: Made) -> None:
    medllm("import", made.model, made.directory / "imported")
    assert (made.directory / "imported" / ".metadata").is_file()


@drives("verify")
def verify(made: Made) -> None:
    prompts = made.directory / "prompts.txt"
    prompts.write_text("問い\n答え\n")
    medllm("export", made.checkpoints, made.directory / "again")
    options = ("--prompts", prompts, "--new-tokens", 2)
    assert "2 prompts" in medllm("verify", made.model, made.directory / "again", *options)


@drives("pairs")
def pairs(made: Made) -> None:
    assert " pairs: " in made.pairs
    assert read_json(made.run_dir / "pairs" / "manifest.json")["questions"] > 0


@drives("score")
def score(made: Made) -> None:
    assert made.pairs
    written = medllm("score", made.recipe, "stage=rpo", *made.from_model())
    assert "reference log-probabilities in " in written


@drives("eval run")
def eval_run(made: Made) -> None:
    assert read_json(made.answers / "summary.json")["requirements"] == []
    assert "| " in made.exam


@drives("eval compare")
def eval_compare(made: Made) -> None:
    assert "| " in medllm("eval", "compare", made.answers, made.answers, "--no-published")


@drives("eval score")
def eval_score(made: Made) -> None:
    assert made.demo
    exam = made.run_dir / "world" / "exam"
    rows = [json.loads(line) for path in sorted(exam.rglob("*.jsonl")) for line in path.read_text().splitlines()]
    answers = [
        {"problem_id": row["problem_id"], "prediction": ",".join(row["answer"])} for row in rows if "answer" in row
    ]
    predictions = made.directory / "predictions.jsonl"
    predictions.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    found = medllm("eval", "score", predictions, "--data", exam, "--exam", "miniature", "--json")
    assert json.loads(found)


@drives("report")
def report(made: Made) -> None:
    assert made.answers.is_dir()
    assert "report.html" in medllm("report", made.run_dir)
    assert (made.run_dir / "report.html").is_file() and read_json(made.run_dir / "summary.json")["models"]


@drives("pipeline")
def pipeline(made: Made) -> None:
    """A recipe of a world and a corpus, twice; the whole recipe is in test_pipeline.py."""
    settings = yaml.safe_load(made.recipe.read_text())
    kept = {key: settings[key] for key in ("name", "seed", "tokenizer", "demo", "corpora")}
    kept |= {"run_dir": str(made.directory / "pipeline"), "model": {"path": str(made.model)}}
    path = write_recipe(kept, made.directory / "pipeline.yaml")
    medllm("pipeline", path)
    assert {p.stem for p in (made.directory / "pipeline" / "stages").glob("*.json")} >= {"world", "corpus-medical"}
    assert medllm("pipeline", path).count("done before") == 3


@drives("plan")
def plan(made: Made) -> None:
    assert json.loads(medllm("plan", made.recipe, "--json"))["fits"] is True
    assert "GiB" in medllm("plan", made.recipe, "--hardware", "h200")
    assert medllm("plan", made.recipe, "--search") and medllm("plan", made.recipe, "--scale", 2)


@drives("certify")
def certify(made: Made) -> None:
    small = ("layout.dp=2", "model.shape.num_layers=2", f"run_dir={made.directory / 'certified'}")
    assert medllm("certify", made.recipe, *small)
    assert medllm("certify", made.recipe, *small, "--check")


@drives("submit")
def submit(made: Made) -> None:
    assert made.corpora
    scripts = medllm("submit", made.recipe, "--dry-run")
    assert scripts.count("#SBATCH --job-name=") >= 4
    assert not RunFiles(made.run_dir).submission.exists()


def submitted(made: Made, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose job 7 waits in a queue, as Slurm's programs tell."""
    files = RunFiles(made.directory / "submitted")
    write_specification(files, StageJob(name="cpt", script="cpt", command=()), {})
    write_json(files.submission, {"jobs": {"cpt": "7"}})
    programs = made.directory / "bin"
    programs.mkdir(exist_ok=True)
    for name, line in {"squeue": "echo '7|7|PENDING|Priority'", "scancel": f"echo $@ > {programs}/cancelled"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return files.run


@drives("status")
def status(made: Made) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        printed = medllm("status", submitted(made, monkeypatch), status=3)  # queued
    assert "cpt" in printed and "pending" in printed and "Priority" in printed


@drives("cancel")
def cancel(made: Made) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert medllm("cancel", submitted(made, monkeypatch)) == "cancelled: 7\n"
    assert (made.directory / "bin" / "cancelled").read_text() == "7\n"


@drives("doctor")
def doctor(made: Made) -> None:
    result = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    assert result.exit_code in (0, 1)  # whether this machine is fit is not the question
    assert "megatron-core" in result.output or "packages" in result.output


@drives("examples")
def examples(made: Made) -> None:
    assert len(medllm("examples").splitlines()) == len(list(shipped("examples").glob("*.yaml")))
    medllm("examples", "laptop", made.directory)
    assert (made.directory / "laptop.yaml").is_file()


@drives("schema")
def schema(made: Made) -> None:
    assert "run_dir" in json.loads(medllm("schema"))["properties"]


@drives("bench throughput")
def bench_throughput(made: Made) -> None:
    assert read_json(made.throughput)


@drives("bench scoring")
def bench_scoring(made: Made) -> None:
    assert "pairs/s" in medllm(
        "bench", "scoring", made.recipe, "stage=rpo", *SHORT_PAIRS, "--output", made.directory / "b1"
    )


@drives("bench generation")
def bench_generation(made: Made) -> None:
    output = made.directory / "b2"
    assert "tokens/s" in medllm(
        "bench", "generation", made.recipe, *made.from_model(), *SHORT_PAIRS, "--output", output
    )


@drives("bench rank")
def bench_rank(made: Made) -> None:
    options = ("--rank", 1, "--steps", 1, "--warmup-steps", 0, "--output", made.directory / "b3")
    assert "| weights |" in medllm("bench", "rank", made.recipe, "layout.dp=2", *options)


@drives("bench compare")
def bench_compare(made: Made) -> None:
    assert "| " in medllm("bench", "compare", made.throughput, made.throughput)


@drives("bench sweep")
def bench_sweep(made: Made) -> None:
    options = ("--over", "cpt.micro_batch_size=1", "--steps", 1, "--synthetic", "--output", made.directory / "b4")
    assert "cpt.micro_batch_size" in medllm("bench", "sweep", made.recipe, *options)


@drives("release write")
def release_write(made: Made) -> None:
    """The whole of it is in test_release.py."""
    assert made.checkpoints.is_dir() and made.answers.is_dir()
    settings = yaml.safe_load(made.recipe.read_text())
    kept = {key: value for key, value in settings.items() if key not in ("base", "pairs", "rpo")}
    write_recipe(kept, made.run_dir / "run.yaml")
    assert "model cpt, licence mit" in medllm("release", made.run_dir, made.directory / "release", "--licence", "mit")


@drives("release verify")
def release_verify(made: Made) -> None:
    target = made.directory / "release"
    if not target.is_dir():
        release_write(made)
    assert medllm("release", "verify", target, "--run", made.run_dir).startswith("verified: ")
