"""Training questions that the evaluation exam holds: the same paper, or nearly the same text."""

from collections.abc import Sequence

from megatron_medllm.corpus.same_question import same_questions
from megatron_medllm.exams.question import Question


def contaminated(
    questions: Sequence[Question], exam: Sequence[Question], *, same_exam: bool
) -> dict[str, tuple[str, str]]:
    """Training problem_id → (exam problem_id, reason). `same_exam`: both come from the exam of the same name."""
    exam_years = {question.year for question in exam if question.year}
    twins = same_questions(questions, exam)
    found: dict[str, tuple[str, str]] = {}
    for question in questions:
        if same_exam and question.year in exam_years:
            found[question.problem_id] = (question.problem_id, f"year {question.year} is in the evaluation exam")
        elif question.problem_id in twins:
            found[question.problem_id] = (twins[question.problem_id], "nearly the same text")
    return found
