"""What a packed micro-batch looks like to the model: one stream of tokens, cut into segments.

A *segment* is a run of tokens that attends causally to itself and, when it has a prefix, to all of that prefix too.
A document is a segment of its own. A preference pair is three: the prompt, and two responses whose prefix is the
prompt, so that both share one copy of it. Positions restart per document; a response's continue from its prompt.

Attention works on *pieces*: a segment's queries on this rank, and the ranges of the whole stream that hold their keys.
Without context parallelism a piece is a segment; with it, what a chunk of the stream cuts out of one.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_medllm.parallel.context import WHOLE, ContextSplit
from megatron_medllm.parallel.staging import to_device

# A padded attention batch may hold at most this share of padding before a segment opens the next one.
_MIN_FILL = 0.6


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of the stream, attending to themselves and to [prefix_start, prefix_end)."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0

    @property
    def prefix_length(self) -> int:
        return self.prefix_end - self.prefix_start

    @property
    def length(self) -> int:
        """Keys that the segment's last token sees."""
        return self.prefix_length + self.end - self.start

    def shifted(self, offset: int) -> "Segment":
        """The same segment in a stream that begins `offset` tokens earlier."""
        moved = (self.prefix_start + offset, self.prefix_end + offset) if self.prefix_length else (0, 0)
        return Segment(self.start + offset, self.end + offset, *moved)


@dataclass(frozen=True)
class SegmentPiece:
    """Queries [start, end) of this rank's tokens; they are the last of the keys, and attend to them causally."""

    start: int
    end: int
    keys: tuple[tuple[int, int], ...]  # ranges of the whole stream

    @property
    def length(self) -> int:
        """Keys that the last query sees."""
        return sum(end - start for start, end in self.keys)


def cut_into_pieces(segments: tuple[Segment, ...], split: ContextSplit) -> list[list[SegmentPiece]]:
    """The pieces of every chunk that a rank holds, in order."""
    chunks, done = [], 0
    for first, last in split.chunks(segments[-1].end):
        pieces = []
        for s in segments:
            start, end = max(first, s.start), min(last, s.end)
            if start < end:
                prefix = ((s.prefix_start, s.prefix_end),) if s.prefix_length else ()
                pieces.append(SegmentPiece(done + start - first, done + end - first, (*prefix, (s.start, end))))
        chunks.append(pieces)
        done += last - first
    return chunks


@dataclass
class PackedSequences(PackedSeqParams):
    """The micro-batch's segments, handed through Megatron-Core's layers to the core attention.

    `qkv_format` stays "sbhd" for our core attention, which rotates q and k itself, by `rotation`; Megatron passes this
    object on untouched. Transformer Engine's attention needs "thd" and `cu_seqlens`, and Megatron's own RoPE.
    """

    position_ids: Tensor | None = None  # [t/cp]
    segments: tuple[Segment, ...] = ()  # of the whole stream
    split: ContextSplit = WHOLE
    rotation: tuple[Tensor, Tensor] | None = None  # cosines and sines [t/cp, hn/2] fp32; the model sets it
    uniform_grad: float | None = None  # d loss / d log-prob of every counted token, where it is one known number
    counted_rows: Tensor | None = None  # int64, this rank's tokens that are predicted, where the host has counted them
    ahead: bool = False  # plans go to the device in queued copies
    _batches: "list[PaddedBatch] | None" = field(default=None, repr=False)
    _plans: "list[VarlenPlan] | None" = field(default=None, repr=False)
    tables: dict = field(default_factory=dict, repr=False)  # what a kernel made of the layout, by the kernel's own key

    @classmethod
    def from_segments(
        cls,
        segments: tuple[Segment, ...],
        position_ids: Tensor,
        *,
        backend: str,
        split: ContextSplit = WHOLE,
        ahead: bool = False,
    ) -> "PackedSequences":
        """Build for a backend.

        Args:
            segments: of the whole stream.
            position_ids: [t/cp], of this rank's tokens.
            backend: whose attention it is for; under context parallelism both backends use ours.
            split: which tokens are this rank's.
            ahead: copy plans to the device without waiting for it.

        Raises:
            ValueError: the segments do not follow each other through the whole stream, or the te backend was asked for
                segments with a prefix, which its kernels cannot mask.
        """
        bounds = [0, *(s.end for s in segments)]
        length = len(position_ids) * split.size
        if [s.start for s in segments] != bounds[:-1] or bounds[-1] != length:
            raise ValueError(f"segments must follow each other from 0 to {length}: {segments}")
        if backend == "torch" or split.size > 1:
            return cls(qkv_format="sbhd", position_ids=position_ids, segments=segments, split=split, ahead=ahead)
        if any(s.prefix_length for s in segments):
            raise ValueError("the te backend packs chosen and rejected side by side; it cannot share their prompt")
        (cu_seqlens,) = to_device([np.array(bounds, np.int32)], position_ids.device, ahead=ahead)
        longest = max(s.length for s in segments)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            position_ids=position_ids,
            segments=segments,
            ahead=ahead,
        )

    def padded_batches(self, device: torch.device) -> list["PaddedBatch"]:
        """Pieces of similar length, as right-padded causal batches; computed once per micro-batch."""
        if self._batches is None:
            pieces = [piece for chunk in cut_into_pieces(self.segments, self.split) for piece in chunk]
            self._batches = [_padded_batch(group, device) for group in _groups_by_length(pieces)]
        return self._batches

    def varlen_plans(self, device: torch.device) -> list["VarlenPlan"]:
        """The same for a variable-length kernel, a call per chunk; computed once per micro-batch."""
        if self._plans is None:
            chunks = cut_into_pieces(self.segments, self.split)
            self._plans = [_varlen_plan(chunk, device, ahead=self.ahead) for chunk in chunks]
        return self._plans

    def ragged_layout(self) -> "RaggedLayout":
        """The same for cuDNN's ragged kernels, whose tables `tables` keeps.

        Raises:
            ValueError: under context parallelism.
        """
        if self.split.size != 1:
            raise ValueError("a ragged layout is of a whole stream")
        (pieces,) = cut_into_pieces(self.segments, self.split)
        return _ragged_layout(pieces)


