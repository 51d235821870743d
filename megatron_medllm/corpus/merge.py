"""From complete parts to final files: the kept documents' tokens, their index, and the list of what was dropped."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import orjson
import zstandard

from megatron_medllm.account import Account
from megatron_medllm.corpus.index import bin_path, copy_kept, idx_path, write_index
from megatron_medllm.corpus.units import Unit
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
            if not part.facts["documents"]:
                continue
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
    read = empty = contaminated = input_bytes = tokens = characters = documents = 0
    histogram = np.zeros(32, np.int64)
    for number, part in parts:
        dropped.update(part.facts["dropped"])
        read, empty = read + part.facts["read"], empty + part.facts["empty"]
        input_bytes, contaminated = input_bytes + part.facts["input_bytes"], contaminated + part.facts["contaminated"]
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
        "contaminated_documents": contaminated,
        "dropped": {step: count for step, count in sorted(dropped.items()) if count},
        "input_bytes": input_bytes,
        "characters": characters,
        # The end-of-document tokens are ours, not the text's.
        "characters_per_token": round(characters / (tokens - documents), 4) if tokens > documents else None,
        "length_histogram": np.trim_zeros(histogram, "b").tolist(),
    }


def corpus_account(sources: dict[str, dict], parts: list[Part], copies: Copies | None) -> Account:
    """Documents kept and lost per source, with the place of the first loss of every kind.

    Args:
        sources: name to `source_facts`.
    """
    account, bases = Account("documents"), _line_bases(parts)
    for name, facts in sources.items():
        account.keep(name, facts["documents"])
    for number, part in enumerate(parts):
        for kind, loss in part.facts["lost"].items():
            place = _place(part, bases[number], loss["piece"], loss["line"], None)
            reason = "" if loss["reason"] == kind else f": {loss['reason']}"
            account.lose(part.unit.source, kind, place["id"] + reason, loss["count"])
        if copies is None:
            continue
        for kind in ("dedup.exact", "dedup.near"):
            own = slice(copies.first[number], copies.first[number + 1])
            lost = (copies.original[own] >= 0) & (copies.is_exact[own] == (kind == "dedup.exact"))
            if lost.any():
                rows = _copies_of(number, parts, copies, bases)
                row = next(row for row in rows if row["step"] == kind)
                account.lose(part.unit.source, kind, f"{row['file']}:{row['line']}: {row['reason']}", int(lost.sum()))
    return account


def write_accounts(output_dir: Path, parts: list[Part], copies: Copies | None) -> None:
    """Write, as JSON lines with source, file, line and id, what was dropped and what met an exam question.

    `dropped.jsonl.zst` adds step and reason, `contaminated.jsonl.zst` the questions met and what was done.
    """
    bases = _line_bases(parts)
    with _packed(output_dir / "dropped.jsonl.zst") as dropped:
        for number, part in enumerate(parts):
            for row in _notes(part, ".dropped", bases[number]):
                _write_row(dropped, row)
            if copies is not None:
                for row in _copies_of(number, parts, copies, bases):
                    _write_row(dropped, row)
    if any(part.facts["contaminated"] for part in parts):
        with _packed(output_dir / "contaminated.jsonl.zst") as contaminated:
            for number, part in enumerate(parts):
                for row in _notes(part, ".contaminated", bases[number]):
                    _write_row(contaminated, row)


@contextmanager
def _packed(path: Path) -> Iterator[IO[bytes]]:
    with atomic_write(path) as stream:
        with zstandard.ZstdCompressor(level=3).stream_writer(stream, closefd=False) as packed:
            yield packed


def _write_row(stream: IO[bytes], row: dict) -> None:
    stream.write(orjson.dumps(row) + b"\n")


def _line_bases(parts: list[Part]) -> list[list[int]]:
    """Per part and piece: lines of the same file that came in earlier pieces."""
    seen: Counter[str] = Counter()
    bases: list[list[int]] = []
    for part in parts:
        bases.append([])
        for piece, lines in zip(part.unit.pieces, part.facts["lines"], strict=True):
            bases[-1].append(seen[piece.path])
            seen[piece.path] += lines
    return bases


def _place(part: Part, bases: list[int], piece: int, line: int, identifier: str | None) -> dict:
    file, line = part.unit.pieces[piece].path, bases[piece] + line
    name = identifier if identifier is not None else f"{file}:{line}"
    return {"source": part.unit.source, "file": file, "line": line, "id": name}


def _notes(part: Part, suffix: str, bases: list[int]) -> Iterator[dict]:
    """A worker's notes, with the place in the file for the place in the piece."""
    with open(part.stem.with_suffix(suffix), "rb") as stream:
        for line in stream:
            note = orjson.loads(line)
            yield _place(part, bases, note.pop("piece"), note.pop("line"), note.pop("id")) | note


def _copies_of(number: int, parts: list[Part], copies: Copies, bases: list[list[int]]) -> Iterator[dict]:
    """A row for each document of a part that is a copy."""
    originals, first = copies.of_part(number), int(copies.first[number])
    if not (originals >= 0).any():
        return
    with open(parts[number].stem.with_suffix(".ids"), "rb") as stream:
        for document, identifier in enumerate(stream, start=first):
            original = int(copies.original[document])
            if original >= 0:
                kept_in = int(np.searchsorted(copies.first, original, side="right")) - 1
                kept_piece = int(copies.pieces[original])
                kept_file = parts[kept_in].unit.pieces[kept_piece].path
                kept_line = bases[kept_in][kept_piece] + int(copies.lines[original])
                piece, line = int(copies.pieces[document]), int(copies.lines[document])
                yield _place(parts[number], bases[number], piece, line, orjson.loads(identifier)) | {
                    "step": "dedup.exact" if copies.is_exact[document] else "dedup.near",
                    "reason": f"copy of {kept_file}:{kept_line}",
                }
