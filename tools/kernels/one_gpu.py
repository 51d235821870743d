"""Kernels on one H200 (or H100), under ten minutes: ceilings, exactness, the head, FP8 linears, four layers of 7B.

Usage: python tools/kernels/one_gpu.py --out DIR [--sections NAME ...] [--only 7B] [--wheels DIR] [--limit-s 540]
       python tools/kernels/one_gpu.py --out DIR --tiny      the same code end to end on tiny shapes, on a CPU too

Writes DIR/rows.jsonl after every measurement and DIR/report.md at the end. `--wheels` holds wheels of the peers
(liger_kernel, cut_cross_entropy) for machines without a network; a peer that is not there has a row that says so, as
have out-of-memory and what the time limit cut off. Times are medians of CUDA-event timings after a warm-up; memory is
the growth of the allocator's peak over the inputs, weight gradient (bf16) included.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_medllm.kernels.fp8 import fp8_frozen_linear, fp8_linear, quantize_weight
from megatron_medllm.kernels.fp8.products import scaled_matmul
from megatron_medllm.kernels.fp8.quantize import quantize_activation
from megatron_medllm.kernels.logprob import fused_linear_logprob
from megatron_medllm.storage import atomic_write

GIB = 2**30
HEADS = {"7B": (3584, 152064), "72B": (8192, 152064), "72B/TP8": (8192, 19008)}
LINEARS = {  # (n, k); fc1 holds gate and up, 72B's FFN is padded to 29696
    "7B qkv": (4608, 3584),
    "7B proj": (3584, 3584),
    "7B fc1": (37888, 3584),
    "7B fc2": (3584, 18944),
    "72B/TP8 qkv": (1280, 8192),
    "72B/TP8 proj": (8192, 1024),
    "72B/TP8 fc1": (7424, 8192),
    "72B/TP8 fc2": (8192, 3712),
}


@dataclass
class Bench:
    """Where to run, how large, until when, and what was measured so far."""

    device: torch.device
    out: Path
    tiny: bool
    deadline: float
    only: str = ""
    rows: list[dict] = field(default_factory=list)

    def wanted(self, shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Those of models whose name begins with `only`."""
        return {name: shape for name, shape in shapes.items() if name.startswith(self.only)}

    def record(self, section: str, name: str, **figures: object) -> None:
        row = {"section": section, "name": name, **figures}
        self.rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        with atomic_write(self.out / "rows.jsonl") as stream:
            stream.writelines(orjson.dumps(row) + b"\n" for row in self.rows)

    def try_record(self, section: str, name: str, measure: Callable[[], dict], **labels: object) -> None:
        """Record what `measure` returns, or why there is nothing."""
        if time.monotonic() > self.deadline:
            self.record(section, name, **labels, skipped="time limit")
            return
        try:
            figures = measure()
        except (ImportError, RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is a RuntimeError
            reason = str(error).strip().splitlines() or [""]
            figures = {"failed": f"{type(error).__name__}: {reason[0][:160]}"}
        self.record(section, name, **labels, **figures)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(*shape, device=self.device) * scale).to(dtype)

    def timed(self, run: Callable[[], object], *, repeats: int = 5, warm_up: int = 2) -> dict:
        """Median ms of `run` and the memory it grew by at its peak, GiB (None on a CPU)."""
        for _ in range(warm_up):
            run()
        if self.device.type != "cuda":
            spans = []
            for _ in range(repeats):
                start = time.perf_counter()
                run()
                spans.append((time.perf_counter() - start) * 1e3)
            return {"ms": round(statistics.median(spans), 3), "peak_gib": None}
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - held) / GIB
        spans = [start.elapsed_time(end) for start, end in events]
        return {"ms": round(statistics.median(spans), 3), "peak_gib": round(peak, 3)}


