"""Packed attention on one Hopper GPU, under a minute: flash against cuDNN, dense and ragged, and both against fp32.

Usage: python tools/kernels/attention_gpu.py --out DIR [--wheels DIR] [--limit-s 60]
       python tools/kernels/attention_gpu.py --out DIR --tiny      small shapes, on a CPU too (cuDNN's rows say why not)

Writes DIR/rows.jsonl after every measurement and prints a table at the end. A variant passes where nothing is NaN and
the largest error of output and gradients, against fp32, is at most 1.5 times flash's. A variant that fails has the last
lines of its traceback in its row. FLOPs count what the masks leave: two products forward, five backward. Heads of 64:8
have two of the streams.
"""

import argparse
import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import torch
from one_gpu import add_wheels
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_medllm.kernels.attention import PlanCache, missing_front_end
from megatron_medllm.models.attention import attend_by_default, dense_sdpa, padded_sdpa
from megatron_medllm.models.attention_choice import ragged_cudnn
from megatron_medllm.parallel.packed import PackedSequences, Segment
from megatron_medllm.storage import atomic_write

WIDTH = 128
MOST_ERROR = 1.5  # of flash's
CHECKED = 2048  # tokens of a stream that is compared with fp32: its scores take heads * tokens^2 * 4 bytes
HEADS = ((28, 4), (64, 8))


@dataclass
class Sweep:
    """Where to run and what was measured so far."""

    device: torch.device
    out: Path
    deadline: float
    plans: PlanCache = field(default_factory=lambda: PlanCache(strict=True))
    rows: list[dict] = field(default_factory=list)

    def record(self, **row: Any) -> None:
        self.rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        with atomic_write(self.out / "rows.jsonl") as stream:
            stream.writelines(orjson.dumps(row) + b"\n" for row in self.rows)


def documents(*lengths: int) -> tuple[Segment, ...]:
    bounds = list(itertools.accumulate(lengths, initial=0))
    return tuple(itertools.starmap(Segment, itertools.pairwise(bounds)))


def pairs(count: int, prompt: int, chosen: int, rejected: int) -> tuple[Segment, ...]:
    """Shared prompts, each before its two responses."""
    segments: list[Segment] = []
    for start in range(0, count * (prompt + chosen + rejected), prompt + chosen + rejected):
        middle, end = start + prompt, start + prompt + chosen
        segments += [Segment(start, middle), Segment(middle, end, start, middle)]
        segments.append(Segment(end, end + rejected, start, middle))
    return tuple(segments)


def packed_row(tokens: int, mean: int) -> tuple[Segment, ...]:
    """Documents of lognormal lengths of this mean, the last one cut off."""
    generator = torch.Generator().manual_seed(tokens)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        draw = math.exp(math.log(mean) - 0.32 + 0.8 * float(torch.randn(1, generator=generator)))
        lengths.append(max(1, min(int(draw), tokens - sum(lengths))))
    return documents(*lengths)


