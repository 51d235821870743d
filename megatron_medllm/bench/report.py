"""A measured throughput as Markdown and as a page, and two of them side by side."""

from pathlib import Path
from typing import Any

from megatron_medllm.pages.markdown import markdown_table
from megatron_medllm.pages.page import write_page
from megatron_medllm.storage import read_json

# What a benchmark counts besides tokens -> how the table calls it
COUNTS = {
    "pairs_per_s": "pairs/s",
    "samples_per_s": "samples/s",
    "prompt_tokens_per_s": "prompt tokens/s",
    "loss_tokens_per_s": "tokens/s with a loss",
}


def throughput_report(result: dict[str, Any]) -> str:
    """One result as a Markdown table with its circumstances."""
    return "\n".join(markdown_table(["", ""], throughput_rows(result)))


def write_bench_page(path: Path, result: dict[str, Any]) -> None:
    """The same as an HTML page, with the parts of a step as bars."""
    write_page(
        path,
        "megatron_medllm.bench",
        "bench.html.jinja",
        result=result,
        rows=throughput_rows(result),
        parts_s=list(result["parts_s"].items()),
    )


def throughput_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values, for a table of two columns."""
    facts, times = result["environment"], result["step_time_s"]
    parts = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in result["parts_s"].items())
    return [
        ("measured", ", ".join([result["bench"], *_subject(result)])),
        ("tokens/s/GPU", f"{result['tokens_per_s_per_gpu']:,.1f}"),
        ("tokens/s/GPU, padding included", f"{result['padded_tokens_per_s_per_gpu']:,.1f}"),
        ("tokens/s", f"{result['tokens_per_s']:,.1f}"),
        *((label, f"{result[name]:,.2f}") for name, label in COUNTS.items() if name in result),
        ("step", f"{times['median'] * 1e3:,.1f} ms (min {times['min'] * 1e3:,.1f}, max {times['max'] * 1e3:,.1f})"),
        ("of it (medians)", parts),
        *((f"TFLOP/s/GPU ({n})", f"{rate / 1e12:,.4g}") for n, rate in result["flops_per_s_per_gpu"].items()),
        *((f"MFU ({n})", f"{100 * share:.1f} %") for n, share in result.get("mfu", {}).items()),
        *(
            [("peak memory", f"{result['peak_memory_bytes'] / 2**30:.2f} GiB (rank 0)")]
            if "peak_memory_bytes" in result
            else []
        ),
        ("window", f"{result['steps']} steps after {result['warmup_steps']} of warm-up"),
        ("data", _data(result["synthetic"])),
        ("device", f"{result['world_size']} x {facts['device']} ({facts['device_type']})"),
        ("code", f"{facts['git_revision'][:12] or 'unknown'}, {facts['git_changed_files']} changed files"),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)),
    ]


def _subject(result: dict[str, Any]) -> list[str]:
    """What was at work: a stage of training in a precision, or an inference engine that writes the tokens counted."""
    if "engine" in result:
        return [
            "tokens are those written",
            " ".join(str(result["engine"][n]) for n in ("engine", "dtype") if n in result["engine"]),
        ]
    workload = result["workload"]
    return [result["stage"], workload["mode"], workload["precision"]]


def _data(synthetic: dict[str, int] | None) -> str:
    if synthetic is None:
        return "the recipe's"
    lengths = ", ".join(f"{name.removesuffix('_length')} {tokens}" for name, tokens in synthetic.items())
    return f"synthetic (mean tokens: {lengths}), random weights"


def compare_report(first: Path, second: Path) -> str:
    """Two results side by side: rates, and every setting in which they differ.

    Raises:
        UserError: a file is missing or not JSON.
    """
    a, b = read_json(first), read_json(second)
    rows = []
    directions = {"tokens_per_s_per_gpu": "higher", **dict.fromkeys(COUNTS, "higher"), "peak_memory_bytes": "lower"}
    for name, better in directions.items():
        if name in a and name in b:
            rows.append(_compared(f"{name} ({better} is better)", a[name], b[name], digits=1))
    steps = [found["step_time_s"]["median"] for found in (a, b)]
    rows.append(_compared("step_time_s (lower is better)", *steps, digits=4))
    x, y = (_flat({k: v[k] for k in ("config", "environment", "world_size", "synthetic")}) for v in (a, b))
    changed = [name for name in sorted(set(x) | set(y)) if x.get(name) != y.get(name)]
    rows += [[name, str(x.get(name)), str(y.get(name)), ""] for name in changed]
    return "\n".join(markdown_table(["", str(first), str(second), "change"], rows))


def _compared(name: str, before: float, after: float, *, digits: int) -> list[str]:
    return [name, f"{before:,.{digits}f}", f"{after:,.{digits}f}", f"{100 * (after / before - 1):+.1f} %"]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for name, inner in value.items() for k, v in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }
