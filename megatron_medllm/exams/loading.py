"""Questions from files: IgakuQA and YakugakuQA as published, and any file of the layouts that `schema` reads."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_medllm.account import Account
from megatron_medllm.errors import UserError
from megatron_medllm.exams.gold import counts_from
from megatron_medllm.exams.question import Question, VoidQuestionError, question_from_row
from megatron_medllm.exams.rows import read_rows
from megatron_medllm.exams.schema import QuestionRow, read_metadata_row, read_question_row
from megatron_medllm.storage import read_json

RULES_DIR = Path(__file__).parent / "rules"
_YEAR = re.compile(r"(?:19|20)\d\d$")
_METADATA = "_metadata.jsonl"
# What lies beside questions in a clone of IgakuQA: metadata, English translations, worked examples, predictions.
_NOT_QUESTIONS = re.compile(r"(_metadata|_translate)\.jsonl$|^fewshot")
_NOT_QUESTION_DIRS = {"baseline_results", "scripts"}
_SHARED_STEM = re.compile(r"^次の文を読み、(?:(\d+)(?:、|〜|～)(\d+)|以下)の問いに答えよ")
_NUMBERED_ID = re.compile(r"(\d{3}[A-F])(\d+)$")


@dataclass(frozen=True, slots=True)
class Exam:
    """An exam's name, its questions in file order, its rules, and the ids left out because they have no answer.

    `account`: questions kept, and those left out as void or, with `text_only`, for their images.
    """

    name: str
    questions: tuple[Question, ...]
    rules: dict[str, Any]
    void_ids: tuple[str, ...] = ()
    account: Account = field(default_factory=lambda: Account("questions"), compare=False)


def load_exam(
    name: str, data: Sequence[Path], *, years: Sequence[str] = (), text_only: bool = False, limit: int | None = None
) -> Exam:
    """Read every question of `data` (files, or directories searched for `*.jsonl`), in a stable order.

    Args:
        name: `igakuqa` and `yakugakuqa` bring their exceptions and pass rules; any other name has none.
        data: files or directories. `NAME_metadata.jsonl` beside `NAME.jsonl` adds category and prohibited choices.
        years: keep these only; all when empty.
        text_only: leave out the questions that need an image.
        limit: keep the first so many after the filters.

    Raises:
        UserError: no file, an unknown schema, a question without gold, a repeated id; names file and line.
    """
    rules = load_rules(name)
    account = Account("questions")
    questions: list[Question] = []
    void_ids: list[str] = []
    places: dict[str, str] = {}
    for path in question_files(data):
        for place, question in _load_file(path, rules):
            problem_id = question if isinstance(question, str) else question.problem_id
            if problem_id in places:
                raise UserError(f"{place}: problem_id {problem_id!r} is also in {places[problem_id]}")
            places[problem_id] = place
            if isinstance(question, str):
                void_ids.append(question)
                account.lose(name, "no right answer", f"{place}: {question} is declared void")
            else:
                questions.append(question)
    questions = _with_groups(questions)
    if years:
        missing = set(years) - {question.year for question in questions}
        if missing:
            raise UserError(f"{_names(data)}: no questions of {', '.join(sorted(missing))}")
        questions = [question for question in questions if question.year in set(years)]
    if text_only:
        for question in questions:
            if not question.text_only:
                account.lose(name, "needs an image", f"{places[question.problem_id]}: {question.problem_id}")
        questions = [question for question in questions if question.text_only]
    questions = questions[:limit]
    account.keep(name, len(questions))
    return Exam(name, tuple(questions), rules, tuple(void_ids), account)


def load_rules(name: str) -> dict[str, Any]:
    """The exam's exceptions, pass marks and published results; empty for an exam that is not shipped."""
    path = RULES_DIR / f"{name}.json"
    return read_json(path) if path.is_file() else {}


