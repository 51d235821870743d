"""`medllm corpus`: text to Megatron's indexed data sets."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_medllm.cli.options import Config, Overrides, load_recipe, print_text
from megatron_medllm.errors import UserError

corpus_app = typer.Typer(no_args_is_help=True, help="Japanese text to Megatron's indexed data sets.")


@corpus_app.command("build")
def corpus_build(
    config: Config,
    overrides: Overrides = None,
    only: Annotated[str | None, typer.Option(help="build this corpus of `corpora` alone")] = None,
    workers: Annotated[int | None, typer.Option(help="processes; default: one a core")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="the first broken document is fatal")] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="work off every Nth unit; --finish comes last")
    ] = None,
    finish: Annotated[bool, typer.Option("--finish", help="make the result of what the shards have done")] = False,
) -> None:
    """Read, clean, deduplicate, decontaminate, tokenize and index the recipe's corpora."""
    from megatron_medllm.account import Account
    from megatron_medllm.corpus import build as building
    from megatron_medllm.shard import Shard

    part = None if shard is None else Shard.parse(shard)
    if part is not None and finish:
        raise UserError(f"--shard {shard} and --finish: give one of them; the last step comes when all shards are done")
    if finish and strict:
        raise UserError("--strict: nothing is read by --finish; give it to the shards")
    run = load_recipe(config, overrides)
    if only is not None and only not in run.corpora:
        raise UserError(f"{config}: no corpus {only!r} in corpora (there are: {', '.join(run.corpora) or 'none'})")
    for name, section in run.corpora.items():
        if only in (None, name):
            output = run.run_dir / "corpus" / name
            if part is not None:
                units = building.build_shard(section, output, part, workers=workers, strict=strict)
                print_text(f"{name}: shard {part}, {len(units):,} units done")
                continue
            if finish:
                manifest = building.finish(section, output, workers=workers)
            else:
                manifest = building.build(section, output, workers=workers, strict=strict)
            for source, facts in manifest["sources"].items():
                print_text(f"{name}/{source}: {facts['documents']:,} documents, {facts['tokens']:,} tokens")
            if "account" in manifest:  # earlier versions' manifests hold none
                for line in Account.from_json(manifest["account"]).loss_lines():
                    print_text(line)


@corpus_app.command("inspect")
def corpus_inspect(
    prefix: Annotated[Path, typer.Argument(help="a .bin/.idx pair, with or without suffix")],
    samples: Annotated[int, typer.Option(help="documents to decode")] = 1,
) -> None:
    """Check an indexed data set against its manifest and show decoded samples."""
    from megatron_medllm.corpus.inspect import inspect

    print_text(str(inspect(prefix, samples=samples)))
