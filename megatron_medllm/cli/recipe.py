"""The commands that walk the recipe: the whole of it, or one stage."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_medllm.cli.options import Config, Overrides, console, load_recipe, print_text
from megatron_medllm.cli.shards import MergeOption, Part, ShardOption
from megatron_medllm.errors import UserError


def pipeline(config: Config, overrides: Overrides = None) -> None:
    """Run the whole recipe; a second run skips what is done."""
    from megatron_medllm.launch.status import refuse_queued
    from megatron_medllm.recipe.runner import run_pipeline

    run = load_recipe(config, overrides)
    refuse_queued(run.run_dir)
    raise typer.Exit(run_pipeline(run, console=console))


def demo(config: Config, overrides: Overrides = None) -> None:
    """Invent the miniature world: corpora, exam, gold explanations, tokenizer."""
    from megatron_medllm.demo.world import generate

    run = load_recipe(config, overrides)
    if run.demo is None:
        raise UserError(f"{config}: no section 'demo'")
    console.print_json(data=generate(run.demo, run.run_dir / "world"))


def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(help="auto: from the newest checkpoint that verifies; never: from the start")
    ] = "auto",
) -> None:
    """Train `stage` (base, cpt or rpo). Exit status 85: saved and stopped early, run it again."""
    if resume not in ("auto", "never"):
        raise UserError(f"--resume {resume}: expected auto or never")
    from megatron_medllm.train.local_ranks import start_ranks_if_needed

    run = load_recipe(config, overrides)
    start_ranks_if_needed(run.layout)
    from megatron_medllm.train.loop import train as train_stage

    raise typer.Exit(train_stage(run, resume=resume == "auto"))


def score(config: Config, overrides: Overrides = None) -> None:
    """Compute the reference log-probabilities of the recipe's preference pairs, once."""
    from megatron_medllm.train.local_ranks import start_ranks_if_needed

    run = load_recipe(config, overrides)
    start_ranks_if_needed(run.layout)
    from megatron_medllm.train.scoring import score as score_pairs

    print_text(f"reference log-probabilities in {score_pairs(run)}")


def pairs(config: Config, overrides: Overrides = None, shard: ShardOption = None, merge: MergeOption = False) -> None:
    """Sample explanations, judge them by the key, and build preference pairs."""
    part = Part.of(shard, merge=merge)
    run = load_recipe(config, overrides)
    if run.pairs is None or run.model.path is None:
        raise UserError(f"{config}: medllm pairs needs the section 'pairs' and model.path")
    from megatron_medllm.account import Account
    from megatron_medllm.preference.pairs import answer_shard, build_pairs

    output = run.output or run.run_dir / "pairs"
    manifest = part.run(
        run.pairs.engine,
        ["pairs", str(config), *(overrides or [])],
        output,
        answer=lambda shard: answer_shard(run.pairs, run.model.path, output, shard),
        make=lambda merge: build_pairs(run.pairs, run.model.path, output, merge=merge),
    )
    if manifest is None:
        return
    for line in Account.from_json(manifest["account"]).lines():
        print_text(line)
    print_text(
        f"{manifest['pairs']} pairs: {manifest['by_tier']}; {manifest['explained_questions']} of "
        f"{manifest['questions']} questions have an explained pair"
    )


def report(run_dir: Annotated[Path, typer.Argument(help="a run directory that `medllm pipeline` made")]) -> None:
    """Write the run's report.html and summary.json, and print its table."""
    from megatron_medllm.evaluation.run_report import build_report, table

    console.print(table(build_report(run_dir)))
    print_text(f"report: {run_dir / 'report.html'}")


def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from megatron_medllm.config.run import RunConfig

    console.print_json(data=RunConfig.model_json_schema())
