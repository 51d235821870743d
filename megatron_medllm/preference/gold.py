"""What the data itself says: the gold explanation in the explained format, and the gold answer."""

import re
from dataclasses import replace
from string import ascii_lowercase

from megatron_medllm.exams.prompts import Mode, PromptSet
from megatron_medllm.exams.question import Question
from megatron_medllm.preference.candidate import Candidate

_NUMBERED_VERDICT = re.compile(r"(?<![\d.])([1-9])(?=\s?[:：])")
_NUMBERED_CHOICE = re.compile(r"(選択肢\s?)([1-9])(?!\d)")


def with_letters(question: Question) -> Question:
    """Rename choices 1, 2, 3… to a, b, c…, in the explanation's `1:正` and `選択肢2` too."""
    if question.kind == "numeric" or not question.labels[0].isdigit():
        return question

    def letter(number: str) -> str:
        return ascii_lowercase[int(number) - 1] if int(number) <= len(question.labels) else number

    explanation = _NUMBERED_VERDICT.sub(lambda m: letter(m.group(1)), question.explanation)
    explanation = _NUMBERED_CHOICE.sub(lambda m: m.group(1) + letter(m.group(2)), explanation)
    return replace(
        question,
        labels=tuple(map(letter, question.labels)),
        answer=tuple(map(letter, question.answer)),
        accepted=tuple(tuple(sorted(map(letter, item))) for item in question.accepted),  # 10 sorts before 2
        explanation=explanation,
    )


def gold_candidate(question: Question, mode: Mode, prompts: PromptSet) -> Candidate | None:
    """The data's own response; None in explained mode when it explains nothing."""
    if mode == "explained" and not question.explanation.strip():
        return None
    answer = question.accepted[0]
    text = prompts.response(mode, answer=answer, explanation=question.explanation.strip())
    return Candidate(question.problem_id, mode, "gold", text, answer, {"written_by": "data"})


def synthetic_wrong(question: Question, prompts: PromptSet) -> Candidate | None:
    """A wrong short answer made by moving the gold labels one choice on; None for numeric questions."""
    if question.kind == "numeric":
        return None
    labels = question.labels
    for step in range(1, len(labels)):
        moved = tuple(sorted(labels[(labels.index(label) + step) % len(labels)] for label in question.accepted[0]))
        if moved not in question.accepted:
            text = prompts.response("answer_only", answer=moved)
            return Candidate(question.problem_id, "answer_only", "wrong", text, moved, {"written_by": "synthetic"})
    return None
