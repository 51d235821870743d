"""One exam question, and how a row of IgakuQA's JSON-lines schema becomes one."""

import re
from dataclasses import dataclass
from itertools import combinations
from string import ascii_lowercase
from typing import Any, Literal

REQUIRED_FIELDS = ("problem_id", "problem_text", "choices", "answer")
_LICENSING_ID = re.compile(r"\d{3}([A-F])\d+$")
_CHOOSE_SOME = re.compile(r"いずれか(?:\s*)([一二三123１２３])つ")
_COUNT = {"一": 1, "二": 2, "三": 3, "1": 1, "2": 2, "3": 3, "１": 1, "２": 2, "３": 3}


@dataclass(frozen=True, slots=True)
class Question:
    """A question with everything that scoring and reporting need.

    `answer` is the published key, `accepted` every set of labels (or every number, for numeric questions) that earns
    the points; `n_answers` is how many labels the question asks for. `group` is shared by questions on one case.
    """

    problem_id: str
    problem_text: str
    choices: tuple[str, ...]
    labels: tuple[str, ...]
    kind: Literal["choice", "numeric"]
    answer: tuple[str, ...]
    accepted: tuple[tuple[str, ...], ...]
    points: int = 1
    text_only: bool = True
    everyone_credited: bool = False
    year: str = ""
    section: str = ""
    category: str = ""
    group: str = ""
    prohibited: frozenset[str] = frozenset()
    human_accuracy: float | None = None
    explanation: str = ""

    @property
    def n_answers(self) -> int:
        """How many labels a right answer has."""
        return len(self.accepted[0])


class VoidQuestionError(Exception):
    """The examiners declared that the question has no right answer."""


def question_from_row(row: dict[str, Any], *, year: str, metadata: dict[str, Any], rules: dict[str, Any]) -> Question:
    """Build a question from one row, its metadata row (or {}) and the exam's exceptions.

    Raises:
        ValueError: a field is missing or has an unusable value; the message names it.
        VoidQuestionError: the row's key says that there is no answer (`解なし`).
    """
    for field in REQUIRED_FIELDS:
        if field not in row:
            raise ValueError(f"missing field {field!r} (the schema is {', '.join(REQUIRED_FIELDS)}, points, text_only)")
    problem_id = str(row["problem_id"])
    answer = _answer_list(row["answer"])
    if any("解なし" in item for item in answer):
        raise VoidQuestionError(problem_id)
    choices = _choice_list(row["choices"])
    numeric = not choices and row["choices"] != "IMAGES"
    exception = rules.get("exceptions", {}).get(problem_id, {})
    section = _LICENSING_ID.match(problem_id)
    return Question(
        problem_id=problem_id,
        problem_text=_string(row, "problem_text"),
        choices=choices,
        labels=() if numeric else _labels(choices, answer),
        kind="numeric" if numeric else "choice",
        answer=tuple(answer),
        accepted=tuple(tuple(item) for item in exception["accept"]) if "accept" in exception else _accepted(answer),
        points=_points(row.get("points", 1)),
        text_only=bool(row.get("text_only", True)),
        everyone_credited=bool(exception.get("everyone_credited", False)),
        year=str(row.get("year", year)),
        section=str(row.get("section") or (section.group(1) if section else "")),
        category=str(row.get("category") or metadata.get("category", "")),
        group=str(row.get("group", problem_id)),
        prohibited=frozenset("".join(metadata.get("kinki", row.get("kinki", []))).replace(" ", "")),
        human_accuracy=_percentage(metadata.get("human_accuracy", "")),
        explanation=str(row.get("explanation") or row.get("comment") or ""),
    )


def _answer_list(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item.strip() for item in value):
        raise ValueError(
            f"field 'answer' must be a non-empty list of strings: a question needs its gold, found {value!r}"
        )
    return [item.strip() for item in value]


def _choice_list(value: Any) -> tuple[str, ...]:
    if value == "IMAGES":  # YakugakuQA: the choices are pictures
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"field 'choices' must be a list of strings, found {value!r}")
    if len(value) > len(ascii_lowercase):
        raise ValueError(f"field 'choices' has {len(value)} entries; at most {len(ascii_lowercase)} can be labelled")
    return tuple(value)


def _string(row: dict[str, Any], field: str) -> str:
    if not isinstance(row[field], str):
        raise ValueError(f"field {field!r} must be a string, found {row[field]!r}")
    return row[field]


def _points(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"field 'points' must be a whole number, found {value!r}") from None


def _percentage(value: Any) -> float | None:
    return float(value) / 100 if value not in ("", None) else None


def _labels(choices: tuple[str, ...], answer: list[str]) -> tuple[str, ...]:
    """Letters, or numbers where the key is written in numbers (YakugakuQA); pictures count as five choices."""
    keys = [item[0] for item in answer]
    if all(key.isdigit() for key in keys):
        count = len(choices) or max(5, *map(int, keys))
        labels = tuple(str(number) for number in range(1, count + 1))
    else:
        labels = tuple(ascii_lowercase[: len(choices) or 5])
    unknown = [key for key in keys if key not in labels]
    if unknown:
        raise ValueError(f"field 'answer' names {unknown[0]!r}, which is not a choice ({', '.join(labels)})")
    return labels


def _accepted(answer: list[str]) -> tuple[tuple[str, ...], ...]:
    """The key itself, or every combination where its note says that any k of the listed ones are right."""
    note = _CHOOSE_SOME.search(answer[-1])
    if note is None:
        return (tuple(sorted(answer)),)
    keys = sorted(item[0] for item in answer)
    return tuple(combinations(keys, _COUNT[note.group(1)]))
