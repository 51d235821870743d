"""`medllm corpus inspect PREFIX`: what an indexed data set holds, and whether it is what its manifest says."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_medllm.corpus.index import Index, bin_path, idx_path, read_index
from megatron_medllm.corpus.tokenizer import TokenizerFacts, decode, describe_tokenizer
from megatron_medllm.corpus.worker import digest_path
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json

_SAMPLE_TOKENS = 200


@dataclass(frozen=True)
class Inspection:
    """What was found. `checks` are the facts verified, in words; `samples` decoded beginnings of documents."""

    prefix: Path
    dtype: str
    documents: int
    empty_documents: int
    tokens: int
    shortest: int
    median: float
    longest: int
    checks: tuple[str, ...]
    samples: tuple[tuple[int, str], ...]

    def __str__(self) -> str:
        lines = [
            f"{self.prefix}: {self.documents:,} documents, {self.tokens:,} tokens ({self.dtype})",
            f"tokens per document: {self.shortest:,} to {self.longest:,}, median {self.median:,.0f}; "
            f"{self.empty_documents:,} empty",
            *(f"ok: {check}" for check in self.checks),
        ]
        for number, text in self.samples:
            lines += ["", f"document {number}:", text]
        return "\n".join(lines)


def inspect(
    prefix: Path, *, tokenizer: TokenizerFacts | None = None, samples: int = 1, digests: bool = True
) -> Inspection:
    """Check `PREFIX.bin`/`.idx` against each other and against the manifest beside them, and decode some documents.

    Args:
        prefix: with or without `.bin` or `.idx`.
        tokenizer: to decode with (`describe_tokenizer`); default: the manifest's.
        samples: documents to decode, spread evenly.
        digests: also compare the files' digests (reads them whole).

    Raises:
        UserError: the files do not fit each other or the manifest.
    """
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    index = read_index(prefix)
    tokens = np.memmap(bin_path(prefix), index.dtype, mode="r") if index.offsets.size else np.empty(0, index.dtype)
    checks = ["the index covers the token file"]
    manifest_path = prefix.parent / "manifest.json"
    manifest = read_json(manifest_path) if manifest_path.exists() else None
    if manifest is not None and prefix.name in manifest["sources"]:
        checks += _check_manifest(prefix, index, tokens, manifest, manifest_path, digests)
        if tokenizer is None:
            said = manifest["tokenizer"]
            tokenizer = describe_tokenizer(said["name"], kind=said["kind"], pattern=said["pattern"])
    numbers: list[int] = []
    if len(index.lengths):
        numbers = np.unique(np.linspace(0, len(index.lengths) - 1, samples).astype(np.int64)).tolist()
    return Inspection(
        prefix=prefix,
        dtype=index.dtype.name,
        documents=len(index.lengths),
        empty_documents=len(index.bounds) - 1 - len(index.lengths),
        tokens=len(tokens),
        shortest=int(index.lengths.min(initial=np.iinfo(np.int32).max)) if len(index.lengths) else 0,
        median=float(np.median(index.lengths)) if len(index.lengths) else 0.0,
        longest=int(index.lengths.max(initial=0)),
        checks=tuple(checks),
        samples=tuple((n, _decode_document(index, tokens, n, tokenizer)) for n in numbers),
    )


def _check_manifest(
    prefix: Path, index: Index, tokens: np.ndarray, manifest: dict, manifest_path: Path, digests: bool
) -> list[str]:
    facts, eod_id = manifest["sources"][prefix.name], manifest["tokenizer"]["eod_id"]
    for what, found, said in (
        ("documents", len(index.lengths), facts["documents"]),
        ("tokens", len(tokens), facts["tokens"]),
        ("dtype", index.dtype.name, manifest["dtype"]),
    ):
        if found != said:
            raise UserError(f"{idx_path(prefix)}: {found} {what}, but {manifest_path} says {said}")
    last = tokens[index.offsets // index.dtype.itemsize + index.lengths - 1]
    if (last != eod_id).any():
        number = int(np.flatnonzero(last != eod_id)[0])
        raise UserError(f"{bin_path(prefix)}: document {number} ends with token {last[number]}, not with {eod_id}")
    checks = ["documents, tokens and dtype are the manifest's", f"every document ends with token {eod_id}"]
    if digests:
        for path in (bin_path(prefix), idx_path(prefix)):
            if digest_path(str(path)) != manifest["outputs"][path.name]:
                raise UserError(f"{path}: its BLAKE2b digest is not the one in {manifest_path}")
        checks.append("both files have the manifest's digests")
    return checks


def _decode_document(index: Index, tokens: np.ndarray, number: int, tokenizer: TokenizerFacts | None) -> str:
    start = int(index.offsets[number]) // index.dtype.itemsize
    ids = tokens[start : start + min(int(index.lengths[number]), _SAMPLE_TOKENS)].tolist()
    more = " …" if index.lengths[number] > _SAMPLE_TOKENS else ""
    if tokenizer is None:
        return " ".join(map(str, ids)) + more
    return decode(tokenizer, ids) + more
