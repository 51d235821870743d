"""Hashes of character n-grams of many texts at once, at a gigabyte a second.

Texts are laid end to end as code points; hashes are computed over the whole run, a cache-sized block at a time, and
grams that straddle two texts are then left out.
"""

import numpy as np

_BLOCK = 1 << 15
_MULTIPLIERS = [np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)]
_CODE_BITS, _TWO_CODES, _MIX_SHIFT = np.uint64(21), np.uint64(42), np.uint64(29)


def code_points(text: str) -> np.ndarray:
    """The characters of a text as uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def hash_grams(codes: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit hash of each of the n-grams of `codes` (uint32 [c]), n >= 5: uint64 [c - n + 1].

    Three code points fit 63 bits without loss. The n-gram is the sum of such trigrams, each times an odd number, so
    that a hash costs a few cached passes instead of n.
    """
    count = max(0, len(codes) - n + 1)
    hashes = np.empty(count, np.uint64)
    at = [*range(0, n - 3, 3), n - 3]  # the last trigram overlaps where 3 does not divide n
    longest = min(_BLOCK, count)
    codes_64, trigrams, scratch = (np.empty(longest + n - 1, np.uint64) for _ in range(3))
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        block, grams, spare = codes_64[: size + n - 1], trigrams[: size + n - 3], scratch[: size + n - 3]
        block[:] = codes[start : start + size + n - 1]
        np.left_shift(block[1:-1], _CODE_BITS, out=grams)
        grams |= block[:-2]
        np.left_shift(block[2:], _TWO_CODES, out=spare)
        grams |= spare
        out, spare = hashes[start : start + size], spare[:size]
        np.multiply(grams[:size], _MULTIPLIERS[0], out=out)
        for position in at[1:]:
            np.right_shift(out, _MIX_SHIFT, out=spare)
            out ^= spare
            out *= _MULTIPLIERS[1]
            out += grams[position : position + size]
        for multiplier in _MULTIPLIERS[1:]:
            np.right_shift(out, _MIX_SHIFT, out=spare)
            out ^= spare
            out *= multiplier
        np.right_shift(out, _MIX_SHIFT, out=spare)
        out ^= spare
    return hashes


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