def question_files(data: Sequence[Path]) -> list[Path]:
    """The question files of `data`, sorted inside each directory; a whole clone of IgakuQA may be given.

    Raises:
        UserError: a path does not exist, or a directory holds no question file.
    """
    files: list[Path] = []
    for place in data:
        if place.is_file():
            files.append(place)
            continue
        if not place.is_dir():
            raise UserError(f"{place}: no such file or directory")
        inside = sorted(
            path
            for path in place.rglob("*.jsonl")
            if not _NOT_QUESTIONS.search(path.name) and _NOT_QUESTION_DIRS.isdisjoint(path.relative_to(place).parts)
        )
        if not inside:
            raise UserError(f"{place}: holds no question files (*.jsonl)")
        files += inside
    return files


def load_shots(path: Path, rules: dict[str, Any] | None = None) -> tuple[Question, ...]:
    """Worked examples for few-shot prompts: questions that may carry an `explanation`.

    Raises:
        UserError: as `load_exam`.
    """
    return tuple(question for _, question in _load_file(path, rules or {}) if isinstance(question, Question))


def is_metadata(path: Path) -> bool:
    """Whether a file only tells about the questions of the file beside it."""
    return path.name.endswith(_METADATA)


def load_question_texts(path: Path) -> list[QuestionRow]:
    """The questions of a file as far as their text goes: nothing is asked of their gold, and `text` alone is enough.

    Raises:
        UserError: a row is no question; names file and line.
    """
    found = []
    for number, (place, row) in enumerate(read_rows(path), start=1):
        try:
            found.append(read_question_row(row, needs_gold=False, default_id=f"{path.name}:{number}"))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
    return found


def _load_file(path: Path, rules: dict[str, Any]) -> list[tuple[str, Question | str]]:
    """Place and question of every row, or place and id of one without an answer."""
    metadata = _load_metadata(path.with_name(path.stem + _METADATA))
    year = next((part for part in (path.stem, path.parent.name) if _YEAR.match(part)), "")
    rows = list(read_rows(path))
    try:
        counted_from = counts_from(row for _, row in rows)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    found: list[tuple[str, Question | str]] = []
    for number, (place, row) in enumerate(rows, start=1):
        about = metadata.get(str(row.get("problem_id")), {})
        try:
            question = question_from_row(
                row,
                year=year,
                metadata=about,
                rules=rules,
                default_id=f"{path.stem}:{number}",
                counted_from=counted_from,
            )
        except VoidQuestionError as error:
            found.append((place, str(error)))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        else:
            found.append((place, question))
    return found


def _load_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of a metadata file by problem_id; none where there is no file."""
    found: dict[str, dict[str, Any]] = {}
    for place, row in read_rows(path) if path.is_file() else ():
        try:
            problem_id = read_metadata_row(row).problem_id
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        if problem_id in found:
            raise UserError(f"{place}: problem_id {problem_id!r} is described twice")
        found[problem_id] = row
    return found


def _with_groups(questions: list[Question]) -> list[Question]:
    """Give the questions on one case a common `group`.

    Only the first of them carries the case. Older papers say which numbers follow (`40、41`, `51〜53`); newer ones say
    `以下の問い`, and there the case runs to the next one, the last as far as the one before it.
    """
    starts: dict[str, list[tuple[int, int | None]]] = {}
    for question in questions:
        stem, numbered = _SHARED_STEM.match(question.problem_text), _NUMBERED_ID.match(question.problem_id)
        if stem and numbered:
            end = int(stem.group(2)) if stem.group(2) else None
            starts.setdefault(numbered.group(1), []).append((int(numbered.group(2)), end))
    group_of: dict[str, str] = {}
    for section, cases in starts.items():
        size = 2
        for position, (first, end) in enumerate(cases):
            if end is None:
                following = cases[position + 1][0] if position + 1 < len(cases) else first + size
                size = following - first
                end = following - 1
            group_of |= {f"{section}{number}": f"{section}{first}" for number in range(first, end + 1)}
    return [replace(q, group=group_of.get(q.problem_id, q.group)) for q in questions]


def _names(data: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in data)
