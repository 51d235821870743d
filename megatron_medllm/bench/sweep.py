"""`medllm bench sweep`: the same measurement over a grid of settings. A failure is a result, not an end."""

import hashlib
import itertools
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_medllm.bench.environment import environment_facts
from megatron_medllm.config.run import load
from megatron_medllm.errors import UserError
from megatron_medllm.progress import progress
from megatron_medllm.storage import digest_file, digest_value, read_json, write_json

PACKAGE = Path(__file__).resolve().parents[1]
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
) -> list[dict[str, Any]]:
    """Run `medllm bench WHAT` for every combination, each in a process of its own.

    Results so far are kept in OUTPUT/sweep.json under a digest of all that they depend on: what is measured, its
    options, the recipe as it is read with all settings, versions, code and devices. What is there is not run again.

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
    surroundings = _surroundings()
    results = []
    points = grid(axes)
    with progress("sweep", total=len(points)) as bar:
        for number, point in enumerate(points, start=1):
            settings = [*overrides, *point]
            facts = {"what": what, "options": options, "recipe": _recipe(config, settings), **surroundings}
            key = digest_value(facts)
            if key not in done:
                folder = output / f"{what}-{key[:12]}"
                measured = _measure(config, settings, folder, what, options)
                done[key] = {"what": what, "settings": " ".join(point), "folder": folder.name, **measured}
                write_json(path, done)
            results.append(done[key])
            bar.update(number, " ".join(point))
    return results


def _recipe(config: Path, settings: list[str]) -> Any:
    """The recipe as it is read, defaults and all; why not, where it is refused (which is a result too)."""
    try:
        return load(config, settings).model_dump(mode="json")
    except UserError as error:
        return str(error)


def _surroundings() -> dict[str, Any]:
    """What a measurement depends on besides the recipe. No CUDA is started here: its memory would be missing there."""
    code = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        code.update(f"{path.relative_to(PACKAGE)}\0{digest_file(path)}\n".encode())
    devices = platform.processor() or platform.machine()
    if shutil.which("nvidia-smi") is not None:
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        devices = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    facts = environment_facts(torch.device("cpu"))
    kept = {name: facts[name] for name in ("python", "cuda", "packages")}
    return {**kept, "code": code.hexdigest(), "devices": devices}


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


def sweep_report(results: list[dict[str, Any]]) -> str:
    """Fastest first, failures last, as a Markdown table."""
    lines = ["| settings | tokens/s/GPU | peak GiB |", "|---|---|---|"]
    for row in sorted(results, key=lambda r: -r.get("tokens_per_s_per_gpu", 0)):
        if "failed" in row:
            lines.append(f"| {row['settings']} | {row['failed']} | |")
        else:
            memory = f"{row['peak_memory_bytes'] / 2**30:.2f}" if "peak_memory_bytes" in row else ""
            lines.append(f"| {row['settings']} | {row['tokens_per_s_per_gpu']:,.1f} | {memory} |")
    return "\n".join(lines)
