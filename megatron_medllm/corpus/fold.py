"""A fold for matching: what remains of a text when layout, width, case, voicing marks and punctuation do not count.

One table look-up per character instead of NFKC (21 MB/s): every code point maps to the letters and digits of its
NFKD form, lower-cased. Because the fold knows no context, it decomposes voiced kana too: ガ, ｶﾞ and カ+◌゙ all become カ.
"""

import functools
import unicodedata
from collections.abc import Iterable

import numpy as np

SEPARATOR = "\U0010ffff"  # between texts: kept by the fold, and part of no question
_CODES = 0x110000
# Ideographs and Hangul fold to themselves; beyond the last range lies nothing to match.
_IDENTITY = ((0x3400, 0xA000), (0xAC00, 0xD7A4), (0x20000, 0x2F800), (0x30000, 0x33480))


@functools.cache
def _table() -> tuple[np.ndarray, list[list[int]]]:
    """uint32 [0x110000]: 0 to drop, a code point, or 0x110000 + i for the i-th of the longer replacements."""
    table = np.zeros(_CODES, np.uint32)
    longer: list[list[int]] = []
    position = 0
    for start, stop in _IDENTITY:
        for code in range(position, start):
            folded = _fold_code(code)
            if len(folded) == 1:
                table[code] = folded[0]
            elif folded:
                table[code] = _CODES + len(longer)
                longer.append(folded)
        table[start:stop] = np.arange(start, stop)
        position = stop
    table[ord(SEPARATOR)] = ord(SEPARATOR)
    return table, longer


def _fold_code(code: int) -> list[int]:
    if 0xD800 <= code < 0xF900:  # surrogates and private use
        return []
    return [ord(c) for c in unicodedata.normalize("NFKD", chr(code)).lower() if c.isalnum()]


def fold(codes: np.ndarray) -> np.ndarray:
    """Fold code points: uint32 [c] to uint32 [f]."""
    table, longer = _table()
    folded = table.take(codes, mode="clip")
    folded = folded[folded != 0]
    expanding = np.flatnonzero(folded >= _CODES)
    if not len(expanding):
        return folded
    replacements = [longer[i] for i in folded[expanding] - _CODES]
    counts = np.ones(len(folded), np.int64)
    counts[expanding] = [len(replacement) for replacement in replacements]
    starts = (np.cumsum(counts) - counts)[expanding]
    out = np.repeat(folded, counts)
    for start, replacement in zip(starts, replacements, strict=True):
        out[start : start + len(replacement)] = replacement
    return out


def fold_origins(codes: np.ndarray) -> np.ndarray:
    """For each code point of `fold(codes)` the position in `codes` that it comes from (int64 [f])."""
    table, longer = _table()
    folded = table.take(codes, mode="clip")
    positions = np.flatnonzero(folded)
    folded = folded[positions]
    counts = np.ones(len(folded), np.int64)
    expanding = folded >= _CODES
    counts[expanding] = [len(longer[i]) for i in folded[expanding] - _CODES]
    return np.repeat(positions, counts)


def join(texts: Iterable[str]) -> str:
    """Texts end to end with a separator behind each, and none within."""
    return "".join(part for text in texts for part in (text.replace(SEPARATOR, "\0"), SEPARATOR))
