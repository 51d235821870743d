"""Gold answers as they are written, and what they mean; one that no answer could match is refused."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from megatron_medllm.exams.labels import alphabet, plain, read_label, read_label_list, squeezed
from megatron_medllm.exams.schema import QuestionRow, short

_NOTE = re.compile(r"\s*([^(（]+?)\s*[(（](.*)[)）]\s*$", re.DOTALL)
_CHOOSE_SOME = re.compile(r"いずれか(?:\s*)([一二三123１２３])つ")
_COUNT = {"一": 1, "二": 2, "三": 3, "1": 1, "2": 2, "3": 3, "１": 1, "２": 2, "３": 3}
_EITHER = re.compile(r"\s+or\s+|\s*(?:または|又は|もしくは|あるいは)\s*", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_FROM_ZERO = ("answer_idx", "answer_index")
NO_ANSWER = "解なし"
_PICTURED_CHOICES = 5


def counts_from(rows: Iterable[dict[str, Any]]) -> int | None:
    """Whether whole numbers under `answer` count the choices from 0 or from 1; None when nothing in the file says so.

    An MMLU row (it has a `subject`) counts from 0. Else a 0 says so, and a number as large as the number of choices
    says the contrary.

    Raises:
        ValueError: both occur.
    """
    zero = one = False
    for row in rows:
        choices = row.get("choices", row.get("options"))
        value = row.get("answer")
        if "problem_text" in row or isinstance(value, bool) or not isinstance(choices, list):
            continue
        number = value if isinstance(value, int) else int(str(value)) if _is_index(value) else None
        if number is None or (isinstance(value, str) and value in choices):
            continue
        zero |= number == 0 or (isinstance(value, int) and isinstance(row.get("subject"), str))
        one |= number == len(choices)
    if zero and one:
        raise ValueError("field 'answer' holds 0 as well as the number of choices: counted from 0 or from 1?")
    return 0 if zero else 1 if one else None


def _is_index(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 4


def read_number_gold(row: QuestionRow) -> tuple[str, ...]:
    """The one number that a question without choices asks for, in half-width digits.

    Raises:
        ValueError: it is no plain number.
    """
    for field, value in row.gold.items():
        items = value if isinstance(value, list) else [value]
        if len(items) == 1 and isinstance(items[0], str | int | float) and not isinstance(items[0], bool):
            text = plain(str(items[0])).strip()
            text = text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
            if _NUMBER.fullmatch(text):
                return (text,)
        raise ValueError(
            f"field {field!r}: a question without choices needs one number as its gold, found {short(value)}"
        )
    raise ValueError("missing field 'answer': a question needs its gold")


@dataclass(frozen=True, slots=True)
class Gold:
    """Labels of a question's choices, those that its gold names, and every set of labels that earns the points."""

    labels: tuple[str, ...]
    keys: tuple[str, ...]
    accepted: tuple[tuple[str, ...], ...]


def read_choice_gold(row: QuestionRow, *, counted_from: int | None) -> Gold:
    """Read every gold field of a row; they must agree on one reading.

    Args:
        counted_from: what `counts_from` says of the file.

    Raises:
        ValueError: the gold names no choice, names one twice, or can be read in two ways.
    """
    any_of: int | None = None
    readings: set[tuple[str, ...]] | None = None
    labels: tuple[str, ...] = ()
    for field, value in row.gold.items():
        try:
            items, any_of = _items(value)
            labels = labels or row.choices.labels or _labels(row, items)
            bases = _bases(field, row, counted_from)
            found = _readings(items, labels, row, bases=bases)
        except ValueError as error:
            raise ValueError(f"field {field!r} {error}") from None
        if readings is not None and not readings & found:
            raise ValueError(f"fields {', '.join(map(repr, row.gold))} name different choices")
        readings = found if readings is None else readings & found
    if not readings:
        raise ValueError("missing field 'answer': a question needs its gold")
    if len(readings) > 1:
        told = " or ".join(sorted("+".join(reading) for reading in readings))
        field, value = next(iter(row.gold.items()))
        raise ValueError(
            f"field {field!r} may mean {told}, found {short(value)}: write letters, or `answer_index` (counted from 0)"
        )
    keys = next(iter(readings))
    accepted = tuple(combinations(sorted(keys), any_of)) if any_of else (tuple(sorted(keys)),)
    return Gold(labels, keys, accepted)


