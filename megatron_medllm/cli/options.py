"""What every command shares: the recipe as its arguments, reading it, printing."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

console = Console()

Config = Annotated[Path, typer.Argument(help="the recipe, a YAML file", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value overrides", show_default=False)]


class DefaultCommand(TyperGroup):
    """A group one of whose commands need not be named: `medllm eval CONFIG` means `medllm eval run CONFIG`."""

    default = ""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer, with the default's name put in where no command stands first."""
        if args and args[0] not in (*self.commands, "--help"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


def load_recipe(config: Path, overrides: list[str] | None) -> Any:
    """The recipe with its overrides. Imported here and not above: `--help` must not wait for it."""
    from megatron_medllm.config.run import load

    return load(config, overrides or [])


def print_text(text: str) -> None:
    """Print as it is: no markup, no colours, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
