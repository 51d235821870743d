"""One worker process: a unit of input becomes a part on disk, whole or not at all.

A part is `NNNNNN.bin` (tokens), `.npz` (per document: tokens, characters, line, keys that copies are found by),
`.sketch` (to verify copies), `.ids` (to name them), `.dropped` and `.contaminated` (JSON lines), and at the end
`.json`, whose presence says that the rest is complete.
"""

import dataclasses
import fcntl
import hashlib
import os
import pickle
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import orjson

from megatron_medllm.config.corpus import CorpusConfig
from megatron_medllm.corpus.clean import clean
from megatron_medllm.corpus.decontaminate import Detector, Found
from megatron_medllm.corpus.dedup import sign
from megatron_medllm.corpus.index import token_dtype
from megatron_medllm.corpus.read import Documents, count_lines, read_piece
from megatron_medllm.corpus.tokenizer import Encoded, Encoder, Encoders, TokenizerFacts
from megatron_medllm.corpus.units import InputPiece, Unit
from megatron_medllm.errors import UserError
from megatron_medllm.storage import atomic_write, read_json, write_json

QUESTIONS = "questions.pickle"  # beside the parts: the index of exam questions


@dataclass(frozen=True)
class Job:
    """What all units share."""

    config: CorpusConfig
    tokenizer: TokenizerFacts
    parts: Path
    strict: bool
    parent_pid: int  # told, not asked: the parent may be dead before a worker has started


class Document(NamedTuple):
    """A document on its way. `line` is within its piece."""

    text: str
    id: str | None
    line: int


_worker: "UnitWriter | None" = None