def _items(value: Any) -> tuple[list[str | int], int | None]:
    """The gold as a list, and how many are enough where its note says so (`3（いずれか2つを選択で正解とする）`)."""
    items = value if isinstance(value, list) else [value]
    if not items or not all(_is_key(item) for item in items):
        raise ValueError(
            f"must be a label or a non-empty list of labels: a question needs its gold, found {short(value)}"
        )
    last = items[-1]
    if isinstance(last, str):
        note = _NOTE.match(last)
        chosen = _CHOOSE_SOME.search(note.group(2)) if note else None
        if note and chosen:
            return [*items[:-1], note.group(1)], _COUNT[chosen.group(1)]
        if len(items) == 1 and len(either := _EITHER.split(last)) > 1:
            return list(either), 1
    return items, None


def _is_key(item: Any) -> bool:
    return isinstance(item, str | int) and not isinstance(item, bool) and bool(str(item).strip())


def _labels(row: QuestionRow, items: list[str | int]) -> tuple[str, ...]:
    """Letters, or numbers where the key is in numbers (YakugakuQA); pictures count as five choices."""
    count = len(row.choices.texts)
    if not row.own_layout:
        return alphabet(count, digits=False)
    numbers = [
        read_label(word) for item in items for word in re.split(r"[,、\s)]+", plain(str(item))) if read_label(word)
    ]
    if not all(_is_index(number) for number in numbers):
        return alphabet(count or _PICTURED_CHOICES, digits=False)
    return alphabet(
        count or max(_PICTURED_CHOICES, *(int(number) for number in numbers if len(number) < 3)), digits=True
    )


def _bases(field: str, row: QuestionRow, counted_from: int | None) -> tuple[int, ...]:
    """From what a number may be counted that is no label."""
    if row.own_layout:
        return ()
    if field in _FROM_ZERO:
        return (0,) if len(row.gold) == 1 else (0, 1)  # with a second field, the two tell
    return (0, 1) if counted_from is None else (counted_from,)


def _readings(
    items: list[str | int], labels: tuple[str, ...], row: QuestionRow, *, bases: tuple[int, ...]
) -> set[tuple[str, ...]]:
    """Every way to read the gold: as labels, as the choices' own texts, as numbers counted from each of `bases`."""
    found: list[tuple[str, ...]] = []
    by_label = [read_label_list(str(item), labels) or _label_with_text(str(item), labels, row) for item in items]
    if all(by_label) and (labels[0].isdigit() or not any(isinstance(item, int) for item in items)):
        found.append(tuple(label for keys in by_label for label in keys or ()))
    if not (found and row.own_layout):  # there the key is made of labels, whatever the choices say
        by_text = [
            [
                label
                for label, text in zip(labels, row.choices.texts, strict=False)
                if isinstance(item, str) and squeezed(text) == squeezed(item)
            ]
            for item in items
        ]
        if all(len(same) == 1 for same in by_text):
            found.append(tuple(same[0] for same in by_text))
    if not labels[0].isdigit() and all(isinstance(item, int) or _is_index(item.strip()) for item in items):
        for base in bases:
            places = [int(item) - base for item in items]
            if all(0 <= place < len(labels) for place in places):
                found.append(tuple(labels[place] for place in places))
    if not found:
        first = next((item for item, keys in zip(items, by_label, strict=True) if not keys), items[0])
        raise ValueError(f"names {short(first)}, which is not a choice ({', '.join(labels)})")
    distinct = [keys for keys in found if len(set(keys)) == len(keys)]
    if not distinct:
        raise ValueError(f"names a choice twice ({', '.join(found[0])})")
    return {tuple(sorted(keys)) for keys in distinct}


def _label_with_text(item: str, labels: tuple[str, ...], row: QuestionRow) -> tuple[str, ...] | None:
    """The label of `c. 水`, where 水 is the text of c."""
    for label, text in zip(labels, row.choices.texts, strict=False):
        before, found, after = plain(item).partition(plain(text)) if text else ("", "", "")
        if found and not after.strip() and read_label(before) == label and before.strip() != label:
            return (label,)
    return None
