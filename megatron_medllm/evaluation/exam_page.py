"""report.html of one evaluation: one file without outside parts, for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_medllm.evaluation.markdown import MODE_NAMES
from megatron_medllm.evaluation.outcome import Outcome
from megatron_medllm.exams.statistics import wilson_interval
from megatron_medllm.pages.intervals import Dot, IntervalChart
from megatron_medllm.pages.page import rows_of, write_page

_LONGEST_OUTPUT = 1500


def write_exam_page(path: Path, summary: dict[str, Any], outcomes: Sequence[Outcome], *, examples: int) -> None:
    """Write the page of one evaluation; `examples` bounds the answers shown of each kind."""
    charts = [_years_chart(summary), _malformed_chart(summary), _category_chart(summary)]
    first = [outcome for outcome in outcomes if outcome.sample == 0]
    write_page(
        path,
        "megatron_medllm.evaluation",
        "exam.html.jinja",
        summary=summary,
        mode_names=MODE_NAMES,
        charts=[chart for chart in charts if chart is not None],
        flips=_flips(first, examples),
        malformed=[_shown(outcome) for outcome in first if outcome.parsed.malformed][:examples],
        provenance=rows_of(summary["provenance"]),
    )


def _years_chart(summary: dict[str, Any]) -> IntervalChart:
    confidence = summary["config"]["confidence"]
    years = list(dict.fromkeys(year for row in summary["modes"].values() for year in row["by_year"]))
    rows = []
    for year in [*years, "all"]:
        dots = []
        for mode, row in summary["modes"].items():
            part = row if year == "all" else row["by_year"].get(year)
            if part:
                interval = wilson_interval(part["correct"], part["n"], confidence=confidence)
                dots.append(Dot(MODE_NAMES[mode], interval.estimate, interval.low, interval.high))
        rows.append((year, dots))
    return IntervalChart("Accuracy by year", rows)


def _malformed_chart(summary: dict[str, Any]) -> IntervalChart:
    rows = []
    for mode, row in summary["modes"].items():
        interval = wilson_interval(row["malformed"], row["n"], confidence=summary["config"]["confidence"])
        rows.append((MODE_NAMES[mode], [Dot("malformed", interval.estimate, interval.low, interval.high)]))
    upper = max(dot.high for _, dots in rows for dot in dots)
    return IntervalChart("Malformed answers", rows, upper=1.0 if upper > 0.5 else 0.5 if upper > 0.1 else 0.1)


def _category_chart(summary: dict[str, Any]) -> IntervalChart | None:
    if "gap" not in summary:
        return None
    rows = [
        (f"{category} ({row['n']})", [Dot("gap", row["estimate"], row["low"], row["high"])])
        for category, row in sorted(summary["gap"]["by_category"].items(), key=lambda item: -item[1]["n"])
    ]
    if not rows:
        return None
    widest = max(max(abs(dot.low), abs(dot.high)) for _, dots in rows for dot in dots)
    reach = next((scale for scale in (0.1, 0.2, 0.4) if widest <= scale), 0.6)  # a tiny category may reach further
    title = "Gap (explained minus answer only) by category"
    return IntervalChart(title, rows, lower=-reach, upper=reach, signed=True)


def _flips(outcomes: Sequence[Outcome], examples: int) -> dict[str, list[dict[str, Any]]]:
    """Questions whose answer changed side, the two outputs beside each other."""
    answered = {o.question.problem_id: o for o in outcomes if o.mode == "answer_only"}
    found: dict[str, list[dict[str, Any]]] = {"Right, then wrong when explaining": [], "Wrong, then right": []}
    lost, won = found.values()
    for explained in (o for o in outcomes if o.mode == "explained"):
        short = answered.get(explained.question.problem_id)
        if short is None or short.score.correct == explained.score.correct:
            continue
        target = lost if short.score.correct else won
        if len(target) < examples:
            target.append({"short": _shown(short), "explained": _shown(explained)})
    return found


def _shown(outcome: Outcome) -> dict[str, Any]:
    question = outcome.question
    output = outcome.completion.text
    return {
        "problem_id": question.problem_id,
        "question": question.problem_text,
        "choices": [
            {"label": label, "text": text, "right": any(label in item for item in question.accepted)}
            for label, text in zip(question.labels, question.choices, strict=False)
        ],
        "gold": " / ".join(",".join(item) for item in question.accepted),
        "mode": MODE_NAMES[outcome.mode],
        "correct": outcome.score.correct,
        "parsed": ",".join(outcome.parsed.answer) if outcome.parsed.answer is not None else outcome.parsed.reason,
        "output": output if len(output) <= _LONGEST_OUTPUT else output[:_LONGEST_OUTPUT] + " …",
    }
