"""What the parser and `answer_end` share: one width, the end of thinking, answer markers, the next question."""

import re

from megatron_medllm.exams.labels import plain

# Letters, digits and punctuation of either width become the usual ones; every character stays one character.
ONE_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0x3000: " ",
    0xFF61: "。",
    0xFF64: "、",
    0xFF65: "・",
}
# Not 応答 (a response of the body), not 不正解.
MARKER_WORD = r"(?:答え|(?<![一-鿿])答|(?<!不)正解|正答|解答|回答|answer)"
NEXT_QUESTION = re.compile(r"\n\s*(?:問題|設問|質問|question)\s*\d*\s*[:.]", re.IGNORECASE)
# `答え:`, `**Answer:**`, `正解は: `, `"answer": `, 【答え】, <answer>, \boxed{.
COLON_MARKER = re.compile(
    rf"{MARKER_WORD}[\s*」』】\"'`]*(?:は\s*|is\s*)?[:=]\s*|【{MARKER_WORD}】\s*|<answer>\s*|\\boxed(?=\{{)",
    re.IGNORECASE,
)
_THINKING = re.compile(r"<(/?)think(?:ing)?>", re.IGNORECASE)


def one_width(text: str) -> str:
    """`text` in half-width letters, digits and punctuation, of the same length."""
    return text.translate(ONE_WIDTH)


def thinking_end(text: str) -> int | None:
    """Where the answer proper begins: behind the last `</think>`, 0 without any, None while the model still thinks."""
    start: int | None = 0
    for tag in _THINKING.finditer(text):
        start = tag.end() if tag.group(1) else None
    return start


# What only leads to the answer: a marker (`## 答え`, `**答え:**`, `{"answer":`), a fence, an open tag.
_LEAD = re.compile(rf"```[a-z]*|</?answer>|\\boxed|(?:最終的?な?|final[\s_]*)?{MARKER_WORD}(?:は|is)?", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]")


def says_something(line: str) -> bool:
    """Whether a line holds more than what leads to an answer."""
    return bool(_WORD.search(plain(_LEAD.sub("", line))))


def first_line(text: str) -> str:
    """The first line of `text` that says something; empty when none does."""
    return next((line.strip() for line in re.split(r"[\r\n]+", text) if says_something(line)), "")
