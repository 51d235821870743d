"""Throughput and memory of the corpus builder against a plain loop, printed and written to docs/benchmarks/corpus.md.

    python tools/peers/megatron_preprocess.py --data FILE.jsonl --tokenizer DIR --exams igakuqa [--memory]

The peer is what Megatron's preprocess_data.py does: `json.loads`, HF `tokenizers`' `encode` one document at a time,
`IndexedDatasetBuilder.add_document`. Every run is a process of its own and fills its caches anew. A round runs each
side once on one document (start-up) and once on the whole input, one side after the other; a side's time is the sum
over the rounds of whole less start-up: seconds of work, without a text that repeats itself. Rates are by processor
time, all processes of a side counted, which is per core whatever runs beside it; of the best runs by wall clock too.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from megatron_medllm.bench.process import cpu_model

ROUNDS = 5
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


def run_shard(job: dict) -> None:
    """Child: one shard of a build, or with `shard` None the last step."""
    from megatron_medllm.config.corpus import CorpusConfig
    from megatron_medllm.corpus.build import build_shard, finish
    from megatron_medllm.shard import Shard

    source = {"paths": job["data"], "clean": job["clean"]}
    config = CorpusConfig.model_validate(
        {
            "sources": {"s": source},
            "tokenizer": job["tokenizer"],
            "eod_id": job["eod_id"],
            "chunk_mb": 4,
            **job["extra"],
        }
    )
    if job["shard"] is None:
        finish(config, Path(job["output"]), workers=1)
    else:
        build_shard(config, Path(job["output"]), Shard.parse(job["shard"]), workers=1)


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


def run_floor(job: dict) -> None:
    """Child: what no builder that uses fastokens can save."""
    os.environ["FASTOKENS_BPE_THREADS"] = "1"
    import fastokens
    import orjson

    tokenizer = fastokens.Tokenizer.from_file(os.path.join(job["tokenizer"], "tokenizer.json"))
    tokenizer.no_truncation()
    with open(job["data"], "rb") as stream:
        while lines := stream.readlines(4 << 20):
            tokenizer.encode_batch_flat([orjson.loads(line)["text"] for line in lines], False, True)


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
        job = {"output": os.path.join(folder, "out")} | job
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-W", "ignore", f"{folder}/child.py", __file__, side, json.dumps(job)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        if job.get("compare"):
            files = [Path(job["output"], name).read_bytes() for name in ("s.bin", "s.idx")]
            result["digest"] = [hashlib.sha256(content).hexdigest() for content in files]
    return result


@dataclass
class Side:
    """A row of the table: what is run, and its runs so far, as `measure` gives them."""

    name: str
    kind: str
    job: dict
    starts: list[dict] = field(default_factory=list)
    wholes: list[dict] = field(default_factory=list)

    def net(self) -> list[float]:
        """Processor seconds of work in each round."""
        return [whole["cpu_s"] - start["cpu_s"] for start, whole in zip(self.starts, self.wholes, strict=True)]

    def best(self, clock: str) -> float:
        """Seconds of work, the quickest run on the whole input less the quickest on one document."""
        return min(whole[clock] for whole in self.wholes) - min(start[clock] for start in self.starts)


def compare(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The throughput table's rows."""
    one = folder / "one.jsonl"
    with open(arguments.data, "rb") as stream:
        one.write_bytes(stream.readline())
    job = {"tokenizer": arguments.tokenizer, "eod_id": arguments.eod_id, "workers": 1, "clean": {}, "extra": {}}
    everything = {"clean": CLEAN, "extra": {"dedup": {"near": True}, "decontaminate": {"exams": arguments.exams}}}
    sides = [
        Side("plain loop (preprocess_data.py's)", "peer", job | {"compare": True}),
        Side("fastokens alone, nothing written", "floor", job),
        Side("ours: tokenize and index", "ours", job | {"compare": True}),
        Side("ours: clean, decontaminate, dedup too", "ours", job | everything),
    ]
    for _ in range(arguments.rounds):
        for side in sides:
            side.starts.append(measure(side.kind, side.job | {"data": str(one)}))
            side.wholes.append(measure(side.kind, side.job | {"data": arguments.data}))
    rows = [_row(side, sides[0], sides[1], os.path.getsize(arguments.data) / 1e6) for side in sides]
    print("\n".join(rows))
    return rows


