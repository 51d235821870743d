"""From what a model wrote to the answer it gave, or to `malformed` with a reason.

Two parsers. `strict` does what IgakuQA's own scorer does: split at commas, strip nothing. `lenient` reads what a person
would read: letters of any width, `答え：ｃ`, `正解は c と e`, `④`, JSON, an answer given twice, text after the answer,
a choice's own text. A word's first letter is no answer (`B型肝炎`); what can be read in two ways is malformed.
"""

import re
from dataclasses import dataclass
from typing import Literal

from megatron_medllm.exams.answer_text import (
    COLON_MARKER,
    MARKER_WORD,
    NEXT_QUESTION,
    first_line,
    one_width,
    thinking_end,
)
from megatron_medllm.exams.choice_text import read_choice_texts, starts_another_choice
from megatron_medllm.exams.label_text import read_labels
from megatron_medllm.exams.labels import plain, read_label
from megatron_medllm.exams.numbers import read_number
from megatron_medllm.exams.prompts import Mode
from megatron_medllm.exams.question import Question

Parser = Literal["lenient", "strict"]

_WORD_MARKER = re.compile(rf"{MARKER_WORD}\s*(?:は|is)?[、,]?\s*", re.IGNORECASE)
_STRICT_MARKER = re.compile(r"答え[:：]")


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """The labels (or the one number, as written) that an output gives; None with a reason when it gives none."""

    answer: tuple[str, ...] | None
    reason: str = ""

    @property
    def malformed(self) -> bool:
        """Whether no usable answer was found."""
        return self.answer is None


def parse_answer(output: str, question: Question, *, mode: Mode, parser: Parser = "lenient") -> ParsedAnswer:
    """Read the answer from a model's raw `output`, which went on after the prompt of `mode`."""
    if parser == "strict":
        return _parse_strict(output, question, mode)
    start = thinking_end(output)
    if start is None:
        return ParsedAnswer(None, "thinking without an end")
    text = one_width(output[start:])
    text = NEXT_QUESTION.split(text, maxsplit=1)[0]
    told, hinted = (
        [text[found.end() :] for found in reversed(list(marker.finditer(text)))]
        for marker in (COLON_MARKER, _WORD_MARKER)
    )
    whole = [text] if mode == "answer_only" else []
    # A calculation starts with other numbers than its result.
    segments = [*told, *whole, *hinted] if question.kind == "numeric" else [*whole, *told, *hinted]
    if not segments:
        return ParsedAnswer(None, "no answer line")
    reason = ""
    for segment in segments:
        parsed = _read_number(segment) if question.kind == "numeric" else _read_choices(segment, question)
        if not parsed.malformed:
            return parsed
        reason = reason or parsed.reason
    return ParsedAnswer(None, reason)


def _parse_strict(output: str, question: Question, mode: Mode) -> ParsedAnswer:
    prediction = output
    if mode == "explained":
        parts = _STRICT_MARKER.split(output)
        if len(parts) == 1:
            return ParsedAnswer(None, "no answer line")
        prediction = parts[-1].strip()
    answer = tuple(sorted(prediction.split(",")))
    if question.kind == "choice" and not set(answer) <= set(question.labels):
        return ParsedAnswer(None, "not a list of choices" if prediction else "empty")
    return ParsedAnswer(answer)


def _read_number(segment: str) -> ParsedAnswer:
    number = read_number(first_line(segment))
    return ParsedAnswer((number,)) if number is not None else ParsedAnswer(None, "no number")


def _read_choices(segment: str, question: Question) -> ParsedAnswer:
    """The choices whose labels, or whose own texts, the first line of `segment` gives."""
    line = first_line(segment)
    labels, reason = read_labels(line, question)
    of_text = read_choice_texts(plain(line), question)
    if of_text is None or of_text == labels:
        if labels and starts_another_choice(plain(line), labels[0], question):
            return ParsedAnswer(None, "no answer read")
        return ParsedAnswer(labels or None, reason)
    if not labels or not _is_label_list(line, question):
        return ParsedAnswer(of_text)
    # A label, and also another choice's text: labels are small letters or numbers, as the prompt shows them.
    if line.lower() == line:
        return ParsedAnswer(labels)
    return ParsedAnswer(None, "a label as well as a choice's text")


def _is_label_list(line: str, question: Question) -> bool:
    """Whether a line is `b` or `b, d`, and not `bd` or `1:1`, which may be a text."""
    words = [read_label(word) for word in re.split("[,、]", plain(line))]
    return len(set(words)) == len(words) and all(word in question.labels for word in words)
