"""Points, rates and the official pass/fail decision."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_medllm.exams.loading import Exam
from megatron_medllm.exams.parsing import ParsedAnswer, Parser
from megatron_medllm.exams.question import Question


@dataclass(frozen=True, slots=True)
class Score:
    """What one answer earns. `prohibited`: it names an option that no doctor may choose (禁忌肢)."""

    correct: bool
    points: int
    prohibited: bool


def score_answer(question: Question, parsed: ParsedAnswer, *, parser: Parser = "lenient") -> Score:
    """Score one answer: the exact set of labels, or the number, with the exam's exceptions."""
    answer = parsed.answer
    correct = question.everyone_credited or (answer is not None and _matches(question, answer, parser))
    prohibited = answer is not None and question.kind == "choice" and bool(question.prohibited & set(answer))
    return Score(correct, question.points if correct else 0, prohibited)


def _matches(question: Question, answer: tuple[str, ...], parser: Parser) -> bool:
    if question.kind == "choice":
        return answer in question.accepted
    if answer == question.answer:  # the digits as the answer sheet has them
        return True
    return parser == "lenient" and any(_same_number(answer, accepted) for accepted in question.accepted)


def _same_number(answer: tuple[str, ...], accepted: tuple[str, ...]) -> bool:
    try:
        return Decimal(answer[0]) == Decimal(accepted[0])
    except InvalidOperation:
        return False


def summarize(questions: Sequence[Question], scores: Mapping[str, Score]) -> dict[str, Any]:
    """Totals over the questions that have a score.

    `accuracy` is correct / n, as IgakuQA's scorer has it; `points_rate` is points / possible, as the literature's
    0.868 is meant.
    """
    scored = [question for question in questions if question.problem_id in scores]
    correct = sum(scores[q.problem_id].correct for q in scored)
    points = sum(scores[q.problem_id].points for q in scored)
    possible = sum(q.points for q in scored)
    return {
        "n": len(scored),
        "correct": correct,
        "points": points,
        "possible": possible,
        "accuracy": correct / len(scored) if scored else None,
        "points_rate": points / possible if possible else None,
    }


def summarize_by(questions: Sequence[Question], scores: Mapping[str, Score], *, field: str) -> dict[str, Any]:
    """`summarize` for each value of a question's `field` (year, section, category), in order of appearance."""
    values = dict.fromkeys(getattr(q, field) for q in questions)
    return {value: summarize([q for q in questions if getattr(q, field) == value], scores) for value in values if value}


def pass_decision(year: str, exam: Exam, scores: Mapping[str, Score], *, whole_exam: Exam) -> dict[str, Any]:
    """The official decision of one year: points in the required sections, in the rest, and prohibited choices.

    `passed` is None when the exam has no published rule for the year or when an answer of the year is missing
    (`whole_exam` holds all of its questions): a part of a paper is neither passed nor failed.
    """
    required_sections = exam.rules.get("required_sections", [])
    questions = [q for q in exam.questions if q.year == year and q.problem_id in scores]
    required = [q for q in questions if q.section in required_sections]
    rest = [q for q in questions if q.section not in required_sections]
    result: dict[str, Any] = {
        "required": sum(scores[q.problem_id].points for q in required),
        "required_possible": sum(q.points for q in required),
        "rest": sum(scores[q.problem_id].points for q in rest),
        "rest_possible": sum(q.points for q in rest),
        "prohibited": sum(scores[q.problem_id].prohibited for q in questions),
        "passed": None,
    }
    rule = exam.rules.get("pass", {}).get(year)
    complete = all(q.problem_id in scores for q in whole_exam.questions if q.year == year)
    if rule is None:
        return result
    if "required" in rule:
        required_mark = rule["required"]
    else:
        required_mark = math.ceil(rule["required_rate"] * result["required_possible"])
    result |= {
        "required_mark": required_mark,
        "rest_mark": rule["rest"],
        "prohibited_max": exam.rules["max_prohibited"],
    }
    if complete:
        result["passed"] = (
            result["required"] >= required_mark
            and result["rest"] >= rule["rest"]
            and result["prohibited"] <= exam.rules["max_prohibited"]
        )
    return result


def score_report(exam: Exam, scores: Mapping[str, Score], *, whole_exam: Exam) -> dict[str, Any]:
    """`summarize` with the breakdown by year, each year with its `pass_decision`, and by section and category."""
    by_year = summarize_by(exam.questions, scores, field="year")
    for year in by_year:
        by_year[year] |= pass_decision(year, exam, scores, whole_exam=whole_exam)
    return {
        **summarize(exam.questions, scores),
        "by_year": {year: row for year, row in by_year.items() if row["n"]},
        "by_section": summarize_by(exam.questions, scores, field="section"),
        "by_category": summarize_by(exam.questions, scores, field="category"),
    }
