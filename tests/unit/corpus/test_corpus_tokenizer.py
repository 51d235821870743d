"""Any kind of tokenizer; the fast library only where it agrees; special tokens in text stay text."""

import base64
import io
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megatron_medllm.corpus import tokenizer as room
from megatron_medllm.corpus.index import read_index
from megatron_medllm.corpus.inspect import inspect
from megatron_medllm.corpus.tokenizer import Encoders, choose_backend, describe_tokenizer, load_encoder
from megatron_medllm.corpus.worker import Job, encode_fast, start_worker
from megatron_medllm.errors import UserError
from tests.worlds.corpus import FUZZ, SENTENCES

PATTERN = r"\p{L}+|\p{N}{1,3}|[^\p{L}\p{N}]+"


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        vocab_size=384,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture
def tiktoken_ranks(tmp_path):
    tokens = [bytes([i]) for i in range(256)] + ["血".encode()[:2], "血".encode(), "圧".encode()[:2], "圧".encode()]
    lines = [base64.b64encode(token).decode() + f" {rank}" for rank, token in enumerate(tokens)]
    path = tmp_path / "ranks.tiktoken"
    path.write_text("\n".join(lines))
    return path


def test_fast_and_reference_agree_and_specials_stay_text(tokenizer_dir, eod_id):
    facts = describe_tokenizer(str(tokenizer_dir))
    fast, reference = load_encoder(facts, "fastokens")(FUZZ), load_encoder(facts, "tokenizers")(FUZZ)
    np.testing.assert_array_equal(fast[0], reference[0])
    np.testing.assert_array_equal(fast[1], reference[1])
    assert eod_id not in fast[0]
    assert "<|endoftext|>" in "".join(FUZZ)


def choose(facts):
    return choose_backend(facts, SENTENCES, lambda: Encoders(facts).encode_fast(SENTENCES))


def test_disagreement_means_the_reference(tokenizer_dir, monkeypatch):
    facts = describe_tokenizer(str(tokenizer_dir))
    assert choose(facts)[0] == "fastokens"
    honest = room.fastokens_encoder
    monkeypatch.setattr(room, "fastokens_encoder", lambda path: lambda texts: honest(path)([t + "。" for t in texts]))
    assert choose(facts) == (
        "tokenizers",
        "fastokens' ids differ on a sample of 5 texts",
    )


def test_library_that_cannot_load_is_told(tokenizer_dir, monkeypatch):
    def fail(path):
        raise ValueError("unsupported model")

    monkeypatch.setattr(room, "fastokens_encoder", fail)
    facts = describe_tokenizer(str(tokenizer_dir))
    assert choose(facts) == (
        "tokenizers",
        "fastokens cannot load it: unsupported model",
    )


def test_digest_is_of_what_decides_ids(tokenizer_dir, tmp_path):
    spec = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    same = spec | {"truncation": None, "post_processor": None}
    same["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    other = json.loads((tokenizer_dir / "tokenizer.json").read_text()) | {"normalizer": None}
    for name, content in (("same", same), ("other", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content, indent=1))
    digests = [
        describe_tokenizer(str(p)).digest for p in (tokenizer_dir, tmp_path / "same.json", tmp_path / "other.json")
    ]
    assert digests[0] == digests[1] != digests[2]


def test_vocabulary_size(tokenizer_dir):
    size = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).get_vocab_size()
    assert describe_tokenizer(str(tokenizer_dir)).vocab_size == size


def test_sentencepiece_build(build_one, sentencepiece_model):
    output, manifest = build_one(SENTENCES, tokenizer=str(sentencepiece_model.parent), eod_id=2)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    expected = [token for text in SENTENCES for token in [*processor.encode(text), 2]]
    assert np.fromfile(output / "s.bin", np.uint16).tolist() == expected
    assert manifest["backend"]["name"] == "sentencepiece"
    assert inspect(output / "s").samples[0][1].startswith("高血圧症の患者")


def test_tiktoken_build(build_one, tiktoken_ranks):
    output, _ = build_one(["血圧<|endoftext|>"], tokenizer=str(tiktoken_ranks), tiktoken_pattern=PATTERN, eod_id=255)
    assert np.fromfile(output / "s.bin", np.uint16).tolist() == [257, 259, *b"<|endoftext|>", 255]
    assert read_index(output / "s").lengths.tolist() == [16]
    with pytest.raises(UserError, match="set tiktoken_pattern"):
        build_one(["x"], tokenizer=str(tiktoken_ranks), eod_id=0, output="other")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such tokenizer file or directory"),
        ("{tmp}", "holds no tokenizer.json"),
        ("{tmp}/a.json", "not a tokenizer.json"),
        ("{tmp}/a.model", "not a SentencePiece model"),
        ("{tmp}/a.bin", "set tokenizer_kind"),
    ],
)
def test_what_is_no_tokenizer(tmp_path, name, message):
    if name.startswith("{tmp}/"):
        (tmp_path / name.removeprefix("{tmp}/")).write_text("{}")
    with pytest.raises(UserError, match=message):
        describe_tokenizer(name.format(tmp=tmp_path))


def test_end_of_document_id_must_exist(build_one):
    with pytest.raises(UserError, match="eod_id 99999 is not below"):
        build_one(["x"], eod_id=99999)


def test_a_worker_keeps_fastokens_to_one_thread(tmp_path, configure, tokenizer_dir):
    config = configure({"s": {"paths": "unused"}})
    job = Job(config, describe_tokenizer(str(tokenizer_dir)), tmp_path, False, os.getpid())
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_worker, (job,)) as pool:
        pool.submit(encode_fast, SENTENCES * 1000).result()
        worker = next(iter(pool._processes))
        threads = [path.read_text() for path in Path(f"/proc/{worker}/task").glob("*/comm")]
    assert threads and not [name for name in threads if name.startswith("fastokens")]
