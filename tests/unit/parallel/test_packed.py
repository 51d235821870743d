"""Segments of a packed stream, as each attention kernel is told of them."""

import inspect
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from megatron_medllm.models.attention import flash_varlen, padded_sdpa
from megatron_medllm.parallel.context import WHOLE, ContextSplit, gather_stream
from megatron_medllm.parallel.packed import (
    PackedSequences,
    Segment,
    SegmentPiece,
    cut_into_pieces,
)

CPU = torch.device("cpu")
SIGNATURE = inspect.signature(varlen.varlen_attn)
# A document of 3 tokens, then a prompt of 2 and two answers of 1 and 2 behind it.
SHARED = (Segment(0, 3), Segment(3, 5), Segment(5, 6, 3, 5), Segment(6, 8, 3, 5))


def pack(segments: tuple[Segment, ...], backend: str = "torch", split: ContextSplit = WHOLE) -> PackedSequences:
    positions = torch.zeros(segments[-1].end // split.size)
    return PackedSequences.from_segments(segments, positions, backend=backend, split=split)


def test_a_segment_moves_with_its_prefix():
    assert Segment(6, 8, 3, 5).length == 4
    assert Segment(6, 8, 3, 5).shifted(10) == Segment(16, 18, 13, 15)
    assert Segment(0, 3).shifted(10) == Segment(10, 13)


def test_bounds_for_variable_length_kernels():
    (plan,) = pack(SHARED).varlen_plans(CPU)
    assert plan.queries == slice(0, 8)
    assert plan.cu_seqlens_q.tolist() == [0, 3, 5, 6, 8]
    assert plan.cu_seqlens_kv.tolist() == [0, 3, 5, 8, 12]
    assert (plan.max_q, plan.max_kv) == (3, 4)
    assert plan.kv_rows.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 3, 4, 6, 7]
    (plan,) = pack(SHARED[:2]).varlen_plans(CPU)
    assert plan.kv_rows == slice(0, 5)


def test_padded_batches_put_similar_lengths_together():
    batches = pack(SHARED).padded_batches(CPU)
    assert [batch.keys.tolist() for batch in batches] == [[[3, 4, 6, 7], [0, 1, 2, 0], [3, 4, 5, 0]], [[3, 4]]]
    assert [batch.queries.tolist() for batch in batches] == [[[0, 0, 6, 7], [0, 1, 2, 0], [0, 0, 5, 0]], [[3, 4]]]
    assert [batch.tokens.tolist() for batch in batches] == [[6, 7, 0, 1, 2, 5], [3, 4]]
    assert [batch.slots.tolist() for batch in batches] == [[2, 3, 4, 5, 6, 10], [0, 1]]


def test_every_rank_gets_an_early_and_a_late_chunk():
    assert [ContextSplit(rank, 3).chunks(12) for rank in range(3)] == [
        ((0, 2), (10, 12)),
        ((2, 4), (8, 10)),
        ((4, 6), (6, 8)),
    ]
    assert ContextSplit(1, 2).take(np.arange(8) * 10).tolist() == [20, 30, 40, 50]
    assert WHOLE.chunks(7) == ((0, 7),)
    with pytest.raises(ValueError, match="10 tokens does not make 4 equal chunks"):
        ContextSplit(0, 2).chunks(10)


def test_gathered_parts_stand_in_the_streams_order(monkeypatch: pytest.MonkeyPatch):
    from megatron.core.tensor_parallel import mappings

    stream = np.arange(12)
    parts = [torch.from_numpy(ContextSplit(rank, 3).take(stream)) for rank in range(3)]
    group = SimpleNamespace(size=lambda: 3)
    monkeypatch.setattr(mappings, "gather_from_sequence_parallel_region", lambda local, group: torch.cat(parts))
    assert gather_stream(parts[0], group).tolist() == stream.tolist()


def test_chunks_cut_segments_into_pieces():
    """Of the queries that a chunk cuts out, keys are the prefix and the segment from its beginning."""
    first, second = (cut_into_pieces(SHARED, ContextSplit(rank, 2)) for rank in (0, 1))
    assert first == [  # tokens 0, 1 | 6, 7
        [SegmentPiece(0, 2, ((0, 2),))],
        [SegmentPiece(2, 4, ((3, 5), (6, 8)))],
    ]
    assert second == [  # tokens 2, 3 | 4, 5
        [SegmentPiece(0, 1, ((0, 3),)), SegmentPiece(1, 2, ((3, 4),))],
        [SegmentPiece(2, 3, ((3, 5),)), SegmentPiece(3, 4, ((3, 5), (5, 6)))],
    ]
    assert cut_into_pieces(SHARED, WHOLE) == [
        [
            SegmentPiece(0, 3, ((0, 3),)),
            SegmentPiece(3, 5, ((3, 5),)),
            SegmentPiece(5, 6, ((3, 5), (5, 6))),
            SegmentPiece(6, 8, ((3, 5), (6, 8))),
        ]
    ]


