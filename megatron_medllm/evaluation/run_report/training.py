"""What metrics.jsonl of a run's trainings tells: facts of each, and curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megatron_medllm.evaluation.run_report.words import model_label, preference_round
from megatron_medllm.pages.curves import PALETTE, Chart, Line, smoothing_window
from megatron_medllm.storage import read_jsonl

_PER_TOKEN = {
    "": (("chosen", PALETTE["blue"]), ("rejected", PALETTE["orange"])),
    "validation_": (("chosen", PALETTE["green"]), ("rejected", PALETTE["grey"])),
}
_CONTROL_COLOURS = {"rpo-sft": PALETTE["green"], "rpo-dpo": PALETTE["grey"]}


def read_trainings(run_dir: Path, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The metrics of those trainings of `names` that logged any step.

    Raises:
        UserError: a line is not JSON (names file and line).
    """
    found = {
        name: list(read_jsonl(run_dir / name / "metrics.jsonl"))
        for name in names
        if (run_dir / name / "metrics.jsonl").is_file()
    }
    return {name: rows for name, rows in found.items() if curve(rows, "loss")}


def curve(rows: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that hold a finite `metric` (what was not finite is logged as null)."""
    return [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]


def training_facts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """steps, tokens, first_loss and last_loss (means over the first and last 5 % of the logged steps, at least one),
    first_validation_loss (before the first step, where that was measured), validation_loss (last), best_validation and
    its best_step by loss, tokens_per_s (median), peak_lr, skipped_steps."""
    losses = [value for _, value in curve(rows, "loss")]
    end = max(1, len(losses) // 20)
    validation = curve(rows, "validation_loss")
    best = min(((value, step) for step, value in validation if step), default=(None, None))
    speed = [value for _, value in curve(rows, "tokens_per_s")]
    return {
        "steps": max(row["step"] for row in rows),
        "tokens": round(sum(value for _, value in curve(rows, "tokens"))),
        "first_loss": sum(losses[:end]) / end,
        "last_loss": sum(losses[-end:]) / end,
        "first_validation_loss": validation[0][1] if validation and validation[0][0] == 0 else None,
        "validation_loss": validation[-1][1] if validation else None,
        "best_validation_loss": best[0],
        "best_validation_step": best[1],
        "tokens_per_s": median(speed) if speed else None,
        "peak_lr": max((value for _, value in curve(rows, "lr")), default=None),
        "skipped_steps": sum(value for _, value in curve(rows, "skipped")),
    }


def training_charts(trainings: Mapping[str, list[dict[str, Any]]]) -> list[Chart]:
    """Loss of every training but the controls, then margins and log-probabilities of preference training."""
    charts = [_language_loss(name, rows) for name, rows in trainings.items() if not curve(rows, "margin")]
    for name, rows in trainings.items():
        if preference_round(name) and curve(rows, "margin"):
            charts += _preference_charts(name, rows, trainings)
    return [chart for chart in charts if chart is not None]


def _language_loss(name: str, rows: list[dict[str, Any]]) -> Chart:
    points = curve(rows, "loss")
    lines = [Line("training", PALETTE["blue"], points)]
    validation = curve(rows, "validation_loss")
    if validation:
        lines.append(Line("validation", PALETTE["orange"], validation, dots=True))
    return Chart(f"{model_label(name, ())}: loss", f"Nats per counted token. {_faint(points)}", lines)


def _preference_charts(
    name: str, rows: list[dict[str, Any]], trainings: Mapping[str, list[dict[str, Any]]]
) -> list[Chart]:
    label, blue, orange = model_label(name, trainings), PALETTE["blue"], PALETTE["orange"]
    faint = _faint(curve(rows, "loss"))
    loss = [
        Line("total", blue, curve(rows, "loss")),
        Line("total, validation", PALETTE["grey"], curve(rows, "validation_loss"), dots=True),
        Line("preference term", orange, curve(rows, "preference_loss")),
        Line("NLL of the chosen answer, per token", PALETTE["green"], curve(rows, "nll")),
    ]
    margin = [
        Line(label, blue, _reward_margin(rows)),
        Line("validation", orange, _reward_margin(rows, "validation_"), dots=True),
    ]
    if "rpo-dpo" in trainings:
        margin.append(_control_line("rpo-dpo", _reward_margin(trainings["rpo-dpo"])))
    logprobs = [
        Line("chosen", blue, curve(rows, "chosen_logprob")),
        Line("rejected", orange, curve(rows, "rejected_logprob")),
        Line("reference, chosen", blue, curve(rows, "reference_chosen_logprob"), dashed=True),
        Line("reference, rejected", orange, curve(rows, "reference_rejected_logprob"), dashed=True),
    ]
    charts = [
        Chart(f"{label}: loss", f"Preference term plus α × NLL, per pair. {faint}", loss),
        Chart(
            f"{label}: reward margin",
            "β × (chosen minus rejected log-ratio to the reference). It starts at 0: the policy is the reference.",
            margin,
        ),
        Chart(
            f"{label}: log-probabilities of the answers",
            "Policy, summed over an answer's tokens, mean of the step's pairs; dashed: the reference on them.",
            logprobs,
        ),
        Chart(
            f"{label}: pairs ranked right",
            "Share of the step's pairs whose margin is above 0. At the first step all margins are 0 but for rounding.",
            [
                Line(label, blue, curve(rows, "accuracy")),
                Line("validation", orange, _after_start(curve(rows, "validation_accuracy")), dots=True),
            ],
        ),
    ]
    if curve(rows, "validation_loss"):
        charts.append(_per_token_chart(label, rows))
    controls = [control for control in _CONTROL_COLOURS if control in trainings]
    if controls:
        lines = [Line(label, blue, curve(rows, "chosen_logprob"))]
        lines += [_control_line(control, curve(trainings[control], "chosen_logprob")) for control in controls]
        note = "Policy, on the same pairs in the same order. Without the NLL, preference training may push it down."
        charts.append(Chart("Log-probability of the chosen answers, against the controls", note, lines))
    return [_with_points(chart) for chart in charts]


def _per_token_chart(label: str, rows: list[dict[str, Any]]) -> Chart:
    lines = [
        Line(f"{answer}{suffix}", colour, curve(rows, f"{prefix}{answer}_logprob_per_token"), dots=bool(prefix))
        for prefix, suffix in (("", ""), ("validation_", ", validation"))
        for answer, colour in _PER_TOKEN[prefix]
    ]
    note = "Policy, mean over an answer's tokens, then over pairs: the step's, and those of held-out questions."
    return Chart(f"{label}: log-probability per token", note, lines)


def _after_start(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Without step 0, where policy and reference are one and which answer is ahead is rounding."""
    return [(step, value) for step, value in points if step]


def _control_line(name: str, points: list[tuple[float, float]]) -> Line:
    return Line(model_label(name, ()), _CONTROL_COLOURS[name], points)


def _with_points(chart: Chart) -> Chart:
    """Without the lines that nothing was logged for (SimPO has no reference)."""
    return Chart(chart.title, chart.note, [line for line in chart.lines if line.points])


def _reward_margin(rows: Sequence[Mapping[str, Any]], prefix: str = "") -> list[tuple[float, float]]:
    rejected = dict(curve(rows, f"{prefix}rejected_reward"))
    return [(step, value - rejected[step]) for step, value in curve(rows, f"{prefix}chosen_reward") if step in rejected]


def _faint(points: Sequence[tuple[float, float]]) -> str:
    window = smoothing_window(len(points))
    return f"Faint: every step; strong: mean over {window} steps." if window > 1 else "Every step."
