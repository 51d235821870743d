"""`medllm eval compare A B …`: finished evaluations beside each other, and beside the published rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_medllm.errors import UserError
from megatron_medllm.exams.loading import load_rules
from megatron_medllm.exams.statistics import paired_difference
from megatron_medllm.pages.markdown import markdown_table
from megatron_medllm.pages.numbers import difference as difference_text
from megatron_medllm.pages.numbers import rate
from megatron_medllm.storage import read_json, read_jsonl


def compare_evaluations(
    directories: Sequence[Path], *, published: bool = True, resamples: int = 10_000, confidence: float = 0.95
) -> dict[str, Any]:
    """Compare the evaluations in `directories` (each written by `run_exam`).

    Returns:
        `rows` (a model and mode each), `published` (rows of the literature, only for the exam they belong to) and
        `differences` (each later model minus the first, per mode, on the questions that both answered).

    Raises:
        UserError: a directory holds no finished evaluation, or the exams differ.
    """
    summaries = [_read_summary(directory) for directory in directories]
    exams = {summary["exam"] for summary in summaries}
    if len(exams) > 1:
        raise UserError(f"different exams cannot be compared: {', '.join(sorted(exams))}")
    rows = [
        {"name": directory.name, "mode": mode, "gap": summary.get("gap", {}).get("accuracy"), **_mode_row(result)}
        for directory, summary in zip(directories, summaries, strict=True)
        for mode, result in summary["modes"].items()
    ]
    results = [_correct_by_question(directory) for directory in directories]
    differences = [
        {"first": directories[0].name, "second": directory.name, "mode": mode, **difference}
        for directory, other in zip(directories[1:], results[1:], strict=True)
        for mode, difference in _differences(results[0], other, resamples=resamples, confidence=confidence).items()
    ]
    exam = exams.pop()
    return {
        "exam": exam,
        "rows": rows,
        "published": published_rows(exam) if published else [],
        "differences": differences,
    }


def compare_markdown(comparison: dict[str, Any]) -> str:
    """The comparison as Markdown tables."""
    years = sorted({year for row in [*comparison["rows"], *comparison["published"]] for year in row["points_by_year"]})
    header = ["model", "mode", *years, "points", "points rate", "accuracy", "malformed", "gap"]
    body = [
        [
            row["name"],
            row["mode"],
            *(str(row["points_by_year"].get(year, "")) for year in years),
            f"{row['points']}/{row['possible']}",
            rate(row["points_rate"]),
            rate(row["accuracy"]),
            rate(row["malformed_rate"]),
            difference_text(row["gap"]),
        ]
        for row in [*comparison["rows"], *comparison["published"]]
    ]
    lines = [f"# {comparison['exam']}: models compared", "", *markdown_table(header, body)]
    if comparison["published"]:
        lines += ["", "Published: points by the authors' own prompts and settings, not measured here."]
    if comparison["differences"]:
        header = ["minus the first", "mode", "questions", "difference", "lost", "won", "McNemar p"]
        body = [
            [
                f"{row['second']} - {row['first']}",
                row["mode"],
                str(row["n"]),
                difference_text(row["accuracy"]),
                str(row["lost"]),
                str(row["won"]),
                f"{row['mcnemar_p']:.3g}",
            ]
            for row in comparison["differences"]
        ]
        lines += ["", "## Differences in accuracy", "", *markdown_table(header, body)]
    return "\n".join(lines) + "\n"


def _read_summary(directory: Path) -> dict[str, Any]:
    if not (directory / "summary.json").is_file():
        raise UserError(f"{directory}: holds no summary.json; run `medllm eval` there first")
    summary: dict[str, Any] = read_json(directory / "summary.json")
    return summary


def _mode_row(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "points_by_year": {year: row["points"] for year, row in result["by_year"].items()},
        **{key: result[key] for key in ("points", "possible", "points_rate", "accuracy", "malformed_rate")},
    }


def published_rows(exam: str) -> list[dict[str, Any]]:
    """What the literature reports for the exam, a row a model; none for an exam without such figures."""
    published = load_rules(exam).get("published")
    if not published:
        return []
    possible = sum(published["possible"].values())
    return [
        {
            "name": f"{name} (published)",
            "mode": "published",
            "points_by_year": points,
            "points": sum(points.values()),
            "possible": possible,
            "points_rate": sum(points.values()) / possible,
            "accuracy": None,
            "malformed_rate": None,
            "gap": None,
        }
        for name, points in published["points"].items()
    ]


def _correct_by_question(directory: Path) -> dict[str, dict[str, tuple[bool, str]]]:
    """mode → problem_id → (correct, group), of the first sample."""
    found: dict[str, dict[str, tuple[bool, str]]] = {}
    for row in read_jsonl(directory / "results.jsonl"):
        if row["sample"] == 0:
            found.setdefault(row["mode"], {})[row["problem_id"]] = (row["correct"], row["group"])
    return found


def _differences(
    first: dict[str, dict[str, tuple[bool, str]]],
    second: dict[str, dict[str, tuple[bool, str]]],
    *,
    resamples: int,
    confidence: float,
) -> dict[str, dict[str, Any]]:
    result = {}
    for mode in first:
        common = [problem_id for problem_id in first[mode] if problem_id in second.get(mode, {})]
        if not common:
            continue
        found = paired_difference(
            [first[mode][problem_id][0] for problem_id in common],
            [second[mode][problem_id][0] for problem_id in common],
            groups=[first[mode][problem_id][1] for problem_id in common],
            resamples=resamples,
            confidence=confidence,
        )
        result[mode] = {
            "n": found.n,
            "accuracy": found.interval.to_dict(),
            "lost": found.lost,
            "won": found.won,
            "mcnemar_p": found.mcnemar_p,
        }
    return result
