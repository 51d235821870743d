"""How numbers are written, in pages, in Markdown and at the terminal."""

from collections.abc import Mapping, Sequence


def rate(value: float | None) -> str:
    """Three digits, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """Three digits with a sign, or a dash."""
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def signed_interval(value: float | None, ci95: Sequence[float] | None) -> str:
    """An estimate with its interval, or a dash."""
    return "–" if value is None or ci95 is None else f"{signed(value)} [{signed(ci95[0])}, {signed(ci95[1])}]"


def difference(interval: Mapping[str, float] | None) -> str:
    """A signed difference with its interval, from `estimate`, `low` and `high`; or a dash."""
    return "–" if interval is None else signed_interval(interval["estimate"], (interval["low"], interval["high"]))


def count(value: float | None) -> str:
    """A whole number with separators, or a dash."""
    return "–" if value is None else f"{value:,.0f}"


def seconds_text(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def passed_text(passed: bool | None) -> str:
    """The official decision; a dash when there is none."""
    return {True: "pass", False: "fail", None: "–"}[passed]
