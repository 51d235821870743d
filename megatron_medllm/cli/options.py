"""What every command shares: the recipe as its arguments, reading it, printing."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from megatron_medllm.errors import UserError

console = Console()

Config = Annotated[Path, typer.Argument(help="the recipe, a YAML file", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value overrides", show_default=False)]

ShardOption = Annotated[
    str | None, typer.Option("--shard", metavar="I/N", help="answer part I of N into a log of its own, and stop there")
]
MergeOption = Annotated[
    bool, typer.Option("--merge", help="make the results of the shards' answers; refuse when some are missing")
]


def shard_of(shard: str | None, *, merge: bool) -> Any:
    """The shard that `--shard` names, if it does."""
    from megatron_medllm.shard import Shard

    if shard is None:
        return None
    if merge:
        raise UserError("--shard and --merge: give one of them")
    return Shard.parse(shard)


def shard_line(shard: Any, timing: dict[str, float]) -> str:
    """What a shard did, in words."""
    answered, kept = (int(timing.get(name, 0)) for name in ("answered", "taken_from_log"))
    return f"shard {shard}: {answered} requests answered, {kept} had been before"


def load_recipe(config: Path, overrides: list[str] | None) -> Any:
    """The recipe with its overrides. Imported here and not above: `--help` must not wait for it."""
    from megatron_medllm.config.run import load

    return load(config, overrides or [])


def print_text(text: str) -> None:
    """Print as it is: no markup, no colours, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
