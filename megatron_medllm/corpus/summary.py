"""One self-contained HTML page about a built corpus: counts, drops per step, lengths, tokens per source."""

from html import escape
from pathlib import Path

from megatron_medllm.storage import atomic_write

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2530 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } td, th { padding: .2rem .8rem; text-align: right }
th { border-bottom: 1px solid #99a } td:first-child, th:first-child { text-align: left }
.bar { display: inline-block; height: .8em; background: #3b7dd8; vertical-align: baseline }
.chart td { padding: .05rem .6rem; font-size: 13px } .chart td:last-child { text-align: left; width: 26rem }
"""


def write_summary(path: Path, manifest: dict) -> None:
    """Write the page of a manifest."""
    sources, tokenizer = manifest["sources"], manifest["tokenizer"]
    steps = sorted({step for facts in sources.values() for step in facts["dropped"]})
    body = [
        f"<h1>Corpus: {manifest['tokens']:,} tokens in {manifest['documents']:,} documents</h1>",
        f"<p>Tokenizer {escape(tokenizer['name'])} ({tokenizer['vocab_size']:,} ids, end of document "
        f"{tokenizer['eod_id']}), by {escape(manifest['backend']['name'])}: {escape(manifest['backend']['why'])}. "
        f"Stored as {manifest['dtype']}.</p>",
        "<h2>Sources</h2>",
        _table(
            ["source", "documents read", "kept", "tokens", "characters / token", "blend weight", "epochs", "licence"],
            [
                [
                    name,
                    *(f"{facts[key]:,}" for key in ("documents_read", "documents", "tokens")),
                    facts["characters_per_token"] or "",
                    f"{facts['weight']:.4f}",
                    facts.get("epochs", ""),
                    facts["licence"],
                ]
                for name, facts in sources.items()
            ],
        ),
        "<h2>Tokens per source</h2>",
        _bars([(name, facts["tokens"]) for name, facts in sources.items()]),
        "<h2>Dropped documents per step</h2>",
        _bars([(step, sum(facts["dropped"].get(step, 0) for facts in sources.values())) for step in steps])
        if steps
        else "<p>None.</p>",
        "<h2>Tokens per document</h2>",
        *(f"<h3>{escape(name)}</h3>{_bars(_lengths(facts['length_histogram']))}" for name, facts in sources.items()),
    ]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Corpus</title><style>{_STYLE}</style>'
    with atomic_write(path) as stream:
        stream.write("\n".join([page, *body, "</html>\n"]).encode())


def _lengths(histogram: list[int]) -> list[tuple[str, int]]:
    first = next((i for i, count in enumerate(histogram) if count), len(histogram))
    return [(f"{2**i:,} – {2 ** (i + 1) - 1:,}", histogram[i]) for i in range(first, len(histogram))]


def _table(head: list[str], rows: list[list[object]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _bars(rows: list[tuple[str, int]]) -> str:
    longest = max((count for _, count in rows), default=0) or 1
    lines = "".join(
        f"<tr><td>{escape(name)}</td><td>{count:,}</td>"
        f'<td><span class="bar" style="width:{100 * count / longest:.1f}%"></span></td></tr>'
        for name, count in rows
    )
    return f'<table class="chart">{lines}</table>'
