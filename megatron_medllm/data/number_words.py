"""Random texts for measuring and certifying: every token is a word of its own, its number."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_medllm.corpus.index import bin_path, idx_path, token_dtype, write_index
from megatron_medllm.storage import atomic_write, write_json

END = 0  # the token that ends a document or an answer; it is never drawn


class NumberWords:
    """Draws texts of random words from one seed."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab_size, self._generator = vocab_size, np.random.default_rng(seed)

    def draw(self, least: int, most: int) -> str:
        """A text of `least` to `most` tokens."""
        length = int(self._generator.integers(least, most + 1))
        return " ".join(map(str, self._generator.integers(END + 1, self._vocab_size, size=length)))


def write_tokenizer(directory: Path, *, vocab_size: int) -> None:
    """Write a tokenizer whose words are the token numbers, with what HF readers look for beside it."""
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token=str(END)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with atomic_write(directory / "tokenizer.json") as stream:
        stream.write(tokenizer.to_str().encode())
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": str(END), "pad_token": str(END)}
    write_json(directory / "tokenizer_config.json", names)
    write_json(directory / "generation_config.json", {"eos_token_id": END})


def write_corpus(directory: Path, name: str, ids: np.ndarray, lengths: Sequence[int], *, vocab_size: int) -> None:
    """Write documents as `medllm corpus build` leaves them: one source, all of it for training.

    Args:
        directory: where the two files of the source and the manifest go.
        name: of the source; it also stands for the tokenizer's digest.
        ids: the documents' tokens, one behind the other.
        lengths: tokens of each document.
        vocab_size: of the tokenizer.
    """
    prefix = directory / name
    ids = ids.astype(token_dtype(vocab_size))
    with atomic_write(bin_path(prefix)) as stream:
        stream.write(ids.data)
    with atomic_write(idx_path(prefix)) as stream:
        write_index(stream, np.array(lengths, np.int32), ids.dtype)
    write_json(
        directory / "manifest.json",
        {
            "format": 1,
            "sources": {name: {"prefix": name, "weight": 1.0, "tokens": len(ids), "documents": len(lengths)}},
            "split": [1.0, 0.0, 0.0],
            "tokenizer": {"digest": name, "vocab_size": vocab_size, "eod_id": END},
        },
    )
