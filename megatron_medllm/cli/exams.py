"""`medllm eval`: examine a model, compare evaluations, score answers made elsewhere."""

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_medllm.cli.options import Config, DefaultCommand, Overrides, load_recipe, print_text
from megatron_medllm.cli.shards import MergeOption, Part, ShardOption
from megatron_medllm.errors import UserError


class DefaultToRun(DefaultCommand):
    """`medllm eval CONFIG` means `medllm eval run CONFIG`."""

    default = "run"


eval_app = typer.Typer(
    no_args_is_help=True,
    cls=DefaultToRun,
    help="Exams, with and without explanations: `medllm eval CONFIG`, or compare and score below.",
)


@eval_app.command("run")
def eval_run(
    config: Config, overrides: Overrides = None, shard: ShardOption = None, merge: MergeOption = False
) -> None:
    """Examine model.path in the recipe's modes. Exit status 1: a requirement is not met."""
    part = Part.of(shard, merge=merge)
    run = load_recipe(config, overrides)
    if run.eval is None or run.model.path is None:
        raise UserError(f"{config}: medllm eval needs the section 'eval' and model.path")
    from megatron_medllm.account import Account
    from megatron_medllm.evaluation.run import answer_shard, run_exam

    output = run.output or run.run_dir / "eval"
    summary = part.run(
        run.eval.engine,
        ["eval", "run", str(config), *(overrides or [])],
        output,
        answer=lambda shard: answer_shard(run.eval, run.model.path, output, shard),
        make=lambda merge: run_exam(run.eval, run.model.path, output, merge=merge),
    )
    if summary is None:
        return
    print_text((output / "report.md").read_text())
    for line in Account.from_json(summary["account"]).loss_lines():
        print_text(line)
    raise typer.Exit(0 if all(r["met"] for r in summary["requirements"]) else 1)


@eval_app.command("compare")
def eval_compare(
    directories: Annotated[list[Path], typer.Argument(help="folders that `medllm eval` wrote; the first is the base")],
    published: Annotated[bool, typer.Option(help="add the literature's rows, marked as published")] = True,
) -> None:
    """Put evaluations beside each other, with paired intervals for their differences."""
    from megatron_medllm.evaluation.compare import compare_evaluations, compare_markdown

    print_text(compare_markdown(compare_evaluations(directories, published=published)))


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
    result = score_predictions(
        exam, data, predictions, text_only=text_only, parser="strict" if parser == "strict" else "lenient"
    )
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    print_text(score_markdown(result))
