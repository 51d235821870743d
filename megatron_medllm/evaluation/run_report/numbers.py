"""The paper's table for one run: accuracy with and without explaining, the gap, and whether the effect shows.

Everything is computed from the answers themselves (results.jsonl), first samples only, so that two models can be
compared question by question. Intervals are at 95 % and cover the choice of questions, not the seed of the training.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_medllm.exams.question import Question
from megatron_medllm.exams.statistics import (
    Interval,
    PairedDifference,
    paired_bootstrap,
    paired_difference,
    wilson_interval,
)
from megatron_medllm.storage import read_json, read_jsonl

CONFIDENCE = 0.95
_SPLIT_RESAMPLES = 2000


@dataclass(frozen=True)
class Examined:
    """One model's finished evaluation: eval's summary, and the rows of results.jsonl by mode and problem_id."""

    name: str
    summary: dict[str, Any]
    rows: dict[str, dict[str, dict[str, Any]]]

    @property
    def bootstrap(self) -> dict[str, int]:
        """The evaluation's own resampling, so that its report and this one print the same intervals."""
        config = self.summary["config"]
        return {"resamples": config["resamples"], "seed": config["decoding"]["seed"]}


def read_examined(directory: Path) -> Examined:
    """Read what `run_exam` left in `directory`.

    Raises:
        UserError: a file is missing or broken.
    """
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in read_jsonl(directory / "results.jsonl"):
        if row["sample"] == 0:
            rows.setdefault(row["mode"], {})[row["problem_id"]] = row
    return Examined(directory.name, read_json(directory / "summary.json"), rows)


def score_model(
    examined: Examined, *, only: Collection[str] | None = None, resamples: int | None = None
) -> dict[str, Any]:
    """Accuracy in each mode and the gap (explained minus answer only), on all questions or on those of `only`.

    Returns:
        `answer_only` and `explained` (accuracy, ci95, n, correct, malformed; None for a mode that was not run),
        `gap`, `gap_ci95` (paired bootstrap over question groups), `right_to_wrong`, `wrong_to_right`, `mcnemar_p`.
    """
    by_mode = {
        mode: [row for problem_id, row in examined.rows.get(mode, {}).items() if only is None or problem_id in only]
        for mode in ("answer_only", "explained")
    }
    numbers: dict[str, Any] = {mode: _mode_numbers(rows) if rows else None for mode, rows in by_mode.items()}
    numbers |= dict.fromkeys(("gap", "gap_ci95", "right_to_wrong", "wrong_to_right", "mcnemar_p"))
    pairs = _paired(by_mode["answer_only"], by_mode["explained"])
    if pairs:
        options = examined.bootstrap | ({"resamples": resamples} if resamples else {})
        found = _difference(pairs, options)
        numbers |= {"gap": found.interval.estimate, "gap_ci95": [found.interval.low, found.interval.high]}
        numbers |= {"right_to_wrong": found.lost, "wrong_to_right": found.won, "mcnemar_p": found.mcnemar_p}
    return numbers


def _mode_numbers(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    correct, possible = sum(row["correct"] for row in rows), sum(row["possible"] for row in rows)
    interval = wilson_interval(correct, len(rows), confidence=CONFIDENCE)
    return {
        "accuracy": correct / len(rows),
        "ci95": [interval.low, interval.high],
        "n": len(rows),
        "correct": correct,
        "malformed": sum(row["parsed"] is None for row in rows),
        "points_rate": sum(row["points"] for row in rows) / possible if possible else None,
    }


def _paired(
    first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    known = {row["problem_id"]: row for row in first}
    return [(known[row["problem_id"]], row) for row in second if row["problem_id"] in known]


def _difference(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], options: Mapping[str, int]) -> PairedDifference:
    return paired_difference(
        [first["correct"] for first, _ in pairs],
        [second["correct"] for _, second in pairs],
        groups=[second["group"] for _, second in pairs],
        confidence=CONFIDENCE,
        resamples=options["resamples"],
        seed=options["seed"],
    )


def _interval(found: Interval) -> dict[str, Any]:
    return {"estimate": found.estimate, "ci95": [found.low, found.high]}


def compare_models(first: Examined, second: Examined) -> dict[str, Any]:
    """`second` minus `first` on the questions that both answered: answer_only, explained, and the change of the gap.

    Each is an estimate with ci95, or None where a mode is missing. A gap that closes counts upwards.
    """
    result: dict[str, Any] = {"first": first.name, "second": second.name}
    for mode in ("answer_only", "explained"):
        pairs = _paired(list(first.rows.get(mode, {}).values()), list(second.rows.get(mode, {}).values()))
        result[mode] = _interval(_difference(pairs, second.bootstrap).interval) if pairs else None
    before, after = _gap_by_question(first), _gap_by_question(second)
    common = [problem_id for problem_id in after if problem_id in before]
    result["gap"] = None
    if common:
        found = paired_bootstrap(
            [before[problem_id] for problem_id in common],
            [after[problem_id] for problem_id in common],
            groups=[second.rows["explained"][problem_id]["group"] for problem_id in common],
            confidence=CONFIDENCE,
            resamples=second.bootstrap["resamples"],
            seed=second.bootstrap["seed"],
        )
        result["gap"] = _interval(found)
    return result


def _gap_by_question(examined: Examined) -> dict[str, float]:
    answered = examined.rows.get("answer_only", {})
    return {
        problem_id: float(row["correct"]) - float(answered[problem_id]["correct"])
        for problem_id, row in examined.rows.get("explained", {}).items()
        if problem_id in answered
    }


def split_scores(examined: Examined, metadata: Sequence[dict[str, Any]], field: str) -> dict[str, Any]:
    """`score_model` on the questions whose metadata say yes to `field`, and on those that say no."""
    result = {}
    for value, name in ((True, "yes"), (False, "no")):
        only = {row["problem_id"] for row in metadata if row.get(field) is value}
        if any(only & rows.keys() for rows in examined.rows.values()):
            result[name] = score_model(examined, only=only, resamples=_SPLIT_RESAMPLES)
    return result


def chance_accuracy(questions: Sequence[Question], *, count_revealed: bool) -> float:
    """What blind guessing among the choices would score.

    The guesser knows how many choices to name where the prompt tells (`count_revealed`), else it names one to all
    of them, each set alike. A number cannot be guessed.
    """
    return math.fsum(_guessed(question, count_revealed=count_revealed) for question in questions) / len(questions)


def _guessed(question: Question, *, count_revealed: bool) -> float:
    if question.everyone_credited:
        return 1.0
    if question.kind == "numeric":
        return 0.0
    n = len(question.labels)
    return len(question.accepted) / (math.comb(n, question.n_answers) if count_revealed else 2**n - 1)


def is_chance(mode_numbers: dict[str, Any] | None, chance: float | None) -> bool:
    """Whether the interval does not lie above blind guessing."""
    return mode_numbers is not None and chance is not None and mode_numbers["ci95"][0] <= chance
