"""Dot-and-interval charts as SVG text, drawn by the reader's browser in the reader's (Japanese) fonts."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#1f6feb", "#d1570a", "#5b8c3e")
_LABEL_WIDTH, _PLOT_WIDTH, _ROW_HEIGHT, _TOP = 150, 430, 26, 30


@dataclass(frozen=True, slots=True)
class Dot:
    """A value with its interval; `series` picks the colour."""

    series: str
    value: float
    low: float
    high: float


def interval_chart(
    rows: Sequence[tuple[str, Sequence[Dot]]], *, lower: float, upper: float, signed: bool = False
) -> str:
    """One line a row: label, then a dot with its interval for each series, on a common scale.

    Args:
        rows: label and dots.
        lower, upper: ends of the scale; values outside are drawn at its ends.
        signed: write the scale with signs and mark zero.
    """
    series = list(dict.fromkeys(dot.series for _, dots in rows for dot in dots))
    height = _TOP + _ROW_HEIGHT * len(rows) + 28

    def x(value: float) -> float:
        share = (min(max(value, lower), upper) - lower) / (upper - lower)
        return _LABEL_WIDTH + share * _PLOT_WIDTH

    parts = [
        f'<svg viewBox="0 0 {_LABEL_WIDTH + _PLOT_WIDTH + 60} {height}" width="{_LABEL_WIDTH + _PLOT_WIDTH + 60}" '
        'role="img" font-size="12" font-family="system-ui, sans-serif">'
    ]
    for index, name in enumerate(series):
        left = _LABEL_WIDTH + 130 * index
        parts.append(f'<circle cx="{left}" cy="12" r="5" fill="{COLOURS[index % len(COLOURS)]}"/>')
        parts.append(f'<text x="{left + 10}" y="16">{escape(name)}</text>')
    steps = 4 if signed else 5  # with 4, zero stands on a line
    for step in range(steps + 1):
        value = lower + (upper - lower) * step / steps
        bottom = _TOP + _ROW_HEIGHT * len(rows)
        parts.append(f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{_TOP}" y2="{bottom}" stroke="#ddd"/>')
        text = f"{value:+.2f}" if signed else f"{value:.2f}"
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 18}" text-anchor="middle" fill="#666">{text}</text>')
    if signed and lower < 0 < upper:
        bottom = _TOP + _ROW_HEIGHT * len(rows)
        parts.append(f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{_TOP}" y2="{bottom}" stroke="#888"/>')
    for number, (label, dots) in enumerate(rows):
        middle = _TOP + _ROW_HEIGHT * (number + 0.5)
        parts.append(f'<text x="{_LABEL_WIDTH - 10}" y="{middle + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        for position, dot in enumerate(dots):
            y = middle + 7 * (position - (len(dots) - 1) / 2)
            colour = COLOURS[series.index(dot.series) % len(COLOURS)]
            parts.append(
                f'<line x1="{x(dot.low):.1f}" x2="{x(dot.high):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
                f'stroke="{colour}" stroke-width="2"/>'
                f'<circle cx="{x(dot.value):.1f}" cy="{y:.1f}" r="4" fill="{colour}">'
                f"<title>{escape(label)} {escape(dot.series)}: {dot.value:.3f} [{dot.low:.3f}, {dot.high:.3f}]</title>"
                "</circle>"
            )
    return "".join(parts) + "</svg>"
