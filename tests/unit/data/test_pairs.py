"""Preference pairs: what a stream looks like, token for token, and how streams are spread."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_medllm.account import Account
from megatron_medllm.config.train import OptimizerConfig, RpoConfig
from megatron_medllm.data.microbatch import IGNORED
from megatron_medllm.data.pair_streams import pack_pairs, plan_micro_batches
from megatron_medllm.data.pairs import Pair, Response, load_pairs
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
    strict = config(path, filters={"min_edit_distance": 0.3})
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
        digest_pairs(PairSet([pair], [], [], Account("pairs")))
        for pair in (
            FIRST,
            Pair(0, np.array([1, 2, 4]), FIRST.chosen, FIRST.rejected, 1.0),
            Pair(0, FIRST.prompt, response(10, 12), FIRST.rejected, 1.0),
            Pair(0, FIRST.prompt, FIRST.chosen, response(20, 21, 22), 1.0),
        )
    }
    assert len(digests) == 4


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(directory, *, template=CHATML, eos="<|endoftext|>"):
    """A base model's tokenizer with a chat template, as Qwen2.5's: eos ends documents, `<|im_end|>` turns."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)
    fast.chat_template = template
    fast.save_pretrained(directory)
    return directory


def chat_texts(directory, path, **changes):
    """Prompt, chosen and rejected as text, from their ids."""
    (pair,) = load_pairs(config(path, template="chat", **changes), directory, cut_length=999).pairs
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return [
        tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        for ids in (pair.prompt, pair.chosen.ids, pair.rejected.ids)
    ]


def test_answers_end_with_the_templates_own_end_of_turn_once(tmp_path):
    directory = chat_tokenizer(tmp_path / "tokenizer")
    for chosen, rejected in (("a", "b"), ("a<|im_end|>", "b<|im_end|>\n")):
        path = write(tmp_path, {"prompt": "q", "chosen": chosen, "rejected": rejected})
        assert chat_texts(directory, path) == [
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>", "b<|im_end|>",
        ]  # fmt: skip
    path = write(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"})
    assert chat_texts(directory, path, add_eos=False)[1:] == ["a", "b"]
    cut = write(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b", "rejected_ended": False})
    assert chat_texts(directory, cut)[1:] == ["a<|im_end|>", "b"]


def test_the_prompt_is_what_the_model_was_sampled_with(tmp_path):
    """With thinking off Qwen3's template puts an empty thought before the answer; training must show the same."""
    thought = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}" + thought
    directory = chat_tokenizer(tmp_path / "tokenizer", template=template)
    path = write(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"})
    assert chat_texts(directory, path)[0] == chat_texts(directory, path, thinking="on")[0] == "q<|im_end|>"
    assert chat_texts(directory, path, thinking="off") == ["q<|im_end|><think></think>", "a<|im_end|>", "b<|im_end|>"]
    with pytest.raises(UserError, match=r"rpo\.thinking=off is a chat template's switch: set rpo\.template=chat"):
        load_pairs(config(path, template="plain", thinking="off"), directory, cut_length=999)
    old = chat_tokenizer(tmp_path / "old")
    with pytest.raises(UserError, match="the chat template has no switch `enable_thinking`"):
        chat_texts(old, path, thinking="off")


def test_a_template_that_ends_no_turn_takes_the_tokenizers_eos(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    path = write(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"})
    directory = chat_tokenizer(tmp_path / "eos", template=template)
    assert chat_texts(directory, path)[1:] == ["a<|endoftext|>", "b<|endoftext|>"]
    directory = chat_tokenizer(tmp_path / "none", template=template, eos=None)
    with pytest.raises(UserError, match=r"ends no turn and the tokenizer has no eos_token; set rpo\.add_eos=false"):
        chat_texts(directory, path)
    assert chat_texts(directory, path, add_eos=False)[1:] == ["a", "b"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", r"cannot be used \(roles must alternate\)"),
        ("{% for m in messages %}{{ m.nothing.there }}{% endfor %}", "cannot be used"),
        ("{{ messages[0]['content'] }}", "leaves the assistant's answers out"),
    ],
)
def test_templates_that_cannot_be_used_are_one_line(tmp_path, template, message):
    path = write(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match=message):
        chat_texts(chat_tokenizer(tmp_path / "tokenizer", template=template), path)


def test_plain_answers_end_once_and_only_where_they_ended(tokenizer_dir, tmp_path):
    path = write(
        tmp_path,
        {"prompt": "q", "chosen": "a <eos>", "rejected": "b", "rejected_ended": False},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    )
    first, second = load_pairs(config(path), tokenizer_dir, cut_length=64).pairs
    assert (first.chosen.ids.tolist(), first.rejected.ids.tolist()) == ([3, 0], [4])
    assert (second.chosen.ids.tolist(), second.rejected.ids.tolist()) == ([3, 0], [4, 0])


@pytest.mark.parametrize("eos", ["[]", "null", '"<eos>"', "true", "-1"])
def test_an_eos_that_is_no_token_is_one_line(tokenizer_dir, tmp_path, eos):
    (tokenizer_dir / "generation_config.json").write_text(f'{{"eos_token_id": {eos}}}')
    path = write(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match="eos_token_id"):
        load_pairs(config(path), tokenizer_dir, cut_length=64)
    assert load_pairs(config(path, add_eos=False), tokenizer_dir, cut_length=64).pairs


def test_no_pair_left_says_why(tokenizer_dir, tmp_path):
    path = write(tmp_path, *[{"prompt": "q a b c x y", "chosen": "a b", "rejected": "c"}] * 3)
    with pytest.raises(UserError, match=r"none of 3 pairs is left \(longer than 8 tokens: 3, first .*pairs\.jsonl:1\)"):
        load_pairs(config(path), tokenizer_dir, cut_length=8)


def test_messages_need_the_chat_template(tokenizer_dir, tmp_path):
    path = write(tmp_path, {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: the pair holds messages: set rpo\.template=chat"):
        load_pairs(config(path), tokenizer_dir, cut_length=64)