@dataclass(frozen=True)
class RaggedLayout:
    """A stream's sequences for such a kernel, on the host; queries are the stream's, in order."""

    lengths_q: tuple[int, ...]
    lengths_kv: tuple[int, ...]
    kv_rows: np.ndarray | None  # int64, rows of the stream that are the keys; None: all of it, in order


def _ragged_layout(pieces: list[SegmentPiece]) -> RaggedLayout:
    ranges = [keys for piece in pieces for keys in piece.keys]
    rows = _kv_rows(ranges)
    return RaggedLayout(
        lengths_q=tuple(piece.end - piece.start for piece in pieces),
        lengths_kv=tuple(piece.length for piece in pieces),
        kv_rows=None if isinstance(rows, slice) else rows,
    )


@dataclass(frozen=True)
class VarlenPlan:
    """A chunk's pieces for a variable-length kernel whose causal mask is aligned to the last key."""

    queries: slice  # of this rank's tokens
    cu_seqlens_q: Tensor  # [n+1] int32
    cu_seqlens_kv: Tensor  # [n+1] int32
    max_q: int
    max_kv: int
    kv_rows: Tensor | slice  # of the whole stream; rows one by one where a prefix is repeated before its responses


def _varlen_plan(pieces: list[SegmentPiece], device: torch.device, *, ahead: bool) -> VarlenPlan:
    bounds_q, bounds_kv = [0], [0]
    for piece in pieces:
        bounds_q.append(bounds_q[-1] + piece.end - piece.start)
        bounds_kv.append(bounds_kv[-1] + piece.length)
    arrays = [np.array(bounds, np.int32) for bounds in (bounds_q, bounds_kv)]
    kv_rows = _kv_rows([keys for piece in pieces for keys in piece.keys])
    cu_seqlens_q, cu_seqlens_kv, *moved = to_device(
        arrays if isinstance(kv_rows, slice) else [*arrays, kv_rows], device, ahead=ahead
    )
    return VarlenPlan(
        queries=slice(pieces[0].start, pieces[-1].end),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        max_q=max(piece.end - piece.start for piece in pieces),
        max_kv=max(piece.length for piece in pieces),
        kv_rows=kv_rows if isinstance(kv_rows, slice) else moved[0],
    )


def _kv_rows(ranges: list[tuple[int, int]]) -> np.ndarray | slice:
    if all(before[1] == after[0] for before, after in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return np.concatenate([np.arange(start, end) for start, end in ranges])


@dataclass(frozen=True)
class PaddedBatch:
    """n pieces as rows of l keys, padded on the right. Query i has the same position as key i.

    Padding repeats row 0 of the stream; a slot that holds no query of the piece (padding, its prefix, keys before its
    chunk) repeats this rank's query 0, and its output is thrown away.
    """

    keys: Tensor  # [n, l], rows of the whole stream
    queries: Tensor  # [n, l], rows of this rank's tokens
    slots: Tensor  # [q], where the flattened batch holds queries
    tokens: Tensor  # [q], which of this rank's tokens they are


def _groups_by_length(pieces: list[SegmentPiece]) -> list[list[SegmentPiece]]:
    groups: list[list[SegmentPiece]] = []
    for piece in sorted(pieces, key=lambda piece: -piece.length):
        if groups and piece.length >= _MIN_FILL * groups[-1][0].length:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _padded_batch(group: list[SegmentPiece], device: torch.device) -> PaddedBatch:
    longest = group[0].length
    keys, queries = torch.zeros(2, len(group), longest, dtype=torch.long)
    tokens, slots = [], []
    for i, piece in enumerate(group):
        length, own = piece.length, torch.arange(piece.start, piece.end)
        keys[i, :length] = torch.cat([torch.arange(start, end) for start, end in piece.keys])
        queries[i, length - len(own) : length] = own
        tokens.append(own)
        slots.append(torch.arange(i * longest + length - len(own), i * longest + length))
    return PaddedBatch(keys.to(device), queries.to(device), torch.cat(slots).to(device), torch.cat(tokens).to(device))
