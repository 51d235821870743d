"""`medllm release`: what one uploads of a finished run, and whether it still is what it was."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_medllm.cli.options import DefaultCommand, print_text
from megatron_medllm.errors import UserError


class DefaultToWrite(DefaultCommand):
    """`medllm release RUN HF_DIR` means `medllm release write RUN HF_DIR`."""

    default = "write"


release_app = typer.Typer(
    cls=DefaultToWrite,
    no_args_is_help=True,
    help="What one uploads of a run: `medllm release RUN HF_DIR`, then `medllm release verify HF_DIR --run RUN`.",
)


@release_app.command("write")
def release_write(
    run: Annotated[Path, typer.Argument(help="a finished run directory, its model examined")],
    hf_dir: Annotated[Path, typer.Argument(help="the folder to make")],
    stage: Annotated[str | None, typer.Option(help="whose model: rpo, cpt, …; default: the recipe's last")] = None,
    name: Annotated[str | None, typer.Option(help="the model's name on its card; default: the folder's")] = None,
    base_model: Annotated[str | None, typer.Option(help="the base's id on the hub, where it cannot be told")] = None,
    base_licence: Annotated[str | None, typer.Option(help="the base's licence, where it cannot be told")] = None,
    licence: Annotated[str | None, typer.Option(help="of the release; default: the base's")] = None,
    licence_file: Annotated[Path | None, typer.Option(help="its text; default: the one beside the base")] = None,
    language: Annotated[list[str] | None, typer.Option(help="ISO code, may be repeated; default: ja")] = None,
    hardware: Annotated[str | None, typer.Option(help="what it was trained on, for the card")] = None,
    source_licence: Annotated[
        list[str] | None, typer.Option(metavar="NAME=ID", help="licence of a source or exam, may be repeated")
    ] = None,
) -> None:
    """Write weights, tokenizer, model card, licence and provenance of a run's model to a folder."""
    from megatron_medllm.release.write import ReleaseOptions, write_release

    options = ReleaseOptions(
        stage=stage,
        name=name,
        base_model=base_model,
        base_licence=base_licence,
        licence=licence,
        licence_file=licence_file,
        languages=tuple(language or ("ja",)),
        hardware=hardware,
        source_licences=dict(_pair(text) for text in source_licence or []),
    )
    released = write_release(run, hf_dir, options)
    for warning in released.warnings:
        print_text(f"note: {warning}")
    print_text(f"{hf_dir}: model {released.model}, licence {released.licence}: {', '.join(released.files)}")


def _pair(text: str) -> tuple[str, str]:
    key, found, value = text.partition("=")
    if not (key and found and value):
        raise UserError(f"--source-licence {text}: expected NAME=LICENCE")
    return key, value


@release_app.command("verify")
def release_verify(
    directory: Annotated[Path, typer.Argument(help="what medllm release wrote")],
    run: Annotated[Path | None, typer.Option(help="the run behind it; default: the release's own files only")] = None,
) -> None:
    """Read a release and its run again and name the first stage that does not match. Exit status 1: one does not."""
    from megatron_medllm.release.verify import verify_release

    found = verify_release(directory, run)
    for line in found.lines():
        print_text(line)
    raise typer.Exit(1 if found.wrong else 0)
