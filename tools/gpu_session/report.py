"""The table at the end: what each row showed, ours beside the peers' of the same run, and the goals."""

from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]
GIB_OF_DEVICE = 139.0
# ours, the peer's row, and the rate that is compared
BESIDE = (
    ("lora-8k-whole", "cpt 8192", "tokens_per_s"),
    ("lora-4k", "cpt 4096 packed", "tokens_per_s"),
    ("rpo-8k", "dpo precomputed", "pairs_per_s"),
    ("rpo-4k", "dpo precomputed", "pairs_per_s"),
    ("rpo-2k", "dpo precomputed", "pairs_per_s"),
    ("rpo-2k-fp8", "dpo precomputed", "pairs_per_s"),
    ("rpo-2k swiglu", "dpo precomputed", "pairs_per_s"),
)
KINDS = ("matrix products", "attention", "element-wise and reductions", "copies and fills")
TRAINING, PEERS = ("train", "full", "72b"), ("peers", "dpo")


def report(rows: Rows) -> str:
    """All rows of one OUT as Markdown; of a row that was measured more than once, the last result counts."""
    latest = {(row["part"], row["row"]): row for row in rows if "row" in row}
    ours = {name: row for (part, name), row in latest.items() if part in TRAINING}
    peers = {name: row for (part, name), row in latest.items() if part in PEERS}
    session = next((row for row in reversed(rows) if row["part"] == "session"), {})
    lines = ["# One GPU", "", session.get("device", ""), ""]
    lines += [", ".join(f"{name} {version}" for name, version in session.get("packages", {}).items()), ""]
    lines += training_table(ours) + peers_table(ours, peers) + goals(rows, ours, peers) + kernel_tables(rows)
    lines += ranks_table([row for (part, _), row in latest.items() if part == "ranks"])
    lines += tests_table([row for (part, _), row in latest.items() if part in ("tests", "all-tests")])
    ends = {row["part"]: row for row in rows if "ended" in row}
    if ends:
        lines += table(
            "Parts",
            ["part", "ended", "s", "limit s"],
            [[n, e["ended"], e["seconds"], e["limit_s"]] for n, e in ends.items()],
        )
    return "\n".join(lines) + "\n"


def table(title: str, head: list[str], rows: list[list[Any]]) -> list[str]:
    """A section with one table; nothing where there are no rows."""
    if not rows:
        return []
    cells = [[shown(cell) for cell in row] for row in rows]
    return [f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head),
            *(f"| {' | '.join(row)} |" for row in cells), ""]  # fmt: skip


