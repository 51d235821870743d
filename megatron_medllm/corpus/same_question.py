"""Questions that are nearly the same text as a question of an exam: found as documents of a corpus are.

Width, case, voicing marks, layout and punctuation do not count. A run of 30 characters alone is often boilerplate
among questions (`次の文を読み…`), and half of the grams alone may be a shared list of choices: it takes both.
"""

from collections.abc import Sequence

from megatron_medllm.config.corpus import DecontaminateConfig
from megatron_medllm.corpus.decontaminate import Detector
from megatron_medllm.corpus.fold import fold
from megatron_medllm.corpus.questions import GRAM, SoughtQuestion, index_questions
from megatron_medllm.corpus.shingles import code_points
from megatron_medllm.exams.question import Question

# Against questions nothing is boilerplate by itself: what they share is weighed by the share of the whole question.
_CONFIG = DecontaminateConfig(boilerplate_editions=1_000_000)


def same_questions(questions: Sequence[Question], exam: Sequence[Question]) -> dict[str, str]:
    """problem_id of each of `questions` that is in `exam` → problem_id there."""
    texts = {question.problem_id: _text(question) for question in exam}
    folded = {problem_id: _folded(text) for problem_id, text in texts.items()}
    # Too short for a gram, or for a run: such a question must be there whole.
    short = {text: problem_id for problem_id, text in folded.items() if len(text) < _CONFIG.match_chars}
    sought = [
        SoughtQuestion(question.problem_id, question.year, texts[question.problem_id], ())  # with its choices only
        for question in exam
        if len(folded[question.problem_id]) >= GRAM
    ]
    detected = Detector(index_questions(sought, _CONFIG), _CONFIG).find([_text(q) for q in questions]) if sought else {}
    found: dict[str, str] = {}
    for position, question in enumerate(questions):
        twin = short.get(_folded(_text(question)))
        meetings = detected[position].meetings if position in detected else []
        met = [m for m in meetings if m.long_match and m.coverage >= _CONFIG.coverage]
        if twin is None and met:
            twin = max(met, key=lambda meeting: meeting.coverage).question
        if twin is not None:
            found[question.problem_id] = twin
    return found


def _text(question: Question) -> str:
    return "".join((question.problem_text, *question.choices))


def _folded(text: str) -> str:
    return "".join(map(chr, fold(code_points(text))))
