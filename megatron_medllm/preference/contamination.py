"""Training questions that the evaluation exam holds: the same paper, or nearly the same text.

Thirteen shared characters are mostly boilerplate (`正しいのはどれか`); a hit needs a run of 30 characters and half of
the exam question's 13-grams.
"""

from collections import Counter
from collections.abc import Sequence

from megatron_medllm.exams.question import Question

GRAM_CHARS = 13
RUN_CHARS = 30
COVERAGE = 0.5


def contaminated(
    questions: Sequence[Question], exam: Sequence[Question], *, same_exam: bool
) -> dict[str, tuple[str, str]]:
    """Training problem_id → (exam problem_id, reason). `same_exam`: both come from the exam of the same name."""
    exam_years = {question.year for question in exam if question.year}
    found: dict[str, tuple[str, str]] = {}
    texts = [_text(question) for question in exam]
    grams = [_grams(text) for text in texts]
    where: dict[str, list[int]] = {}
    for index, question_grams in enumerate(grams):
        for gram in question_grams:
            where.setdefault(gram, []).append(index)
    for question in questions:
        if same_exam and question.year in exam_years:
            found[question.problem_id] = (question.problem_id, f"year {question.year} is in the evaluation exam")
            continue
        text = _text(question)
        shared = Counter(index for gram in _grams(text) for index in where.get(gram, ()))
        for index, count in shared.most_common():
            if count < COVERAGE * len(grams[index]):
                continue
            if _longest_run(text, texts[index]) >= min(RUN_CHARS, len(texts[index])):
                found[question.problem_id] = (exam[index].problem_id, "nearly the same text")
                break
    return found


def _text(question: Question) -> str:
    return "".join("".join((question.problem_text, *question.choices)).split())


def _grams(text: str) -> set[str]:
    return {text[i : i + GRAM_CHARS] for i in range(max(1, len(text) - GRAM_CHARS + 1))}


def _longest_run(a: str, b: str) -> int:
    """Length of the longest common substring, looked for by the runs of shared 13-grams."""
    grams = _grams(b)
    best = run = 0
    for i in range(len(a) - GRAM_CHARS + 1):
        run = run + 1 if a[i : i + GRAM_CHARS] in grams else 0
        best = max(best, run)
    return best + GRAM_CHARS - 1 if best else (len(b) if b == a else 0)
