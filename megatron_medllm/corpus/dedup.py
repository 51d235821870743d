"""Copies, exact and near, over all sources at once.

Workers sign documents: a 128-bit digest for exact copies; for near copies MinHash over character 5-grams (Broder
1997), of which go to disk one 64-bit key per band (`rows` hashes each) and one byte per hash ("b-bit minwise hashing",
Li and König 2010). Afterwards the signatures are read one band at a time, so memory grows with one band, not with
the signatures: documents sharing a key become candidates, candidates whose estimated similarity is too low are let
go, and the rest are joined into clusters, of which one document stays.

Memory while clusters are found: some 100 bytes a document; on disk 16 + 8 x bands + bands x rows, 296 by default.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

from megatron_medllm.config.corpus import CorpusConfig, DedupConfig
from megatron_medllm.corpus.merge import Copies, Part
from megatron_medllm.corpus.shingles import hash_grams_of_texts

_GRAM = 5
_WINDOW = 8
_PAIRS = 1 << 18
_MIX = np.uint64(0x9E3779B97F4A7C15)


def sign(texts: list[str], config: DedupConfig) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """What copies of `texts` are found by.

    Returns:
        Columns `exact0`, `exact1` and, for near copies, `band00`..., each uint64 [texts]; and the sketch, uint8
        [texts, bands * rows], or None.
    """
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    exact = np.frombuffer(digests, np.uint64).reshape(len(texts), 2)
    columns = {"exact0": exact[:, 0], "exact1": exact[:, 1]}
    if not config.near:
        return columns, None
    import rensa

    hashes, offsets = hash_grams_of_texts(texts, _GRAM)
    permutations = config.bands * config.rows
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, permutations, config.seed)
    minhashes = np.array(matrix.to_rows(), np.uint32)
    keys = _band_keys(minhashes.reshape(len(texts), config.bands, config.rows))
    columns |= {f"band{band:02d}": keys[:, band] for band in range(config.bands)}
    return columns, minhashes.astype(np.uint8)


def _band_keys(minhashes: np.ndarray) -> np.ndarray:
    """uint32 [texts, bands, rows] to uint64 [texts, bands]."""
    keys = np.zeros(minhashes.shape[:2], np.uint64)
    for row in range(minhashes.shape[2]):
        keys = (keys ^ minhashes[:, :, row]) * _MIX
        keys ^= keys >> np.uint64(32)
    return keys


def find_copies(parts: list[Part], config: CorpusConfig) -> Copies | None:
    """Cluster the documents of all parts; None where no deduplication is asked for."""
    dedup = config.dedup
    if not (dedup.exact or dedup.near):
        return None
    filled = [part for part in parts if part.facts["documents"]]

    def gather(name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *(part.column(name) for part in filled)])

    first = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([part.facts["documents"] for part in parts], out=first[1:])
    chars = gather("chars", np.uint32)
    not_empty = chars > 0  # empty documents are equal, but copies of nothing
    parents = np.arange(first[-1])
    high = gather("exact1", np.uint64)
    for a, b in _neighbours(gather("exact0", np.uint64), not_empty):
        equal = high[a] == high[b]
        join_groups(parents, a[equal], b[equal])
    del high
    exact_roots = find_roots(parents, parents)
    if dedup.near:
        sketches = _Sketches(parts, first, dedup.bands * dedup.rows)
        for band in range(dedup.bands):
            for a, b in _neighbours(gather(f"band{band:02d}", np.uint64), not_empty):
                apart = find_roots(parents, a) != find_roots(parents, b)
                a, b = a[apart], b[apart]
                alike = sketches.similarity(a, b) >= dedup.threshold - dedup.slack
                join_groups(parents, a[alike], b[alike])
    roots = find_roots(parents, parents)
    original = _originals(roots, chars, _priorities(parts, config), first, dedup.keep)
    is_exact = (original >= 0) & (exact_roots == exact_roots[np.maximum(original, 0)])
    return Copies(original, is_exact, first, gather("pieces", np.int32), gather("lines", np.int64))


def _neighbours(keys: np.ndarray, eligible: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of eligible documents of equal key, each with its next few in the order of documents."""
    documents = np.flatnonzero(eligible)
    order = documents[np.argsort(keys[documents], kind="stable")]
    ordered = keys[order]
    for step in range(1, _WINDOW + 1):
        equal = np.flatnonzero(ordered[step:] == ordered[:-step])
        for start in range(0, len(equal), _PAIRS):
            chosen = equal[start : start + _PAIRS]
            yield order[chosen], order[chosen + step]


def find_roots(parents: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The smallest document of each one's cluster."""
    roots = parents[documents]
    while not np.array_equal(above := parents[roots], roots):
        roots = above
    return roots


def join_groups(parents: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Make one cluster of the clusters of `a[i]` and `b[i]`, in place."""
    while len(a):
        a, b = find_roots(parents, a), find_roots(parents, b)
        apart = a != b
        a, b = a[apart], b[apart]
        np.minimum.at(parents, np.maximum(a, b), np.minimum(a, b))


class _Sketches:
    """The one-byte hashes of documents, mapped from disk."""

    def __init__(self, parts: list[Part], first: np.ndarray, permutations: int) -> None:
        self.parts, self.first, self.permutations = parts, first, permutations

    def rows(self, documents: np.ndarray) -> np.ndarray:
        """uint8 [documents, permutations]."""
        rows = np.empty((len(documents), self.permutations), np.uint8)
        numbers = np.searchsorted(self.first, documents, side="right") - 1
        order = np.argsort(numbers, kind="stable")  # part by part, whatever their number: each is mapped once
        for chosen in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1) if len(order) else ():
            number = numbers[chosen[0]]
            mapped = np.memmap(self.parts[number].stem.with_suffix(".sketch"), mode="r")
            rows[chosen] = mapped.reshape(-1, self.permutations)[documents[chosen] - self.first[number]]
        return rows

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Estimated Jaccard similarity of pairs: equal bytes, less those equal by chance (1 in 256)."""
        equal = (self.rows(a) == self.rows(b)).mean(axis=1)
        return (equal - 1 / 256) / (1 - 1 / 256)


def _priorities(parts: list[Part], config: CorpusConfig) -> np.ndarray:
    return np.array([config.sources[part.unit.source].priority for part in parts], np.int64)


def _originals(
    roots: np.ndarray, chars: np.ndarray, priorities: np.ndarray, first: np.ndarray, keep: str
) -> np.ndarray:
    """For each document the one of its cluster that stays, or -1 where that is itself."""
    strays = np.flatnonzero(roots != np.arange(len(roots)))
    members = np.unique(np.concatenate([strays, roots[strays]]))
    lengths = -chars[members].astype(np.int64)
    ranks = -priorities[np.searchsorted(first, members, side="right") - 1]
    by = {"longest": (ranks, lengths), "priority": (lengths, ranks), "first": ()}[keep]
    order = np.lexsort((members, *by, roots[members]))
    members, groups = members[order], roots[members[order]]
    begins = np.ones(len(groups), bool)
    begins[1:] = groups[1:] != groups[:-1]
    original = np.full(len(roots), -1, np.int64)
    original[members] = members[begins][np.cumsum(begins) - 1]
    original[members[begins]] = -1
    return original