def measure_ceilings(bench: Bench) -> None:
    """The two limits that everything else is read against."""
    n = 256 if bench.tiny else 8192
    a, b = bench.randn(n, n), bench.randn(n, n)
    ms = bench.timed(lambda: a @ b, repeats=20)["ms"]
    bench.record("ceiling", "bf16 matmul", n=n, tflops=round(2 * n**3 / ms / 1e9, 1))
    source = torch.empty(2**20 if bench.tiny else 2 * GIB, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    ms = bench.timed(lambda: target.copy_(source), repeats=20)["ms"]
    bench.record("ceiling", "copy", tb_per_s=round(2 * source.numel() / ms / 1e9, 3))


def check_head(bench: Bench) -> None:
    """Log-probs of all rows, d hidden of sampled rows and d weight of sampled words, against float64."""
    tokens, (hidden_size, vocab) = (64, (48, 1000)) if bench.tiny else (512, HEADS["7B"])
    hidden = bench.randn(tokens, hidden_size).requires_grad_()
    weight = bench.randn(vocab, hidden_size, scale=0.02).requires_grad_()
    target = torch.randint(0, vocab, (tokens,), device=bench.device)
    upstream = bench.randn(tokens, dtype=torch.float32)
    x, w = hidden.detach().double(), weight.detach().double()  # no graph: float64 of this size must not be kept
    logits = x @ w.t()
    lse = torch.logsumexp(logits, -1)
    picked = logits.gather(1, target[:, None])[:, 0] - lse
    gradient = torch.exp(logits - lse[:, None]).mul_(-upstream.double()[:, None])
    gradient.scatter_add_(1, target[:, None], upstream.double()[:, None])
    words = torch.cat([target[:32], torch.randint(0, vocab, (32,), device=bench.device)])
    expected_dx, expected_dw = gradient[:64] @ w, gradient[:, words].t() @ x
    for mode in ("general", "frozen"):
        hidden.grad = weight.grad = None
        logprobs, _ = fused_linear_logprob(hidden, weight, target, frozen_weight=mode == "frozen")
        logprobs.backward(upstream)
        figures = {
            "max_logprob_error": float((logprobs.detach().double() - picked.detach()).abs().max()),
            "hidden_grad_error": relative_error(hidden.grad[:64], expected_dx),
        }
        if weight.grad is not None:
            figures["weight_grad_error"] = relative_error(weight.grad[words], expected_dw)
        bench.record("head against float64", mode, **figures)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def head_variants(hidden: Tensor, weight: Tensor, target: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, a function whose result is a mean loss); our own first."""

    def ours(**options) -> Callable[[], Tensor]:
        return lambda: -fused_linear_logprob(hidden, weight, target, **options)[0].mean()

    def eager() -> Tensor:
        return F.cross_entropy((hidden @ weight.t()).float(), target)

    def liger(head: Tensor = weight) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(head, hidden, target)

    def cut() -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, target)

    yield "ours, general", ours()
    yield "ours, uniform", ours(uniform_grad=1.0)
    yield "ours, frozen", ours(frozen_weight=True)
    yield "ours, general, torch row passes", ours(backend="torch")
    yield "liger", liger
    yield "liger, frozen", lambda: liger(weight.detach())
    yield "cut cross-entropy", cut
    yield "eager", eager
    yield "torch.compile", torch.compile(eager, dynamic=False)  # half a minute of compilation


def sweep_heads(bench: Bench, token_counts: tuple[int, ...], *, compiled: bool) -> None:
    """Forward + backward of every variant, and our forward alone; or of `torch.compile` alone."""
    shapes = {"tiny": (64, 1000)} if bench.tiny else bench.wanted(HEADS)
    for tokens, (model, (hidden_size, vocab)) in itertools.product(token_counts, shapes.items()):
        hidden = bench.randn(tokens, hidden_size).requires_grad_()
        weight = bench.randn(vocab, hidden_size, scale=0.02).requires_grad_()
        target = torch.randint(0, vocab, (tokens,), device=bench.device)
        labels = {"model": model, "tokens": tokens}
        for name, loss in head_variants(hidden, weight, target):
            if compiled != (name == "torch.compile"):
                continue

            def step(loss: Callable[[], Tensor] = loss, hidden: Tensor = hidden, weight: Tensor = weight) -> None:
                hidden.grad = weight.grad = None
                loss().backward()

            bench.try_record("head", name, lambda step=step: bench.timed(step, repeats=3), **labels)
            hidden.grad = weight.grad = None
        if not compiled:
            score = next(head_variants(hidden, weight, target))[1]
            bench.try_record("head", "ours, forward", lambda score=score: time_scoring(bench, score), **labels)


def time_scoring(bench: Bench, score: Callable[[], Tensor]) -> dict:
    with torch.no_grad():
        return bench.timed(score, repeats=3)


def measure_linears(bench: Bench) -> None:
    """Forward + backward with all casts: bf16, FP8 trained, FP8 frozen with a rank-16 adapter."""
    tokens = 64 if bench.tiny else 8192
    for name, (n, k) in {"tiny": (256, 384)}.items() if bench.tiny else bench.wanted(LINEARS).items():
        x = bench.randn(tokens, k).requires_grad_()
        weight = bench.randn(n, k, scale=0.02).requires_grad_()
        base = quantize_weight(weight.detach())
        a, b = bench.randn(16, k, scale=0.02).requires_grad_(), bench.randn(n, 16).requires_grad_()
        dy = bench.randn(tokens, n)
        frozen_weight = weight.detach()
        layers = {
            "bf16": lambda x=x, w=weight: F.linear(x, w),
            "fp8": lambda x=x, w=weight: fp8_linear(x, w),
            "bf16 frozen + adapter": lambda x=x, w=frozen_weight, a=a, b=b: (
                F.linear(x, w) + F.linear(F.linear(x, a), b)
            ),
            "fp8 frozen + adapter": lambda x=x, w=base, a=a, b=b: fp8_frozen_linear(x, w) + F.linear(F.linear(x, a), b),
        }
        for kind, layer in layers.items():

            def step(layer: Callable[[], Tensor] = layer, dy: Tensor = dy, leaves: tuple = (x, weight, a, b)) -> None:
                for leaf in leaves:
                    leaf.grad = None
                layer().backward(dy)

            bench.try_record("linear", kind, lambda step=step: bench.timed(step), layer=name, tokens=tokens)


def measure_recipes(bench: Bench) -> None:
    """`scaled_mm` alone, operands already cast, at the shapes of a 7B layer: by kind of scale, beside bf16.

    Whole-tensor and per-row scales are what a kernel with cheaper scales could reach at most.
    """
    tokens = 64 if bench.tiny else 8192
    for name, (n, k) in {"tiny": (256, 384)}.items() if bench.tiny else LINEARS.items():
        if not name.startswith(("7B", "tiny")):
            continue
        x, weight = bench.randn(tokens, k), bench.randn(n, k, scale=0.02)
        one, rows, columns = (torch.ones(shape, device=bench.device) for shape in ((), (tokens, 1), (1, n)))
        cast, base = (value.to(torch.float8_e4m3fn) for value in (x, weight))
        blocks, weight_blocks = quantize_activation(x)[0], quantize_weight(weight)

        def scaled(a: Tensor, b: Tensor, *, fast: bool, cast: Tensor = cast, base: Tensor = base) -> Tensor:
            return torch._scaled_mm(cast, base.t(), scale_a=a, scale_b=b, out_dtype=torch.bfloat16, use_fast_accum=fast)

        products = {
            "bf16": lambda x=x, w=weight: x @ w.t(),
            "blocks 1x128 by 128x128": lambda a=blocks, b=weight_blocks: scaled_matmul(a, b, out_dtype=torch.bfloat16),
            "rows": lambda a=rows, b=columns, scaled=scaled: scaled(a, b, fast=True),
            "tensor": lambda a=one, scaled=scaled: scaled(a, a, fast=True),
            "tensor, exact sums": lambda a=one, scaled=scaled: scaled(a, a, fast=False),
            "cast of x alone": lambda x=x: quantize_activation(x),
        }
        for kind, product in products.items():

            def measure(kind: str = kind, product: Callable[[], object] = product, n: int = n, k: int = k) -> dict:
                ms = bench.timed(product, repeats=10)["ms"]
                return {"ms": ms} | ({} if "cast" in kind else {"tflops": round(2 * tokens * n * k / ms / 1e9, 1)})

            bench.try_record("product", kind, measure, layer=name, tokens=tokens)


class Slice(torch.nn.Module):
    """Decoder layers of Qwen2.5 7B without position encoding: enough to time its linears in their surroundings."""

    def __init__(self, bench: Bench, *, layers: int, fp8: bool) -> None:
        super().__init__()
        self.head_dim, self.heads, self.groups = (16, 8, 2) if bench.tiny else (128, 28, 4)
        h, ffn = self.head_dim * self.heads, 256 if bench.tiny else 18944
        shapes = [((self.heads + 2 * self.groups) * self.head_dim, h), (h, h), (2 * ffn, h), (h, ffn)]
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(bench.randn(n, k, scale=k**-0.5)) for n, k in shapes * layers
        )
        self.width, self.layers, self.linear = h, layers, fp8_linear if fp8 else F.linear

    def forward(self, x: Tensor) -> Tensor:
        for first in range(0, 4 * self.layers, 4):
            qkv, proj, fc1, fc2 = self.weights[first : first + 4]
            sizes = [self.heads * self.head_dim] + 2 * [self.groups * self.head_dim]
            parts = self.linear(F.rms_norm(x, (self.width,)), qkv).split(sizes, -1)
            q, k, v = (part.view(1, len(x), -1, self.head_dim).transpose(1, 2) for part in parts)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + self.linear(mixed.transpose(1, 2).reshape(len(x), -1), proj)
            gate, up = self.linear(F.rms_norm(x, (self.width,)), fc1).chunk(2, -1)
            x = x + self.linear(F.silu(gate) * up, fc2)
        return x


def measure_slice(bench: Bench) -> None:
    """Four layers, 8,192 tokens, forward + backward."""
    tokens = 64 if bench.tiny else 8192
    for kind in ("bf16", "fp8"):

        def measure(kind: str = kind) -> dict:
            torch.manual_seed(0)
            model = Slice(bench, layers=4, fp8=kind == "fp8")
            x = bench.randn(tokens, model.width).requires_grad_()

            def step() -> None:
                model.zero_grad()
                model(x).float().square().mean().backward()

            figures = bench.timed(step)
            return figures | {"tokens_per_s": round(tokens / figures["ms"] * 1e3)}

        bench.try_record("four layers of 7B", kind, measure, tokens=tokens)


def add_wheels(folder: Path) -> None:
    """Unpack pure-Python wheels beside each other and make them importable (Triton reads kernels' source files)."""
    unpacked = Path(tempfile.mkdtemp(prefix="wheels-"))
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
    sys.path.insert(0, str(unpacked))


def verdicts(rows: list[dict]) -> list[str]:
    """What the kernels are to reach at 7B and 8,192 tokens (docs/kernels.md): met, missed or open."""
    head = {row["name"]: row for row in rows if row.get("model") == "7B" and row.get("tokens") == 8192}
    dw_gib = 3584 * 152064 * 2 / GIB

    def figure(name: str, key: str) -> float | None:
        return head.get(name, {}).get(key)

    lines = ["| target, 7B, 8,192 tokens | measured | verdict |", "|---|---|---|"]

    def add(text: str, value: float | None, met: Callable[[float], bool]) -> None:
        verdict = "open" if value is None else "met" if met(value) else "missed"
        lines.append(f"| {text} | {'-' if value is None else f'{value:.2f}'} | {verdict} |")

    training = figure("ours, uniform", "ms")
    add("training head (uniform) <= 40 ms", training, lambda ms: ms <= 40)
    for mode in ("uniform", "general"):
        peak = figure(f"ours, {mode}", "peak_gib")
        add(f"{mode} head <= 1 GiB beside dW", None if peak is None else peak - dw_gib, lambda gib: gib <= 1)
    add("frozen head <= 28 ms", figure("ours, frozen", "ms"), lambda ms: ms <= 28)
    add("forward <= 13.5 ms", figure("ours, forward", "ms"), lambda ms: ms <= 13.5)
    liger = figure("liger", "ms")
    add(">= 1.5x faster than Liger", None if not (liger and training) else liger / training, lambda ratio: ratio >= 1.5)
    sums = {kind: [row.get("ms") for row in rows if row["section"] == "linear" and row["name"] == kind
                   and row["layer"].startswith("7B")] for kind in ("bf16", "fp8")}  # fmt: skip
    ratio = None
    if all(times and None not in times for times in sums.values()):
        ratio = sum(sums["bf16"]) / sum(sums["fp8"])
    add("FP8 linears of a 7B layer, forward + backward >= 1.4x bf16", ratio, lambda value: value >= 1.4)
    return lines


def write_report(bench: Bench) -> None:
    """report.md: the machine, the verdicts, one table a section."""
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    lines = ["# Kernels, measured", "", f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}", ""]
    lines += verdicts(bench.rows)
    for section in dict.fromkeys(row["section"] for row in bench.rows):
        rows = [row for row in bench.rows if row["section"] == section]
        keys = list(dict.fromkeys(key for row in rows for key in row if key != "section"))
        lines += ["", f"## {section}", "", f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
        lines += ["| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in rows]
    with atomic_write(bench.out / "report.md") as stream:
        stream.write(("\n".join(lines) + "\n").encode())


def sweep_first(bench: Bench, *, compiled: bool = False) -> None:
    sweep_heads(bench, (128,) if bench.tiny else (8192,), compiled=compiled)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "ceilings": measure_ceilings,
    "head-check": check_head,
    "head": sweep_first,
    "linears": measure_linears,
    "recipes": measure_recipes,
    "slice": measure_slice,
    "more-heads": lambda bench: sweep_heads(bench, () if bench.tiny else (2048, 16384), compiled=False),
    "compiled": lambda bench: sweep_first(bench, compiled=True),
}


def main() -> int:
    """Run all sections within the time limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--limit-s", type=float, default=540)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these, in this order")
    parser.add_argument("--only", default="", help="models whose name begins so: 7B, 72B")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.tiny:
        parser.error("no CUDA device: only --tiny runs here")
    if arguments.wheels:
        add_wheels(arguments.wheels)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, arguments.out, arguments.tiny, time.monotonic() + arguments.limit_s, arguments.only)
    for section in arguments.sections:
        try:
            SECTIONS[section](bench)
        except RuntimeError as error:  # out of memory, a kernel that this device has not: the next section goes on
            bench.record(section, "the section", failed=f"{type(error).__name__}: {str(error)[:300]}")
    write_report(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
