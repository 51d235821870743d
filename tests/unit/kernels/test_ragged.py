"""What cuDNN's ragged attention is told of a stream: literal tables, shapes and keys, and how often keys repeat."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from megatron_medllm.kernels.attention import RaggedBatch, plan_key
from megatron_medllm.kernels.attention.ragged import PlanKey
from megatron_medllm.parallel.packed import PackedSequences, Segment
from megatron_medllm.parallel.staging import to_device

MOVE = partial(to_device, device=torch.device("cpu"), ahead=True)


def build(lengths_q: list[int], lengths_kv: list[int], rows: np.ndarray | None = None) -> RaggedBatch:
    return RaggedBatch.build(lengths_q, lengths_kv, heads=(6, 2), width=16, move=MOVE, kv_rows=rows)


def key_of(batch: RaggedBatch) -> PlanKey:
    return plan_key(batch, heads=(6, 2), width=16, dtype=torch.bfloat16, scale=0.25)


def test_tables_are_in_elements_of_each_tensor():
    batch = build([3, 1, 2], [3, 1, 4], np.array([0, 1, 2, 3, 0, 1, 4, 5]))
    assert batch.offsets_q.tolist() == [0, 3 * 96, 4 * 96, 6 * 96]  # 6 heads of 16
    assert batch.offsets_kv.tolist() == [0, 3 * 32, 4 * 32, 8 * 32]  # 2 heads of 16
    assert batch.offsets_stats.tolist() == [0, 18, 24, 36]  # 6 heads
    assert (batch.lengths_q.tolist(), batch.lengths_kv.tolist()) == ([3, 1, 2], [3, 1, 4])
    assert [x.dtype for x in (batch.lengths_q, batch.lengths_kv)] == [torch.int32] * 2
    assert [x.dtype for x in (batch.offsets_q, batch.offsets_kv, batch.offsets_stats)] == [torch.int64] * 3
    assert (batch.tokens_q, batch.tokens_kv, batch.max_q, batch.max_kv) == (6, 8, 3, 4)
    assert batch.kv_rows is not None and batch.kv_rows.tolist() == [0, 1, 2, 3, 0, 1, 4, 5]
    assert batch.bottom_right and not build([3, 1], [3, 1]).bottom_right


@pytest.mark.parametrize("count", [1, 31, 32, 100])
def test_every_table_starts_where_cudnn_may_read(count: int):
    batch = build([1] * count, [2] * count)
    tables = (batch.lengths_q, batch.lengths_kv, batch.offsets_q, batch.offsets_kv, batch.offsets_stats)
    assert all(table.is_contiguous() and table.data_ptr() % 16 == 0 for table in tables)
    assert [len(table) for table in tables] == [count, count, count + 1, count + 1, count + 1]


@pytest.mark.parametrize(
    ("lengths_q", "lengths_kv", "rows", "message"),
    [
        ([3, 0], [3, 1], None, "needs a query"),
        ([3, 2], [3, 1], None, "as many keys as queries"),
        ([3], [3, 1], None, "1 lengths of queries, 2 of keys"),
        ([], [], None, "0 lengths"),
        ([1, 1], [1, 2], np.arange(2), "2 rows for 3 keys"),
    ],
)
def test_what_cudnn_would_answer_with_nan_is_refused(
    lengths_q: list[int], lengths_kv: list[int], rows: np.ndarray | None, message: str
):
    with pytest.raises(ValueError, match=message):
        build(lengths_q, lengths_kv, rows)


def test_shapes_are_token_major():
    key = key_of(build([300, 5], [300, 700]))
    assert key.shape("q") == ((2, 6, 512, 16), (512 * 96, 16, 96, 1))
    assert key.shape("kv") == ((2, 2, 1024, 16), (1024 * 32, 16, 32, 1))
    assert key.shape("stats") == ((2, 6, 512, 1), (512 * 6, 1, 6, 1))


def test_keys_round_up():
    key = key_of(build([300, 5], [300, 700]))
    assert (key.max_q, key.max_kv, key.total_q, key.total_kv) == (512, 1024, 384, 1024)
    assert key_of(build([400, 5], [400, 690])) != key  # 405 queries: workspace for 512
    assert key_of(build([310, 9], [310, 690])) == key
    assert key_of(build([310, 9], [310, 9])) != key
    assert key_of(build([1], [1])).shape("q")[0] == (1, 6, 128, 16)  # cuDNN has no kernel for one query and one key
    totals = {tokens: key_of(build([tokens], [tokens])).total_q for tokens in (1, 64, 65, 4095, 4097, 6144, 6145, 8192)}
    assert totals == {1: 64, 64: 64, 65: 128, 4095: 4096, 4097: 6144, 6144: 6144, 6145: 8192, 8192: 8192}


@pytest.mark.parametrize(("tokens", "mean", "most"), [(4096, 1024, 30), (8192, 1024, 45), (8192, 300, 90)])
def test_packed_rows_share_plans(tokens: int, mean: int, most: int):
    """Three hundred rows of lognormal documents need few plans, whose masks are aligned to the first key."""
    random = np.random.default_rng(0)
    keys = set()
    for _ in range(300):
        bounds = [0]
        while bounds[-1] < tokens:
            bounds.append(min(tokens, bounds[-1] + max(1, int(random.lognormal(np.log(mean) - 0.5, 1.0)))))
        segments = tuple(itertools.starmap(Segment, itertools.pairwise(bounds)))
        layout = PackedSequences.from_segments(segments, torch.zeros(tokens), backend="torch").ragged_layout()
        keys.add(key_of(build(list(layout.lengths_q), list(layout.lengths_kv), layout.kv_rows)))
    assert len(keys) <= most
    assert not any(key.bottom_right for key in keys)
