"""The commands under `medllm bench`: parse, load the configuration, measure, print the table. No logic."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_medllm.cli.options import Config, Overrides, load_recipe, print_text
from megatron_medllm.errors import UserError

bench_app = typer.Typer(no_args_is_help=True, help="Throughput that can be checked and compared.")

Steps = Annotated[int, typer.Option(min=1, help="steps of the measured window")]
WarmupSteps = Annotated[int, typer.Option(min=0, help="steps before it")]
Synthetic = Annotated[bool, typer.Option("--synthetic", help="random data and weights instead of the recipe's")]
DocumentLength = Annotated[int, typer.Option(min=1, help="mean tokens of a synthetic document")]
PromptLength = Annotated[int, typer.Option(min=1, help="mean tokens of a synthetic prompt")]
ResponseLength = Annotated[int, typer.Option(min=1, help="mean tokens of a synthetic answer")]
Hardware = Annotated[str | None, typer.Option(help="whose peak MFU refers to; default: this device, where known")]
Profile = Annotated[bool, typer.Option("--profile", help="one more step, and where its time goes as profile.md")]
Output = Annotated[Path | None, typer.Option(help="folder; default: RUN_DIR/bench")]


@bench_app.command("throughput")
def throughput(
    config: Config,
    overrides: Overrides = None,
    steps: Steps = 10,
    warmup_steps: WarmupSteps = 3,
    synthetic: Synthetic = False,
    document_length: DocumentLength = 1024,
    prompt_length: PromptLength = 256,
    response_length: ResponseLength = 256,
    hardware: Hardware = None,
    profile: Profile = False,
    output: Output = None,
) -> None:
    """Measure `stage` as training runs it: tokens/s/GPU, pairs/s, FLOP/s, memory, shares of the step."""
    run = load_recipe(config, overrides)
    _start_ranks(run)
    from megatron_medllm.bench.throughput import measure

    lengths = {"document_length": document_length, "prompt_length": prompt_length, "response_length": response_length}
    settings = _settings(run, output, steps, warmup_steps, synthetic, lengths, hardware, profile)
    _show(measure(run, settings))


@bench_app.command("scoring")
def scoring(
    config: Config,
    overrides: Overrides = None,
    steps: Steps = 10,
    warmup_steps: WarmupSteps = 3,
    synthetic: Synthetic = False,
    prompt_length: PromptLength = 256,
    response_length: ResponseLength = 256,
    hardware: Hardware = None,
    profile: Profile = False,
    output: Output = None,
) -> None:
    """Measure `medllm score`: tokens/s and pairs/s of the reference, rpo.global_batch_size pairs a step."""
    run = load_recipe(config, overrides)
    _start_ranks(run)
    from megatron_medllm.bench.scoring import measure_scoring

    lengths = {"prompt_length": prompt_length, "response_length": response_length}
    settings = _settings(run, output, steps, warmup_steps, synthetic, lengths, hardware, profile)
    _show(measure_scoring(run, settings))


@bench_app.command("generation")
def generation(
    config: Config,
    overrides: Overrides = None,
    steps: Steps = 10,
    warmup_steps: WarmupSteps = 3,
    synthetic: Synthetic = False,
    prompt_length: PromptLength = 256,
    response_length: ResponseLength = 256,
    output: Output = None,
) -> None:
    """Measure the engine that samples: samples/s and new tokens/s, engine.batch_size requests a step."""
    run = load_recipe(config, overrides)
    from megatron_medllm.bench.generation import measure_generation

    lengths = {"prompt_length": prompt_length, "response_length": response_length}
    settings = _settings(run, output, steps, warmup_steps, synthetic, lengths, None)
    _show(measure_generation(run, settings))


@bench_app.command("rank")
def rank(
    config: Config,
    overrides: Overrides = None,
    rank: Annotated[int, typer.Option("--rank", help="which rank of the recipe's whole layout, from 0")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="steps that are timed")] = 3,
    warmup_steps: Annotated[int, typer.Option(min=0, help="steps before them")] = 1,
    micro_batches: Annotated[int | None, typer.Option(min=1, help="a step; default: at most 2 x pp")] = None,
    output: Output = None,
) -> None:
    """Run one rank of a layout without the others: its bytes by part beside the plan, memory, computing time."""
    run = load_recipe(config, overrides)
    from megatron_medllm.bench.rank import RankSettings, measure_rank

    settings = RankSettings(
        rank=rank,
        output=output or run.run_dir / "bench",
        steps=steps,
        warmup_steps=warmup_steps,
        micro_batches=micro_batches,
    )
    _show(measure_rank(run, settings))


@bench_app.command("compare")
def compare(
    first: Annotated[Path, typer.Argument(help="what a benchmark wrote, e.g. throughput.json")],
    second: Annotated[Path, typer.Argument(help="likewise")],
) -> None:
    """Put two measurements beside each other, and what differs in their settings."""
    from megatron_medllm.bench.report import compare_report

    print_text(compare_report(first, second))


@bench_app.command("sweep")
def sweep(
    config: Config,
    overrides: Overrides = None,
    over: Annotated[list[str] | None, typer.Option(help="key=value,value; may be repeated")] = None,
    what: Annotated[str, typer.Option(help="throughput, scoring or generation")] = "throughput",
    steps: Steps = 10,
    synthetic: Synthetic = False,
    prompt_length: PromptLength = 256,
    response_length: ResponseLength = 256,
    output: Output = None,
) -> None:
    """Measure every combination of settings; one that runs out of memory is a result."""
    from megatron_medllm.bench.sweep import sweep as sweep_settings
    from megatron_medllm.bench.sweep import sweep_report

    if not over:
        raise UserError("medllm bench sweep needs --over key=value,value")
    if what not in ("throughput", "scoring", "generation"):
        raise UserError(f"--what {what}: expected throughput, scoring or generation")
    folder = output or load_recipe(config, overrides).run_dir / "bench"
    options = ["--steps", str(steps), "--prompt-length", str(prompt_length), "--response-length", str(response_length)]
    options += ["--synthetic"] if synthetic else []
    print_text(sweep_report(sweep_settings(config, overrides or [], over, folder, what=what, options=options)))


def _start_ranks(run: Any) -> None:
    from megatron_medllm.train.local_ranks import start_ranks_if_needed

    start_ranks_if_needed(run.layout)


def _settings(
    run: Any,
    output: Path | None,
    steps: int,
    warmup_steps: int,
    synthetic: bool,
    lengths: dict[str, int],
    hardware: str | None,
    profile: bool = False,
) -> Any:
    from megatron_medllm.bench.harness import BenchSettings
    from megatron_medllm.bench.synthetic import SyntheticData

    return BenchSettings(
        output=output or run.run_dir / "bench",
        warmup_steps=warmup_steps,
        steps=steps,
        synthetic=SyntheticData(**lengths) if synthetic else None,
        hardware=hardware,
        profile=profile,
    )


def _show(result: Path) -> None:
    """Print the table of a result, on the main rank."""
    if os.environ.get("RANK", "0") == "0":
        print_text(result.with_suffix(".md").read_text().rstrip())
