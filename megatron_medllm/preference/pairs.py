"""`medllm pairs`: preference pairs by the hierarchy gold > sampled right > sampled wrong > malformed."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_medllm.config.pairs import PairsConfig
from megatron_medllm.errors import UserError
from megatron_medllm.exams.loading import load_exam
from megatron_medllm.exams.prompts import render_messages, render_text
from megatron_medllm.exams.question import Question
from megatron_medllm.inference.exam_requests import ExamPrompter
from megatron_medllm.preference.candidate import Candidate, Tier
from megatron_medllm.preference.contamination import contaminated
from megatron_medllm.preference.filters import candidate_reason, pair_reason
from megatron_medllm.preference.gold import gold_candidate, synthetic_wrong, with_letters
from megatron_medllm.preference.report import pairs_report, write_pairs_page
from megatron_medllm.preference.sampling import sample
from megatron_medllm.storage import atomic_write, digest_file, write_json, write_jsonl

SAMPLE_LOG = "sample_answers.jsonl"
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


def build_pairs(config: PairsConfig, model_dir: Path, output_dir: Path) -> dict[str, Any]:
    """Build the pairs; write pairs.jsonl, samples.jsonl, dropped.jsonl, manifest.json and report.md to `output_dir`.

    Killed and started again it keeps the samples it had.

    Returns:
        The contents of manifest.json.

    Raises:
        UserError: bad questions, contamination by the evaluation exam, a model that cannot be used, or no pair left.
    """
    questions, contamination = training_questions(config)
    prompter = ExamPrompter(config.prompt, config.questions.data)
    samples, origin = sample(config, questions, model_dir, prompter=prompter, log=output_dir / SAMPLE_LOG)
    rows, drops = pair_up(config, questions, samples, prompter)
    if not rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in _reasons(drops).items())
        raise UserError(f"no pair is left of {len(questions)} questions and {len(samples)} samples ({reasons})")
    write_jsonl(output_dir / "pairs.jsonl", rows)
    write_jsonl(output_dir / "samples.jsonl", [candidate.to_row() for candidate in samples])
    write_jsonl(
        output_dir / "dropped.jsonl",
        [{"problem_id": d.problem_id, "mode": d.mode, "tier": d.tier, "reason": d.reason} for d in drops],
    )
    if config.parquet:
        with atomic_write(output_dir / "pairs.parquet") as stream:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    manifest = {
        "pairs": len(rows),
        "digest": digest_file(output_dir / "pairs.jsonl"),
        "questions": len(questions),
        "by_tier": dict(Counter(f"{row['mode']} {row['tier']}" for row in rows).most_common()),
        "samples_by_tier": dict(Counter(f"{c.mode} {c.tier}" for c in samples).most_common()),
        "characters": {key: _length_summary([len(row[key]) for row in rows]) for key in ("chosen", "rejected")},
        "drop_reasons": _reasons(drops),
        "contamination": contamination,
        **origin,
        "model": str(model_dir),
        "config": config.model_dump(mode="json"),
    }
    write_json(output_dir / "manifest.json", manifest)
    with atomic_write(output_dir / "report.md") as stream:
        stream.write(pairs_report(manifest, rows).encode())
    write_pairs_page(output_dir / "report.html", manifest, rows)
    return manifest


def training_questions(config: PairsConfig) -> tuple[list[Question], dict[str, Any]]:
    """The questions to learn from, without those of the evaluation exam.

    Raises:
        UserError: contamination with `contamination=refuse`, or no question is left.
    """
    source = config.questions
    loaded = load_exam(source.name, source.data, years=source.years, text_only=source.text_only, limit=source.limit)
    questions = list(loaded.questions)
    found: dict[str, tuple[str, str]] = {}
    if config.exam is not None and config.contamination != "allow":
        exam = load_exam(config.exam.name, config.exam.data, years=config.exam.years, text_only=config.exam.text_only)
        # `limit` is ignored: what a full evaluation would ask must stay out of training.
        found = contaminated(questions, exam.questions, same_exam=_same_paper(config))
    if found and config.contamination == "refuse":
        first, (twin, reason) = next(iter(found.items()))
        raise UserError(
            f"questions: {len(found)} of {len(questions)} are in the evaluation exam (first: {first} and {twin}, "
            f"{reason}); train on other questions, or set contamination=drop"
        )
    questions = [question for question in questions if question.problem_id not in found]
    if config.letters:
        questions = [with_letters(question) for question in questions]
    if not questions:
        raise UserError(f"questions of {source.name!r}: none is left to learn from")
    checked = config.exam is not None and config.contamination != "allow"
    dropped = {problem_id: list(twin) for problem_id, twin in found.items()}
    return questions, {"checked": checked, "dropped": dropped, "void_questions": list(loaded.void_ids)}


def _same_paper(config: PairsConfig) -> bool:
    return config.exam is not None and config.exam.name == config.questions.name


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
    drops += [
        Drop(question.problem_id, "explained", _tier(pair), "more than max_pairs")
        for pair in spread[config.max_pairs :]
    ]
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
    for chosen, rejected, weight in pairs:
        reason = pair_reason(chosen, rejected, config.filters)
        if reason is None:
            yield chosen, rejected, weight
        else:
            drops.append(Drop(chosen.problem_id, chosen.mode, _tier((chosen, rejected, weight)), reason))


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
    options = {
        "shots": () if config.train_without_shots else prompter.shots,
        "explain_shots": config.prompt.explain_shots,
        "reveal_count": config.prompt.reveal_count,
    }
    render = render_messages if config.prompt.chat else render_text
    return {
        "prompt": render(prompter.prompts, question, chosen.mode, **options),
        "chosen": chosen.text,
        "rejected": rejected.text,
        "source": config.questions.name,
        "tier": f"{chosen.tier}>{rejected.tier}",
        "weight": weight,
        "mode": chosen.mode,
        "problem_id": question.problem_id,
        "chosen_by": chosen.provenance,
        "rejected_by": rejected.provenance,
    }


def _reasons(drops: Sequence[Drop]) -> dict[str, int]:
    return dict(Counter(drop.reason for drop in drops).most_common())


def _length_summary(lengths: list[int]) -> dict[str, float]:
    ordered = sorted(lengths)
    return {
        "mean": sum(ordered) / len(ordered),
        "median": ordered[len(ordered) // 2],
        "p95": ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)],
        "max": ordered[-1],
    }
