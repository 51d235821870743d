"""One judged answer, and the numbers that a set of them gives."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_medllm.exams.loading import Exam
from megatron_medllm.exams.parsing import ParsedAnswer, Parser, parse_answer
from megatron_medllm.exams.prompts import Mode
from megatron_medllm.exams.question import Question
from megatron_medllm.exams.scoring import Score, score_answer, score_report, summarize
from megatron_medllm.exams.statistics import paired_bootstrap, paired_difference, wilson_interval
from megatron_medllm.inference.protocol import Completion, Request


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer with its question, prompt, parse and score."""

    question: Question
    mode: Mode
    sample: int
    request: Request
    completion: Completion
    parsed: ParsedAnswer
    score: Score

    def to_row(self) -> dict[str, Any]:
        """The row of results.jsonl."""
        question = self.question
        return {
            "problem_id": question.problem_id,
            "mode": self.mode,
            "sample": self.sample,
            "year": question.year,
            "section": question.section,
            "category": question.category,
            "group": question.group,
            "text_only": question.text_only,
            "prompt": self.request.prompt or list(self.request.messages),
            "output": self.completion.text,
            "finish_reason": self.completion.finish_reason,
            "prompt_tokens": self.completion.prompt_tokens,
            "new_tokens": self.completion.new_tokens,
            "temperature": self.request.temperature,
            "seed": self.request.seed,
            "parsed": list(self.parsed.answer) if self.parsed.answer is not None else None,
            "malformed_reason": self.parsed.reason,
            "gold": [list(item) for item in question.accepted],
            "correct": self.score.correct,
            "points": self.score.points,
            "possible": question.points,
            "prohibited": self.score.prohibited,
            "human_accuracy": question.human_accuracy,
        }


def judge_answer(
    question: Question, mode: Mode, sample: int, request: Request, completion: Completion, *, parser: Parser
) -> Outcome:
    """Parse and score one completion."""
    parsed = parse_answer(completion.text, question, mode=mode, parser=parser)
    return Outcome(question, mode, sample, request, completion, parsed, score_answer(question, parsed, parser=parser))


def mode_summary(exam: Exam, outcomes: Sequence[Outcome], *, whole_exam: Exam, confidence: float) -> dict[str, Any]:
    """Everything about one mode: `outcomes` are one answer a question."""
    scores = {outcome.question.problem_id: outcome.score for outcome in outcomes}
    report = score_report(exam, scores, whole_exam=whole_exam)
    malformed = [outcome for outcome in outcomes if outcome.parsed.malformed]
    return {
        **report,
        "accuracy_interval": wilson_interval(report["correct"], report["n"], confidence=confidence).to_dict(),
        "text_only": summarize([q for q in exam.questions if q.text_only], scores),
        "malformed": len(malformed),
        "malformed_rate": len(malformed) / len(outcomes),
        "malformed_reasons": dict(Counter(outcome.parsed.reason for outcome in malformed).most_common()),
        "wrong_count": sum(_wrong_count(outcome) for outcome in outcomes),
        # Cut off before an answer came: one that is complete is not truncated, whatever would have followed.
        "truncated": sum(outcome.completion.finish_reason == "length" for outcome in malformed),
        "new_tokens_mean": sum(outcome.completion.new_tokens for outcome in outcomes) / len(outcomes),
    }


def _wrong_count(outcome: Outcome) -> bool:
    """More or fewer choices than the question asks for."""
    answer, question = outcome.parsed.answer, outcome.question
    return answer is not None and question.kind == "choice" and len(answer) != question.n_answers


def stability_gap(
    answered: Sequence[Outcome], explained: Sequence[Outcome], *, resamples: int, confidence: float, seed: int
) -> dict[str, Any]:
    """Explained minus answer only, on the questions that both hold: the number this project is about.

    Intervals: paired bootstrap over question groups; p: McNemar's exact test on the flips.
    """
    first = {outcome.question.problem_id: outcome for outcome in answered}
    pairs = [(first[o.question.problem_id], o) for o in explained if o.question.problem_id in first]
    questions = [outcome.question for _, outcome in pairs]
    a = [one.score.correct for one, _ in pairs]
    b = [two.score.correct for _, two in pairs]
    points = [float(question.points) for question in questions]
    groups = [question.group for question in questions]
    bootstrap = partial(paired_bootstrap, confidence=confidence, seed=seed)
    found = paired_difference(a, b, groups=groups, resamples=resamples, confidence=confidence, seed=seed)
    result = {
        "n": found.n,
        "accuracy": found.interval.to_dict(),
        "right_to_wrong": found.lost,
        "wrong_to_right": found.won,
        "mcnemar_p": found.mcnemar_p,
    }
    if sum(points) > 0:
        result["points_rate"] = bootstrap(a, b, weights=points, groups=groups, resamples=resamples).to_dict()
    result["by_category"] = {
        category: {
            "n": len(index),
            **bootstrap(
                [a[i] for i in index],
                [b[i] for i in index],
                groups=[groups[i] for i in index],
                resamples=min(resamples, 2000),
            ).to_dict(),
        }
        for category, index in _indices_by_category(questions).items()
    }
    return result


def _indices_by_category(questions: Sequence[Question]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        if question.category:
            found.setdefault(question.category, []).append(index)
    return found


def sample_summary(outcomes: Sequence[Outcome], *, parser: Parser) -> dict[str, Any]:
    """Several answers a question: their mean accuracy, the majority's (maj@k), and how often they agree.

    The majority is over parsed answers; malformed ones vote for nothing, and the earliest answer wins a tie.
    """
    by_question: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_question.setdefault(outcome.question.problem_id, []).append(outcome)
    majority_correct, agreement = 0, 0.0
    for answers in by_question.values():
        question = answers[0].question
        votes = Counter(outcome.parsed.answer for outcome in answers if not outcome.parsed.malformed)
        winner, count = votes.most_common(1)[0] if votes else (None, 0)
        majority_correct += score_answer(question, ParsedAnswer(winner), parser=parser).correct
        agreement += count / len(answers)
    n = len(by_question)
    return {
        "samples_per_question": len(outcomes) / n,
        "mean_accuracy": sum(outcome.score.correct for outcome in outcomes) / len(outcomes),
        "majority_accuracy": majority_correct / n,
        "consistency": agreement / n,
    }
