"""Values with their intervals as SVG text, drawn by the reader's browser in the page's fonts and colours."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megatron_medllm.pages.curves import PALETTE

COLOURS = (PALETTE["blue"], PALETTE["orange"], PALETTE["green"])
_WIDTH, _LEFT, _RIGHT, _TOP = 900, 250, 24, 8
_DOT_DISTANCE = 14


@dataclass(frozen=True, slots=True)
class Dot:
    """A value with its interval; `series` picks the colour."""

    series: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class IntervalChart:
    """A titled picture of rows of dots on a common scale.

    `rows` are labels and dots; values outside `lower`..`upper` are drawn at the scale's ends. `signed` writes the scale
    with signs and marks zero. `chance` is marked by a dotted line.
    """

    title: str
    rows: Sequence[tuple[str, Sequence[Dot]]]
    lower: float = 0.0
    upper: float = 1.0
    signed: bool = False
    chance: float | None = None

    @property
    def series(self) -> list[tuple[str, str]]:
        """Name and colour of each series, for a legend."""
        names = dict.fromkeys(dot.series for _, dots in self.rows for dot in dots)
        return [(name, COLOURS[index % len(COLOURS)]) for index, name in enumerate(names)]

    @property
    def svg(self) -> str:
        """The picture."""
        heights = [14 + _DOT_DISTANCE * max(1, len(dots)) for _, dots in self.rows]
        bottom = _TOP + sum(heights)
        parts = [
            f'<svg viewBox="0 0 {_WIDTH} {bottom + 24}" role="img" aria-label="{escape(self.title)}" class="curve">',
            *self._scale(bottom),
        ]
        top = _TOP
        for (label, dots), height in zip(self.rows, heights, strict=True):
            parts += self._row(label, dots, middle=top + height / 2)
            top += height
        return "".join(parts) + "</svg>"

    def _x(self, value: float) -> float:
        share = (min(max(value, self.lower), self.upper) - self.lower) / (self.upper - self.lower)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def _scale(self, bottom: float) -> list[str]:
        parts = []
        steps = 4 if self.signed else 5  # with 4, zero stands on a line
        for step in range(steps + 1):
            value = self.lower + (self.upper - self.lower) * step / steps
            at = f"{self._x(value):.1f}"
            kind = "zero" if self.signed and abs(value) < 1e-12 else "grid"
            text = (f"{value:+.2f}" if self.signed else f"{value:.2f}").replace("-", "−")
            parts.append(f'<line class="{kind}" x1="{at}" x2="{at}" y1="{_TOP}" y2="{bottom}"/>')
            parts.append(f'<text x="{at}" y="{bottom + 17}" text-anchor="middle">{text}</text>')
        if self.chance is not None:
            at = f"{self._x(self.chance):.1f}"
            parts.append(f'<line class="chance" x1="{at}" x2="{at}" y1="{_TOP}" y2="{bottom}"/>')
        return parts

    def _row(self, label: str, dots: Sequence[Dot], *, middle: float) -> list[str]:
        colours = dict(self.series)
        parts = [f'<text x="0" y="{middle + 4:.1f}" class="label">{escape(label)}</text>']
        for position, dot in enumerate(dots):
            y = middle + _DOT_DISTANCE * (position - (len(dots) - 1) / 2)
            colour = colours[dot.series]
            parts.append(
                f'<line class="interval" x1="{self._x(dot.low):.1f}" x2="{self._x(dot.high):.1f}" y1="{y:.1f}" '
                f'y2="{y:.1f}" stroke="{colour}"/>'
                f'<circle cx="{self._x(dot.value):.1f}" cy="{y:.1f}" r="5.5" fill="{colour}">'
                f"<title>{escape(label)} {escape(dot.series)}: {dot.value:.3f} [{dot.low:.3f}, {dot.high:.3f}]</title>"
                "</circle>"
            )
        return parts
