"""Cleaning of a batch of documents. Every step is opt-in per source (NFC aside) and says why it drops what it drops.

Width folding is a targeted map, not NFKC: NFKC would turn 10⁶ into 106, ① into 1 and ㎎ into mg, which changes
what a medical text says. Most documents hold nothing to strip or fold, so one table look-up per character over the
whole batch says which ones to look at.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator

import numpy as np

from megatron_medllm.config.corpus import CleanConfig
from megatron_medllm.corpus.shingles import code_points, hash_grams

_Ranges = tuple[tuple[int, int], ...]  # code points, both ends included
_ZERO_WIDTH: _Ranges = (
    (0xAD, 0xAD),
    (0x200B, 0x200F),
    (0x202A, 0x202E),
    (0x2060, 0x2064),
    (0x2066, 0x2069),
    (0xFEFF, 0xFEFF),
)
_CONTROL: _Ranges = ((0x00, 0x08), (0x0B, 0x0C), (0x0E, 0x1F), (0x7F, 0x9F))
_FULLWIDTH: dict[str, _Ranges] = {
    "none": (),
    "alphanumeric": ((0xFF10, 0xFF19), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A)),
    "ascii": ((0xFF01, 0xFF5E),),
}
_FULLWIDTH_TO_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_HALFWIDTH_KANA: _Ranges = ((0xFF61, 0xFF9F),)
_JAPANESE: _Ranges = ((0x3001, 0x3007), (0x3041, 0x30FF), (0x4E00, 0x9FFF))
_REPEAT_GRAM = 10


def clean(texts: list[str], config: CleanConfig) -> list[tuple[str, str, str]]:
    """For each text (text, "", "") or, for a document to drop, (text, step, reason)."""
    texts = _rewrite(texts, config)
    if not config.judges:
        return [(text, "", "") if text else ("", *_judge("", config, 1.0, 0.0)) for text in texts]
    wants_japanese, wants_variety = config.min_japanese_ratio > 0, config.max_repeat_ratio < 1
    japanese = japanese_ratios(texts) if wants_japanese else [1.0] * len(texts)
    repeats = repeat_ratios(texts) if wants_variety else [0.0] * len(texts)
    return [(text, *_judge(text, config, *ratios)) for text, *ratios in zip(texts, japanese, repeats, strict=True)]


def _judge(text: str, config: CleanConfig, japanese: float, repeats: float) -> tuple[str, str]:
    """The step that drops a text, and its reason; both empty where it stays."""
    if not text:
        return "empty", "nothing is left"
    if len(text) < config.min_chars:
        return "min_chars", f"{len(text)} characters"
    if config.max_chars and len(text) > config.max_chars:
        return "max_chars", f"{len(text)} characters"
    if japanese < config.min_japanese_ratio:
        return "min_japanese_ratio", f"{japanese:.3f}"
    if repeats > config.max_repeat_ratio:
        return "max_repeat_ratio", f"{repeats:.3f}"
    return "", ""


def _rewrite(texts: list[str], config: CleanConfig) -> list[str]:
    texts = list(texts)
    stripped = (_ZERO_WIDTH if config.strip_zero_width else ()) + (_CONTROL if config.strip_control else ())
    halfwidth = _HALFWIDTH_KANA if config.fold_halfwidth_kana else ()
    fullwidth = _FULLWIDTH[config.fold_width]
    strip, widen, narrow = _pattern(stripped).sub, _pattern(halfwidth).sub, _pattern(fullwidth).sub
    for position, (has_stripped, has_halfwidth, has_fullwidth) in _holding(texts, (stripped, halfwidth, fullwidth)):
        text = texts[position]
        if has_stripped:
            text = strip("", text)
        if has_halfwidth:
            # NFKC on a run of half-width kana alone composes its voicing marks, and touches nothing else.
            text = widen(lambda run: unicodedata.normalize("NFKC", run[0]), text)
        if has_fullwidth:
            text = narrow(lambda run: run[0].translate(_FULLWIDTH_TO_ASCII), text)
        texts[position] = text
    if config.nfc:
        normal = unicodedata.is_normalized
        texts = [text if normal("NFC", text) else unicodedata.normalize("NFC", text) for text in texts]
    return [dedup_lines(text) for text in texts] if config.dedup_lines else texts


@functools.cache
def _pattern(ranges: _Ranges) -> re.Pattern[str]:
    """Matches a run of the characters of `ranges`; nothing where there are none."""
    return re.compile("[" + "".join(f"{chr(a)}-{chr(b)}" for a, b in ranges) + "]+" if ranges else "(?!)")


@functools.cache
def _table(*classes: _Ranges) -> np.ndarray:
    """uint8 [0x110000]: bit i of a character is set where it is in the i-th class."""
    table = np.zeros(0x110000, np.uint8)
    for i, ranges in enumerate(classes):
        for first, last in ranges:
            table[first : last + 1] |= 1 << i
    return table


def _holding(texts: list[str], classes: tuple[_Ranges, ...]) -> Iterator[tuple[int, list[bool]]]:
    """The texts that hold characters of any class: their positions, and for each class whether they hold some."""
    if not any(classes):
        return
    bits = _table(*classes).take(code_points("".join(texts)), mode="clip")
    found = np.flatnonzero(bits != 0)
    owners = np.searchsorted(np.cumsum([len(text) for text in texts]), found, side="right")
    held = np.zeros(len(texts), np.uint8)
    np.bitwise_or.at(held, owners, bits[found])
    for position in np.flatnonzero(held).tolist():
        yield position, [bool(held[position] >> i & 1) for i in range(len(classes))]


def dedup_lines(text: str) -> str:
    """Keep the first of equal lines; blank lines are layout and all stay."""
    lines = text.split("\n")
    if len(lines) - len(set(lines)) == max(0, lines.count("") - 1):
        return text
    seen: set[str] = set()
    kept = []
    for line in lines:
        if line and not line.isspace():
            if line in seen:
                continue
            seen.add(line)
        kept.append(line)
    return "\n".join(kept)


def _slices(texts: list[str], values: np.ndarray) -> Iterator[np.ndarray]:
    """Each text's part of `values`, which has one for each character of all texts end to end."""
    end = 0
    for text in texts:
        begin, end = end, end + len(text)
        yield values[begin:end]


def japanese_ratios(texts: list[str]) -> list[float]:
    """Share of kana, kanji and 、。々 among all characters of each text."""
    japanese = _table(_JAPANESE).take(code_points("".join(texts)), mode="clip")
    return [np.count_nonzero(own) / max(1, len(own)) for own in _slices(texts, japanese)]


def repeat_ratios(texts: list[str]) -> list[float]:
    """Share of each text's character 10-grams that occur more than once in it."""
    hashes = hash_grams(code_points("".join(texts)), _REPEAT_GRAM)
    return [
        _repeated(own[: max(0, len(text) - _REPEAT_GRAM + 1)])
        for text, own in zip(texts, _slices(texts, hashes), strict=True)
    ]


def _repeated(hashes: np.ndarray) -> float:
    """Share of `hashes` that occur more than once; sorts them."""
    hashes.sort()
    same = hashes[1:] == hashes[:-1]
    recurrences = np.count_nonzero(same)
    if not recurrences:
        return 0.0
    different = int(same[0]) + np.count_nonzero(same[1:] > same[:-1])
    return (recurrences + different) / len(hashes)