def start_worker(job: Job) -> None:
    """Initialise a worker process: load the tokenizer once, and die with the parent."""
    global _worker
    # One core per worker: the libraries' own threads would fight the other workers for theirs. fastokens' would also
    # burn time waiting for work, each with a cache of its own to fill.
    os.environ |= {"FASTOKENS_BPE_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_exit_with_parent, args=(job.parent_pid,), daemon=True).start()
    _worker = UnitWriter(job)


def encode_fast(sample: list[str]) -> Encoded | str:
    """Ids of `sample` by fastokens, or why there are none."""
    assert _worker is not None
    return _worker.encoders.encode_fast(sample)


def run_unit(unit: Unit, backend: str) -> dict:
    """Process a unit in a worker started by `start_worker`; returns the part's facts."""
    assert _worker is not None
    return _worker.write(unit, backend)


def digest_path(path: str) -> str:
    """BLAKE2b-256 of a file, in hex: three times as fast as SHA-256 where the processor has no SHA instructions."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _exit_with_parent(parent: int) -> None:
    # Killed with -9, a parent cannot tell its workers; a resumed run must not race with them.
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


@contextmanager
def _claimed(path: Path, number: int) -> Iterator[None]:
    """Hold one byte of a lock file that all processes share; waits for whoever holds it, and ends with its holder.

    POSIX record locks hold between the hosts of a network file system too.
    """
    with open(path, "ab") as stream:
        fcntl.lockf(stream, fcntl.LOCK_EX, 1, number)
        yield


class UnitWriter:
    """Holds the tokenizer and the question index between units."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.dtype = token_dtype(job.tokenizer.vocab_size)
        self.encoders = Encoders(job.tokenizer)
        self.backend = ""
        self._detector: Detector | None = None

    @property
    def detector(self) -> Detector | None:
        """Finds exam questions; None where none are given. Read once, when the first unit comes."""
        if self._detector is None and self.job.config.decontaminate.exams:
            with open(self.job.parts / QUESTIONS, "rb") as stream:
                self._detector = Detector(pickle.load(stream), self.job.config.decontaminate)
        return self._detector

    @property
    def encode(self) -> Encoder:
        """Texts to ids, by the backend in use."""
        return self.encoders.get(self.backend)

    def write(self, unit: Unit, backend: str) -> dict:
        """Write the part of `unit`, unless another process has done so, and return its facts."""
        self.backend = backend
        with _claimed(self.job.parts.parent / "units.lock", unit.number):
            facts = self.job.parts / f"{unit.name}.json"
            return read_json(facts) if facts.exists() else self._write(unit)

    def _write(self, unit: Unit) -> dict:
        part = PartWriter(self.job.parts, unit)
        source = self.job.config.sources[unit.source]
        with ExitStack() as files:
            part.open(files)
            for piece_number, piece in enumerate(unit.pieces):
                for batch in read_piece(piece, source):
                    self._take(part, piece_number, piece, batch)
        return part.finish()

    def _take(self, part: "PartWriter", piece_number: int, piece: InputPiece, batch: Documents) -> None:
        if batch.bad and self.job.strict:
            loss = batch.bad[0]
            raise UserError(f"{piece.path}:{loss.line + _lines_before(piece)}: {loss.reason}")
        part.lines[piece_number] += batch.lines_read
        part.input_bytes += batch.input_bytes
        part.read += len(batch.texts) + len(batch.bad)
        for loss in batch.bad:
            part.drop(piece_number, loss.line, None, "read", loss.reason, kind=loss.kind)

        kept = self._clean(part, piece_number, batch)
        if self.detector is not None:
            kept = self._decontaminate(part, piece_number, kept)
        if not kept:
            return
        texts = [document.text for document in kept]
        part.add(*self.append_eod(texts), kept, piece_number)
        dedup = self.job.config.dedup
        if dedup.exact or dedup.near:
            part.add_signatures(kept, *sign(texts, dedup))

    def _clean(self, part: "PartWriter", piece: int, batch: Documents) -> list[Document]:
        config = self.job.config.sources[part.unit.source].clean
        kept = []
        cleaned = clean(batch.texts, config)
        for was, (text, step, reason), identifier, line in zip(
            batch.texts, cleaned, batch.ids, batch.lines, strict=True
        ):
            if not was and self.job.config.keep_empty:
                part.empty += 1
                part.lose("empty text", piece, line, "empty text")
                kept.append(Document(was, identifier, line))
            elif step:
                part.drop(piece, line, identifier, f"clean.{step}", reason)
            else:
                kept.append(Document(text, identifier, line))
        return kept

    def _decontaminate(self, part: "PartWriter", piece: int, documents: list[Document]) -> list[Document]:
        assert self.detector is not None
        found = self.detector.find([document.text for document in documents])
        kept = []
        for position, document in enumerate(documents):
            meeting = found.get(position)
            if meeting is None:
                kept.append(document)
                continue
            masks = self.job.config.decontaminate.action == "mask" and meeting.masked
            part.note_contamination(piece, document, meeting, "masked" if masks else "dropped")
            if masks:
                kept.append(Document(meeting.masked, document.id, document.line))
            else:
                met = ", ".join(meeting.question for meeting in meeting.meetings)
                part.drop(piece, document.line, document.id, "decontaminate", met)
        return kept

    def append_eod(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts with the end-of-document id behind each non-empty one; tokens per text, int32."""
        ids, counts = self.encode(texts)
        lengths = counts + (counts > 0)
        tokens = np.empty(int(lengths.sum()), self.dtype)
        ends = np.cumsum(lengths)[counts > 0] - 1
        is_text = np.ones(len(tokens), bool)
        is_text[ends] = False
        tokens[is_text] = ids
        tokens[ends] = self.job.config.eod_id
        return tokens, lengths.astype(np.int32)


class PartWriter:
    """The files of one part while they grow."""

    def __init__(self, folder: Path, unit: Unit) -> None:
        self.unit, self.stem = unit, folder / unit.name
        self.lines = [0] * len(unit.pieces)
        self.input_bytes = self.read = self.empty = self.contaminated = self.tokens = 0
        self.dropped: Counter[str] = Counter()
        self.lost: dict[str, dict] = {}
        self.columns: dict[str, list[np.ndarray]] = {}

    def open(self, files: ExitStack) -> None:
        """Open the part's streams; they take their names when `files` closes without an error."""
        self._bin, self._dropped, self._contaminated, self._ids, self._sketch = (
            files.enter_context(atomic_write(self.stem.with_suffix(suffix)))
            for suffix in (".bin", ".dropped", ".contaminated", ".ids", ".sketch")
        )

    def lose(self, kind: str, piece: int, line: int, reason: str) -> None:
        """Count a loss for the account, and remember the first of its kind."""
        first = self.lost.setdefault(kind, {"count": 0, "piece": piece, "line": line, "reason": reason})
        first["count"] += 1

    def drop(
        self, piece: int, line: int, identifier: str | None, step: str, reason: str, *, kind: str | None = None
    ) -> None:
        """Write down a document that does not go on. Its line is within the piece; the end adds the piece's own.

        Args:
            kind: what the account counts it under; default: the step.
        """
        self.dropped[step] += 1
        self.lose(kind or step, piece, line, reason)
        _write_row(self._dropped, {"piece": piece, "line": line, "id": identifier, "step": step, "reason": reason})

    def note_contamination(self, piece: int, document: Document, found: Found, action: str) -> None:
        """Write down which questions a document holds, and what is done about it."""
        self.contaminated += 1
        place = {"piece": piece, "line": document.line, "id": document.id}
        questions = [dataclasses.asdict(meeting) for meeting in found.meetings]
        _write_row(self._contaminated, place | {"action": action, "questions": questions})

    def add(self, tokens: np.ndarray, lengths: np.ndarray, documents: list[Document], piece: int) -> None:
        """Append documents with their tokens (all in one array) and tokens per document (int32)."""
        self._bin.write(tokens.data)
        self.tokens += len(tokens)
        self.put("lengths", lengths)
        self.put("chars", np.array([len(document.text) for document in documents], np.uint32))
        self.put("lines", np.array([document.line for document in documents], np.int64))
        self.put("pieces", np.full(len(documents), piece, np.int32))

    def add_signatures(
        self, documents: list[Document], columns: dict[str, np.ndarray], sketch: np.ndarray | None
    ) -> None:
        """Append what copies of the last documents are found by, and what they are called."""
        self._ids.write(b"".join(orjson.dumps(document.id) + b"\n" for document in documents))
        for name, column in columns.items():
            self.put(name, column)
        if sketch is not None:
            self._sketch.write(sketch.data)

    def put(self, name: str, column: np.ndarray) -> None:
        """Append to a per-document column of the part."""
        self.columns.setdefault(name, []).append(column)

    def finish(self) -> dict:
        """Write the columns, then the facts that declare the part complete."""
        columns = {name: np.concatenate(chunks) for name, chunks in self.columns.items()}
        with atomic_write(self.stem.with_suffix(".npz")) as stream:
            np.savez(stream, **columns)  # type: ignore[arg-type]  # to mypy one of them might be allow_pickle
        facts = {
            "documents": len(columns["lengths"]) if columns else 0,
            "tokens": self.tokens,
            "read": self.read,
            "empty": self.empty,
            "contaminated": self.contaminated,
            "input_bytes": self.input_bytes,
            "lines": self.lines,
            "dropped": dict(sorted(self.dropped.items())),
            "lost": self.lost,
        }
        write_json(self.stem.with_suffix(".json"), facts)
        return facts


def _write_row(stream: IO[bytes], row: object) -> None:
    stream.write(orjson.dumps(row) + b"\n")


def _lines_before(piece: InputPiece) -> int:
    return count_lines(Path(piece.path), piece.start) if piece.format in ("jsonl", "lines") else 0
