"""Curves of a training run as SVG text: drawn by the reader's browser, in the page's own fonts and colours."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 520, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 10, 38
_MOST_POINTS = 300
Place = Callable[[float, float], tuple[float, float]]  # step and value to pixels
# Named in base.html.jinja, for light and dark pages.
PALETTE = {name: f"var(--{name})" for name in ("blue", "orange", "green", "grey")}


@dataclass(frozen=True, slots=True)
class Line:
    """One series over steps. `dots` marks single measurements instead of a curve; `dashed` a reference."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A titled picture; `note` says how to read it."""

    title: str
    note: str
    lines: Sequence[Line]

    @property
    def svg(self) -> str:
        """The picture."""
        return line_chart(self.lines, label=self.title)


def line_chart(lines: Sequence[Line], *, label: str) -> str:
    """Curves over steps: each step faint, their moving mean strong.

    Args:
        lines: at least one of them with points.
        label: what the picture is called to those who cannot see it.
    """
    x_low, x_high = _range([x for line in lines for x, _ in line.points])
    y_low, y_high = _padded(*_range([y for line in lines for _, y in line.points]))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}" class="curve">']
    for tick in ticks(y_low, y_high):
        _, y = place(x_low, tick)
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in ticks(x_low, x_high):
        x, _ = place(tick, y_low)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{_number(tick)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 5}" text-anchor="middle" class="axis">step</text>')
    for line in lines:
        parts += _drawn(line, place)
    return "".join(parts) + "</svg>"


def _drawn(line: Line, place: Place) -> list[str]:
    if line.dots:
        spots = [place(x, y) for x, y in line.points]
        return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{line.colour}" class="dot"/>' for x, y in spots]
    parts = []
    window = smoothing_window(len(line.points))
    if window > 1 and not line.dashed:
        parts.append(_path(thinned(line.points), place, f'stroke="{line.colour}" class="faint"'))
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    parts.append(_path(thinned(smoothed(line.points, window)), place, f'stroke="{line.colour}" class="line"{dash}'))
    return parts


def _path(points: Sequence[tuple[float, float]], place: Place, style: str) -> str:
    route = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
    return f'<polyline points="{route}" fill="none" {style}/>'


def smoothing_window(count: int) -> int:
    """Over how many steps a curve of `count` points is averaged: odd, about a 25th of them."""
    return 1 if count < 25 else count // 25 // 2 * 2 + 1


def smoothed(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Centred moving mean over `window` (odd) points, fewer at the ends."""
    half = window // 2
    result = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        near = [y for _, y in points[i - reach : i + reach + 1]]
        result.append((x, sum(near) / len(near)))
    return result


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MOST_POINTS` points: means of equal runs of steps, so that long trainings stay small files."""
    size = math.ceil(len(points) / _MOST_POINTS)
    if size <= 1:
        return list(points)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`, about five."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:,.10g}".replace("-", "−")


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.04 * (high - low)
    return low - margin, high + margin
