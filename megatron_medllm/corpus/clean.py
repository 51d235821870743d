"""Cleaning of one document. Every step is opt-in per source (NFC aside) and says why it drops what it drops.

Width folding is a targeted map, not NFKC: NFKC would turn 10⁶ into 106, ① into 1 and ㎎ into mg, which changes
what a medical text says.
"""

import re
import unicodedata

import numpy as np

from megatron_medllm.config.corpus import CleanConfig
from megatron_medllm.corpus.shingles import code_points, hash_grams

_ZERO_WIDTH = "\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff"
_CONTROL = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
# By (strip_zero_width, strip_control): one pass over the text for both.
_STRIPPED = {
    (True, False): re.compile(f"[{_ZERO_WIDTH}]+"),
    (False, True): re.compile(f"[{_CONTROL}]+"),
    (True, True): re.compile(f"[{_ZERO_WIDTH}{_CONTROL}]+"),
}
_FULLWIDTH = {"alphanumeric": re.compile("[０-９Ａ-Ｚａ-ｚ]+"), "ascii": re.compile("[！-～]+")}
_FULLWIDTH_TO_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
# NFKC on a run of half-width kana alone composes its voicing marks, and touches nothing else.
_HALFWIDTH_KANA = re.compile("[\uff61-\uff9f]+")
_REPEAT_GRAM = 10
_JAPANESE = np.zeros(0x110000, bool)
for _first, _last in ((0x3001, 0x3007), (0x3041, 0x30FF), (0x4E00, 0x9FFF)):
    _JAPANESE[_first : _last + 1] = True


def clean(text: str, config: CleanConfig) -> tuple[str, str, str]:
    """Return (text, "", "") or, for a document to drop, (text, step, reason)."""
    text = _rewrite(text, config)
    if not text:
        return text, "empty", "nothing is left"
    if len(text) < config.min_chars:
        return text, "min_chars", f"{len(text)} characters"
    if config.max_chars and len(text) > config.max_chars:
        return text, "max_chars", f"{len(text)} characters"
    if config.min_japanese_ratio > 0:
        ratio = japanese_ratio(text)
        if ratio < config.min_japanese_ratio:
            return text, "min_japanese_ratio", f"{ratio:.3f}"
    if config.max_repeat_ratio < 1:
        ratio = repeat_ratio(text)
        if ratio > config.max_repeat_ratio:
            return text, "max_repeat_ratio", f"{ratio:.3f}"
    return text, "", ""


def _rewrite(text: str, config: CleanConfig) -> str:
    stripped = _STRIPPED.get((config.strip_zero_width, config.strip_control))
    if stripped is not None:
        text = stripped.sub("", text)
    if text.isascii():
        return dedup_lines(text) if config.dedup_lines else text
    if config.fold_halfwidth_kana:
        text = _HALFWIDTH_KANA.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)
    if config.fold_width != "none":
        text = _FULLWIDTH[config.fold_width].sub(lambda run: run[0].translate(_FULLWIDTH_TO_ASCII), text)
    if config.nfc and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    return dedup_lines(text) if config.dedup_lines else text


def dedup_lines(text: str) -> str:
    """Keep the first of equal lines; blank lines are layout and all stay."""
    seen: set[str] = set()
    kept = []
    for line in text.split("\n"):
        if line and not line.isspace():
            if line in seen:
                continue
            seen.add(line)
        kept.append(line)
    return "\n".join(kept)


def japanese_ratio(text: str) -> float:
    """Share of kana, kanji and 、。々 among all characters."""
    codes = code_points(text)
    return float(_JAPANESE[codes].mean()) if len(codes) else 0.0


def repeat_ratio(text: str) -> float:
    """Share of a text's character 10-grams that occur more than once in it."""
    hashes = np.sort(hash_grams(code_points(text), _REPEAT_GRAM))
    if not len(hashes):
        return 0.0
    same = hashes[1:] == hashes[:-1]
    repeated = np.zeros(len(hashes), bool)
    repeated[1:] |= same
    repeated[:-1] |= same
    return float(repeated.mean())
