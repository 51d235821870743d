"""An evaluation as Markdown tables."""

from collections.abc import Sequence
from typing import Any

MODE_NAMES = {"answer_only": "answer only", "explained": "explained"}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; pipes in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def rate_text(rate: float | None) -> str:
    """A rate with three digits, or nothing."""
    return "" if rate is None else f"{rate:.3f}"


def interval_text(interval: dict[str, float] | None) -> str:
    """A signed difference with its interval, or nothing."""
    return "" if interval is None else f"{interval['estimate']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"


def passed_text(passed: bool | None) -> str:
    """The official decision; a dash when there is none."""
    return {True: "pass", False: "fail", None: "-"}[passed]


def summary_markdown(summary: dict[str, Any]) -> str:
    """report.md: headline, gap, years, requirements."""
    confidence = f"{summary['config']['confidence']:.0%}"
    lines = [f"# {summary['exam']}: {summary['model']}", "", f"{summary['questions']} questions.", ""]
    lines += markdown_table(
        ["mode", "accuracy", f"{confidence} interval", "points", "points rate", "text only", "malformed", "cut off"],
        [
            [
                MODE_NAMES[mode],
                rate_text(row["accuracy"]),
                "{low:.3f}-{high:.3f}".format(**row["accuracy_interval"]),
                f"{row['points']}/{row['possible']}",
                rate_text(row["points_rate"]),
                rate_text(row["text_only"]["accuracy"]),
                f"{row['malformed']} ({row['malformed_rate']:.1%})",
                str(row["truncated"]),
            ]
            for mode, row in summary["modes"].items()
        ],
    )
    lines += _gap_lines(summary, confidence)
    lines += _year_lines(summary)
    lines += _sample_lines(summary)
    if summary.get("requirements"):
        lines += ["", "## Requirements", ""]
        lines += markdown_table(
            ["requirement", "value", ""],
            [
                [row["expression"], f"{row['value']:.4f}", "met" if row["met"] else "NOT met"]
                for row in summary["requirements"]
            ],
        )
    return "\n".join(lines) + "\n"


def _gap_lines(summary: dict[str, Any], confidence: str) -> list[str]:
    if "gap" not in summary:
        return []
    gap = summary["gap"]
    return [
        "",
        f"Stability gap (explained minus answer only, {confidence} paired bootstrap over question groups): "
        f"**{interval_text(gap['accuracy'])}** accuracy, {interval_text(gap.get('points_rate'))} points rate. "
        f"Right to wrong {gap['right_to_wrong']}, wrong to right {gap['wrong_to_right']}, "
        f"McNemar p = {gap['mcnemar_p']:.3g}.",
    ]


def _year_lines(summary: dict[str, Any]) -> list[str]:
    rows = [
        [
            year,
            MODE_NAMES[mode],
            f"{row['points']}/{row['possible']}",
            f"{row['required']}/{row['required_possible']}",
            f"{row['rest']}/{row['rest_possible']}",
            str(row["prohibited"]),
            passed_text(row["passed"]),
        ]
        for mode, result in summary["modes"].items()
        for year, row in result["by_year"].items()
    ]
    if not rows:
        return []
    header = ["year", "mode", "points", "required", "rest", "prohibited", "official"]
    return ["", "## By year", "", *markdown_table(header, rows)]


def _sample_lines(summary: dict[str, Any]) -> list[str]:
    rows = [
        [
            MODE_NAMES[mode],
            f"{row['samples']['samples_per_question']:.0f}",
            rate_text(row["samples"]["mean_accuracy"]),
            rate_text(row["samples"]["majority_accuracy"]),
            rate_text(row["samples"]["consistency"]),
        ]
        for mode, row in summary["modes"].items()
        if "samples" in row
    ]
    if not rows:
        return []
    return ["", "## Samples", "", *markdown_table(["mode", "k", "mean", "maj@k", "agreement"], rows)]
