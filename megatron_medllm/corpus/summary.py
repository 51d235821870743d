"""One self-contained HTML page about a built corpus."""

from pathlib import Path


def write_summary(path: Path, manifest: dict) -> None:
    """Write the page."""