def test_bounds_of_a_chunk_for_variable_length_kernels():
    early, late = pack(SHARED, split=ContextSplit(1, 2)).varlen_plans(CPU)
    assert (early.queries, late.queries) == (slice(0, 2), slice(2, 4))
    assert (early.cu_seqlens_q.tolist(), early.cu_seqlens_kv.tolist()) == ([0, 1, 2], [0, 3, 4])
    assert (late.cu_seqlens_q.tolist(), late.cu_seqlens_kv.tolist()) == ([0, 1, 2], [0, 2, 5])
    assert (early.max_q, early.max_kv, late.max_q, late.max_kv) == (1, 3, 1, 3)
    assert early.kv_rows == slice(0, 4)  # documents follow each other: no row is copied
    assert late.kv_rows.tolist() == [3, 4, 3, 4, 5]
    late_document = pack((Segment(0, 3), Segment(3, 8)), split=ContextSplit(0, 2)).varlen_plans(CPU)[1]
    assert late_document.kv_rows == slice(3, 8)


def test_queries_of_a_chunk_stand_behind_their_earlier_keys():
    long, short = pack((Segment(0, 3), Segment(3, 8)), split=ContextSplit(1, 2)).padded_batches(CPU)
    assert long.keys.tolist() == [[0, 1, 2], [3, 4, 5]]  # of token 2, and of 4 and 5
    assert long.queries.tolist() == [[0, 0, 0], [0, 2, 3]]
    assert (long.slots.tolist(), long.tokens.tolist()) == ([2, 4, 5], [0, 2, 3])
    assert (short.keys.tolist(), short.queries.tolist()) == ([[3]], [[1]])


def test_te_gets_cumulative_lengths():
    packed = pack(SHARED[:2], backend="te")
    assert packed.qkv_format == "thd"
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 3, 5]
    assert packed.max_seqlen_q == 3
    with pytest.raises(ValueError, match="side by side"):
        pack(SHARED, backend="te")
    assert pack(SHARED, backend="te", split=ContextSplit(0, 2)).qkv_format == "sbhd"  # then the attention is ours


@pytest.mark.parametrize(
    "segments",
    [(Segment(0, 3), Segment(4, 8)), (Segment(0, 8), Segment(3, 8)), (Segment(3, 8), Segment(0, 3))],
    ids=["gap", "overlap", "order"],
)
def test_segments_that_do_not_fill_the_stream_are_refused(segments: tuple[Segment, ...]):
    with pytest.raises(ValueError, match="segments must follow each other from 0 to 8"):
        PackedSequences.from_segments(segments, torch.zeros(8), backend="torch")


def test_a_tail_without_segment_is_refused():
    with pytest.raises(ValueError, match="from 0 to 9"):
        PackedSequences.from_segments(SHARED, torch.zeros(9), backend="torch")


def reference_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **settings: Any
) -> Tensor:
    """What torch documents of `varlen_attn`: the causal mask is aligned to each sequence's last key."""
    SIGNATURE.bind(query, key, value, cu_q, cu_k, max_q, max_k, **settings)
    assert settings["window_size"] == (-1, 0)
    out = torch.empty_like(query)
    for i in range(len(cu_q) - 1):
        rows, keys = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
        q, k, v = query[rows].transpose(0, 1), key[keys].transpose(0, 1), value[keys].transpose(0, 1)
        assert q.shape[1] <= max_q and k.shape[1] <= max_k
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=settings["scale"], enable_gqa=True)
        out[rows] = y.transpose(0, 1)
    return out


@pytest.mark.parametrize("kv_heads", [2, 6])
def test_both_kernels_are_asked_for_the_same_attention(monkeypatch: pytest.MonkeyPatch, kv_heads: int):
    segments = (Segment(0, 5), Segment(5, 16), Segment(16, 20, 5, 16), Segment(20, 27, 5, 16), Segment(27, 28))
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(28, 6, 8, generator=generator)
    key, value = torch.randn(2, 28, kv_heads, 8, generator=generator)
    scale = 1 / math.sqrt(8)
    expected = padded_sdpa(query, key, value, pack(segments), scale)
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    found = flash_varlen(query, key, value, pack(segments), scale)
    assert (found - expected).abs().max() < 1e-6
    for rank in (0, 1):  # with all keys, each rank's queries find what they find in the whole stream
        split = ContextSplit(rank, 2)
        own = torch.from_numpy(split.take(np.arange(28)))
        for attend in (padded_sdpa, flash_varlen):
            found = attend(query[own], key, value, pack(segments, split=split), scale)
            assert (found - expected[own]).abs().max() < 1e-6


def test_a_ragged_layout_repeats_keys_only_where_it_must():
    layout = pack(SHARED).ragged_layout()
    assert (layout.lengths_q, layout.lengths_kv) == ((3, 2, 1, 2), (3, 2, 3, 4))
    assert layout.kv_rows is not None
    assert layout.kv_rows.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 3, 4, 6, 7]
    plain = pack((Segment(0, 3), Segment(3, 5))).ragged_layout()
    assert (plain.lengths_q, plain.lengths_kv, plain.kv_rows) == ((3, 2), (3, 2), None)
    with pytest.raises(ValueError, match="of a whole stream"):
        pack((Segment(0, 8),), split=ContextSplit(0, 2)).ragged_layout()
