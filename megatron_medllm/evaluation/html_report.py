"""report.html: one file without outside parts, for people."""

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_medllm.evaluation.charts import Dot, interval_chart
from megatron_medllm.evaluation.markdown import MODE_NAMES, interval_text, passed_text, rate_text
from megatron_medllm.evaluation.outcome import Outcome
from megatron_medllm.exams.statistics import wilson_interval

_LONGEST_OUTPUT = 1500


def html_report(summary: dict[str, Any], outcomes: Sequence[Outcome], *, examples: int) -> str:
    """The report of one evaluation; `examples` bounds the answers shown of each kind."""
    environment = Environment(
        loader=PackageLoader("megatron_medllm.evaluation", "."),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"rate": rate_text, "interval": interval_text, "passed": passed_text}
    charts = {"Accuracy by year": _years_chart(summary), "Malformed answers": _malformed_chart(summary)}
    if "gap" in summary:
        charts["Gap (explained minus answer only) by category"] = _category_chart(summary)
    first = [outcome for outcome in outcomes if outcome.sample == 0]
    return environment.get_template("report.html.jinja").render(
        summary=summary,
        mode_names=MODE_NAMES,
        charts={title: Markup(chart) for title, chart in charts.items() if chart},
        flips=_flips(first, examples),
        malformed=[_shown(outcome) for outcome in first if outcome.parsed.malformed][:examples],
    )


def _years_chart(summary: dict[str, Any]) -> str:
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
    return interval_chart(rows, lower=0.0, upper=1.0)


def _malformed_chart(summary: dict[str, Any]) -> str:
    rows = []
    for mode, row in summary["modes"].items():
        interval = wilson_interval(row["malformed"], row["n"], confidence=summary["config"]["confidence"])
        rows.append((MODE_NAMES[mode], [Dot("malformed", interval.estimate, interval.low, interval.high)]))
    upper = max(dot.high for _, dots in rows for dot in dots)
    return interval_chart(rows, lower=0.0, upper=1.0 if upper > 0.5 else 0.5 if upper > 0.1 else 0.1)


def _category_chart(summary: dict[str, Any]) -> str:
    rows = [
        (f"{category} ({row['n']})", [Dot("gap", row["estimate"], row["low"], row["high"])])
        for category, row in sorted(summary["gap"]["by_category"].items(), key=lambda item: -item[1]["n"])
    ]
    if not rows:
        return ""
    widest = max(max(abs(dot.low), abs(dot.high)) for _, dots in rows for dot in dots)
    reach = next((scale for scale in (0.1, 0.2, 0.4) if widest <= scale), 0.6)  # a tiny category may reach further
    return interval_chart(rows, lower=-reach, upper=reach, signed=True)


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
        "choices": list(zip(question.labels, question.choices, strict=False)),
        "gold": " / ".join(",".join(item) for item in question.accepted),
        "mode": MODE_NAMES[outcome.mode],
        "parsed": ",".join(outcome.parsed.answer) if outcome.parsed.answer is not None else outcome.parsed.reason,
        "output": output if len(output) <= _LONGEST_OUTPUT else output[:_LONGEST_OUTPUT] + " …",
    }
