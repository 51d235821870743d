"""Throughput and memory of the corpus builder against a plain loop, printed and written to docs/benchmarks/corpus.md.

    python tools/bench_corpus.py --data bench_ja_20mb.jsonl --tokenizer qwen2.5-tokenizer --exams igakuqa [--memory]

The peer is what Megatron's preprocess_data.py does: `json.loads`, HF `tokenizers`' `encode` one document at a time,
`IndexedDatasetBuilder.add_document`. Both sides run on one core; each side's time is processor time, its children's
included, less that of the same side on one document (start-up, reported apart). Every run is a process of its own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from megatron_medllm.bench.process import cpu_model

RUNS = 3
CLEAN = {
    "strip_zero_width": True,
    "strip_control": True,
    "fold_width": "alphanumeric",
    "fold_halfwidth_kana": True,
    "dedup_lines": True,
    "min_chars": 20,
    "min_japanese_ratio": 0.05,
    "max_repeat_ratio": 0.9,
}


def run_ours(job: dict) -> None:
    """Child: one build."""
    from megatron_medllm.config.corpus import CorpusConfig
    from megatron_medllm.corpus.build import build

    config = {"sources": {"s": {"paths": job["data"], "clean": job["clean"]}}, "tokenizer": job["tokenizer"]}
    config |= {"eod_id": job["eod_id"], **job["extra"]}
    build(CorpusConfig.model_validate(config), Path(job["output"]), workers=job["workers"])


def run_peer(job: dict) -> None:
    """Child: preprocess_data.py's loop."""
    import tokenizers
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = tokenizers.Tokenizer.from_file(os.path.join(job["tokenizer"], "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    Path(job["output"]).mkdir()
    prefix = os.path.join(job["output"], "s")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.get_vocab_size()))
    with open(job["data"], encoding="utf-8") as stream:
        for line in stream:
            ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
            ids.append(job["eod_id"])
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def measure(side: str, job: dict) -> dict:
    """Run a child; its wall and processor time in s, and the largest resident size of any of its processes in MB."""
    script = (
        "import json, resource, runpy, sys, time; began = time.perf_counter()\n"
        "if __name__ == '__main__':\n"
        "    module = runpy.run_path(sys.argv[1]); module['run_' + sys.argv[2]](json.loads(sys.argv[3]))\n"
        "    own, children = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))\n"
        "    cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime\n"
        "    rss = max(own.ru_maxrss, children.ru_maxrss) / 1024\n"
        "    print(json.dumps({'wall_s': time.perf_counter() - began, 'cpu_s': cpu, 'rss_mb': rss}))\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "child.py").write_text(script)
        job = job | {"output": os.path.join(folder, "out")}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-W", "ignore", f"{folder}/child.py", __file__, side, json.dumps(job)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        result["bin"] = Path(job["output"], "s.bin").read_bytes() if job.get("compare") else b""
        result["idx"] = Path(job["output"], "s.idx").read_bytes() if job.get("compare") else b""
    return result


def best(side: str, job: dict, runs: int = RUNS) -> dict:
    """The run with the least processor time."""
    return min((measure(side, job) for _ in range(runs)), key=lambda result: result["cpu_s"])


def compare(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The throughput table's rows."""
    megabytes = os.path.getsize(arguments.data) / 1e6
    one = folder / "one.jsonl"
    with open(arguments.data, "rb") as stream:
        one.write_bytes(stream.readline())
    job = {
        "data": arguments.data,
        "tokenizer": arguments.tokenizer,
        "eod_id": arguments.eod_id,
        "workers": 1,
        "clean": {},
        "extra": {},
    }
    everything = job | {"clean": CLEAN, "extra": {"dedup": {"near": True}, "decontaminate": {"exams": arguments.exams}}}
    rows, peer_rate = [], 0.0
    peer_bytes: tuple[bytes, bytes] = (b"", b"")
    for name, side, task, runs in (
        ("plain loop (preprocess_data.py's)", "peer", job | {"compare": True}, 1),
        ("ours: tokenize and index", "ours", job | {"compare": True}, RUNS),
        ("ours: clean, decontaminate, dedup too", "ours", everything, RUNS),
    ):
        start = best(side, task | {"data": str(one)})
        whole = best(side, task, runs)
        rate = megabytes / (whole["cpu_s"] - start["cpu_s"])
        peer_rate = peer_rate or rate
        same = ""
        if task.get("compare"):
            peer_bytes = peer_bytes if side == "ours" else (whole["bin"], whole["idx"])
            same = "the reference" if side == "peer" else str((whole["bin"], whole["idx"]) == peer_bytes)
        rows.append(
            f"| {name} | {rate:.1f} | {rate / peer_rate:.1f} x | {start['wall_s']:.2f} / {start['cpu_s']:.2f} | "
            f"{whole['rss_mb']:.0f} | {same} |"
        )
        print(rows[-1], flush=True)
    return rows


def measure_memory(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Peak resident size on 100 MB and 1 GB, deduplication off."""
    data = Path(arguments.data).read_bytes()
    rows = []
    for megabytes in (100, 1000):
        path = folder / f"{megabytes}.jsonl"
        with open(path, "wb") as stream:
            for _ in range(round(megabytes * 1e6 / len(data))):
                stream.write(data)
        job = {
            "data": str(path),
            "tokenizer": arguments.tokenizer,
            "eod_id": arguments.eod_id,
            "workers": 2,
            "clean": {},
            "extra": {},
        }
        result = measure("ours", job)
        rows.append(f"| {path.stat().st_size / 1e6:.0f} | {result['rss_mb']:.0f} | {result['wall_s']:.0f} |")
        print(rows[-1], flush=True)
        path.unlink()
    return rows


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--eod-id", type=int, default=151643)
    parser.add_argument("--exams", required=True)
    parser.add_argument("--memory", action="store_true", help="also measure peak memory on 100 MB and 1 GB")
    parser.add_argument("--output", type=Path, help="write a Markdown page")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(arguments, Path(folder))
        memory = measure_memory(arguments, Path(folder)) if arguments.memory else []
    if arguments.output:
        arguments.output.write_text(_page(arguments, rows, memory), encoding="utf-8")


def _page(arguments: argparse.Namespace, rows: list[str], memory: list[str]) -> str:
    libraries = ", ".join(f"{n} {version(n)}" for n in ("fastokens", "tokenizers", "rensa", "numpy", "megatron-core"))
    lines = [
        "# The corpus builder's speed and memory",
        "",
        f"{cpu_model()}, {os.cpu_count()} cores (shared); Python {platform.python_version()}, {libraries}.",
        f"Input: {Path(arguments.data).name}, {os.path.getsize(arguments.data) / 1e6:.1f} MB; Qwen2.5's tokenizer. "
        "Command: `python tools/bench_corpus.py --data … --tokenizer … --exams … --memory --output "
        "docs/benchmarks/corpus.md`.",
        "",
        "MB/s are per core, in processor time (the machine is shared), all processes counted, less the same side's run "
        f"on one document. Best of {RUNS}; the plain loop once.",
        "",
        "| | MB/s/core | to the plain loop | start-up s (wall / processor) | peak MB | same bytes |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    if memory:
        lines += [
            "## Memory (two workers, deduplication off)",
            "",
            "Largest resident size of any one process.",
            "",
            "| corpus MB | peak MB | wall s |",
            "|---|---|---|",
            *memory,
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
