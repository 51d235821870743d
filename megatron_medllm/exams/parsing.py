"""From what a model wrote to the answer it gave, or to `malformed` with a reason.

Two parsers. `strict` does what IgakuQA's own scorer does: split at commas, strip nothing. `lenient` reads what a person
would read: letters of any width, `答え：ｃ`, `正解は c と e`, an answer given twice, text after the answer.
"""

import re
from dataclasses import dataclass
from typing import Literal

from megatron_medllm.exams.prompts import Mode
from megatron_medllm.exams.question import Question

Parser = Literal["lenient", "strict"]

# Letters, digits and punctuation of either width become the usual ones.
_ONE_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0x3000: " ",
    0xFF61: "。",
    0xFF64: "、",
    0xFF65: "・",
}
_NEXT_QUESTION = re.compile(r"\n\s*(?:問題|設問|質問)\s*\d*\s*[:.]")
_COLON_MARKER = re.compile(r"(?:答え|正解|正答|解答|回答|answer)[\s*」』】]*(?:は\s*)?[:=]\s*|\\boxed(?=\{)")
_WORD_MARKER = re.compile(r"(?:答え|正解|正答|解答|回答|answer)\s*(?:は|is)?\s*")
_OPENING = re.compile(r"(?:[\s「『【\[(<*_\"'`${]|\\boxed\{|\\text\{)*(?:選択肢)?\s*")
_CLOSING = re.compile(r"[」』】\])>*_\"'`$}]*[.:]?\s*")
_SEPARATOR = re.compile(r"\s*(?:,|、|・|/|&|\+|;|と|及び|および|\band\b|\s)\s*")
_NEGATION = re.compile(r"\s*(?:では?な[いく]|じゃな[いく]|以外)")
_NUMBER = re.compile(r"(?<![a-z\d.])[-+]?\d[\d,]*(?:\.\d+)?")
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
    text = output.translate(_ONE_WIDTH).lower()
    text = _NEXT_QUESTION.split(text, maxsplit=1)[0]
    told, hinted = (
        [text[found.end() :] for found in reversed(list(marker.finditer(text)))]
        for marker in (_COLON_MARKER, _WORD_MARKER)
    )
    start = [text] if mode == "answer_only" else []
    # A calculation starts with other numbers than its result.
    segments = [*told, *start, *hinted] if question.kind == "numeric" else [*start, *told, *hinted]
    if not segments:
        return ParsedAnswer(None, "no answer line")
    reason = ""
    for segment in segments:
        parsed = _read_number(segment) if question.kind == "numeric" else _read_labels(segment, question)
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
    line = segment.lstrip().split("\n", 1)[0]
    found = _NUMBER.search(line)
    return ParsedAnswer((found.group().replace(",", ""),)) if found else ParsedAnswer(None, "no number")


def _read_labels(segment: str, question: Question) -> ParsedAnswer:
    """Labels at the very start of `segment`, each possibly followed by its choice's own text."""
    line = segment.lstrip().split("\n", 1)[0]
    digits = question.labels[0].isdigit()
    run = re.compile(r"\d{1,9}(?![\d.])" if digits else r"[a-z]+(?![a-z\d])")
    choices = {
        label: choice.translate(_ONE_WIDTH).lower().strip()
        for label, choice in zip(question.labels, question.choices, strict=False)
    }
    position = _OPENING.match(line).end()  # type: ignore[union-attr]
    labels: list[str] = []
    while found := run.match(line, position):
        word = found.group()
        if len(word) > 1 and (labels or not _is_label_run(word, question.labels)):
            break
        if unknown := [label for label in word if label not in question.labels]:
            return ParsedAnswer(None, f"{unknown[0]} is not a choice")
        if not labels and word == "a" and _is_english_article(line[found.end() :], choices.get("a", "")):
            break
        labels += list(word)
        position = _CLOSING.match(line, found.end()).end()  # type: ignore[union-attr]
        choice = choices.get(word, "")
        if choice and line.startswith(choice, position):
            position += len(choice)
        if _NEGATION.match(line, position):
            return ParsedAnswer(None, "no answer read")
        separator = _SEPARATOR.match(line, position)
        position = _OPENING.match(line, separator.end() if separator else position).end()  # type: ignore[union-attr]
        if not separator and not line[:position].endswith((" ", ".", ":")):
            break
    if not labels:
        return ParsedAnswer(None, "no answer read" if line else "empty")
    return ParsedAnswer(tuple(sorted(set(labels))))


def _is_label_run(word: str, labels: tuple[str, ...]) -> bool:
    """`ace` is three answers; `bad` and `decade` are words."""
    return all(label in labels for label in word) and list(word) == sorted(set(word))


def _is_english_article(rest: str, choice: str) -> bool:
    following = rest.lstrip()
    if choice and following.startswith(choice):
        return False
    return bool(re.match(r"\s+(?!and\b|or\b)[a-z]{2,}", rest))
