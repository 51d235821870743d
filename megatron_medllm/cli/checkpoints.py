"""The commands that convert and compare checkpoints."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megatron_medllm.cli.options import print_text
from megatron_medllm.errors import UserError


def import_(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face directory")],
    checkpoint: Annotated[Path, typer.Argument(help="distributed checkpoint to make")],
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the source's")] = None,
    layout: Annotated[
        Literal["megatron", "bridge"], typer.Option(help="bridge: with what Megatron-Bridge looks for around it")
    ] = "megatron",
    workers: Annotated[int, typer.Option(help="threads")] = 2,
) -> None:
    """Convert a Hugging Face directory to a Megatron distributed checkpoint, tensor by tensor."""
    if layout == "bridge":
        from megatron_medllm.checkpoint.foreign.bridge_out import import_to_bridge

        import_to_bridge(hf_dir, checkpoint, dtype=_dtype(dtype), workers=workers)
        return
    from megatron_medllm.checkpoint.convert import import_hf

    import_hf(hf_dir, checkpoint, dtype=_dtype(dtype), workers=workers)


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Megatron checkpoint, or a training run's folder of them")],
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face directory to make")],
    source: Annotated[Path | None, typer.Option(help="HF directory with config.json and tokenizer")] = None,
    base: Annotated[Path | None, typer.Option(help="HF directory of the base, for a checkpoint of adapters")] = None,
    peft: Annotated[bool, typer.Option("--peft", help="write the adapters in PEFT's format, not merged")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the checkpoint's")] = None,
    shard_size_gb: Annotated[float, typer.Option("--shard-size", help="GB of one safetensors file")] = 5.0,
    workers: Annotated[int, typer.Option(help="threads")] = 2,
) -> None:
    """Convert a Megatron checkpoint, ours or another tool's, to a Hugging Face directory, tensor by tensor."""
    if peft:
        from megatron_medllm.checkpoint.peft_adapter import export_peft

        base_model = None if base is None else str(base)
        export_peft(checkpoint, hf_dir, base_model=base_model, source_dir=source, dtype=_dtype(dtype))
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
    from megatron_medllm.models.config import DTYPES

    if name not in DTYPES:
        raise UserError(f"--dtype {name}: expected {' or '.join(DTYPES)}")
    return DTYPES[name]


def verify(
    first: Annotated[Path, typer.Argument(help="HF directory or Megatron checkpoint")],
    second: Annotated[Path, typer.Argument(help="likewise")],
    prompts: Annotated[Path, typer.Option(help="a prompt a line, or JSON lines of prompt or ids")],
    source: Annotated[Path | None, typer.Option(help="HF directory with config.json and tokenizer")] = None,
    tolerance: Annotated[float, typer.Option(help="largest logit difference, relative to the logits' scale")] = 1e-4,
    new_tokens: Annotated[int, typer.Option(help="length of the greedy continuations")] = 16,
) -> None:
    """Compare two checkpoints by logits and greedy continuations. Exit status 1: they differ."""
    from megatron_medllm.checkpoint.verify import compare_checkpoints

    found = compare_checkpoints(first, second, prompts, new_tokens=new_tokens, tolerance=tolerance, source_dir=source)
    for line in found.lines():
        print_text(line)
    raise typer.Exit(0 if found.agree else 1)
