"""`medllm`: the commands put together. Each parses, loads the recipe and calls one job; none holds logic."""

import logging
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from megatron_medllm.cli import checkpoints, cluster, recipe
from megatron_medllm.cli.bench import bench_app
from megatron_medllm.cli.corpus import corpus_app
from megatron_medllm.cli.examples import examples
from megatron_medllm.cli.exams import eval_app
from megatron_medllm.cli.release import release_app
from megatron_medllm.errors import USER_ERROR_EXIT_CODE, UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Qwen2.5 and Qwen3 on Megatron-Core: Japanese medical continued pretraining, then preference optimization. "
    "Every command takes a YAML file and key=value overrides, e.g. cpt.optimizer.lr=1e-5.",
)
app.add_typer(corpus_app, name="corpus")
app.add_typer(bench_app, name="bench")
app.add_typer(eval_app, name="eval")
app.add_typer(release_app, name="release")

_COMMANDS: dict[str, Callable[..., None]] = {
    "pipeline": recipe.pipeline,
    "demo": recipe.demo,
    "train": recipe.train,
    "score": recipe.score,
    "pairs": recipe.pairs,
    "report": recipe.report,
    "schema": recipe.schema,
    "examples": examples,
    "import": checkpoints.import_,
    "export": checkpoints.export,
    "verify": checkpoints.verify,
    "plan": cluster.plan,
    "certify": cluster.certify,
    "submit": cluster.submit,
    "status": cluster.status,
    "cancel": cluster.cancel,
    "doctor": cluster.doctor,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


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


def main() -> None:
    """Entry point: errors that the user can mend are one line, without a traceback unless `--debug`."""
    try:
        app()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        line = Text.assemble(("error:", "bold red"), f" {error}")  # a name may hold [brackets]: text, never markup
        Console(stderr=True).print(line, soft_wrap=True)
        sys.exit(USER_ERROR_EXIT_CODE)
