from pathlib import Path

import pytest

from megatron_medllm.exams.loading import Exam, load_exam
from megatron_medllm.exams.parsing import ParsedAnswer, parse_answer
from megatron_medllm.exams.question import Question, question_from_row
from megatron_medllm.exams.scoring import Score, pass_decision, score_answer, score_report, summarize

RULES = {
    "exceptions": {
        "900A1": {"everyone_credited": True},
        "900A2": {"accept": [["a"], ["d"]]},
        "900A3": {"accept": [["2.1"]]},
    },
    "required_sections": ["B"],
    "max_prohibited": 1,
    "pass": {"2001": {"required": 6, "rest": 2}, "2002": {"required_rate": 0.8, "rest": 1}},
}


def make(problem_id: str, answer: list[str], *, numeric: bool = False, points: int = 1, **more: object) -> Question:
    row = {
        "problem_id": problem_id,
        "problem_text": "?",
        "choices": [] if numeric else ["v", "w", "x", "y", "z"],
        "answer": answer,
        "points": points,
        **more,
    }
    metadata = {"kinki": ["e"]} if problem_id.startswith("9") and not numeric else {}
    return question_from_row(row, year="2001", metadata=metadata, rules=RULES)


def scored(question: Question, output: str, parser: str = "lenient") -> Score:
    parsed = parse_answer(output, question, mode="answer_only", parser=parser)
    return score_answer(question, parsed, parser=parser)


def test_exact_set_earns_the_points() -> None:
    question = make("800A9", ["a", "c"], points=3)
    assert scored(question, "c,a") == Score(True, 3, False)
    assert scored(question, "a") == Score(False, 0, False)
    assert scored(question, "a,b,c") == Score(False, 0, False)
    assert scored(question, "nothing") == Score(False, 0, False)


def test_exceptions() -> None:
    everyone = make("900A1", ["e"])
    assert scored(everyone, "b").correct and scored(everyone, "gibberish").correct
    either = make("900A2", ["b"])
    assert [scored(either, letter).correct for letter in ("a", "d", "b", "a,d")] == [True, True, False, False]


def test_prohibited_choice_counts_when_chosen() -> None:
    question = make("900A4", ["a"])
    assert scored(question, "a,e") == Score(False, 0, True)
    assert not scored(question, "b").prohibited


@pytest.mark.parametrize(
    ("output", "lenient", "strict"),
    [("2.1", True, False), ("2.10", True, False), ("21", True, True), ("2.2", False, False), ("2,1", True, False)],
)
def test_numbers_are_numbers(output: str, lenient: bool, strict: bool) -> None:
    """The published key is 21, the boxes read ①.②: 2.1. The official scorer knows only the digits."""
    question = make("900A3", ["21"], numeric=True)
    assert scored(question, output).correct is lenient
    assert scored(question, output, "strict").correct is strict


def test_leading_zero_is_not_dropped() -> None:
    question = make("800A3", ["7.20"], numeric=True)
    assert scored(question, "7.2").correct
    assert scored(question, "07.20").correct
    assert not scored(question, "72").correct


def sheet(**points: int) -> tuple[Exam, dict[str, Score]]:
    """A year of two required questions of 3 points and two others of 1; all wrong unless named."""
    questions = [
        make("900B1", ["a"], points=3),
        make("900B2", ["a"], points=3),
        make("900C1", ["a"]),
        make("900C2", ["a"]),
    ]
    exam = Exam("x", tuple(questions), RULES)
    return exam, {q.problem_id: Score(q.problem_id in points, points.get(q.problem_id, 0), False) for q in questions}


def test_pass_needs_both_parts() -> None:
    exam, scores = sheet(**{"900B1": 3, "900B2": 3, "900C1": 1, "900C2": 1})
    decision = pass_decision("2001", exam, scores, whole_exam=exam)
    assert (decision["required"], decision["rest"], decision["prohibited"], decision["passed"]) == (6, 2, 0, True)
    exam, scores = sheet(**{"900B1": 3, "900C1": 1, "900C2": 1})
    assert pass_decision("2001", exam, scores, whole_exam=exam)["passed"] is False
    exam, scores = sheet(**{"900B1": 3, "900B2": 3, "900C1": 1})
    assert pass_decision("2001", exam, scores, whole_exam=exam)["passed"] is False


