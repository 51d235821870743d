"""`medllm`: parse, load the configuration, call one job. No logic."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from megatron_medllm.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Qwen2.5 on Megatron-Core: Japanese medical continued pretraining, then preference optimization. "
    "Every command takes a YAML file and key=value overrides, e.g. cpt.optimizer.lr=1e-5.",
)
corpus_app = typer.Typer(no_args_is_help=True, help="Japanese text to Megatron's indexed data sets.")
eval_app = typer.Typer(no_args_is_help=True, help="Exams: with and without explanations, compared and scored.")
app.add_typer(corpus_app, name="corpus")
app.add_typer(eval_app, name="eval")

console = Console()

Config = Annotated[Path, typer.Argument(help="the recipe, a YAML file", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value overrides", show_default=False)]


def _load(config: Path, overrides: list[str] | None) -> Any:
    from megatron_medllm.config.run import load

    return load(config, overrides or [])


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks and debug messages")] = False,
) -> None:
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO,
        format="%(message)s",
        datefmt="%H:%M:%S",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )
    for noisy in ("megatron", "matplotlib", "fsspec", "urllib3", "torch", "asyncio", "filelock", "httpx"):
        logging.getLogger(noisy).setLevel(logging.DEBUG if debug else logging.ERROR)


@app.command()
def pipeline(config: Config, overrides: Overrides = None) -> None:
    """Run the whole recipe; a second run skips what is done."""
    from megatron_medllm.pipeline import run_pipeline

    raise typer.Exit(run_pipeline(_load(config, overrides), console=console))


@app.command()
def demo(config: Config, overrides: Overrides = None) -> None:
    """Invent the miniature world: corpora, exam, gold explanations, tokenizer."""
    from megatron_medllm.demo.world import generate

    run = _load(config, overrides)
    if run.demo is None:
        raise UserError(f"{config}: no section 'demo'")
    console.print_json(data=generate(run.demo, run.run_dir / "world"))


@corpus_app.command("build")
def corpus_build(
    config: Config,
    overrides: Overrides = None,
    only: Annotated[str | None, typer.Option(help="build this corpus of `corpora` alone")] = None,
    workers: Annotated[int | None, typer.Option(help="processes; default: one a core")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="the first broken document is fatal")] = False,
) -> None:
    """Read, clean, deduplicate, decontaminate, tokenize and index the recipe's corpora."""
    from megatron_medllm.corpus.build import build

    run = _load(config, overrides)
    if only is not None and only not in run.corpora:
        raise UserError(f"{config}: no corpus {only!r} in corpora (there are: {', '.join(run.corpora) or 'none'})")
    for name, section in run.corpora.items():
        if only in (None, name):
            manifest = build(section, run.run_dir / "corpus" / name, workers=workers, strict=strict)
            for source, facts in manifest["sources"].items():
                console.print(f"{name}/{source}: {facts['documents']:,} documents, {facts['tokens']:,} tokens")


@app.command()
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
    run = _load(config, overrides)
    _start_ranks_if_needed(run.layout)
    from megatron_medllm.train.loop import train as train_stage

    raise typer.Exit(train_stage(run, resume=resume == "auto"))


@app.command()
def score(config: Config, overrides: Overrides = None) -> None:
    """Compute the reference log-probabilities of the recipe's preference pairs, once."""
    run = _load(config, overrides)
    _start_ranks_if_needed(run.layout)
    from megatron_medllm.train.scoring import score as score_pairs

    console.print(f"reference log-probabilities in {score_pairs(run)}")


def _start_ranks_if_needed(layout: Any) -> None:
    from megatron_medllm.train.local_ranks import needed, run_ranks

    processes = needed(layout)
    if processes:
        raise typer.Exit(run_ranks(sys.argv[1:], processes=processes))


@app.command()
def pairs(config: Config, overrides: Overrides = None) -> None:
    """Sample explanations, judge them by the key, and build preference pairs."""
    from megatron_medllm.preference.pairs import build_pairs

    run = _load(config, overrides)
    if run.pairs is None or run.model.path is None:
        raise UserError(f"{config}: medllm pairs needs the section 'pairs' and model.path")
    manifest = build_pairs(run.pairs, run.model.path, run.output or run.run_dir / "pairs")
    console.print(f"{manifest['pairs']} pairs: {manifest['by_tier']}")


@eval_app.command("run")
def eval_run(config: Config, overrides: Overrides = None) -> None:
    """Examine model.path in the recipe's modes. Exit status 1: a requirement is not met."""
    from megatron_medllm.evaluation.run import run_exam

    run = _load(config, overrides)
    if run.eval is None or run.model.path is None:
        raise UserError(f"{config}: medllm eval needs the section 'eval' and model.path")
    output = run.output or run.run_dir / "eval"
    summary = run_exam(run.eval, run.model.path, output)
    console.print((output / "report.md").read_text())
    raise typer.Exit(0 if all(r["met"] for r in summary["requirements"]) else 1)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="a run directory that `medllm pipeline` made")]) -> None:
    """Write the run's report.html and summary.json, and print its table."""
    from megatron_medllm.evaluation.run_report import build_report, table

    console.print(table(build_report(run_dir)))
    console.print(f"report: {run_dir / 'report.html'}", soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from megatron_medllm.config.run import RunConfig

    console.print_json(data=RunConfig.model_json_schema())


@app.command()
def doctor() -> None:
    """Say what this machine has, what it lacks, and what the lack costs."""
    from megatron_medllm.launch.doctor import doctor as examine
    from megatron_medllm.launch.doctor import doctor_report, failed

    checks = examine()
    console.print(doctor_report(checks), markup=False, highlight=False)
    raise typer.Exit(1 if failed(checks) else 0)


def main() -> None:
    """Entry point: errors that the user can mend are one line, without a traceback unless `--debug`."""
    try:
        app()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
