"""`medllm pairs`: preference pairs by the hierarchy gold > sampled right > sampled wrong > malformed."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_medllm.account import Account
from megatron_medllm.config.pairs import PairsConfig
from megatron_medllm.errors import UserError
from megatron_medllm.exams.loading import load_exam
from megatron_medllm.exams.question import Question
from megatron_medllm.inference.answer_log import NOT_OF_THE_RESULT, TIMING, write_timing
from megatron_medllm.inference.exam_requests import ExamPrompter
from megatron_medllm.preference.candidate import Candidate
from megatron_medllm.preference.contamination import contaminated
from megatron_medllm.preference.gold import gold_candidate, with_letters
from megatron_medllm.preference.pairing import NO_EXPLANATION, SURPLUS, Drop, pair_up
from megatron_medllm.preference.report import pairs_report, write_pairs_page
from megatron_medllm.preference.sampling import sample, sample_shard
from megatron_medllm.shard import Shard
from megatron_medllm.storage import atomic_write, digest_file, write_json, write_jsonl

SAMPLE_LOG = "sample_answers.jsonl"
# A tier of so many responses cannot be lost whole by chance.
_WHOLE_TIER = 20


def build_pairs(config: PairsConfig, model_dir: Path, output_dir: Path, *, merge: bool = False) -> dict[str, Any]:
    """Build the pairs; write pairs.jsonl, samples.jsonl, dropped.jsonl, manifest.json and report.md to `output_dir`.

    Killed and started again it keeps the samples it had, and those of shards. With `merge` these have to be all.

    Returns:
        The contents of manifest.json.

    Raises:
        UserError: bad questions, contamination by the evaluation exam, a model that cannot be used, a tier that the
            filters took whole, or fewer explained pairs than `config.min_explained_share` asks for.
    """
    questions, contamination = training_questions(config)
    prompter = ExamPrompter(config.prompt, config.questions.data)
    log = output_dir / SAMPLE_LOG
    samples, answers = sample(config, questions, model_dir, prompter=prompter, log=log, merge=merge)
    rows, drops = pair_up(config, questions, samples, prompter)
    write_jsonl(output_dir / "samples.jsonl", [candidate.to_row() for candidate in samples])
    write_jsonl(
        output_dir / "dropped.jsonl",
        [{"problem_id": d.problem_id, "mode": d.mode, "tier": d.tier, "reason": d.reason} for d in drops],
    )
    gold = sum(gold_candidate(question, "explained", prompter.prompts) is not None for question in questions)
    account = pairs_account(samples, rows, drops, gold=gold)
    require_pairs(config, account, rows, drops, questions=len(questions), samples=len(samples))
    write_jsonl(output_dir / "pairs.jsonl", rows)
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
        "explained_questions": _explained_questions(rows),
        "drop_reasons": _reasons(drops),
        "account": account.to_json(),
        "contamination": contamination,
        **({} if answers is None else {"provenance": answers.provenance}),
        "model": str(model_dir),
        "config": config.model_dump(mode="json", exclude=NOT_OF_THE_RESULT),
    }
    if answers is not None:
        write_timing(output_dir / TIMING, answers)
    write_json(output_dir / "manifest.json", manifest)
    with atomic_write(output_dir / "report.md") as stream:
        stream.write(pairs_report(manifest, rows).encode())
    write_pairs_page(output_dir / "report.html", manifest, rows)
    return manifest


def answer_shard(config: PairsConfig, model_dir: Path, output_dir: Path, shard: Shard) -> dict[str, float]:
    """Sample one shard's part into its own log in `output_dir`; `build_pairs` makes pairs of all.

    Returns:
        What it took; empty where nothing is sampled.

    Raises:
        UserError: as `build_pairs`, of what comes before the pairing.
    """
    questions, _ = training_questions(config)
    prompter, log = ExamPrompter(config.prompt, config.questions.data), output_dir / SAMPLE_LOG
    answers = sample_shard(config, questions, model_dir, prompter=prompter, log=log, shard=shard)
    return {} if answers is None else write_timing(shard.file(output_dir / TIMING), answers)


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
    account = Account("questions")
    account.add(loaded.account)
    for problem_id, (twin, reason) in found.items():
        account.keep(source.name, -1)
        account.lose(source.name, "in the evaluation exam", f"{problem_id} and {twin}: {reason}")
    questions = [question for question in questions if question.problem_id not in found]
    if config.letters:
        questions = [with_letters(question) for question in questions]
    if not questions:
        raise UserError(f"questions of {source.name!r}: none is left to learn from")
    checked = config.exam is not None and config.contamination != "allow"
    dropped = {problem_id: list(twin) for problem_id, twin in found.items()}
    return questions, {
        "checked": checked,
        "dropped": dropped,
        "void_questions": list(loaded.void_ids),
        "account": account.to_json(),
    }


def _same_paper(config: PairsConfig) -> bool:
    return config.exam is not None and config.exam.name == config.questions.name


def pairs_account(
    samples: Sequence[Candidate], rows: Sequence[dict[str, Any]], drops: Sequence[Drop], *, gold: int
) -> Account:
    """What the filters left of every tier: of its responses (`explained malformed`) and of its pairs
    (`explained gold>malformed`). `gold`: how many questions explain something.
    """
    account = Account("responses and pairs")
    came = Counter(f"{candidate.mode} {candidate.tier}" for candidate in samples)
    came["explained gold"] += gold
    lost = Counter(f"{drop.mode} {drop.tier}" for drop in drops)
    missing = sum(drop.tier == "gold" and drop.reason == NO_EXPLANATION for drop in drops)
    for subject, count in came.items():
        unfit = lost[subject] - (missing if subject == "explained gold" else 0)
        account.keep(subject, count - unfit)
    for row in rows:
        account.keep(f"{row['mode']} {row['tier']}")
    for drop in drops:
        if drop.reason != SURPLUS:
            account.lose(f"{drop.mode} {drop.tier}", drop.reason, drop.problem_id)
    return account


def require_pairs(
    config: PairsConfig,
    account: Account,
    rows: Sequence[dict[str, Any]],
    drops: Sequence[Drop],
    *,
    questions: int,
    samples: int,
) -> None:
    """Stop where the filters took what the pairs are for, and say what they left."""
    if not rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in _reasons(drops).items())
        raise UserError(f"no pair is left of {questions} questions and {samples} samples ({reasons})")
    if not config.explains:
        return
    explained = _explained_questions(rows)
    if explained < config.min_explained_share * questions:
        left = "; ".join(line for line in account.lines() if line.startswith("explained"))
        raise UserError(
            f"only {explained} of {questions} questions have an explained pair, fewer than "
            f"pairs.min_explained_share={config.min_explained_share:g} of them ({left}); "
            "see dropped.jsonl, loosen pairs.filters, ask for more samples, or lower the share"
        )
    for subject, tally in account.subjects.items():
        if tally.total_lost >= _WHOLE_TIER and subject.startswith("explained") and ">" not in subject:
            account.require("loosen pairs.filters, or give the tier no weight in pairs.weights", subject=subject)


def _explained_questions(rows: Sequence[dict[str, Any]]) -> int:
    return len({row["problem_id"] for row in rows if row["mode"] == "explained"})


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