def test_prohibited_choices_fail() -> None:
    exam, scores = sheet(**{"900B1": 3, "900B2": 3, "900C1": 1, "900C2": 1})
    scores["900B1"] = Score(True, 3, True)
    assert pass_decision("2001", exam, scores, whole_exam=exam)["passed"] is True  # one is allowed here
    scores["900C1"] = Score(True, 1, True)
    decision = pass_decision("2001", exam, scores, whole_exam=exam)
    assert (decision["prohibited"], decision["passed"]) == (2, False)


def test_a_part_of_a_paper_is_not_decided() -> None:
    exam, scores = sheet(**{"900B1": 3, "900B2": 3, "900C1": 1, "900C2": 1})
    del scores["900C2"]
    assert pass_decision("2001", exam, scores, whole_exam=exam)["passed"] is None


def test_summary_literal() -> None:
    exam, scores = sheet(**{"900B1": 3, "900C1": 1})
    assert summarize(exam.questions, scores) == {
        "n": 4,
        "correct": 2,
        "points": 4,
        "possible": 8,
        "accuracy": 0.5,
        "points_rate": 0.5,
    }
    report = score_report(exam, scores, whole_exam=exam)
    assert report["by_section"]["B"]["accuracy"] == 0.5
    assert report["by_year"]["2001"]["required"] == 3


def all_right(questions: tuple[Question, ...]) -> dict[str, Score]:
    return {q.problem_id: score_answer(q, ParsedAnswer(q.accepted[0])) for q in questions}


def drop_points(scores: dict[str, Score], questions: list[Question], points: int) -> dict[str, Score]:
    """Turn right answers wrong until exactly `points` are lost."""
    scores = dict(scores)
    for question in sorted(questions, key=lambda q: -q.points):
        if 0 < question.points <= points and not question.everyone_credited:
            scores[question.problem_id] = Score(False, 0, False)
            points -= question.points
    assert points == 0
    return scores


# Required and rest: possible points and pass mark, as the ministry announced them (2022: 80 % of 197 → 158).
MARKS = {
    "2018": (200, 160, 299, 208),
    "2019": (200, 160, 296, 209),
    "2020": (197, 158, 299, 217),
    "2021": (200, 160, 300, 209),
    "2022": (197, 158, 297, 214),
}


@pytest.mark.parametrize("year", MARKS)
def test_official_decision_at_the_mark(shared_data: Path, year: str) -> None:
    exam = load_exam("igakuqa", [shared_data / "igakuqa"], years=[year])
    required_possible, required_mark, rest_possible, rest_mark = MARKS[year]
    perfect = all_right(exam.questions)
    decision = pass_decision(year, exam, perfect, whole_exam=exam)
    assert (decision["required"], decision["rest"], decision["passed"]) == (required_possible, rest_possible, True)
    required = [q for q in exam.questions if q.section in "BE"]
    rest = [q for q in exam.questions if q.section not in "BE"]
    at_mark = drop_points(perfect, required, required_possible - required_mark)
    at_mark = drop_points(at_mark, rest, rest_possible - rest_mark)
    assert pass_decision(year, exam, at_mark, whole_exam=exam)["passed"] is True
    right = [q for q in exam.questions if at_mark[q.problem_id].points == 1]
    for section_is_required in (True, False):
        one = next(q for q in right if (q.section in "BE") is section_is_required)
        below = at_mark | {one.problem_id: Score(False, 0, False)}
        assert pass_decision(year, exam, below, whole_exam=exam)["passed"] is False
    for count, passed in ((3, True), (4, False)):
        chosen = [q for q in exam.questions if q.prohibited][:count]
        marked = perfect | {q.problem_id: Score(True, q.points, True) for q in chosen}
        assert pass_decision(year, exam, marked, whole_exam=exam)["passed"] is passed


def test_official_exceptions_on_real_questions(shared_data: Path) -> None:
    by_id = {q.problem_id: q for q in load_exam("igakuqa", [shared_data / "igakuqa"]).questions}
    assert scored(by_id["116A71"], "a", "strict") == Score(True, 1, False)
    assert [scored(by_id["112B30"], letter, "strict").points for letter in ("a", "d", "c", "a,d")] == [3, 3, 0, 0]
    # Keys that lack the decimal point, or the printed leading digit.
    for problem_id, digits, number in (
        ("116B50", "21", "2.1"),
        ("116F74", "04", "0.4"),
        ("114C75", "100", "10.0"),
        ("114F75", "130", "1,130"),
    ):
        assert scored(by_id[problem_id], digits, "strict").correct
        assert scored(by_id[problem_id], digits).correct and scored(by_id[problem_id], number).correct
    assert not scored(by_id["116F74"], "4").correct
