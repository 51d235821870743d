"""`medllm eval`: one model, one exam, both modes."""

from pathlib import Path
from typing import Any

from megatron_medllm.config.exam import EvalConfig
from megatron_medllm.corpus.same_question import same_questions
from megatron_medllm.errors import UserError
from megatron_medllm.evaluation.exam_page import write_exam_page
from megatron_medllm.evaluation.gate import check_requirements, parse_requirement
from megatron_medllm.evaluation.markdown import summary_markdown
from megatron_medllm.evaluation.outcome import Outcome, judge_answer, mode_summary, sample_summary, stability_gap
from megatron_medllm.exams.loading import Exam, load_exam
from megatron_medllm.exams.prompts import Mode
from megatron_medllm.exams.question import Question
from megatron_medllm.inference.answer_log import NOT_OF_THE_RESULT, TIMING, Answers, answer_requests, write_timing
from megatron_medllm.inference.exam_requests import ExamPrompter
from megatron_medllm.inference.protocol import Request
from megatron_medllm.shard import Shard
from megatron_medllm.storage import atomic_write, write_json, write_jsonl

ANSWER_LOG = "answers.jsonl"
_Asked = tuple[Question, Mode, int, Request]


def run_exam(config: EvalConfig, model_dir: Path, output_dir: Path, *, merge: bool = False) -> dict[str, Any]:
    """Examine the model in `model_dir`; write results.jsonl, summary.json and the reports to `output_dir`.

    Killed and started again it goes on where it stopped: finished answers lie in `output_dir`/answers.jsonl, and those
    of shards beside it. With `merge` these have to answer everything.

    Returns:
        The contents of summary.json, and as `timing` those of timing.json. `requirements` says which gates are met;
        nothing is raised for one that is not.

    Raises:
        UserError: bad questions, a model directory that cannot be used, an engine that failed, an incomplete merge.
    """
    exam, whole_exam, asked = _prepare(config)
    answers = _answer(config, asked, model_dir, output_dir, merge=merge)
    outcomes = [
        judge_answer(question, mode, sample, request, answers.completions[request.request_id], parser=config.parser)
        for question, mode, sample, request in asked
    ]
    summary = {
        "exam": exam.name,
        "model": str(model_dir),
        "questions": len(exam.questions),
        "void_questions": list(exam.void_ids),
        "account": exam.account.to_json(),
        "provenance": answers.provenance,
        **summarize_outcomes(config, exam, outcomes, whole_exam=whole_exam),
        "config": config.model_dump(mode="json", exclude=NOT_OF_THE_RESULT),
    }
    summary["requirements"] = check_requirements(config.require, summary)
    write_jsonl(output_dir / "results.jsonl", [outcome.to_row() for outcome in outcomes])
    write_text(output_dir / "report.md", summary_markdown(summary))
    if config.html:
        write_exam_page(output_dir / "report.html", summary, outcomes, examples=config.examples)
    timing = write_timing(output_dir / TIMING, answers)
    write_json(output_dir / "summary.json", summary)  # last: its presence says that the evaluation is complete
    return summary | {"timing": timing}


def answer_shard(config: EvalConfig, model_dir: Path, output_dir: Path, shard: Shard) -> dict[str, Any]:
    """Answer one shard's part into its own log in `output_dir`; `run_exam` makes results of all.

    Returns:
        What it took.

    Raises:
        UserError: as `run_exam`.
    """
    _, _, asked = _prepare(config)
    answers = _answer(config, asked, model_dir, output_dir, shard=shard)
    return write_timing(shard.file(output_dir / TIMING), answers)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as stream:
        stream.write(text.encode())


def load_configured_exam(config: EvalConfig) -> tuple[Exam, Exam]:
    """The questions to ask, and the whole exam that they come from (to know whether a year is complete).

    Raises:
        UserError: no question is left after the filters.
    """
    section = config.exam
    whole = load_exam(section.name, section.data)
    exam = load_exam(section.name, section.data, years=section.years, text_only=section.text_only, limit=section.limit)
    if not exam.questions:
        raise UserError(f"exam {section.name!r}: no question is left after years, text_only and limit")
    return exam, whole


def _prepare(config: EvalConfig) -> tuple[Exam, Exam, list[_Asked]]:
    """The questions to ask, the whole exam, and every request with its question, mode and sample."""
    for requirement in config.require:  # a typing error should not cost an evaluation
        parse_requirement(requirement, modes=config.modes)
    exam, whole_exam = load_configured_exam(config)
    prompter = ExamPrompter(config.prompt, config.exam.data)
    told = same_questions(prompter.shots, exam.questions)
    if told:
        shot, twin = next(iter(told.items()))
        raise UserError(
            f"few-shot item {shot} is question {twin} of the exam, and would tell its answer: "
            "set prompt.shot_file to other questions, or exam.years to other papers"
        )
    asked: list[_Asked] = [
        (question, mode, sample, prompter.request(question, mode, config.decoding, sample=sample))
        for mode in config.modes
        for question in exam.questions
        for sample in range(config.samples)
    ]
    return exam, whole_exam, asked


def _answer(
    config: EvalConfig,
    asked: list[_Asked],
    model_dir: Path,
    output_dir: Path,
    *,
    shard: Shard | None = None,
    merge: bool = False,
) -> Answers:
    return answer_requests(
        config.engine,
        model_dir,
        [request for *_, request in asked],
        log=output_dir / ANSWER_LOG,
        title=f"{config.exam.name} on {model_dir.name}",
        shard=shard,
        merge=merge,
    )


def summarize_outcomes(config: EvalConfig, exam: Exam, outcomes: list[Outcome], *, whole_exam: Exam) -> dict[str, Any]:
    """Scores per mode and, when both modes were run, the stability gap. Headline numbers are of the first sample."""
    modes: dict[str, Any] = {}
    first: dict[str, list[Outcome]] = {}
    for mode in config.modes:
        of_mode = [outcome for outcome in outcomes if outcome.mode == mode]
        first[mode] = [outcome for outcome in of_mode if outcome.sample == 0]
        modes[mode] = mode_summary(exam, first[mode], whole_exam=whole_exam, confidence=config.confidence)
        if config.samples > 1:
            modes[mode]["samples"] = sample_summary(of_mode, parser=config.parser)
    summary: dict[str, Any] = {"modes": modes}
    if {"answer_only", "explained"} <= set(config.modes):
        summary["gap"] = stability_gap(
            first["answer_only"],
            first["explained"],
            resamples=config.resamples,
            confidence=config.confidence,
            seed=config.decoding.seed,
        )
    return summary