def streams(*, tiny: bool) -> dict[str, tuple[Segment, ...]]:
    """By name; the first is one document."""
    unit = 16 if tiny else 1024
    odd = unit * 4 - 3 - (unit + 77 % unit)
    return {
        "one document": documents(8 * unit),
        "packed 8k": packed_row(8 * unit, unit),
        "8 shared prompts": pairs(8, unit // 2, unit // 4, unit // 4 - 1),
        "one-token documents": documents(1, unit + 77 % unit, 1, odd, 1),
        "packed 4k": packed_row(4 * unit, unit),
    }


def shortened(segments: tuple[Segment, ...], tokens: int) -> tuple[Segment, ...]:
    """The stream's first tokens: what is compared with fp32."""
    kept = [s for s in segments if s.start < tokens]
    return (*kept[:-1], Segment(kept[-1].start, min(kept[-1].end, tokens), kept[-1].prefix_start, kept[-1].prefix_end))


def by_document(query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float) -> Tensor:
    """cuDNN through torch, a call a document."""
    if any(s.prefix_length for s in packed.segments):
        raise ValueError("documents with a prefix")
    lengths = [s.end - s.start for s in packed.segments]
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    return torch.cat([dense_sdpa(*part, scale) for part in parts])


def variants(sweep: Sweep) -> dict[str, Callable[..., Tensor]]:
    """Flash first: the others are compared with it."""

    def ragged(query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float) -> Tensor:
        missing = missing_front_end(sweep.device)
        if missing is not None:
            raise ImportError(f"needs {missing}")
        out = ragged_cudnn(query, key, value, packed, scale, sweep.plans)
        assert out is not None  # a strict cache raises
        return out

    return {"flash": attend_by_default, "dense cuDNN": by_document, "ragged cuDNN": ragged}


def inputs(sweep: Sweep, tokens: int, heads: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
    """q, k, v in buffers whose rest is NaN (a kernel that reads on shows it), and the output's gradient."""
    generator = torch.Generator(sweep.device).manual_seed(0)
    leaves = []
    for n in (heads[0], heads[1], heads[1], heads[0]):
        buffer = torch.full((tokens + 256, n, WIDTH), math.nan, device=sweep.device, dtype=torch.bfloat16)
        buffer[:tokens] = torch.randn(tokens, n, WIDTH, device=sweep.device, generator=generator).bfloat16()
        leaves.append(buffer[:tokens])
    return leaves[:3], leaves[3]


def results(attend: Callable, leaves: list[Tensor], upstream: Tensor, segments: tuple[Segment, ...]) -> list[Tensor]:
    packed = PackedSequences.from_segments(segments, torch.zeros(len(upstream)), backend="torch")
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = attend(*leaves, packed, WIDTH**-0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def errors(sweep: Sweep, attend: Callable, segments: tuple[Segment, ...], heads: tuple[int, int]) -> list[float]:
    """Largest error of o, dQ, dK and dV on the stream's first tokens, each relative to the largest value."""
    short = shortened(segments, CHECKED)
    leaves, upstream = inputs(sweep, short[-1].end, heads)
    found = results(attend, leaves, upstream, short)
    with sdpa_kernel(SDPBackend.MATH):  # the others may round products to TF32
        expected = results(padded_sdpa, [x.float() for x in leaves], upstream.float(), short)
    return [float((x.float() - y).abs().max() / y.abs().max()) for x, y in zip(found, expected, strict=True)]


def milliseconds(sweep: Sweep, run: Callable[[], object], repeats: int = 10) -> float:
    for _ in range(2):
        run()
    if sweep.device.type == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def kernel_names(sweep: Sweep, run: Callable[[], object]) -> list[str]:
    """The three costliest kernels of a call."""
    if sweep.device.type == "cpu":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    costly = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    return [f"{event.key[:70]} x{event.count} {event.device_time_total:.0f}us" for event in costly[:3]]


def measure(sweep: Sweep, attend: Callable, segments: tuple[Segment, ...], heads: tuple[int, int]) -> dict:
    """Errors, times and kernels of one variant on one stream."""
    start = time.perf_counter()
    off = errors(sweep, attend, segments, heads)
    first_s = time.perf_counter() - start
    tokens = segments[-1].end
    leaves, upstream = inputs(sweep, tokens, heads)
    packed = PackedSequences.from_segments(segments, torch.zeros(tokens), backend="torch")
    trained = [x.detach().requires_grad_() for x in leaves]

    def forward() -> Tensor:
        return attend(*leaves, packed, WIDTH**-0.5)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*trained, packed, WIDTH**-0.5), trained, upstream)

    start = time.perf_counter()
    gradients = step()
    build_s = time.perf_counter() - start  # with the plans of this shape
    finite = all(bool(x.isfinite().all()) for x in (*gradients, forward()))
    forward_ms, both_ms = milliseconds(sweep, forward), milliseconds(sweep, step)
    seen = sum((s.end - s.start) * s.prefix_length + (s.end - s.start) * (s.end - s.start + 1) // 2 for s in segments)
    flops = 2 * 2 * heads[0] * WIDTH * seen
    return {
        "forward_ms": round(forward_ms, 3),
        "both_ms": round(both_ms, 3),
        "forward_tflops": round(flops / forward_ms / 1e9, 1),
        "both_tflops": round(3.5 * flops / both_ms / 1e9, 1),
        "errors": [round(x, 5) for x in off],
        "finite": finite,
        "first_s": round(first_s, 2),
        "build_s": round(build_s, 2),
        "kernels": kernel_names(sweep, step),
    }


def try_measure(sweep: Sweep, name: str, attend: Callable, stream: str, segments: Any, heads: tuple[int, int]) -> None:
    row = {"stream": stream, "heads": f"{heads[0]}:{heads[1]}", "variant": name}
    if time.monotonic() > sweep.deadline:
        sweep.record(**row, skipped="time limit")
        return
    try:
        figures = measure(sweep, attend, segments, heads)
    except Exception as error:  # whatever it is, the row says it and the sweep goes on
        lines = "".join(traceback.format_exception(error)).strip().splitlines()
        sweep.record(**row, failed=f"{type(error).__name__}: {str(error)[:600]}", where=[x.strip() for x in lines[-7:]])
        return
    flash = next((r for r in sweep.rows if r.get("errors") and r["variant"] == "flash" and r["stream"] == stream
                  and r["heads"] == row["heads"]), figures)  # fmt: skip
    near = all(x <= MOST_ERROR * y + 1e-6 for x, y in zip(figures["errors"], flash["errors"], strict=True))
    ratio = round(flash["both_ms"] / figures["both_ms"], 2)
    sweep.record(**row, passed=near and figures["finite"], times_flash=ratio, **figures)


def table(rows: list[dict]) -> str:
    lines = [
        f"{'stream':20} {'heads':6} {'variant':13} {'fwd ms':>8} {'f+b ms':>8} {'TFLOP/s':>8} {'x flash':>8}  verdict"
    ]
    for row in rows:
        start = f"{row['stream']:20} {row['heads']:6} {row['variant']:13}"
        if "both_ms" not in row:
            lines.append(f"{start} {row.get('failed', row.get('skipped', ''))[:110]}")
            continue
        verdict = "passed" if row["passed"] else f"FAILED errors={row['errors']} finite={row['finite']}"
        figures = f"{row['forward_ms']:8.3f} {row['both_ms']:8.3f} {row['both_tflops']:8.1f} {row['times_flash']:8.2f}"
        lines.append(f"{start} {figures}  {verdict}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--limit-s", type=float, default=60)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.tiny:
        parser.error("no CUDA device: only --tiny runs here")
    if arguments.wheels:
        add_wheels(arguments.wheels)
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sweep = Sweep(device, arguments.out, time.monotonic() + arguments.limit_s)
    print(f"torch {torch.__version__} cuDNN {torch.backends.cudnn.version()} on {device}", flush=True)
    for heads in ((4, 2),) if arguments.tiny else HEADS:
        for stream, segments in streams(tiny=arguments.tiny).items():
            if heads == (64, 8) and stream not in ("one document", "packed 8k"):
                continue
            for name, attend in variants(sweep).items():
                if name == "dense cuDNN" and stream != "one document":
                    continue  # torch builds a plan for every length of a document
                try_measure(sweep, name, attend, stream, segments, heads)
    print(table(sweep.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
