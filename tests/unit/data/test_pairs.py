"""Preference pairs: what a stream looks like, token for token, and how streams are spread."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_medllm.config.train import OptimizerConfig, RpoConfig
from megatron_medllm.data.microbatch import IGNORED
from megatron_medllm.data.pairs import Pair, Response, load_pairs, pack_pairs, plan_micro_batches
from megatron_medllm.data.reference import ReferenceCache, ReferenceKey, digest_pairs
from megatron_medllm.errors import UserError
from megatron_medllm.parallel.packed import Segment


def response(*ids, preferred=None):
    return Response(np.array(ids), np.array(preferred or [True] * len(ids)))


FIRST = Pair(0, np.array([1, 2, 3]), response(10, 11), response(20, 21, 22, preferred=[True, False, True]), 1.0)
SECOND = Pair(7, np.array([4]), response(30), response(40), 1.0)


def test_shared_prompt_stream_by_hand():
    stream = pack_pairs([FIRST, SECOND], share_prompt=True, stream_length=None, multiple=4)
    no = IGNORED
    #                              prompt | chosen | rejected  | second pair: chosen | rejected | padding
    assert stream.tokens.tolist() == [1, 2, 3, 10, 3, 20, 21, 4, 4, 0, 0, 0]
    assert stream.labels.tolist() == [no, no, 10, 11, 20, 21, 22, 30, 40, no, no, no]
    assert stream.position_ids.tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 0, 0, 0, 0]
    assert stream.segments == (
        Segment(0, 2), Segment(2, 4, 0, 2), Segment(4, 7, 0, 2), Segment(7, 8), Segment(8, 9), Segment(9, 12),
    )  # fmt: skip
    assert stream.response.tolist() == [-1, -1, 0, 0, 1, 1, 1, 2, 3, -1, -1, -1]
    assert stream.preferred.tolist() == [False, False, True, True, True, False, True, True, True] + [False] * 3
    assert stream.rows == (0, 7)


def test_side_by_side_stream_by_hand():
    stream = pack_pairs([FIRST], share_prompt=False, stream_length=10, multiple=1)
    no = IGNORED
    assert stream.tokens.tolist() == [1, 2, 3, 10, 1, 2, 3, 20, 21, 0]
    assert stream.labels.tolist() == [no, no, 10, 11, no, no, 20, 21, 22, no]
    assert stream.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0]
    assert stream.segments == (Segment(0, 4), Segment(4, 9), Segment(9, 10))
    assert stream.response.tolist() == [-1, -1, 0, 0, -1, -1, 1, 1, 1, -1]


def test_lengths_are_those_of_the_streams():
    for share in (True, False):
        stream = pack_pairs([FIRST], share_prompt=share, stream_length=None, multiple=1)
        assert len(stream.tokens) == FIRST.packed_length(share_prompt=share)


def test_plan_fills_streams_and_gives_every_replica_as_many():
    plan = plan_micro_batches([50, 30, 60, 20, 40], capacity=100, replicas=2)
    assert plan == [[[2, 4]], [[0, 1, 3]]]
    uneven = plan_micro_batches([90, 90, 90], capacity=100, replicas=2)
    assert uneven == [[[0], [2]], [[1], []]]
    assert plan_micro_batches([10], capacity=100, replicas=1) == [[[0]]]
    assert plan_micro_batches([90, 90, 90], capacity=100, replicas=1, rounds_multiple=2) == [[[0], [1], [2], []]]


@pytest.fixture
def tokenizer_dir(tmp_path):
    words = {word: i for i, word in enumerate(["<eos>", "[UNK]", "q", "a", "b", "c", "**", "x", "y"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    return tmp_path


def config(path, **changes):
    return RpoConfig(pairs=path, optimizer=OptimizerConfig(lr=1e-3), sequence_length=64, global_batch_size=1, **changes)


def write(tmp_path, *rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_responses_end_with_eos_and_masked_patterns_leave_the_preference_term(tokenizer_dir, tmp_path):
    path = write(tmp_path, {"prompt": "q q", "chosen": "** a **", "rejected": "b"})
    (pair,) = load_pairs(config(path, mask_patterns=(r"\*\*",)), tokenizer_dir, cut_length=64).pairs
    assert pair.prompt.tolist() == [2, 2]
    assert pair.chosen.ids.tolist() == [6, 3, 6, 0]
    assert pair.chosen.preferred.tolist() == [False, True, False, True]
    assert pair.rejected.ids.tolist() == [4, 0]


def test_long_pairs_are_dropped_with_a_reason_or_cut_in_the_prompt_only(tokenizer_dir, tmp_path):
    path = write(
        tmp_path,
        {"prompt": "q a b c x y", "chosen": "a b", "rejected": "c"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    )
    dropped = load_pairs(config(path), tokenizer_dir, cut_length=8)
    assert dropped.dropped == [(0, "longer than 8 tokens")]
    cut = load_pairs(config(path, too_long="cut_prompt"), tokenizer_dir, cut_length=8)
    assert cut.pairs[0].prompt.tolist() == [5, 3, 4, 5, 7, 8][-4:]
    assert cut.pairs[0].chosen.ids.tolist() == [3, 4, 0]
    assert cut.pairs[0].packed_length(share_prompt=True) == 8


def test_identical_and_nearly_identical_answers_are_dropped(tokenizer_dir, tmp_path):
    path = write(
        tmp_path,
        {"prompt": "q", "chosen": "a b", "rejected": "a b"},
        {"prompt": "q", "chosen": "a b c x", "rejected": "a b c y"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    )
    strict = config(path, rpo_guard={"min_edit_distance": 0.3})
    assert load_pairs(strict, tokenizer_dir, cut_length=64).dropped == [
        (0, "answers identical"),
        (1, "answers nearly identical"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, "pairs.jsonl:1: field 'rejected'"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "pairs.jsonl:1: field 'prompt'"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "pairs.jsonl:1: field 'chosen'"),
    ],
)
def test_bad_rows_are_named(tokenizer_dir, tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load_pairs(config(write(tmp_path, row)), tokenizer_dir, cut_length=64)


def test_reference_cache_returns_what_was_written_and_refuses_another_key(tmp_path):
    cache = ReferenceCache(tmp_path / "reference")
    key = ReferenceKey(weights="w", pairs="p", template="plain", tokenizer="t", dtype="float32", base="dense")
    assert cache.open_for_writing(key) == set()
    columns = {
        "row": np.array([0, 7]),
        "chosen_logprob": np.array([-1.5, -2.0]),
        "rejected_logprob": np.array([-3.0, -4.0]),
        "chosen_tokens": np.array([2.0, 1.0]),
        "rejected_tokens": np.array([3.0, 1.0]),
    }
    cache.write_part(0, columns)
    assert cache.open_for_writing(key) == {0, 7}
    assert cache.load(key, [7, 0]) == {7: (-2.0, -4.0), 0: (-1.5, -3.0)}
    with pytest.raises(UserError, match="computed with other weights, dtype"):
        cache.load(replace(key, weights="v", dtype="bfloat16"), [0])
    with pytest.raises(UserError, match="1 of 2 pairs have no reference"):
        cache.load(key, [0, 3])
    assert cache.open_for_writing(replace(key, weights="v")) == set()


def test_the_digest_of_pairs_sees_every_token_and_mask():
    from megatron_medllm.data.pairs import PairSet

    digests = {
        digest_pairs(PairSet([pair], [], []))
        for pair in (
            FIRST,
            Pair(0, np.array([1, 2, 4]), FIRST.chosen, FIRST.rejected, 1.0),
            Pair(0, FIRST.prompt, response(10, 12), FIRST.rejected, 1.0),
            Pair(0, FIRST.prompt, FIRST.chosen, response(20, 21, 22), 1.0),
        )
    }
    assert len(digests) == 4
