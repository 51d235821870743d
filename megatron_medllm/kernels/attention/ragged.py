"""What describes a packed stream to cuDNN's ragged attention. Nothing here calls cuDNN, so all of it runs on a CPU.

b: sequences, s: the longest one, np: heads, ng: KV heads, hn: width of a head. A sequence's queries are the last of its
keys; both of every sequence lie behind one another in [t, n, hn], token by token. cuDNN sees [b, n, s, hn] with an
offset, in elements, for the start of each sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

_SHORTEST = 128  # a plan for less than this would be one more plan and no faster
_TOTAL_STEPS = 2  # sizes of workspaces between one power of two and the next


@dataclass(frozen=True)
class PlanKey:
    """All that a plan depends on: streams of one key share its two plans."""

    sequences: int
    max_q: int
    max_kv: int
    total_q: int  # tokens that the backward pass has workspace for
    total_kv: int
    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    scale: float
    bottom_right: bool  # some sequence has fewer queries than keys

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    def shape(self, which: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Dimensions and strides [b, n, s, hn] of "q" (o, dO and dQ too), "kv" (K, V and their gradients) or "stats".

        Log-sum-exps must be token-major like the rest: head-major ones make gradients of zeros (cudnn-frontend #462).
        """
        heads, longest, width = {
            "q": (self.heads, self.max_q, self.width),
            "kv": (self.kv_heads, self.max_kv, self.width),
            "stats": (self.heads, self.max_q, 1),
        }[which]
        dims = (self.sequences, heads, longest, width)
        return dims, (longest * heads * width, width, heads * width, 1)


@dataclass(frozen=True)
class RaggedBatch:
    """One stream's sequences on the device, for given numbers of heads."""

    sequences: int
    max_q: int
    max_kv: int
    tokens_q: int
    tokens_kv: int
    lengths_q: Tensor  # [b] int32
    lengths_kv: Tensor  # [b] int32
    offsets_q: Tensor  # [b+1] int64, elements of [t, np, hn]
    offsets_kv: Tensor  # [b+1] int64, elements of [tokens_kv, ng, hn]
    offsets_stats: Tensor  # [b+1] int64, elements of [t, np]
    kv_rows: Tensor | None  # [tokens_kv] rows of the stream where its keys are not the sequences' as they stand
    bottom_right: bool

    @classmethod
    def build(
        cls,
        lengths_q: Sequence[int],
        lengths_kv: Sequence[int],
        *,
        heads: tuple[int, int],
        width: int,
        move: Callable[[list[np.ndarray]], list[Tensor]],
        kv_rows: np.ndarray | None = None,
    ) -> "RaggedBatch":
        """Put the tables of a stream on the device, in one copy.

        Args:
            lengths_q: queries of each sequence, at least one.
            lengths_kv: keys of each, no fewer than its queries.
            heads: (np, ng).
            width: hn.
            move: puts arrays on the device, each at a multiple of 16 bytes.
            kv_rows: [tokens_kv] int64, rows of the stream that are the sequences' keys; None: all of it, in order.

        Raises:
            ValueError: an empty sequence (cuDNN below 9.25 makes NaN of it), fewer keys than queries (the mask is
                aligned to the last key), or rows that are not as many as the keys.
        """
        if not lengths_q or len(lengths_q) != len(lengths_kv):
            raise ValueError(f"{len(lengths_q)} lengths of queries, {len(lengths_kv)} of keys")
        if any(not 1 <= q <= kv for q, kv in zip(lengths_q, lengths_kv, strict=True)):
            raise ValueError("a sequence needs a query, and as many keys as queries")
        if kv_rows is not None and len(kv_rows) != sum(lengths_kv):
            raise ValueError(f"{len(kv_rows)} rows for {sum(lengths_kv)} keys")
        arrays: list[np.ndarray] = [np.array(lengths, np.int32) for lengths in (lengths_q, lengths_kv)]
        for lengths, stride in ((lengths_q, heads[0] * width), (lengths_kv, heads[1] * width), (lengths_q, heads[0])):
            arrays.append(np.array([0, *accumulate(lengths)], np.int64) * stride)
        tables = move(arrays if kv_rows is None else [*arrays, kv_rows])
        return cls(
            sequences=len(lengths_q),
            max_q=max(lengths_q),
            max_kv=max(lengths_kv),
            tokens_q=sum(lengths_q),
            tokens_kv=sum(lengths_kv),
            lengths_q=tables[0],
            lengths_kv=tables[1],
            offsets_q=tables[2],
            offsets_kv=tables[3],
            offsets_stats=tables[4],
            kv_rows=None if kv_rows is None else tables[5],
            bottom_right=list(lengths_q) != list(lengths_kv),
        )


def plan_key(batch: RaggedBatch, *, heads: tuple[int, int], width: int, dtype: torch.dtype, scale: float) -> PlanKey:
    """The plans that serve this batch. Lengths are rounded up so that few keys serve many streams."""
    return PlanKey(
        sequences=batch.sequences,
        max_q=_power_of_two(batch.max_q),
        max_kv=_power_of_two(batch.max_kv),
        total_q=_rounded_total(batch.tokens_q),
        total_kv=_rounded_total(batch.tokens_kv),
        heads=heads[0],
        kv_heads=heads[1],
        width=width,
        dtype=dtype,
        scale=scale,
        bottom_right=batch.bottom_right,
    )


def _power_of_two(length: int) -> int:
    return max(_SHORTEST, 1 << (length - 1).bit_length())


def _rounded_total(tokens: int) -> int:
    """Up to half a power of two, and to 64: cuDNN's workspace is sized by it, what it computes is not."""
    step = max(64, (1 << (tokens - 1).bit_length()) // 2 // _TOTAL_STEPS)
    return -(-tokens // step) * step
