"""An evaluation as Markdown tables."""

from typing import Any

from megatron_medllm.pages.markdown import markdown_table
from megatron_medllm.pages.numbers import difference, passed_text, rate

MODE_NAMES = {"answer_only": "answer only", "explained": "explained"}


def summary_markdown(summary: dict[str, Any]) -> str:
    """report.md: headline, gap, years, requirements."""
    confidence = f"{summary['config']['confidence']:.0%}"
    lines = [f"# {summary['exam']}: {summary['model']}", "", f"{summary['questions']} questions.", ""]
    lines += markdown_table(
        ["mode", "accuracy", f"{confidence} interval", "points", "points rate", "text only", "malformed", "cut off"],
        [
            [
                MODE_NAMES[mode],
                rate(row["accuracy"]),
                "{low:.3f}-{high:.3f}".format(**row["accuracy_interval"]),
                f"{row['points']}/{row['possible']}",
                rate(row["points_rate"]),
                rate(row["text_only"]["accuracy"]),
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
        f"**{difference(gap['accuracy'])}** accuracy, {difference(gap.get('points_rate'))} points rate. "
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
            rate(row["samples"]["mean_accuracy"]),
            rate(row["samples"]["majority_accuracy"]),
            rate(row["samples"]["consistency"]),
        ]
        for mode, row in summary["modes"].items()
        if "samples" in row
    ]
    if not rows:
        return []
    return ["", "## Samples", "", *markdown_table(["mode", "k", "mean", "maj@k", "agreement"], rows)]