def measure_shards(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Processor seconds of every shard of 1, 2 and 4, one after the other, and of the last step; all steps on."""
    extra = {"dedup": {"near": True}, "decontaminate": {"exams": arguments.exams}}
    job = {"data": arguments.data, "tokenizer": arguments.tokenizer, "eod_id": arguments.eod_id}
    job |= {"clean": CLEAN, "extra": extra}
    megabytes, rows, digests = os.path.getsize(arguments.data) / 1e6, [], set()
    for count in (1, 2, 4):
        job["output"] = str(folder / f"shards{count}")
        shards = [measure("shard", job | {"shard": f"{i + 1}/{count}"})["cpu_s"] for i in range(count)]
        last = measure("shard", job | {"shard": None})["cpu_s"]
        files = [Path(job["output"], name).read_bytes() for name in ("s.bin", "s.idx", "manifest.json")]
        digests.add(hashlib.sha256(b"".join(files)).hexdigest())
        cells = [str(count), f"{min(shards):.2f} to {max(shards):.2f}", f"{megabytes / max(shards):.1f}", f"{last:.2f}"]
        rows.append(f"| {' | '.join([*cells, 'yes' if len(digests) == 1 else 'NO'])} |")
        print(rows[-1], flush=True)
    return rows


def _row(side: Side, peer: Side, floor: Side, megabytes: float) -> str:
    net, peer_net = side.net(), peer.net()
    cells = [
        side.name,
        f"{sum(net):.2f} ({min(net):.2f} to {max(net):.2f})",
        f"{megabytes * len(net) / sum(net):.1f} ({sum(peer_net) / sum(net):.1f} x)",
        f"{sum(floor.net()) / sum(net):.2f}",
    ]
    for clock in ("cpu_s", "wall_s"):
        cells.append(f"{megabytes / side.best(clock):.1f} ({peer.best(clock) / side.best(clock):.1f} x)")
    start_s = {clock: min(start[clock] for start in side.starts) for clock in ("wall_s", "cpu_s")}
    cells += [f"{start_s['wall_s']:.2f} / {start_s['cpu_s']:.2f}", f"{max(w['rss_mb'] for w in side.wholes):.0f}"]
    if side is peer:
        cells.append("the reference")
    elif side.job.get("compare"):
        cells.append("yes" if all(whole["digest"] == peer.wholes[0]["digest"] for whole in side.wholes) else "NO")
    else:
        cells.append("")
    return f"| {' | '.join(cells)} |"


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
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--memory", action="store_true", help="also measure peak memory on 100 MB and 1 GB")
    parser.add_argument("--shards", action="store_true", help="also measure 1, 2 and 4 shards and the last step")
    parser.add_argument("--output", type=Path, help="write a Markdown page")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        load = os.getloadavg()[0]
        rows = compare(arguments, Path(folder))
        load = max(load, os.getloadavg()[0])
        shards = measure_shards(arguments, Path(folder)) if arguments.shards else []
        memory = measure_memory(arguments, Path(folder)) if arguments.memory else []
    if arguments.output:
        arguments.output.write_text(_page(arguments, rows, shards, memory, load), encoding="utf-8")


def _page(arguments: argparse.Namespace, rows: list[str], shards: list[str], memory: list[str], load: float) -> str:
    libraries = ", ".join(f"{n} {version(n)}" for n in ("fastokens", "tokenizers", "rensa", "numpy", "megatron-core"))
    lines = [
        "# The corpus builder's speed and memory",
        "",
        f"{cpu_model()}, {os.cpu_count()} cores (shared); Python {platform.python_version()}, {libraries}.",
        f"Input: {Path(arguments.data).name}, {os.path.getsize(arguments.data) / 1e6:.1f} MB; Qwen2.5's tokenizer. "
        "Command: `python tools/peers/megatron_preprocess.py --data … --tokenizer … --exams … --memory --output "
        "docs/benchmarks/corpus.md`.",
        "",
        f"{arguments.rounds} rounds; a round runs each side once on one document and once on the whole input, in turn, "
        "each in a fresh process, ours with one worker. Net: whole less one document, so without start-up; summed over "
        "the rounds (least and most of a round). Best: the quickest whole run less the quickest on one document. "
        "Processor time is that of all processes of a side; its MB/s are per core. Start-up: the quickest run on one "
        f"document. Load average up to {load:.1f}, this run included.",
        "",
        "| | net processor s | MB/s (to the plain loop) | share of fastokens' floor | "
        "best, by processor | best, by wall clock | start-up s, "
        "wall / processor | peak MB | same bytes |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    if shards:
        lines += [
            "## Shards (all steps)",
            "",
            "Processor seconds with start-up, a worker a shard; MB/s: all the input by the slowest shard's seconds.",
            "",
            "| shards | s of a shard | MB/s | the last step, s | same bytes |",
            "|---|---|---|---|---|",
            *shards,
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
