"""summary.html of a built corpus: counts, drops per step, lengths, tokens per source."""

from pathlib import Path
from typing import Any

from megatron_medllm.pages.page import write_page


def write_summary(path: Path, manifest: dict[str, Any]) -> None:
    """Write the page of a manifest."""
    sources = manifest["sources"]
    steps = sorted({step for facts in sources.values() for step in facts["dropped"]})
    write_page(
        path,
        "megatron_medllm.corpus",
        "summary.html.jinja",
        name=", ".join(sources),  # not the folder's name: the page, too, is the same bytes wherever it is built
        manifest=manifest,
        tokens=[(name, facts["tokens"]) for name, facts in sources.items()],
        dropped=[(step, sum(facts["dropped"].get(step, 0) for facts in sources.values())) for step in steps],
        lengths={name: _lengths(facts["length_histogram"]) for name, facts in sources.items()},
    )


def _lengths(histogram: list[int]) -> list[tuple[str, int]]:
    first = next((i for i, count in enumerate(histogram) if count), len(histogram))
    return [(f"{2**i:,} – {2 ** (i + 1) - 1:,}", histogram[i]) for i in range(first, len(histogram))]
