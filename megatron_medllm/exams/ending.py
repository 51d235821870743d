"""Where a complete answer ends: a base model goes on after `答え: c` with the next thing, which is no part of it."""

import re

from megatron_medllm.exams.answer_text import (
    COLON_MARKER,
    MARKER_WORD,
    NEXT_QUESTION,
    one_width,
    says_something,
    thinking_end,
)
from megatron_medllm.exams.prompts import Mode

_LABEL = re.compile(r"(?:[\W_]|選択肢|\\text|\\boxed)*(?:[a-z](?![a-z])|[\d①-⑳])", re.IGNORECASE)
_SENTENCES = re.compile(r"。\s*[^\s。」』）)\"'*]")
_HEADING = re.compile(rf"(?:^|\n)[#* ]*(?:最終的?な?|final\s*)?{MARKER_WORD}[* ]*(?=\n)", re.IGNORECASE)
_TOLD = re.compile(rf"{MARKER_WORD}\s*(?:は|is)\s*\S", re.IGNORECASE)


def answer_end(text: str, mode: Mode) -> int | None:
    """The position in `text` (a model's output so far) behind the complete answer, or None when there is none yet.

    A short answer ends with its line: the first that says more than `答え:`. An explanation ends with the line behind
    its first answer marker (`答え: c`, `【答え】c`, `\\boxed{c}`, `<answer>c</answer>`, `"answer": "c"`), or, when it
    told its answer in a sentence (`正解はcである`), where it begins a next question. Several sentences behind a marker
    are a further explanation, no answer. Thinking (`<think>…</think>`) is no part of an answer. A line is complete
    when its end was written: whoever sees end-of-text needs no cut.
    """
    plain = one_width(text)
    start = thinking_end(plain)
    if start is None:
        return None
    following = NEXT_QUESTION.search(plain, start)
    limit = following.start() if following else len(plain)
    # Where a next question begins, the line before it is complete.
    lines_end = limit + 1 if following else limit
    if mode == "answer_only":
        line = _answer_line(plain, start, lines_end)
        return line[1] if line else None
    markers = sorted(
        found.end() for pattern in (COLON_MARKER, _HEADING) for found in pattern.finditer(plain, start, limit)
    )
    for marker in markers:
        line = _answer_line(plain, marker, lines_end)
        if line is None:
            break
        if _LABEL.match(plain, *line) or not _SENTENCES.search(plain, *line):
            return line[1]
    return limit if following and _TOLD.search(plain, start, limit) else None


def _answer_line(plain: str, position: int, stop: int) -> tuple[int, int] | None:
    """Start and end of the first whole line from `position` that says something, its line break left out."""
    while (end := plain.find("\n", position, stop)) >= 0:
        if says_something(plain[position:end]):
            return position, end
        position = end + 1
    return None
