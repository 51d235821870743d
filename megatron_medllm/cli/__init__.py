"""The command line, a file per group of commands. Nothing below this room imports typer."""

from megatron_medllm.cli.app import main

__all__ = ["main"]
