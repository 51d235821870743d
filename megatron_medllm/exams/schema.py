"""The rows of question files, checked field by field: what would be misread is refused.

A question is written in one of four layouts, told apart by their fields:

- IgakuQA, YakugakuQA: `problem_id`, `problem_text`, `choices` (a list, or `IMAGES`), `answer` (a list of labels)
- MedQA: `question`, `options` (label → text, or `[{"key": "A", "value": …}]`), `answer_idx`, `answer` (its text)
- MMLU: `question`, `choices` (a list), `answer` (a letter, or a number), `answer_index` (counted from 0)
- ARC: `question`, `choices` (`{"text": […], "label": […]}`), `answerKey`
"""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from string import ascii_lowercase
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictBool, ValidationError
from pydantic_core import PydanticCustomError

from megatron_medllm.exams.labels import alphabet, read_label

_NAMES = {
    "problem_id": ("problem_id", "id", "question_id"),
    "problem_text": ("problem_text", "question", "text"),
    "choices": ("choices", "options"),
    "explanation": ("explanation", "comment"),
}
# In the order in which they are believed; all that a row has must agree.
GOLD_FIELDS = ("answer_idx", "answer_index", "answerKey", "answer")
_GOLD_ELSEWHERE = ("label",)  # AGIEval
_LABEL_KEYS, _TEXT_KEYS = ("label", "key", "letter", "id"), ("text", "value", "content")
_PRINTED = re.compile(r"\s*[(（\[]?([A-Za-zＡ-Ｚａ-ｚ]|[\d０-９]{1,2}|[①-⑳])([)）\].．:：、]|(?<=[①-⑳]))\s*(?=\S)")
_MOST_POINTS = 10_000
PICTURES = "IMAGES"
_Model = TypeVar("_Model", bound=BaseModel)


def _fault(message: str) -> PydanticCustomError:
    return PydanticCustomError("schema", message.replace("{", "{{").replace("}", "}}"))


def _text(value: Any) -> Any:
    if not isinstance(value, str):
        raise _fault("must be a string")
    return value


