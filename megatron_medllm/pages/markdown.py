"""Markdown tables."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; pipes and line ends in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return ["|" + "|".join(_cell(cell) for cell in line) + "|" for line in lines]


def _cell(text: str) -> str:
    return f" {' '.join(text.splitlines())} ".replace("|", "\\|") if text else " "
