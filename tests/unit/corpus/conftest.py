"""A small real tokenizer, sources on disk, and Megatron's own writer to compare with."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_medllm.config.corpus import CorpusConfig
from megatron_medllm.corpus.build import build
from tests.worlds.corpus import SENTENCES, write_jsonl


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A byte-level BPE like Qwen's, with a vocabulary small enough for uint16."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def eod_id(tokenizer_dir) -> int:
    return tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).token_to_id("<|endoftext|>")


@pytest.fixture
def configure(tokenizer_dir, eod_id):
    """A config from sources and overrides."""

    def make(sources: dict, **overrides) -> CorpusConfig:
        defaults = {"tokenizer": str(tokenizer_dir), "eod_id": eod_id}
        return CorpusConfig.model_validate({"sources": sources} | defaults | overrides)

    return make


@pytest.fixture
def build_one(tmp_path, configure):
    """Build texts or files as the single source `s` with one worker; returns (output directory, manifest)."""

    def run(source: list[str] | Path, *, output: str = "out", strict: bool = False, clean=None, **overrides):
        path = write_jsonl(tmp_path / "in.jsonl", source) if isinstance(source, list) else source
        config = configure({"s": {"paths": str(path), "clean": clean or {}}}, **overrides)
        return tmp_path / output, build(config, tmp_path / output, workers=1, strict=strict)

    return run
