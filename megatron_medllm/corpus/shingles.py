"""Hashes of character n-grams of many texts at once, at a gigabyte a second.

Texts are laid end to end as code points; hashes are computed over the whole run, a cache-sized block at a time, and
grams that straddle two texts are then left out.
"""

import itertools

import numpy as np

_BLOCK = 1 << 15
# Odd and otherwise arbitrary: one for each doubling of the window, and the last for the end.
_MULTIPLIERS = [
    np.uint64(x)
    for x in (
        0x9E3779B97F4A7C15,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0xD6E8FEB86659FD93,
        0xFF51AFD7ED558CCD,
        0xC4CEB9FE1A85EC53,
        0x2545F4914F6CDD1D,
    )
]
_HALF, _MIX_SHIFT = np.uint64(32), np.uint64(29)


def code_points(text: str) -> np.ndarray:
    """The characters of a text as uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def hash_grams(codes: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit hash of each of the n-grams of `codes` (uint32 [c]): uint64 [c - n + 1].

    A sum of code points, each times a fixed odd number of its place (multilinear hashing), then mixed. The sums of two
    neighbouring windows, one of them times a number, make that of the window twice as wide, so a hash costs 2 log2(n)
    cached passes instead of n; where n is no power of two, the last two windows overlap.
    """
    count = max(0, len(codes) - n + 1)
    hashes = np.empty(count, np.uint64)
    longest = min(_BLOCK, count) + n - 1
    buffers = np.empty(longest, np.uint64), np.empty(longest, np.uint64)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start) + n - 1
        sums, spare = buffers
        sums[:size] = codes[start : start + size]
        width, multipliers = 1, itertools.cycle(_MULTIPLIERS[:-1])
        while width < n:
            step = min(width, n - width)
            size -= step
            np.multiply(sums[:size], next(multipliers), out=spare[:size])
            spare[:size] += sums[step : step + size]
            sums, spare = spare, sums
            width += step
        _mix(sums[:size], spare[:size], out=hashes[start : start + size])
    return hashes


def _mix(sums: np.ndarray, spare: np.ndarray, *, out: np.ndarray) -> None:
    """Let every bit of a sum decide every bit of its hash; one-to-one."""
    np.right_shift(sums, _HALF, out=spare)
    np.bitwise_xor(sums, spare, out=out)
    out *= _MULTIPLIERS[-1]
    np.right_shift(out, _MIX_SHIFT, out=spare)
    out ^= spare


def hash_grams_of_texts(texts: list[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams within each text: uint64 [grams], and row offsets uint64 [texts + 1].

    A text shorter than n has one gram: itself, padded with zeros.
    """
    padded = [text if len(text) >= n else text.ljust(n, "\0") for text in texts]
    lengths = np.fromiter(map(len, padded), np.int64, len(padded))
    hashes = hash_grams(code_points("".join(padded)), n)
    inside = np.ones(len(hashes), bool)
    ends = np.cumsum(lengths)[:-1]
    for k in range(1, n):
        inside[ends - k] = False
    offsets = np.zeros(len(texts) + 1, np.uint64)
    offsets[1:] = np.cumsum(lengths - (n - 1))
    return hashes[inside], offsets
