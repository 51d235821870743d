"""`medllm eval score`: score predictions made elsewhere, in the IgakuQA repository's own format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_medllm.account import Account
from megatron_medllm.errors import UserError
from megatron_medllm.exams.loading import load_exam
from megatron_medllm.exams.parsing import Parser, parse_answer
from megatron_medllm.exams.question import Question
from megatron_medllm.exams.rows import read_rows
from megatron_medllm.exams.scoring import Score, score_answer, score_report
from megatron_medllm.pages.markdown import markdown_table
from megatron_medllm.pages.numbers import passed_text, rate


def score_predictions(
    exam_name: str,
    data: Sequence[Path],
    predictions: Sequence[Path],
    *,
    text_only: bool = False,
    parser: Parser = "strict",
) -> dict[str, Any]:
    """Score JSON-lines files of `problem_id` and `prediction` (such as `a,c`).

    Returns:
        n, correct, points, possible, accuracy, points_rate, malformed, missing (questions of the covered years without
        a prediction: they are in no other count), and by_year, by_section, by_category. A year is `passed` or not only
        when all of its questions have a prediction.

    Raises:
        UserError: a missing file or field, an unknown or repeated problem_id (names file and line).
    """
    whole = load_exam(exam_name, data)
    exam = load_exam(exam_name, data, text_only=text_only)
    known = {question.problem_id: question for question in whole.questions}
    wanted = {question.problem_id for question in exam.questions}
    scores: dict[str, Score] = {}
    malformed = 0
    for problem_id, prediction in read_predictions(predictions, known).items():
        if problem_id not in wanted:
            continue
        parsed = parse_answer(prediction, known[problem_id], mode="answer_only", parser=parser)
        malformed += parsed.malformed
        scores[problem_id] = score_answer(known[problem_id], parsed, parser=parser)
    if not scores:
        raise UserError(f"{', '.join(map(str, predictions))}: no prediction for the selected questions")
    account = Account("questions")
    for question in exam.questions:
        if question.problem_id in scores:
            account.keep(exam_name)
        else:
            account.lose(exam_name, "no prediction", question.problem_id)
    years = {question.year for question in exam.questions if question.problem_id in scores}
    missing = [q.problem_id for q in exam.questions if q.year in years and q.problem_id not in scores]
    return {
        **score_report(exam, scores, whole_exam=whole),
        "malformed": malformed,
        "missing": len(missing),
        "missing_first": missing[:10],
        "account": account.to_json(),
        "parser": parser,
        "text_only": text_only,
    }


def read_predictions(paths: Sequence[Path], known: dict[str, Question]) -> dict[str, str]:
    """Predictions by problem_id.

    Raises:
        UserError: see `score_predictions`.
    """
    found: dict[str, str] = {}
    for path in paths:
        for place, row in read_rows(path):
            for field in ("problem_id", "prediction"):
                if not isinstance(row.get(field), str):
                    raise UserError(f"{place}: expected a string field {field!r}, found {row.get(field)!r}")
            problem_id = row["problem_id"]
            if problem_id not in known:
                raise UserError(f"{place}: problem_id {problem_id!r} is not a question of the exam")
            if problem_id in found:
                raise UserError(f"{place}: problem_id {problem_id!r} was predicted before")
            found[problem_id] = row["prediction"]
    return found


def score_markdown(result: dict[str, Any]) -> str:
    """The result of `score_predictions` as a table: one line a year, and the total."""
    lines = [
        [
            year,
            f"{row['correct']}/{row['n']}",
            f"{row['points']}/{row['possible']}",
            f"{row['required']}/{row['required_possible']}",
            f"{row['rest']}/{row['rest_possible']}",
            str(row["prohibited"]),
            passed_text(row["passed"]),
        ]
        for year, row in result["by_year"].items()
    ]
    total = ["all", f"{result['correct']}/{result['n']}", f"{result['points']}/{result['possible']}", "", "", "", ""]
    header = ["year", "correct", "points", "required", "rest", "prohibited", "official"]
    text = "\n".join(markdown_table(header, [*lines, total]))
    text += f"\n\naccuracy {rate(result['accuracy'])}, points rate {rate(result['points_rate'])}, "
    text += f"{result['malformed']} malformed ({result['parser']} parser)"
    if result["missing"]:
        text += f"; {result['missing']} questions have no prediction (first: {', '.join(result['missing_first'])})"
    return text + "\n"
