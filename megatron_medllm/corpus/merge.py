"""From complete parts to final files: the kept documents' tokens, their index, and the list of what was dropped."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import zstandard

from megatron_medllm.corpus.index import bin_path, copy_kept, idx_path, write_index
from megatron_medllm.corpus.read import Unit
from megatron_medllm.storage import atomic_write, read_json


@dataclass(frozen=True)
class Part:
    """A unit's result on disk."""

    unit: Unit
    stem: Path
    facts: dict

    def column(self, name: str) -> np.ndarray:
        """A per-document column, read from disk."""
        with np.load(self.stem.with_suffix(".npz")) as columns:
            return columns[name]


@dataclass(frozen=True)
class Copies:
    """Which documents (numbered over all parts) are copies: `original` is the number kept instead, or -1."""

    original: np.ndarray  # int64 [documents]
    is_exact: np.ndarray  # bool [documents]
    first: np.ndarray  # int64 [parts + 1], number of each part's first document
    pieces: np.ndarray  # int32 [documents], and `lines` int64: where each document stands
    lines: np.ndarray

    def of_part(self, number: int) -> np.ndarray:
        """`original` of one part's documents."""
        return self.original[self.first[number] : self.first[number + 1]]


def load_parts(folder: Path, units: list[Unit]) -> list[Part]:
    """The parts of all units, in order."""
    stems = [folder / f"{unit.number:06d}" for unit in units]
    return [Part(unit, stem, read_json(stem.with_suffix(".json"))) for unit, stem in zip(units, stems, strict=True)]


def kept_mask(part: Part, number: int, copies: Copies | None) -> np.ndarray:
    """bool [documents] of a part."""
    if copies is None:
        return np.ones(part.facts["documents"], bool)
    return copies.of_part(number) < 0


def merge_source(prefix: Path, parts: list[tuple[int, Part]], copies: Copies | None, dtype: np.dtype) -> None:
    """Write `PREFIX.bin` and `PREFIX.idx` from a source's parts, given with their numbers; then drop the parts' tokens.

    The index comes last: where it exists, the pair is complete.
    """
    if idx_path(prefix).exists():
        return
    kept_lengths = [np.empty(0, np.int32)]
    with atomic_write(bin_path(prefix)) as target:
        for number, part in parts:
            lengths, kept = part.column("lengths"), kept_mask(part, number, copies)
            copy_kept(target, part.stem.with_suffix(".bin"), lengths, kept, dtype.itemsize)
            kept_lengths.append(lengths[kept])
    with atomic_write(idx_path(prefix)) as stream:
        write_index(stream, np.concatenate(kept_lengths), dtype)
    for _, part in parts:
        part.stem.with_suffix(".bin").unlink(missing_ok=True)


def source_facts(parts: list[tuple[int, Part]], copies: Copies | None) -> dict:
    """Counts of a source: what was read, dropped at each step and kept, and a histogram of lengths.

    `length_histogram[i]` counts kept documents of 2^i to 2^(i+1) - 1 tokens.
    """
    dropped: Counter[str] = Counter()
    read = empty = input_bytes = tokens = characters = documents = 0
    histogram = np.zeros(32, np.int64)
    for number, part in parts:
        dropped.update(part.facts["dropped"])
        read, empty = read + part.facts["read"], empty + part.facts["empty"]
        input_bytes += part.facts["input_bytes"]
        kept = kept_mask(part, number, copies)
        if copies is not None:
            exact = copies.is_exact[copies.first[number] : copies.first[number + 1]]
            dropped["dedup.exact"] += int((~kept & exact).sum())
            dropped["dedup.near"] += int((~kept & ~exact).sum())
        if not part.facts["documents"]:
            continue
        lengths = part.column("lengths")[kept]
        lengths, characters = lengths[lengths > 0], characters + int(part.column("chars")[kept].sum(dtype=np.int64))
        tokens, documents = tokens + int(lengths.sum(dtype=np.int64)), documents + len(lengths)
        histogram += np.bincount(np.log2(lengths).astype(np.int64), minlength=32)
    return {
        "tokens": tokens,
        "documents": documents,
        "empty_documents": empty,
        "documents_read": read,
        "dropped": {step: count for step, count in sorted(dropped.items()) if count},
        "input_bytes": input_bytes,
        "characters": characters,
        # The end-of-document tokens are ours, not the text's.
        "characters_per_token": round(characters / (tokens - documents), 4) if tokens > documents else None,
        "length_histogram": np.trim_zeros(histogram, "b").tolist(),
    }


def write_dropped(path: Path, parts: list[Part], copies: Copies | None) -> None:
    """Write every dropped document as a JSON line: source, file, line, id, step, reason."""
    bases = _line_bases(parts)
    with atomic_write(path) as stream:
        with zstandard.ZstdCompressor(level=3).stream_writer(stream, closefd=False) as packed:
            for number, part in enumerate(parts):
                for row in _dropped_rows(number, part, parts, copies, bases):
                    packed.write(orjson.dumps(row) + b"\n")


def _line_bases(parts: list[Part]) -> list[list[int]]:
    """Per part and piece: lines of the same file that came in earlier pieces."""
    seen: Counter[str] = Counter()
    bases = []
    for part in parts:
        bases.append([])
        for piece, lines in zip(part.unit.pieces, part.facts["lines"], strict=True):
            bases[-1].append(seen[piece.path])
            seen[piece.path] += lines
    return bases


def _dropped_rows(
    number: int, part: Part, parts: list[Part], copies: Copies | None, bases: list[list[int]]
) -> Iterator[dict]:
    def row(piece: int, line: int, identifier: str | None, step: str, reason: str) -> dict:
        file, line = part.unit.pieces[piece].path, bases[number][piece] + line
        identifier = identifier if identifier is not None else f"{file}:{line}"
        return {
            "source": part.unit.source,
            "file": file,
            "line": line,
            "id": identifier,
            "step": step,
            "reason": reason,
        }

    if part.facts["dropped"]:
        with open(part.stem.with_suffix(".dropped"), "rb") as stream:
            for line in stream:
                note = orjson.loads(line)
                yield row(note["piece"], note["line"], note["id"], note["step"], note["reason"])
    if copies is None or not part.facts["documents"]:
        return
    originals = copies.of_part(number)
    if not (originals >= 0).any():
        return
    lines, pieces = copies.lines[copies.first[number] :], copies.pieces[copies.first[number] :]
    with open(part.stem.with_suffix(".ids"), "rb") as stream:
        for i, identifier in enumerate(stream):
            if originals[i] >= 0:
                step = "dedup.exact" if copies.is_exact[copies.first[number] + i] else "dedup.near"
                reason = f"copy of {_place(int(originals[i]), parts, copies, bases)}"
                yield row(int(pieces[i]), int(lines[i]), orjson.loads(identifier), step, reason)


def _place(document: int, parts: list[Part], copies: Copies, bases: list[list[int]]) -> str:
    number = int(np.searchsorted(copies.first, document, side="right")) - 1
    piece = int(copies.pieces[document])
    return f"{parts[number].unit.pieces[piece].path}:{bases[number][piece] + int(copies.lines[document])}"
