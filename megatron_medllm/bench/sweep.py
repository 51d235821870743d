"""`medllm bench sweep`: the same measurement over a grid of settings. A failure is a result, not an end."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_medllm.errors import UserError
from megatron_medllm.progress import progress
from megatron_medllm.storage import read_json, write_json

OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory")


def grid(axes: list[str]) -> list[tuple[str, ...]]:
    """All combinations of axes such as `layout.tp=1,2`, as tuples of overrides.

    Raises:
        UserError: an axis is not key=value,value.
    """
    for axis in axes:
        if "=" not in axis:
            raise UserError(f"--over {axis}: expected key=value,value")
    choices = [[f"{key}={value}" for value in values.split(",")] for key, _, values in (a.partition("=") for a in axes)]
    return list(itertools.product(*choices))


def sweep(
    config: Path, overrides: list[str], axes: list[str], output: Path, *, what: str, options: list[str]
) -> list[dict]:
    """Run `medllm bench WHAT` for every combination, each in a process of its own.

    Results so far are kept in OUTPUT/sweep.json; a combination that is there already is not run again.

    Args:
        config: the recipe.
        overrides: settings for all combinations.
        axes: `key=value,value` each.
        output: where every combination gets a directory.
        what: throughput, scoring or generation.
        options: further options of `medllm bench WHAT`.
    """
    path = output / "sweep.json"
    done: dict[str, Any] = read_json(path) if path.is_file() else {}
    points = grid(axes)
    with progress("sweep", total=len(points)) as bar:
        for number, point in enumerate(points, start=1):
            name = " ".join(point)
            if name not in done:
                done[name] = _measure(config, [*overrides, *point], output / f"{number:03d}", what, options)
                write_json(path, done)
            bar.update(number, name)
    return [{"settings": " ".join(point), **done[" ".join(point)]} for point in points]


def _measure(config: Path, overrides: list[str], output: Path, what: str, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "megatron_medllm", "bench", what, str(config), *overrides]
    done = subprocess.run([*command, "--output", str(output), *options], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        result = read_json(output / f"{what}.json")
        names = ("tokens_per_s_per_gpu", "pairs_per_s", "samples_per_s", "peak_memory_bytes", "padding_share")
        return {name: result[name] for name in names if name in result}
    text = done.stderr.strip()
    if any(sign in text for sign in OUT_OF_MEMORY):
        return {"failed": "out of memory"}
    return {"failed": (text.splitlines() or [f"exit status {done.returncode}"])[-1]}


def sweep_report(results: list[dict]) -> str:
    """Fastest first, failures last, as a Markdown table."""
    lines = ["| settings | tokens/s/GPU | peak GiB |", "|---|---|---|"]
    for row in sorted(results, key=lambda r: -r.get("tokens_per_s_per_gpu", 0)):
        if "failed" in row:
            lines.append(f"| {row['settings']} | {row['failed']} | |")
        else:
            memory = f"{row['peak_memory_bytes'] / 2**30:.2f}" if "peak_memory_bytes" in row else ""
            lines.append(f"| {row['settings']} | {row['tokens_per_s_per_gpu']:,.1f} | {memory} |")
    return "\n".join(lines)
