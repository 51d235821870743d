"""What every command shares: the recipe as its arguments, reading it, printing."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console()

Config = Annotated[Path, typer.Argument(help="the recipe, a YAML file", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value overrides", show_default=False)]


def load_recipe(config: Path, overrides: list[str] | None) -> Any:
    """The recipe with its overrides. Imported here and not above: `--help` must not wait for it."""
    from megatron_medllm.config.run import load

    return load(config, overrides or [])


def print_text(text: str) -> None:
    """Print as it is: no markup, no colours, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
