"""Text to ids, with whichever library is fastest and agrees.

fastokens is some 15 times faster than `tokenizers` on Japanese; it is used where its ids equal `tokenizers`' on a
sample of the corpus at hand, and `tokenizers` otherwise. Special tokens written out in a text stay text: a document
that contains a literal `<|endoftext|>` must not end there.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_medllm.errors import UserError
from megatron_medllm.storage import pointer_kind

Encoded = tuple[np.ndarray, np.ndarray]  # ids uint32 [tokens], tokens per text int64 [texts]
Encoder = Callable[[list[str]], Encoded]


@dataclass(frozen=True)
class TokenizerFacts:
    """What a tokenizer is, small enough to send to a worker. `path` is a local file."""

    path: str
    kind: str
    digest: str
    vocab_size: int
    pattern: str | None = None


def describe_tokenizer(name: str, *, kind: str = "auto", pattern: str | None = None) -> TokenizerFacts:
    """Find a tokenizer's file, its digest and its number of ids.

    The digest covers what decides ids (vocabulary, merges, added tokens, normalizer, pre-tokenizer), so a
    `tokenizer.json` that transformers has merely written anew keeps it.

    Raises:
        UserError: nothing there, or not a tokenizer.
    """
    path = _find(name)
    if kind == "auto":
        kind = {".json": "huggingface", ".model": "sentencepiece", ".tiktoken": "tiktoken"}.get(path.suffix, "")
    if kind == "huggingface":
        digest, vocab_size = _describe_huggingface(path)
    elif kind == "sentencepiece":
        digest, vocab_size = _digest(path.read_bytes()), _load_sentencepiece(path).get_piece_size()
    elif kind == "tiktoken":
        if pattern is None:
            raise UserError(f"{path}: tiktoken ranks hold no splitting regex; set tiktoken_pattern")
        digest = _digest(path.read_bytes() + pattern.encode())
        vocab_size = _load_tiktoken(path, pattern).n_vocab
    else:
        raise UserError(f"{path}: cannot tell its kind by its name; set tokenizer_kind")
    return TokenizerFacts(str(path), kind, digest, vocab_size, pattern)


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        for candidate in ("tokenizer.json", "tokenizer.model", "spiece.model"):
            if (path / candidate).is_file():
                return path / candidate
        found = sorted(path.glob("*.tiktoken"))
        if len(found) == 1:
            return found[0]
        raise UserError(f"{path}: holds no tokenizer.json, tokenizer.model or *.tiktoken")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such tokenizer file or directory")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"tokenizer {name!r}: no such directory, and not found on the Hugging Face hub") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _describe_huggingface(path: Path) -> tuple[str, int]:
    content = path.read_bytes()
    if kind := pointer_kind(content):
        raise UserError(f"{path} is a {kind} pointer, not the file itself: fetch it (`{kind} pull`)")
    try:
        spec = orjson.loads(content)
        model, added = spec["model"], spec["added_tokens"]
        vocab = model["vocab"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path}: not a tokenizer.json") from None
    highest = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
    highest = max([highest, *(token["id"] for token in added)])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())]
    deciding = {
        "type": model.get("type"),
        "vocab": vocab,
        "merges": merges,
        "added": [(token["id"], token["content"], token["special"]) for token in added],
        "normalizer": spec.get("normalizer"),
        "pre_tokenizer": spec.get("pre_tokenizer"),
    }
    return _digest(orjson.dumps(deciding, option=orjson.OPT_SORT_KEYS)), highest + 1


def load_encoder(facts: TokenizerFacts, backend: str) -> Encoder:
    """A function from texts to their ids by `backend`: fastokens, tokenizers, sentencepiece or tiktoken."""
    path = Path(facts.path)
    if backend == "fastokens":
        return fastokens_encoder(path)
    if backend == "tokenizers":
        return _tokenizers_encoder(path)
    if backend == "sentencepiece":
        processor = _load_sentencepiece(path)
        return lambda texts: _flatten(processor.encode(texts, num_threads=1))
    assert backend == "tiktoken" and facts.pattern is not None
    encoding = _load_tiktoken(path, facts.pattern)
    return lambda texts: _flatten([encoding.encode_ordinary(text) for text in texts])


def _flatten(rows: list[list[int]]) -> Encoded:
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter((token for row in rows for token in row), np.uint32, int(counts.sum())), counts


def fastokens_encoder(path: Path) -> Encoder:
    """The encoder of the package fastokens, which must be installed."""
    import fastokens

    tokenizer = fastokens.Tokenizer.from_file(str(path))
    tokenizer.no_truncation()

    def encode(texts: list[str]) -> Encoded:
        ids, offsets = tokenizer.encode_batch_flat(texts, False, True)
        return np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64))

    return encode


def _tokenizers_encoder(path: Path) -> Encoder:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: not a tokenizer.json ({error})") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: _flatten(
        [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    )


def _load_sentencepiece(path: Path) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: not a SentencePiece model ({error})") from None


def _load_tiktoken(path: Path, pattern: str) -> Any:
    try:
        import tiktoken
        import tiktoken.load
    except ImportError:
        raise UserError(f"{path}: reading tiktoken ranks needs the package tiktoken (pip install tiktoken)") from None
    try:
        ranks = tiktoken.load.load_tiktoken_bpe(str(path))
        return tiktoken.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        raise UserError(f"{path}: not tiktoken ranks ({error})") from None


class Encoders:
    """One tokenizer by the libraries that can run it, each loaded at most once; the fast one at once."""

    def __init__(self, facts: TokenizerFacts) -> None:
        self.facts = facts
        self._loaded: dict[str, Encoder] = {}
        self._fast_failure = ""
        if facts.kind == "huggingface":
            try:
                self.get("fastokens")
            except Exception as error:  # whatever it is, `tokenizers` can still do the work; told in the manifest
                self._fast_failure = f"fastokens cannot load it: {error}"
        else:
            self.get(facts.kind)

    def get(self, backend: str) -> Encoder:
        """The encoder by fastokens, tokenizers, sentencepiece or tiktoken."""
        if backend not in self._loaded:
            self._loaded[backend] = load_encoder(self.facts, backend)
        return self._loaded[backend]

    def encode_fast(self, texts: list[str]) -> Encoded | str:
        """Ids by fastokens, or why there are none."""
        return self._fast_failure or self.get("fastokens")(texts)


def choose_backend(facts: TokenizerFacts, sample: list[str], ask_fast: Callable[[], Encoded | str]) -> tuple[str, str]:
    """The library to use, and why: fastokens where its ids for `sample` equal those of `tokenizers`.

    Args:
        ask_fast: `Encoders.encode_fast` of the sample; asked for after `tokenizers` has done its part, so that
            another process may work on it meanwhile.
    """
    if facts.kind != "huggingface":
        return facts.kind, "the only library for this kind"
    expected_ids, expected_counts = load_encoder(facts, "tokenizers")(sample)
    fast = ask_fast()
    if isinstance(fast, str):
        return "tokenizers", fast
    ids, counts = fast
    if not (np.array_equal(ids, expected_ids) and np.array_equal(counts, expected_counts)):
        return "tokenizers", f"fastokens' ids differ on a sample of {len(sample)} texts"
    return "fastokens", f"its ids equal tokenizers' on a sample of {len(sample)} texts, {len(ids)} tokens"


def decode(facts: TokenizerFacts, ids: list[int]) -> str:
    """Ids back to text, special tokens spelled out."""
    path = Path(facts.path)
    if facts.kind == "huggingface":
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(path)).decode(ids, skip_special_tokens=False)
    if facts.kind == "sentencepiece":
        return _load_sentencepiece(path).decode(ids)
    assert facts.pattern is not None
    return _load_tiktoken(path, facts.pattern).decode(ids)
