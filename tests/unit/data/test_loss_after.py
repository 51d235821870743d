"""Markers are found by text, whatever the tokens are cut like; what matched is counted; nothing is an error."""

import logging
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_medllm.config.train import CptConfig
from megatron_medllm.data.loss_after import LossAfter, check_markers
from megatron_medllm.errors import UserError


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE cut like Qwen2.5's: NFC, `:\\n` one token, ChatML's tokens special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pieces = Regex(r"[^\s\p{L}\p{N}]+[\r\n]*|\s*\n| ?[\p{L}\p{N}]+|\s+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<|end|>"], show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(["問題 a:\n答え:\nb"] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def learned(tokenizer_file: Path, text: str, *markers: str) -> str | None:
    """The text of the tokens behind the marker, None without one."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    ids = tokenizer.encode(text).ids
    first = LossAfter(markers, tokenizer_file).first_learned(np.array(ids))
    return None if first is None else tokenizer.decode(ids[first:], skip_special_tokens=False)


CASES = [
    ("問題: x\n答え:\nb", ("答え:",), "b"),  # `:\n` is one token
    ("問題: x\n答え:\nb", ("\n答え:",), "b"),
    ("問題: x\n答え: b", ("答え:",), " b"),
    ("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nb<|im_end|>", ("<|im_start|>assistant\n",), "b<|im_end|>"),
    ("一\n考察: 二\n答え: 三", ("答え:", "考察:"), " 二\n答え: 三"),  # the first of several markers
    ("答え: b\n答え: c", ("答え:",), " b\n答え: c"),  # the first of the same
    (unicodedata.normalize("NFD", "がん: b"), (unicodedata.normalize("NFD", "がん:"),), " b"),
    ("問題: x", ("答え:",), None),
    ("b\n答え:", ("答え:",), ""),
]


@pytest.mark.parametrize(("text", "markers", "rest"), CASES)
def test_markers_are_found_by_text(tokenizer_file: Path, text: str, markers: tuple[str, ...], rest: str | None) -> None:
    assert learned(tokenizer_file, text, *markers) == rest


@pytest.mark.parametrize(("text", "markers", "rest"), CASES)
def test_markers_are_found_with_the_real_tokenizer(
    shared_data: Path, text: str, markers: tuple[str, ...], rest: str | None
) -> None:
    assert learned(shared_data / "qwen2.5-tokenizer" / "tokenizer.json", text, *markers) == rest


def test_our_tokenizer_is_cut_as_the_real_one(tokenizer_file: Path) -> None:
    """What made the search by ids fail: the marker's own tokens are not in the document's."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    assert tokenizer.encode("答え:").ids[-1] not in tokenizer.encode("x\n答え:\nb").ids


def check(tokenizer_file: Path, sources: dict[str, list[str]], *markers: str):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    documents = {
        name: [np.array(tokenizer.encode(t + "<|end|>").ids) for t in texts] for name, texts in sources.items()
    }
    return check_markers(LossAfter(markers, tokenizer_file), documents)


def test_matches_are_counted_by_source(tokenizer_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sources = {"exams": ["x\n答え:\nb", "x\n答え: c", "plain"], "papers": ["plain", "x\n答え:"]}
    account = check(tokenizer_file, sources, "答え:")
    assert "loss_after: 2 of 3 documents of exams hold a marker" in caplog.text
    assert "loss_after: 1 of 2 documents of papers hold a marker" in caplog.text
    assert account.subject("exams").kept == 3
    assert account.subject("papers").lost["nothing follows the marker"].count == 1


def test_nothing_matched_or_nothing_learned_is_an_error(tokenizer_file: Path) -> None:
    with pytest.raises(UserError, match="loss_after: none of 2 documents holds a marker"):
        check(tokenizer_file, {"exams": ["x", "y"]}, "答え:")
    with pytest.raises(UserError, match=r"exams: none of 2 documents is left \(nothing follows the marker: 2"):
        check(tokenizer_file, {"exams": ["x\n答え:", "y\n答え:"], "papers": ["plain"]}, "答え:")


def test_an_empty_marker_is_refused() -> None:
    settings = {"data": [{"path": "c"}], "epochs": 1, "sequence_length": 8, "global_batch_size": 1,
                "optimizer": {"lr": 1.0}}  # fmt: skip
    with pytest.raises(ValueError, match="an empty text marks nothing"):
        CptConfig.model_validate(settings | {"loss_after": ["答え:", ""]})
