"""Host memory that a save adds to each rank, measured over gloo beside the plan.

    python tools/save_memory.py [--dp 1 2 4] [--hidden-size 512] [--output save-memory.json]

Every rank builds the same model with Megatron-Core's distributed optimizer, takes a step, saves once in the background
and once not, and watches its anonymous memory (RssAnon) while it does. glibc is told to give freed memory back at once,
or the second save would live in what the first left.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_medllm.checkpoint.state_writer import StateWriter
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig, ModelShape
from megatron_medllm.config.train import OptimizerConfig
from megatron_medllm.parallel import mcore, runtime
from megatron_medllm.planner.host_memory import save_host_bytes
from megatron_medllm.planner.workload import Workload

PRECISIONS = {"bfloat16": "bf16", "float32": "fp32"}
SAMPLE_S = 0.001


def anonymous_bytes() -> int:
    """This process's memory that no file is behind."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def added_bytes(work: Callable[[], None]) -> int:
    """The most memory that this process had beyond what it began with, while it did some work."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = peak = anonymous_bytes()
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(SAMPLE_S):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    over.set()
    thread.join()
    return peak - before


def measure(shape: ModelShape, dtype: str, directory: Path) -> dict[str, Any]:
    """One rank's part: planned and measured bytes."""
    from megatron_medllm.models.gpt import build_model, unwrap
    from megatron_medllm.models.initialize import initialize_weights

    layout = LayoutConfig(dp=int(os.environ["WORLD_SIZE"]))
    ranks = runtime.start(layout, seed=1)
    chunks = build_model(ModelConfig(shape=shape, dtype=dtype), layout, device=ranks.device)
    initialize_weights(chunks, seed=1, tp_rank=0, tp_size=1)
    config = unwrap(chunks[0]).config
    chunks = mcore.wrap_ddp(chunks, config, layout)
    optimizer = mcore.build_optimizer(chunks, config, OptimizerConfig(lr=0.01), layout)
    chunks[0].zero_grad_buffer()
    chunks[0].start_grad_sync()
    chunks[0].finish_grad_sync()
    mcore.clip_and_step(optimizer, norm=mcore.gradient_norm(optimizer), clip_grad=0.0)

    def save(name: str, *, wait: bool) -> Callable[[], None]:
        def work() -> None:
            (directory / name).mkdir(exist_ok=True)
            dist.barrier()
            writer = StateWriter()
            writer.start(mcore.sharded_state(chunks, optimizer, is_loading=False), directory / name, wait=wait)
            writer.finished(block=True)

        return work

    added_bytes(save("warm-up", wait=True))  # threads' stacks, imports
    workload = Workload(
        shape=shape,
        layout=layout,
        precision=PRECISIONS[dtype],
        overlap_grad_reduce=False,
    )
    result = {
        "dtype": dtype,
        "dp": layout.dp,
        "rank": ranks.rank,
        "parameters": sum(p.numel() for p in chunks[0].parameters()),
        "background_measured": added_bytes(save("background", wait=False)),
        "background_planned": save_host_bytes(workload, in_background=True),
        "measured": added_bytes(save("foreground", wait=True)),
        "planned": save_host_bytes(workload, in_background=False),
    }
    runtime.stop()
    return result


def run_ranks(dp: int, arguments: list[str]) -> list[dict[str, Any]]:
    """Start the ranks of one measurement, each this file again."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(dp),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "2",
    }
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    with tempfile.TemporaryDirectory() as directory:
        ranks = [
            subprocess.Popen([*command, "--rank-directory", directory], env=shared | {"RANK": str(rank)})
            for rank in range(dp)
        ]
        if max(rank.wait() for rank in ranks):
            raise SystemExit("a rank failed")
        return [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(dp)]


def main() -> None:
    """Measure, print the table, and write all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dtype", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=16_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rank-directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_directory is not None:
        torch.set_num_threads(1)
        shape = ModelShape(
            num_layers=options.layers,
            hidden_size=options.hidden_size,
            num_attention_heads=8,
            num_query_groups=2,
            ffn_hidden_size=4 * options.hidden_size,
            vocab_size=options.vocab_size,
            tie_embeddings=False,
        )
        found = measure(shape, options.dtype[0], options.rank_directory)
        (options.rank_directory / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        return
    began, rows = time.monotonic(), []
    sizes = ["--hidden-size", options.hidden_size, "--layers", options.layers, "--vocab-size", options.vocab_size]
    for dtype in options.dtype:
        for dp in options.dp:
            ranks = run_ranks(dp, [str(a) for a in ["--dtype", dtype, *sizes]])
            fullest = {key: max(rank[key] for rank in ranks) for key in ranks[0] if key not in ("dtype", "rank")}
            rows.append({"dtype": dtype} | fullest)
            print(
                f"{dtype} DP{dp}, {fullest['parameters'] / 1e6:.1f} M parameters; MB measured (planned): background "
                f"{fullest['background_measured'] / 1e6:.1f} ({fullest['background_planned'] / 1e6:.1f}), otherwise "
                f"{fullest['measured'] / 1e6:.1f} ({fullest['planned'] / 1e6:.1f})",
                flush=True,
            )
    print(f"{time.monotonic() - began:.0f} s")
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
