"""Which answer beats which: candidates of one question to pairs, with a reason for each that is not used."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from megatron_medllm.config.pairs import PairsConfig
from megatron_medllm.exams.question import Question
from megatron_medllm.inference.exam_requests import ExamPrompter
from megatron_medllm.preference.candidate import Candidate, Tier
from megatron_medllm.preference.filters import candidate_reason, pair_reason
from megatron_medllm.preference.gold import gold_candidate, synthetic_wrong

NO_EXPLANATION = "the data explain nothing"
# A choice of the configuration, not a fault of the pair.
SURPLUS = "more than max_pairs"
_CONTENDERS: tuple[tuple[Tier, Tier], ...] = (
    ("gold", "wrong"),
    ("right", "wrong"),
    ("gold", "right"),
    ("gold", "malformed"),
    ("right", "malformed"),
    ("wrong", "malformed"),
)


@dataclass(frozen=True, slots=True)
class Drop:
    """A candidate or a pair that was not used, and why."""

    problem_id: str
    mode: str
    tier: str
    reason: str


def pair_up(
    config: PairsConfig, questions: Sequence[Question], samples: Sequence[Candidate], prompter: ExamPrompter
) -> tuple[list[dict[str, Any]], list[Drop]]:
    """Pairs and drops, in question order; the same for the same samples and seed."""
    by_question: dict[str, list[Candidate]] = {}
    for candidate in samples:
        by_question.setdefault(candidate.problem_id, []).append(candidate)
    rows: list[dict[str, Any]] = []
    drops: list[Drop] = []
    for question in questions:
        written = by_question.get(question.problem_id, [])
        rng = random.Random(f"{config.sampling.seed}:{question.problem_id}")
        for found in (
            _explained(config, question, written, prompter, rng, drops),
            _short(config, question, written, prompter, drops),
        ):
            rows += [_row(config, question, chosen, rejected, weight, prompter) for chosen, rejected, weight in found]
    return rows, drops


def _explained(
    config: PairsConfig,
    question: Question,
    written: Sequence[Candidate],
    prompter: ExamPrompter,
    rng: random.Random,
    drops: list[Drop],
) -> list[tuple[Candidate, Candidate, float]]:
    candidates = [candidate for candidate in written if candidate.mode == "explained"]
    gold = gold_candidate(question, "explained", prompter.prompts)
    if gold is not None:
        candidates.append(gold)
    else:
        drops.append(Drop(question.problem_id, "explained", "gold", NO_EXPLANATION))
    usable = {
        chosen: _usable(
            config, question, _without_duplicates(candidates, drops if chosen else None), drops, chosen=chosen
        )
        for chosen in (True, False)
    }
    pairs: list[tuple[Candidate, Candidate, float]] = []
    for winner, loser in _CONTENDERS:
        weight = getattr(config.weights, f"{winner}_over_{loser}")
        if weight == 0:
            continue
        contest = list(
            product(
                [c for c in usable[True] if c.tier == winner],
                [c for c in usable[False] if c.tier == loser],
            )
        )
        rng.shuffle(contest)
        pairs += [(chosen, rejected, weight) for chosen, rejected in contest]
    pairs.sort(key=lambda pair: -pair[2])  # stable: the hierarchy's order among equal weights
    kept = list(_passing(config, pairs, drops))
    spread = _spread(kept)
    drops += [Drop(question.problem_id, "explained", _tier(pair), SURPLUS) for pair in spread[config.max_pairs :]]
    return spread[: config.max_pairs]


def _short(
    config: PairsConfig,
    question: Question,
    written: Sequence[Candidate],
    prompter: ExamPrompter,
    drops: list[Drop],
) -> list[tuple[Candidate, Candidate, float]]:
    """Right short answer over wrong ones, sampled if there are any."""
    if not config.weights.answer_only or not config.max_answer_only_pairs:
        return []
    gold = gold_candidate(question, "answer_only", prompter.prompts)
    wrong = [c for c in written if c.mode == "answer_only" and c.tier in ("wrong", "malformed")]
    wrong.sort(key=lambda candidate: candidate.tier == "malformed")
    rejected = _usable(config, question, _without_duplicates(wrong, drops), drops, chosen=False)
    made_up = synthetic_wrong(question, prompter.prompts) if config.synthetic_wrong and not rejected else None
    if made_up is not None:
        rejected.append(made_up)
    pairs = [(gold, loser, config.weights.answer_only) for loser in rejected if gold is not None]
    return list(_passing(config, pairs, drops))[: config.max_answer_only_pairs]


def _usable(
    config: PairsConfig, question: Question, candidates: Sequence[Candidate], drops: list[Drop], *, chosen: bool
) -> list[Candidate]:
    kept = []
    for candidate in candidates:
        reason = candidate_reason(candidate, question, config.filters, chosen=chosen)
        if reason is None:
            kept.append(candidate)
        elif chosen == (candidate.tier in ("gold", "right")):  # name each once, in the part it is meant for
            drops.append(Drop(candidate.problem_id, candidate.mode, candidate.tier, reason))
    return kept


def _without_duplicates(candidates: Sequence[Candidate], drops: list[Drop] | None) -> list[Candidate]:
    seen: set[str] = set()
    kept = []
    for candidate in candidates:
        text = candidate.text.strip()
        if text in seen:
            if drops is not None:
                drops.append(Drop(candidate.problem_id, candidate.mode, candidate.tier, "duplicate"))
            continue
        seen.add(text)
        kept.append(candidate)
    return kept


def _passing(
    config: PairsConfig, pairs: Sequence[tuple[Candidate, Candidate, float]], drops: list[Drop]
) -> Iterator[tuple[Candidate, Candidate, float]]:
    for chosen, whole, weight in pairs:
        rejected = _cut_endless(config, chosen, whole)
        reason = pair_reason(chosen, rejected, config.filters)
        if reason is None:
            yield chosen, rejected, weight
        else:
            drops.append(Drop(chosen.problem_id, chosen.mode, _tier((chosen, rejected, weight)), reason))


def _cut_endless(config: PairsConfig, chosen: Candidate, rejected: Candidate) -> Candidate:
    """The beginning of an explanation that reaches no answer: what runs on for ever is as bad after a while."""
    longest = max(1, int(config.filters.malformed_length * len(chosen.text)))
    if chosen.mode == "answer_only" or rejected.tier != "malformed" or len(rejected.text) <= longest:
        return rejected
    return replace(rejected, text=rejected.text[:longest], truncated=True)


def _spread(pairs: list[tuple[Candidate, Candidate, float]]) -> list[tuple[Candidate, Candidate, float]]:
    """Heaviest first, but each rejected text once before any comes twice, so that few pairs show many mistakes."""
    turns: Counter[str] = Counter()
    keyed = []
    for position, pair in enumerate(pairs):
        turn = turns[pair[1].text]
        turns[pair[1].text] += 1
        keyed.append((turn, position, pair))
    return [pair for *_, pair in sorted(keyed, key=lambda item: item[:2])]


def _tier(pair: tuple[Candidate, Candidate, float]) -> str:
    return f"{pair[0].tier}>{pair[1].tier}"


def _row(
    config: PairsConfig,
    question: Question,
    chosen: Candidate,
    rejected: Candidate,
    weight: float,
    prompter: ExamPrompter,
) -> dict[str, Any]:
    return {
        "prompt": prompter.prompt(question, chosen.mode, with_shots=not config.train_without_shots),
        "chosen": chosen.text,
        "rejected": rejected.text,
        "source": config.questions.name,
        "tier": f"{chosen.tier}>{rejected.tier}",
        "weight": weight,
        "mode": chosen.mode,
        "problem_id": question.problem_id,
        # No end token is learned where the model did not end.
        "chosen_ended": not chosen.truncated,
        "rejected_ended": not rejected.truncated,
        "chosen_by": chosen.provenance,
        "rejected_by": rejected.provenance,
    }
