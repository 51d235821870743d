"""One exam question, and how a row of a question file becomes one."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from megatron_medllm.exams.gold import NO_ANSWER, Gold, read_choice_gold, read_number_gold
from megatron_medllm.exams.labels import read_label_list
from megatron_medllm.exams.schema import read_metadata_row, read_question_row, short

_LICENSING_ID = re.compile(r"\d{3}([A-F])\d+$")


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


def question_from_row(
    row: dict[str, Any],
    *,
    year: str,
    metadata: dict[str, Any],
    rules: dict[str, Any],
    default_id: str = "",
    counted_from: int | None = None,
) -> Question:
    """Build a question from one row, its metadata row (or {}) and the exam's exceptions.

    Args:
        default_id: for a row without an id, where its layout has none.
        counted_from: how the file counts choices (`gold.counts_from`).

    Raises:
        ValueError: a field is missing or would be misread; the message names it.
        VoidQuestionError: the row's key says that there is no answer (`解なし`).
    """
    read = read_question_row(row, default_id=default_id)
    if any(NO_ANSWER in str(value) for value in read.gold.values()):
        raise VoidQuestionError(read.problem_id)
    numeric = not read.choices.texts and not read.choices.pictures
    if numeric:
        number = read_number_gold(read)
        gold = Gold((), number, (number,))
    else:
        gold = read_choice_gold(read, counted_from=counted_from)
    exception = rules.get("exceptions", {}).get(read.problem_id, {})
    about = read_metadata_row({"problem_id": read.problem_id, **metadata})
    section = _LICENSING_ID.match(read.problem_id)
    return Question(
        problem_id=read.problem_id,
        problem_text=read.problem_text,
        choices=read.choices.texts,
        labels=gold.labels,
        kind="numeric" if numeric else "choice",
        answer=gold.keys,
        accepted=tuple(map(tuple, exception["accept"])) if "accept" in exception else gold.accepted,
        points=read.points,
        text_only=read.text_only,
        everyone_credited=bool(exception.get("everyone_credited", False)),
        year=read.year or year,
        section=read.section or (section.group(1) if section else ""),
        category=read.category or about.category,
        group=read.group or read.problem_id,
        prohibited=_prohibited(about.kinki or read.kinki, gold.labels),
        human_accuracy=about.human_accuracy,
        explanation=read.explanation,
    )


def _prohibited(items: tuple[str, ...], labels: tuple[str, ...]) -> frozenset[str]:
    found: set[str] = set()
    for item in items:
        keys = read_label_list(item, labels)
        if keys is None:
            raise ValueError(f"field 'kinki' names {short(item)}, which is not a choice ({', '.join(labels)})")
        found |= set(keys)
    return frozenset(found)