def shown(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1000 else str(value)
    return text.replace("|", "/").replace("\n", " ")


def training_table(ours: dict[str, dict[str, Any]]) -> list[str]:
    head = ["row", "tokens/s", "pairs/s", "step ms", "data", "fwd+bwd", "norm", "update",
            "peak GiB", "host GiB", "MFU %",
            "busy ms", "gap ms", "syncs", "products", "attention", "element-wise", "copies"]  # fmt: skip
    body, failed = [], []
    for name, row in ours.items():
        if "error" in row:
            failed.append([name, row["error"][:300]])
            continue
        parts, kinds = row["parts_ms"], row.get("kinds_ms", {})
        body.append(
            [name, row["tokens_per_s"], row.get("pairs_per_s"), row["step_ms"],
             *(parts.get(part) for part in ("data", "forward_backward", "gradient_norm", "optimizer")),
             row["peak_gib"], row["host_peak_gib"], 100 * row["mfu"] if "mfu" in row else None,
             row.get("profiled_busy_ms"), row.get("profiled_gap_ms"),
             None if row.get("syncs") is None else sum(row["syncs"].values()),
             *(kinds.get(kind) for kind in KINDS)]
        )  # fmt: skip
    return table("Ours", head, body) + table("Ours, without a result", ["row", "why"], failed)


def peers_table(ours: dict[str, dict[str, Any]], peers: dict[str, dict[str, Any]]) -> list[str]:
    head = ["peer", "tokens/s", "pairs/s", "step s", "peak GiB", "error"]
    names = ("tokens_per_s", "pairs_per_s", "step_s", "peak_gib", "error")
    body = [[name, *(row.get(key) for key in names)] for name, row in peers.items() if name != "machine"]
    ratios = []
    for mine, peer, rate in BESIDE:
        speed, memory = ratio(ours.get(mine), peers.get(peer), rate), ratio(ours.get(mine), peers.get(peer), "peak_gib")
        if speed is not None:
            ratios.append([mine, peer, rate, speed, memory])
    found = table("Peers", head, body)
    return found + table("Ours to the peer's", ["ours", "peer", "rate", "speed x", "memory x"], ratios)


def ratio(mine: dict[str, Any] | None, other: dict[str, Any] | None, key: str) -> float | None:
    """None where a side has no figure."""
    if not mine or not other or not mine.get(key) or not other.get(key):
        return None
    return float(mine[key]) / float(other[key])


def goals(rows: Rows, ours: dict[str, dict[str, Any]], peers: dict[str, dict[str, Any]]) -> list[str]:
    """Issue by issue what was asked for: met, missed or open."""
    found: list[list[Any]] = []

    def add(text: str, value: float | None, met: Callable[[float], bool]) -> None:
        found.append([text, value, "open" if value is None else "met" if met(value) else "missed"])

    def own(name: str, key: str) -> float | None:
        return ours.get(name, {}).get(key)

    def to_peer(name: str, peer: str, key: str) -> float | None:
        return ratio(ours.get(name), peers.get(peer), key)

    add("CPT bf16 LoRA, 8,192 whole: >= 1.10 x peft + Liger", to_peer("lora-8k-whole", "cpt 8192", "tokens_per_s"),
        lambda x: x >= 1.10)  # fmt: skip
    add("CPT bf16 LoRA, 4,096 packed: >= 1.15 x peft + Liger", to_peer("lora-4k", "cpt 4096 packed", "tokens_per_s"),
        lambda x: x >= 1.15)  # fmt: skip
    add("CPT FP8-base LoRA, 8,192: >= 22,000 tokens/s", own("fp8-8k", "tokens_per_s"), lambda x: x >= 22000)
    add("RPO bf16 LoRA: >= 2.2 x TRL + Liger", to_peer("rpo-8k", "dpo precomputed", "pairs_per_s"), lambda x: x >= 2.2)
    short = "RPO, streams of 2,048, SwiGLU recomputed: memory <= 1/3 of TRL's"
    add(short, to_peer("rpo-2k swiglu", "dpo precomputed", "peak_gib"), lambda x: x <= 1 / 3)
    add(
        "the same: >= 1.8 x its pairs/s", to_peer("rpo-2k swiglu", "dpo precomputed", "pairs_per_s"), lambda x: x >= 1.8
    )
    parts = ours.get("lora-4k", {}).get("parts_ms", {})
    both = parts["gradient_norm"] + parts["optimizer"] if "optimizer" in parts else None
    add("optimizer step of LoRA, its norm included: <= 4 ms", both, lambda x: x <= 4)
    add("full 7B, 4,096: peak GiB", own("full-7b", "peak_gib"), lambda x: x <= GIB_OF_DEVICE)
    add("72B FP8-base LoRA, 2,048: peak GiB", own("lora-72b-fp8", "peak_gib"), lambda x: x <= GIB_OF_DEVICE)
    add("the same: host GiB", own("lora-72b-fp8", "host_peak_gib"), lambda x: x <= 128)
    head = {row["name"]: row["ms"] for row in rows if row.get("section") == "head" and "ms" in row
            and row.get("model") == "7B" and row.get("tokens") == 8192}  # fmt: skip
    for name, most in (("ours, uniform", 40), ("ours, frozen", 28), ("ours, forward", 13.5)):
        add(f"head 7B, 8,192 tokens, {name}: <= {most} ms", head.get(name), lambda x, most=most: x <= most)
    for mine, peer in (("ours, uniform", "liger"), ("ours, frozen", "liger, frozen")):
        times = head.get(mine), head.get(peer)
        add(f"head, {mine}: >= 1.5 x {peer}", times[1] / times[0] if all(times) else None, lambda x: x >= 1.5)
    sums = {kind: [row["ms"] for row in rows if row.get("section") == "linear" and row["name"] == kind and "ms" in row
                   and row["layer"].startswith("7B")] for kind in ("bf16", "fp8")}  # fmt: skip
    complete = min(len(times) for times in sums.values()) >= 4
    add("FP8 linears of a 7B layer, forward + backward: >= 1.4 x bf16",
        sum(sums["bf16"][-4:]) / sum(sums["fp8"][-4:]) if complete else None, lambda x: x >= 1.4)  # fmt: skip
    return table("Goals", ["goal", "measured", "verdict"], found)


def kernel_tables(rows: Rows) -> list[str]:
    """One table a section of the kernels' and the attention's rows, as they named their figures."""
    found = []
    for part in ("ceilings", "attention", "kernels"):
        mine = [row for row in rows if row["part"] == part and "ended" not in row]
        for section in dict.fromkeys(row.get("section", "") for row in mine):
            of_it = [row for row in mine if row.get("section", "") == section]
            keys = [k for k in dict.fromkeys(key for row in of_it for key in row) if k not in ("section", "part")]
            body = [[row.get(key) for key in keys] for row in of_it]
            found += table(f"{part}: {section}" if section else part, keys, body)
    return found


def ranks_table(rows: Rows) -> list[str]:
    keys = ("row", "forward_backward_s", "planned_forward_backward_s", "optimizer_s", "micro_batches", "held_gib",
            "planned_held_gib", "peak_gib", "planned_peak_gib", "error")  # fmt: skip
    return table("Ranks of TP8 PP4", list(keys), [[row.get(key) for key in keys] for row in rows])


def tests_table(rows: Rows) -> list[str]:
    return table("Tests", ["test", "result"], [[row["row"], row["result"]] for row in rows])