def _identifier(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise _fault("must be a non-empty string or a whole number")
    return str(value)


def _whole(value: Any) -> int:
    message = "must be a whole number, 0 or more"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _fault(message)
    try:
        number = Decimal(str(value).strip())
    except InvalidOperation:
        raise _fault(message) from None
    if not number.is_finite() or not 0 <= number <= _MOST_POINTS or number != number.to_integral_value():
        raise _fault(message)
    return int(number)


def _share(value: Any) -> float | None:
    if value == "":
        return None
    message = "must be a percentage from 0 to 100"
    try:
        number = Decimal(str(value).strip().removesuffix("%")) if isinstance(value, str | int | float) else None
    except InvalidOperation:
        number = None
    if number is None or isinstance(value, bool) or not number.is_finite() or not 0 <= number <= 100:
        raise _fault(message)
    return float(number) / 100


def _prohibited(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise _fault("must be a list of labels")
    return tuple(item for item in items if item.strip())


@dataclass(frozen=True, slots=True)
class Choices:
    """Choices as written: their texts, and their labels where the file prints any. `pictures`: texts are not known."""

    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    pictures: bool = False


def _choices(value: Any) -> Choices:
    if value == PICTURES:
        return Choices(pictures=True)
    pairs = _labelled(value)
    if pairs is None and (not isinstance(value, list) or not all(map(_is_text, value))):
        raise _fault("must be a list of strings, or labels with their texts")
    if len(value) > len(ascii_lowercase):
        raise _fault(f"has {len(value)} entries; at most {len(ascii_lowercase)} can be labelled")
    if pairs is None:
        return Choices(tuple(map(str, value)))
    by_label = dict(pairs)
    for digits in (False, True):
        labels = alphabet(len(pairs), digits=digits)
        if set(by_label) == set(labels):
            return Choices(tuple(by_label[label] for label in labels), labels)
    raise _fault(f"are labelled {short([label for label, _ in pairs])}; expected a, b, … or 1, 2, … without gaps")


def _is_text(value: Any) -> bool:
    """A choice's text; a number stands for its digits."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _labelled(value: Any) -> list[tuple[str, str]] | None:
    """(label, text) of a mapping, of a list of mappings, or of ARC's two lists; None for anything else."""
    if isinstance(value, dict) and set(value) == {"text", "label"}:
        texts, labels = value["text"], value["label"]
        if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
            raise _fault("must have as many labels as texts")
        pairs = list(zip(labels, texts, strict=True))
    elif isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        pairs = [
            (
                next((item[k] for k in _LABEL_KEYS if k in item), None),
                next((item[k] for k in _TEXT_KEYS if k in item), None),
            )
            for item in value
        ]
    else:
        return None
    if not all(isinstance(label, str | int) and _is_text(text) for label, text in pairs):
        raise _fault("must have a label and a text each")
    return [(read_label(str(label)), str(text)) for label, text in pairs]


def _printed(texts: list[Any]) -> dict[str, str] | None:
    """Labels that stand before the texts themselves (`(A) …`, `2. …`), where all have one and they are in order."""
    found = [_PRINTED.match(text) for text in texts if isinstance(text, str)]
    labels = [read_label(match.group(1)) for match in found if match]
    if len(texts) < 2 or not any(labels == list(alphabet(len(texts), digits=digits)) for digits in (False, True)):
        return None
    return {label: text[match.end() :] for label, text, match in zip(labels, texts, found, strict=True) if match}


Text = Annotated[str, BeforeValidator(_text)]
Identifier = Annotated[str, BeforeValidator(_identifier)]
Whole = Annotated[int, BeforeValidator(_whole)]


class QuestionRow(BaseModel):
    """One row in our names, its gold as written. Fields that nobody here uses may be there and are not looked at."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    problem_id: Identifier = ""
    problem_text: Text
    choices: Annotated[Choices, BeforeValidator(_choices)]
    points: Whole = 1
    text_only: StrictBool = True
    year: Identifier = ""
    section: Text = ""
    category: Text = ""
    group: Identifier = ""
    explanation: Text = ""
    kinki: Annotated[tuple[str, ...], BeforeValidator(_prohibited)] = ()
    gold: dict[str, Any] = {}
    own_layout: bool = True


class MetadataRow(BaseModel):
    """A row of `NAME_metadata.jsonl`: what is known of the question of that id."""

    model_config = ConfigDict(frozen=True)

    problem_id: Identifier
    category: Text = ""
    kinki: Annotated[tuple[str, ...], BeforeValidator(_prohibited)] = ()
    human_accuracy: Annotated[float | None, BeforeValidator(_share)] = None


def read_question_row(row: dict[str, Any], *, needs_gold: bool = True, default_id: str = "") -> QuestionRow:
    """Check a row and give it our names.

    Args:
        needs_gold: False where only the text matters; choices may then be missing too.
        default_id: for layouts that have no ids (MedQA, MMLU).

    Raises:
        ValueError: a field is missing or would be misread; names it as the file does.
    """
    names = {ours: next((n for n in theirs if row.get(n) is not None), theirs[0]) for ours, theirs in _NAMES.items()}
    # IgakuQA's `explanation` is empty where `comment` tells it.
    if not row.get(names["explanation"]):
        names["explanation"] = "comment"
    own_layout = row.get("problem_text") is not None
    if not own_layout and row.get("question") is None and row.get("text") is None:
        raise ValueError("no question here (expected `problem_text`, `question` or `text`)")
    values = {
        field: row.get(names.get(field, field))
        for field in QuestionRow.model_fields
        if field not in ("gold", "own_layout")
    }
    values = {field: value for field, value in values.items() if value is not None}
    if not own_layout or not needs_gold:
        values.setdefault("problem_id", default_id)
    if not needs_gold:
        values.setdefault("choices", [])
    fields = [field for field in (*GOLD_FIELDS, *_GOLD_ELSEWHERE) if row.get(field) is not None]
    gold = {field: row[field] for field in fields if field not in _GOLD_ELSEWHERE or fields == [field]}
    for field, wanted in (("problem_id", True), ("choices", True), ("answer", needs_gold)):
        if wanted and field not in values and not (field == "answer" and gold):
            raise ValueError(f"missing field {field!r} (the schema is problem_id, problem_text, choices, answer, …)")
    if not own_layout and isinstance(values["choices"], list):
        values["choices"] = _printed(values["choices"]) or values["choices"]
    checked = _validated(QuestionRow, values | {"gold": gold, "own_layout": own_layout}, names)
    if needs_gold and not checked.problem_text.strip() and checked.text_only:
        raise ValueError(f"field {names['problem_text']!r} is empty, and no image is said to tell the question")
    if needs_gold and checked.text_only and any(not text.strip() for text in checked.choices.texts):
        raise ValueError(f"field {names['choices']!r} has an empty choice, and no image is said to tell it")
    return checked


def read_metadata_row(row: dict[str, Any]) -> MetadataRow:
    """Check a row of a metadata file.

    Raises:
        ValueError: a field is missing or would be misread.
    """
    return _validated(MetadataRow, {field: value for field, value in row.items() if value is not None}, {})


def _validated(model: type[_Model], values: dict[str, Any], names: dict[str, str]) -> _Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        field = str(fault["loc"][0])
        what = (
            "missing" if fault["type"] == "missing" else fault["msg"].removeprefix("Input ").replace("should", "must")
        )
        raise ValueError(f"field {names.get(field, field)!r} {what}, found {short(fault['input'])}") from None


def short(value: Any) -> str:
    """How a message shows a value: one line of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
