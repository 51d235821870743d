"""What a packed micro-batch looks like to the model: one stream of tokens, cut into segments.

A *segment* is a run of tokens that attends causally to itself and, when it has a prefix, to all of that prefix too.
A document is a segment of its own. A preference pair is three: the prompt, and two responses whose prefix is the
prompt, so that both share one copy of it. Positions restart per document; a response's continue from its prompt.
"""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

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


@dataclass
class PackedSequences(PackedSeqParams):
    """The micro-batch's segments, handed through Megatron-Core's layers to the core attention.

    `qkv_format` stays "sbhd" for the torch backend: Megatron then applies RoPE element-wise, with one angle per token
    of `position_ids`, and passes this object on untouched. The te backend sets "thd" and `cu_seqlens`.
    """

    position_ids: Tensor | None = None  # [t]
    segments: tuple[Segment, ...] = ()
    uniform_grad: float | None = None  # d loss / d log-prob of every counted token, where it is one known number
    _batches: list[tuple[Tensor, Tensor, Tensor]] | None = field(default=None, repr=False)
    _plan: "VarlenPlan | None" = field(default=None, repr=False)

    @classmethod
    def from_segments(cls, segments: tuple[Segment, ...], position_ids: Tensor, *, backend: str) -> "PackedSequences":
        """Build for a backend.

        Raises:
            ValueError: the segments do not follow each other through the whole stream, or the te backend was asked for
                segments with a prefix, which its kernels cannot mask.
        """
        bounds = [0, *(s.end for s in segments)]
        if [s.start for s in segments] != bounds[:-1] or bounds[-1] != len(position_ids):
            raise ValueError(f"segments must follow each other from 0 to {len(position_ids)}: {segments}")
        if backend == "torch":
            return cls(qkv_format="sbhd", position_ids=position_ids, segments=segments)
        if any(s.prefix_length for s in segments):
            raise ValueError("the te backend packs chosen and rejected side by side; it cannot share their prompt")
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=position_ids.device)
        longest = max(s.length for s in segments)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            position_ids=position_ids,
            segments=segments,
        )

    def padded_batches(self, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Segments of similar length, as right-padded causal batches; computed once per micro-batch.

        Returns:
            (rows, stream, slots) each: `rows` [n, l] indexes the stream for every key (its prefix first; padding
            repeats index 0), and the outputs of the flattened batch's `slots` are the stream's tokens `stream`.
        """
        if self._batches is None:
            self._batches = [_padded_batch(group, device) for group in _groups_by_length(self.segments)]
        return self._batches

    def varlen_plan(self, device: torch.device) -> "VarlenPlan":
        """The same segments for a variable-length kernel; computed once per micro-batch."""
        if self._plan is None:
            self._plan = _varlen_plan(self.segments, device)
        return self._plan


@dataclass(frozen=True)
class VarlenPlan:
    """Bounds for a variable-length kernel whose causal mask is aligned to the last key.

    `kv_rows` indexes the stream for every key (a response's prompt is repeated before it); None when no segment has
    a prefix and the keys are the stream itself.
    """

    cu_seqlens_q: Tensor  # [n+1] int32
    cu_seqlens_kv: Tensor  # [n+1] int32
    max_q: int
    max_kv: int
    kv_rows: Tensor | None


def _varlen_plan(segments: tuple[Segment, ...], device: torch.device) -> VarlenPlan:
    bounds_q, bounds_kv, rows = [0], [0], []
    for s in segments:
        bounds_q.append(bounds_q[-1] + s.end - s.start)
        bounds_kv.append(bounds_kv[-1] + s.length)
        rows += [torch.arange(s.prefix_start, s.prefix_end), torch.arange(s.start, s.end)]
    shared = any(s.prefix_length for s in segments)
    return VarlenPlan(
        cu_seqlens_q=torch.tensor(bounds_q, dtype=torch.int32, device=device),
        cu_seqlens_kv=torch.tensor(bounds_kv, dtype=torch.int32, device=device),
        max_q=max(s.end - s.start for s in segments),
        max_kv=max(s.length for s in segments),
        kv_rows=torch.cat(rows).to(device) if shared else None,
    )


def _groups_by_length(segments: tuple[Segment, ...]) -> list[list[Segment]]:
    groups: list[list[Segment]] = []
    for segment in sorted((s for s in segments if s.end > s.start), key=lambda s: -s.length):
        if groups and segment.length >= _MIN_FILL * groups[-1][0].length:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def _padded_batch(group: list[Segment], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    longest = group[0].length
    rows = torch.zeros(len(group), longest, dtype=torch.long)
    stream, slots = [], []
    for i, s in enumerate(group):
        rows[i, : s.prefix_length] = torch.arange(s.prefix_start, s.prefix_end)
        rows[i, s.prefix_length : s.length] = torch.arange(s.start, s.end)
        stream.append(torch.arange(s.start, s.end))
        slots.append(torch.arange(i * longest + s.prefix_length, i * longest + s.length))
    return rows.to(device), torch.cat(stream).to(device), torch.cat(slots).to(device)
