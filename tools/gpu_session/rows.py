"""Training rows one behind the other in one process, which spares each the start-up: `--rows NAME ... --out FOLDER`.

A row is what `medllm bench throughput --synthetic --profile` (or `bench rank`) measures, by the same code. Each is a
line of FOLDER/rows.jsonl as it ends. A row that fails ends the process, so that nothing of it reaches the next; the
caller starts another process for the rest.
"""

import argparse
import gc
import json
import logging
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # rows of unlike sizes share the memory

from recipes import ROWS, Row

from megatron_medllm.bench.harness import BenchSettings
from megatron_medllm.bench.rank import RankSettings, measure_rank
from megatron_medllm.bench.synthetic import SyntheticData
from megatron_medllm.bench.throughput import measure
from megatron_medllm.config.run import load
from megatron_medllm.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 2**30
MEMORY_LEFT_GIB = 0.5  # more than this held by an earlier row: the next one needs a process of its own
RESTART = 75  # exit status: go on in a new process; no row failed


class Said(logging.Handler):
    """The lines that say which implementation a switch chose."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if record.name.startswith("megatron_medllm") and line not in self.lines and len(self.lines) < 40:
            self.lines.append(line[:300])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, required=True)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    last: Row | None = None
    for name in arguments.rows:
        row = ROWS[name]
        if last is not None and (row.recipe, row.overrides) != (last.recipe, last.overrides):
            forget_compiled()
        last = row
        if held_gib() > MEMORY_LEFT_GIB:
            print(f"{held_gib():.1f} GiB are still held: a new process goes on", flush=True)
            return RESTART
        started, said = time.monotonic(), Said()
        logging.getLogger().addHandler(said)
        try:
            found = measure_row(name, row, arguments.out, tiny=arguments.tiny)
        except (UserError, RuntimeError, ValueError, AssertionError, NotImplementedError, OSError) as error:
            logging.exception("%s failed", name)
            found = {"error": error_text(error)}
        finally:
            logging.getLogger().removeHandler(said)
        found |= {"row_s": round(time.monotonic() - started, 1), "said": said.lines}
        with open(arguments.out / "rows.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"row": name, **found}) + "\n")
        if "error" in found:
            return 1
        gc.collect()
        empty_cache()
    return 0


def held_gib() -> float:
    import torch

    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def forget_compiled() -> None:
    """Compile anew for other shapes, as a process of its own would, instead of for any shape."""
    import torch

    if torch.cuda.is_available():  # a CPU compiles nothing
        torch._dynamo.reset()


def empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def error_text(error: Exception) -> str:
    if "OutOfMemory" in type(error).__name__:
        return "out of memory: " + str(error)[:200]
    return f"{type(error).__name__}: {str(error)[-500:]}"


def measure_row(name: str, row: Row, out: Path, *, tiny: bool) -> dict[str, Any]:
    """The row's figures, for the table."""
    folder = out / name.replace(" ", "-").replace("=", "-")
    overrides = [*row.all_overrides(tiny=tiny), f"run_dir={folder / 'run'}"]
    run = load(REPOSITORY / "examples" / f"{row.recipe}.yaml", overrides)
    steps = {"steps": 1 if tiny else row.steps, "warmup_steps": 1 if tiny else row.warmup_steps}
    try:
        if row.kind == "rank":
            rank = row.tiny_rank if tiny else row.rank
            result = json.loads(
                measure_rank(
                    run, RankSettings(rank=rank, output=folder, micro_batches=2 if tiny else None, **steps)
                ).read_text()
            )
            return rank_figures(result) | {"switches": row.switches}
        lengths = {key: max(4, value // 16) for key, value in row.lengths.items()} if tiny else row.lengths
        if tiny and not lengths:
            lengths = {"document_length": 32}
        settings = BenchSettings(output=folder, synthetic=SyntheticData(**lengths), profile=True, **steps)
        result = json.loads(measure(run, settings).read_text())
        profiled = json.loads((folder / "profile.json").read_text())
        return train_figures(result) | profile_figures(profiled) | {"switches": row.switches}
    finally:
        for left in ("synthetic", "work", "run"):
            shutil.rmtree(folder / left, ignore_errors=True)


def train_figures(result: dict[str, Any]) -> dict[str, Any]:
    found = {
        "device": result["environment"]["device"],
        "tokens_per_s": round(result["tokens_per_s"], 1),
        "step_ms": round(1e3 * result["step_time_s"]["median"], 1),
        "step_ms_min": round(1e3 * result["step_time_s"]["min"], 1),
        "parts_ms": {name: round(1e3 * seconds, 2) for name, seconds in result["parts_s"].items()},
        "peak_gib": round(result["peak_memory_bytes"] / GIB, 2),
        "host_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2),
        "padding_share": round(result["padding_share"], 4),
        "losses": [round(loss, 4) for loss in result["losses"]],
    }
    if "pairs_per_s" in result:
        found["pairs_per_s"] = round(result["pairs_per_s"], 3)
    if "mfu" in result:
        found["mfu"] = round(result["mfu"]["packed"], 4)
    return found


def profile_figures(profiled: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"kinds_ms": {name: round(1e3 * s, 2) for name, s in profiled["kinds_s"].items()}}
    for name in ("wall", "busy", "gap"):
        if f"{name}_s" in profiled:
            found[f"profiled_{name}_ms"] = round(1e3 * profiled[f"{name}_s"], 2)
    found["syncs"] = profiled.get("syncs")
    found["gaps"] = [[round(1e3 * g["seconds"], 2), g["after"], g["before"]] for g in profiled.get("gaps", [])]
    found["top_kernels"] = [[r["name"][:80], r["calls"], round(1e3 * r["seconds"], 2)] for r in profiled["top"][:12]]
    return found


def rank_figures(result: dict[str, Any]) -> dict[str, Any]:
    held, planned = sum(result["held_bytes"].values()), sum(result["planned_bytes"].values())
    planned_s, planned_peak = (result.get(f"planned_{name}") for name in ("forward_backward_s", "peak_bytes"))
    return {
        "device": result["environment"]["device"],
        "planned_forward_backward_s": planned_s and round(planned_s, 4),
        "planned_peak_gib": planned_peak and round(planned_peak / GIB, 2),
        "build_s": result.get("build_s"),
        "forward_backward_s": round(result["forward_backward_s"], 4),
        "optimizer_s": round(result["optimizer_s"], 4),
        "micro_batches": result["micro_batches"],
        "held_gib": round(held / GIB, 2),
        "planned_held_gib": round(planned / GIB, 2),
        "peak_gib": round(result["peak_memory_bytes"] / GIB, 2),
        "planned_parts_gib": {n: round(size / GIB, 3) for n, size in result["planned_memory_parts"].items()},
    }


if __name__ == "__main__":
    sys.exit(main())
