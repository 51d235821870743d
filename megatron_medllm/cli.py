"""`medllm`: parse, load the configuration, call one job. No logic."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.core import TyperGroup

from megatron_medllm.bench.commands import bench_app
from megatron_medllm.command_line import Config, Overrides, console, load_recipe, print_text
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


class DefaultToRun(TyperGroup):
    """`medllm eval CONFIG` means `medllm eval run CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


eval_app = typer.Typer(
    no_args_is_help=True,
    cls=DefaultToRun,
    help="Exams, with and without explanations: `medllm eval CONFIG`, or compare and score below.",
)
app.add_typer(corpus_app, name="corpus")
app.add_typer(bench_app, name="bench")
app.add_typer(eval_app, name="eval")


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
    for noisy in ("megatron", "fsspec", "urllib3", "torch", "asyncio", "filelock", "httpx"):
        logging.getLogger(noisy).setLevel(logging.DEBUG if debug else logging.ERROR)


@app.command()
def pipeline(config: Config, overrides: Overrides = None) -> None:
    """Run the whole recipe; a second run skips what is done."""
    from megatron_medllm.pipeline import run_pipeline

    raise typer.Exit(run_pipeline(load_recipe(config, overrides), console=console))


@app.command()
def demo(config: Config, overrides: Overrides = None) -> None:
    """Invent the miniature world: corpora, exam, gold explanations, tokenizer."""
    from megatron_medllm.demo.world import generate

    run = load_recipe(config, overrides)
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

    run = load_recipe(config, overrides)
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
    from megatron_medllm.train.local_ranks import start_ranks_if_needed

    run = load_recipe(config, overrides)
    start_ranks_if_needed(run.layout)
    from megatron_medllm.train.loop import train as train_stage

    raise typer.Exit(train_stage(run, resume=resume == "auto"))


@app.command()
def score(config: Config, overrides: Overrides = None) -> None:
    """Compute the reference log-probabilities of the recipe's preference pairs, once."""
    from megatron_medllm.train.local_ranks import start_ranks_if_needed

    run = load_recipe(config, overrides)
    start_ranks_if_needed(run.layout)
    from megatron_medllm.train.scoring import score as score_pairs

    console.print(f"reference log-probabilities in {score_pairs(run)}")


@app.command()
def pairs(config: Config, overrides: Overrides = None) -> None:
    """Sample explanations, judge them by the key, and build preference pairs."""
    from megatron_medllm.preference.pairs import build_pairs

    run = load_recipe(config, overrides)
    if run.pairs is None or run.model.path is None:
        raise UserError(f"{config}: medllm pairs needs the section 'pairs' and model.path")
    manifest = build_pairs(run.pairs, run.model.path, run.output or run.run_dir / "pairs")
    console.print(f"{manifest['pairs']} pairs: {manifest['by_tier']}")


@eval_app.command("run")
def eval_run(config: Config, overrides: Overrides = None) -> None:
    """Examine model.path in the recipe's modes. Exit status 1: a requirement is not met."""
    from megatron_medllm.evaluation.run import run_exam

    run = load_recipe(config, overrides)
    if run.eval is None or run.model.path is None:
        raise UserError(f"{config}: medllm eval needs the section 'eval' and model.path")
    output = run.output or run.run_dir / "eval"
    summary = run_exam(run.eval, run.model.path, output)
    print_text((output / "report.md").read_text())
    raise typer.Exit(0 if all(r["met"] for r in summary["requirements"]) else 1)


@eval_app.command("compare")
def eval_compare(
    directories: Annotated[list[Path], typer.Argument(help="folders that `medllm eval` wrote; the first is the base")],
    published: Annotated[bool, typer.Option(help="add the literature's rows, marked as published")] = True,
) -> None:
    """Put evaluations beside each other, with paired intervals for their differences."""
    from megatron_medllm.evaluation.compare import compare, compare_markdown

    print_text(compare_markdown(compare(directories, published=published)))


@eval_app.command("score")
def eval_score(
    predictions: Annotated[list[Path], typer.Argument(help="JSON lines of problem_id and prediction, such as a,c")],
    data: Annotated[list[Path], typer.Option(help="the exam's files or folders")],
    exam: Annotated[str, typer.Option(help="igakuqa, yakugakuqa, or any name (no pass rules then)")] = "igakuqa",
    text_only: Annotated[bool, typer.Option("--text-only", help="leave out questions with an image")] = False,
    parser: Annotated[str, typer.Option(help="strict: as the official scorer; lenient: as people read")] = "strict",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Score predictions that were made elsewhere, by the official rules."""
    from megatron_medllm.evaluation.score_file import score_markdown, score_predictions

    if parser not in ("strict", "lenient"):
        raise UserError(f"--parser {parser}: expected strict or lenient")
    result = score_predictions(exam, data, predictions, text_only=text_only, parser=parser)
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    print_text(score_markdown(result))


@app.command("import")
def import_(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face directory")],
    checkpoint: Annotated[Path, typer.Argument(help="distributed checkpoint to make")],
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the source's")] = None,
    workers: Annotated[int, typer.Option(help="threads")] = 2,
) -> None:
    """Convert a Hugging Face directory to a Megatron distributed checkpoint, tensor by tensor."""
    from megatron_medllm.checkpoint.convert import import_hf

    import_hf(hf_dir, checkpoint, dtype=_dtype(dtype), workers=workers)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="distributed checkpoint, or a training run's folder of them")],
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face directory to make")],
    source: Annotated[Path | None, typer.Option(help="HF directory with config.json and tokenizer")] = None,
    base: Annotated[Path | None, typer.Option(help="HF directory of the base, for a checkpoint of adapters")] = None,
    peft: Annotated[bool, typer.Option("--peft", help="write the adapters in PEFT's format, not merged")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the checkpoint's")] = None,
    shard_size_gb: Annotated[float, typer.Option("--shard-size", help="GB of one safetensors file")] = 5.0,
    workers: Annotated[int, typer.Option(help="threads")] = 2,
) -> None:
    """Convert a Megatron distributed checkpoint to a Hugging Face directory, tensor by tensor."""
    if peft:
        from megatron_medllm.checkpoint.peft_adapter import export_peft

        export_peft(checkpoint, hf_dir, base_model=str(base or ""))
        return
    from megatron_medllm.checkpoint.convert import export_checkpoint, newest_checkpoint

    export_checkpoint(
        newest_checkpoint(checkpoint),
        hf_dir,
        source_dir=source,
        base_dir=base,
        dtype=_dtype(dtype),
        shard_bytes=int(shard_size_gb * 1e9),
        workers=workers,
    )


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    from megatron_medllm.models.qwen25 import DTYPES

    if name not in DTYPES:
        raise UserError(f"--dtype {name}: expected {' or '.join(DTYPES)}")
    return DTYPES[name]


@app.command()
def verify(
    first: Annotated[Path, typer.Argument(help="HF directory or distributed checkpoint")],
    second: Annotated[Path, typer.Argument(help="likewise")],
    prompts: Annotated[Path, typer.Option(help="a prompt a line, or JSON lines of prompt or ids")],
    tolerance: Annotated[float, typer.Option(help="largest logit difference, relative to the logits' scale")] = 1e-4,
    new_tokens: Annotated[int, typer.Option(help="length of the greedy continuations")] = 16,
) -> None:
    """Compare two checkpoints by logits and greedy continuations. Exit status 1: they differ."""
    from megatron_medllm.checkpoint.verify import compare

    found = compare(first, second, prompts, new_tokens=new_tokens, tolerance=tolerance)
    for line in found.lines():
        print_text(line)
    raise typer.Exit(0 if found.agree else 1)


@corpus_app.command("inspect")
def corpus_inspect(
    prefix: Annotated[Path, typer.Argument(help="a .bin/.idx pair, with or without suffix")],
    samples: Annotated[int, typer.Option(help="documents to decode")] = 1,
) -> None:
    """Check an indexed data set against its manifest and show decoded samples."""
    from megatron_medllm.corpus.inspect import inspect

    console.print(str(inspect(prefix, samples=samples)), markup=False, highlight=False)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    hardware: Annotated[
        str | None, typer.Option(help="h100-sxm, h200, a100-80g, a .json file; default: the cluster's")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="rank all layouts that fit")] = False,
    scale: Annotated[
        int | None, typer.Option(min=1, help="the same job on twice as many GPUs, again and again up to this many")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what `stage` needs per GPU and what it will reach, before anything is submitted."""
    from megatron_medllm.planner.from_config import workload_of
    from megatron_medllm.planner.plan import plan as make_plan
    from megatron_medllm.planner.report import plan_report, plan_values, scale_report, search_report
    from megatron_medllm.planner.scale import doublings, scaling_curve
    from megatron_medllm.planner.search import search as search_layouts

    run = load_recipe(config, overrides)
    workload = workload_of(run)
    hardware = hardware or (run.cluster.hardware if run.cluster else "h100-sxm")
    if search:
        report = search_report(search_layouts(workload, hardware))
        print_text(report)
        return
    if scale is not None:
        curve = scaling_curve(workload, hardware, gpus=doublings(workload, largest=scale))
        print_text(scale_report(curve))
        return
    found = make_plan(workload, hardware)
    if as_json:
        console.print_json(data=plan_values(found))
        return
    print_text(plan_report(found))


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    stages: Annotated[str | None, typer.Option(help="comma-separated stages; default: the whole recipe")] = None,
    bench: Annotated[
        str | None, typer.Option(help="a benchmark instead of the recipe: what follows `medllm bench`")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the scripts, submit nothing")] = False,
    force: Annotated[bool, typer.Option("--force", help="submit although the plan does not fit")] = False,
) -> None:
    """Submit the recipe as a chain of Slurm jobs that checks, resumes and requeues itself."""
    from megatron_medllm.recipe import submit_bench, submit_recipe

    run = load_recipe(config, overrides)
    if bench is not None:
        printed = submit_bench(run, bench, dry_run=dry_run, force=force)
    else:
        printed = submit_recipe(run, stages=stages.split(",") if stages else None, dry_run=dry_run, force=force)
    print_text(printed)


@app.command()
def status(run_dir: Annotated[Path, typer.Argument(help="a submitted run's directory")]) -> None:
    """Show stage, step, rate, time left and restarts of a submitted run."""
    from megatron_medllm.launch.status import run_status, status_report

    print_text(status_report(run_status(run_dir)))


@app.command()
def cancel(run_dir: Annotated[Path, typer.Argument(help="a submitted run's directory")]) -> None:
    """Cancel the jobs of this run, and of this run only."""
    from megatron_medllm.launch.status import cancel as cancel_run

    console.print(f"cancelled: {', '.join(cancel_run(run_dir)) or 'nothing was queued'}")


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
