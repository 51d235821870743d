"""The pairs in a page of Markdown: counts, lengths, what was dropped, and one pair of each tier to read."""

from collections.abc import Sequence
from typing import Any


def pairs_report(manifest: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Markdown text from the manifest and the pairs themselves."""
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
        "| | mean | median | 95 % | max |",
        "|---|---|---|---|---|",
        *(
            f"| {key} | {row['mean']:.0f} | {row['median']} | {row['p95']} | {row['max']} |"
            for key, row in manifest["characters"].items()
        ),
        "",
        "## One pair of each tier",
        "",
    ]
    shown: set[str] = set()
    for row in rows:
        kind = f"{row['mode']} {row['tier']}"
        if kind in shown:
            continue
        shown.add(kind)
        lines += [f"### {kind} ({row['problem_id']})", "", *_quoted("prompt", row["prompt"])]
        lines += [*_quoted("chosen", row["chosen"]), *_quoted("rejected", row["rejected"])]
    return "\n".join(lines) + "\n"


def _table(title: str, key: str, counts: dict[str, int]) -> list[str]:
    rows = [f"| {name} | {count} |" for name, count in counts.items()] or ["| none | 0 |"]
    return [f"## {title}", "", f"| {key} | count |", "|---|---|", *rows, ""]


def _left_table(account: dict[str, Any]) -> list[str]:
    rows = []
    for subject, tally in account["subjects"].items():
        losses = "; ".join(f"{kind} {loss['count']}" for kind, loss in tally["lost"].items())
        rows.append(f"| {subject} | {tally['kept']} | {losses} |")
    return ["## What the filters left", "", "| mode and tier | left | lost |", "|---|---|---|", *rows, ""]


def _quoted(name: str, text: object) -> list[str]:
    if isinstance(text, list):
        text = "\n".join(f"[{message['role']}] {message['content']}" for message in text)
    return [f"{name}:", "", "~~~", str(text), "~~~", ""]
