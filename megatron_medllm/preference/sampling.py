"""Ask the checkpoint for several answers to every training question, and judge each against the gold."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_medllm.config.exam import DecodingConfig
from megatron_medllm.config.pairs import PairsConfig
from megatron_medllm.exams.parsing import Parser, parse_answer
from megatron_medllm.exams.prompts import Mode
from megatron_medllm.exams.question import Question
from megatron_medllm.exams.scoring import score_answer
from megatron_medllm.inference.answer_log import Answers, answer_requests
from megatron_medllm.inference.exam_requests import ExamPrompter
from megatron_medllm.inference.protocol import Completion, Request
from megatron_medllm.preference.candidate import Candidate, Tier
from megatron_medllm.shard import Shard


def sample(
    config: PairsConfig,
    questions: Sequence[Question],
    model_dir: Path,
    *,
    prompter: ExamPrompter,
    log: Path,
    merge: bool = False,
) -> tuple[list[Candidate], Answers | None]:
    """Sample and judge; resumable through `log`. With `merge`, the shards' logs have to hold every sample.

    Returns:
        The candidates in question order, and the answers that they were made of; None where nothing is sampled.

    Raises:
        UserError: the model cannot be used, the engine failed, or a merge is incomplete.
    """
    asked = _asked(config, questions, prompter)
    if not asked:
        return [], None
    answers = _answer(config, asked, model_dir, log=log, merge=merge)
    candidates = [
        judge_candidate(
            question,
            mode,
            request,
            answers.completions[request.request_id],
            parser=config.parser,
            provenance=answers.provenance,
        )
        for question, mode, request in asked
    ]
    return candidates, answers


def sample_shard(
    config: PairsConfig,
    questions: Sequence[Question],
    model_dir: Path,
    *,
    prompter: ExamPrompter,
    log: Path,
    shard: Shard,
) -> Answers | None:
    """Sample one shard's part into its own log beside `log`; None where nothing is sampled.

    Raises:
        UserError: the model cannot be used or the engine failed.
    """
    asked = _asked(config, questions, prompter)
    return _answer(config, asked, model_dir, log=log, shard=shard) if asked else None


_Asked = tuple[Question, Mode, Request]


def _asked(config: PairsConfig, questions: Sequence[Question], prompter: ExamPrompter) -> list[_Asked]:
    return [
        (question, mode, request)
        for question in questions
        for mode, request in sampling_requests(config, prompter, question)
    ]


def _answer(
    config: PairsConfig,
    asked: Sequence[_Asked],
    model_dir: Path,
    *,
    log: Path,
    shard: Shard | None = None,
    merge: bool = False,
) -> Answers:
    requests = [request for *_, request in asked]
    title = f"samples of {model_dir.name}"
    return answer_requests(config.engine, model_dir, requests, log=log, title=title, shard=shard, merge=merge)


def judge_candidate(
    question: Question,
    mode: Mode,
    request: Request,
    completion: Completion,
    *,
    parser: Parser,
    provenance: dict[str, Any],
) -> Candidate:
    """Place a completion in the hierarchy by its parsed answer; `provenance` names the model and engine."""
    parsed = parse_answer(completion.text, question, mode=mode, parser=parser)
    tier: Tier
    if parsed.malformed:
        tier = "malformed"
    else:
        tier = "right" if score_answer(question, parsed, parser=parser).correct else "wrong"
    written_by: dict[str, Any] = {
        "written_by": "model",
        **{key: provenance[key] for key in ("model_digest", "endpoint", "served_model", "engine") if key in provenance},
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "request_id": request.request_id,
        "finish_reason": completion.finish_reason,
        "malformed_reason": parsed.reason,
    }
    return Candidate(
        question.problem_id,
        mode,
        tier,
        completion.text,
        parsed.answer,
        written_by,
        truncated=completion.finish_reason == "length",
        prompt=request.prompt or list(request.messages),
    )


def sampling_requests(config: PairsConfig, prompter: ExamPrompter, question: Question) -> list[tuple[Mode, Request]]:
    """What the model is asked about a question: explanations at every temperature, then short answers."""
    sampling = config.sampling
    decoding = DecodingConfig(
        top_p=sampling.top_p, seed=sampling.seed, max_new_tokens=sampling.max_new_tokens, stop=sampling.stop
    )
    plan: list[tuple[Mode, float, int]] = [
        ("explained", temperature, number)
        for temperature in sampling.temperatures
        for number in range(sampling.samples)
    ]
    if config.max_answer_only_pairs and config.weights.answer_only:
        plan += [("answer_only", sampling.temperatures[-1], number) for number in range(sampling.answer_only_samples)]
    return [
        (mode, prompter.request(question, mode, decoding, sample=number, temperature=temperature))
        for mode, temperature, number in plan
    ]
