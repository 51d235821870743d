"""The pairs for people, as Markdown and as a page: counts, lengths, what was dropped, one pair of each tier to read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_medllm.pages.markdown import markdown_table
from megatron_medllm.pages.numbers import count
from megatron_medllm.pages.page import write_page


def pairs_report(manifest: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Markdown text from the manifest and the pairs themselves."""
    lengths = [
        [key, *(count(row[name]) for name in ("mean", "median", "p95", "max"))]
        for key, row in manifest["characters"].items()
    ]
    lines = [
        "# Preference pairs",
        "",
        f"{manifest['pairs']} pairs from {manifest['questions']} questions; "
        f"contamination check: {'done' if manifest['contamination']['checked'] else 'NOT done'}, "
        f"{len(manifest['contamination']['dropped'])} questions dropped.",
        "",
        f"{manifest['explained_questions']} of the questions have an explained pair.",
        "",
        *_table("Pairs", "mode and tier", manifest["by_tier"]),
        *_table("Samples", "mode and tier", manifest["samples_by_tier"]),
        *_table("Dropped", "reason", manifest["drop_reasons"]),
        *_left_table(manifest["account"]),
        "## Length in characters",
        "",
        *markdown_table(["", "mean", "median", "95 %", "max"], lengths),
        "",
        "## One pair of each tier",
        "",
    ]
    for item in _examples(rows):
        lines += [f"### {item['kind']} ({item['problem_id']})", ""]
        for name in ("prompt", "chosen", "rejected"):
            lines += [f"{name}:", "", "~~~", item[name], "~~~", ""]
    return "\n".join(lines) + "\n"


def write_pairs_page(path: Path, manifest: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write the same as an HTML page."""
    write_page(path, "megatron_medllm.preference", "pairs.html.jinja", manifest=manifest, examples=_examples(rows))


def _examples(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The first pair of each mode and tier, as texts."""
    shown: dict[str, dict[str, str]] = {}
    for row in rows:
        kind = f"{row['mode']} {row['tier']}"
        if kind not in shown:
            texts = {name: _text(row[name]) for name in ("prompt", "chosen", "rejected")}
            shown[kind] = {"kind": kind, "problem_id": row["problem_id"], **texts}
    return list(shown.values())


def _table(title: str, key: str, counts: dict[str, int]) -> list[str]:
    rows = [[name, str(number)] for name, number in counts.items()] or [["none", "0"]]
    return [f"## {title}", "", *markdown_table([key, "count"], rows), ""]


def _left_table(account: dict[str, Any]) -> list[str]:
    rows = [
        [subject, str(tally["kept"]), "; ".join(f"{kind} {loss['count']}" for kind, loss in tally["lost"].items())]
        for subject, tally in account["subjects"].items()
    ]
    return ["## What the filters left", "", *markdown_table(["mode and tier", "left", "lost"], rows), ""]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(f"[{message['role']}] {message['content']}" for message in value)
    return str(value)
