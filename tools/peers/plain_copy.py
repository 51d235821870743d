"""How long conversion takes, and in how much memory, beside a plain copy of the same bytes on the same disk.

    PYTHONPATH=. python tools/peers/plain_copy.py --size 7b --work /big/disk/somewhere

Makes a Hugging Face (HF) directory of a published size filled with random bytes, then measures, each in a process of
its own and with the source dropped from the page cache: a copy (written through to the disk), `import_hf`,
`export_checkpoint`. Ends by comparing every tensor's digest and removes what it made. Needs three times the model.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from megatron_medllm.checkpoint.convert import export_checkpoint, import_hf
from megatron_medllm.checkpoint.hf_source import HFWeights
from megatron_medllm.checkpoint.hf_target import DIGESTS_NAME, HFTarget
from megatron_medllm.config.model import SIZES, ModelShape

BLOCK_VALUES = 1 << 24


def make_model(hf_dir: Path, shape: ModelShape) -> None:
    """Random bf16 weights; one random block is used over and over, each time from another place."""
    target = HFTarget(hf_dir, shape, torch.bfloat16, 4_000_000_000)
    target.create_files()
    block = torch.randn(BLOCK_VALUES).to(torch.bfloat16)
    for number, (name, (_, entry)) in enumerate(target.place.items()):
        columns = entry.shape[1] if len(entry.shape) == 2 else 1
        step = BLOCK_VALUES // 2 // columns
        for first in range(0, entry.shape[0], step):
            rows = min(step, entry.shape[0] - first)
            start = (number * 7919 + first * 31) % (BLOCK_VALUES // 2)
            target.write(name, block[start : start + rows * columns], first_row=first)
    target.finish(shape=shape, source_dir=None, digests={})
    (hf_dir / DIGESTS_NAME).unlink()


def copy(source: Path, target: Path) -> None:
    """Copy a directory and wait until the disk has it."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb+") as stream:
            os.fsync(stream.fileno())


def run_step(step: str, source: str, target: str, workers: str) -> None:
    """One measured step, in the process that is measured."""
    if step == "copy":
        copy(Path(source), Path(target))
    elif step == "import":
        import_hf(Path(source), Path(target), workers=int(workers))
    else:
        export_checkpoint(Path(source), Path(target), workers=int(workers))


def drop_from_cache(directory: Path) -> None:
    """Let the next reader go to the disk."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(step: str, source: Path, target: Path, workers: int) -> dict:
    """Run one step in a process of its own: seconds, CPU seconds, peak resident memory in GiB."""
    drop_from_cache(source)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    started = time.perf_counter()
    program = "import sys; from tools.peers.plain_copy import run_step; run_step(*sys.argv[1:])"
    command = [sys.executable, "-c", program, step, str(source), str(target), str(workers)]
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{step} failed with status {status}")
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    return {
        "step": step,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_gib": round(usage.ru_maxrss / 2**20, 2),
        "mb_per_s": round(size / 1e6 / seconds),
    }


def same_tensors(hf_dir: Path, back: Path, shape: ModelShape) -> bool:
    """Every tensor of the source against the digest that the export recorded."""
    recorded = json.loads((back / DIGESTS_NAME).read_text())["tensors"]
    source = HFWeights(hf_dir, shape)
    return recorded == {name: source.digest(name) for name in source.place}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="0.5b")
    parser.add_argument("--work", type=Path, required=True, help="an empty or new directory on the disk to measure")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    shape, work = SIZES[arguments.size], arguments.work
    work.mkdir(parents=True, exist_ok=True)
    hf_dir, ckpt, back, copied = (work / name for name in ("hf", "ckpt", "back", "copied"))
    try:
        make_model(hf_dir, shape)
        rows = [measure("copy", hf_dir, copied, 1)]
        shutil.rmtree(copied)
        rows.append(measure("import", hf_dir, ckpt, arguments.workers))
        rows.append(measure("export", ckpt, back, arguments.workers))
        size = sum(path.stat().st_size for path in hf_dir.glob("*.safetensors"))
        print(f"{arguments.size}: {size / 1e9:.2f} GB, {arguments.workers} workers")
        for row in rows:
            print(json.dumps(row | {"times_the_copy": round(row["seconds"] / rows[0]["seconds"], 2)}))
        print("bitwise the same:", same_tensors(hf_dir, back, shape))
    finally:
        for directory in (hf_dir, ckpt, back, copied, *work.glob(".*.partial")):
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
