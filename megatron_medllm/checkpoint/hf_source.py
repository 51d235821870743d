"""The tensors of a Hugging Face (HF) directory: found and checked by name, read slice by slice."""

import logging
import re
from pathlib import Path

import torch

from megatron_medllm.checkpoint.names import EMBEDDING, OUTPUT, hf_shapes
from megatron_medllm.checkpoint.safetensors_file import (
    DTYPES,
    Entry,
    digest_entry,
    open_descriptor,
    read_header,
    read_slice,
)
from megatron_medllm.checkpoint.weight_source import WeightSource
from megatron_medllm.config.hf_files import INDEX_NAME, weight_files
from megatron_medllm.config.model import ModelShape
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json

# Tables that old versions stored with the model, and that every version computes anew: not read, as in transformers.
_COMPUTED = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(original_inv_freq|inv_freq|cos_cached|sin_cached)"
)

log = logging.getLogger(__name__)


class HFWeights(WeightSource):
    """The tensors of an HF directory, found and checked by name, read slice by slice."""

    def __init__(self, hf_dir: Path, shape: ModelShape) -> None:
        """Read the index and the headers, and check them against `shape`; no tensor is read.

        Raises:
            UserError: a tensor is missing, extra, of another shape, or of an unusable type; a shard is missing,
                truncated or lacks a tensor that the index promises.
        """
        super().__init__(hf_dir, shape)
        self.hf_dir = hf_dir
        self.place: dict[str, tuple[Path, Entry]] = {}
        for path, promised in weight_files(hf_dir).items():
            header = read_header(path)
            for name in sorted(promised - header.keys()):
                raise UserError(f"{path}: tensor {name!r} is missing; {hf_dir / INDEX_NAME} says it is here")
            for name, entry in header.items():
                if promised and name not in promised:
                    raise UserError(f"{hf_dir / INDEX_NAME}: no entry for tensor {name!r}, which is in {path.name}")
                if not _COMPUTED.fullmatch(name):
                    self.place[name] = (path, entry)
        self._check()
        self._check_total()

    def _check_total(self) -> None:
        """An index that is wrong about the size is told, no more: transformers does not look at it."""
        index = self.hf_dir / INDEX_NAME
        metadata = read_json(index).get("metadata") if index.exists() else None
        promised = metadata.get("total_size") if isinstance(metadata, dict) else None
        found = sum(entry.size for _, entry in self.place.values())
        if promised is not None and promised != found:
            log.warning("%s: total_size is %s, the tensors have %d bytes", index, promised, found)

    def _check(self) -> None:
        expected = hf_shapes(self.shape)
        missing = [name for name in expected if name not in self.place]
        if missing:
            raise UserError(f"{self.hf_dir}: tensor {missing[0]!r} is missing{_and_more(missing)}")
        copied_head = OUTPUT.hf[0] if self.shape.tie_embeddings else None
        extra = [name for name in self.place if name not in expected and name != copied_head]
        if extra:
            raise UserError(f"{self.hf_dir}: tensor {extra[0]!r} is not part of this model{_and_more(extra)}")
        for name, wanted in expected.items():
            path, entry = self.place[name]
            if entry.shape != wanted:
                raise UserError(f"{path}: tensor {name!r} has shape {list(entry.shape)}, expected {list(wanted)}")
            if entry.dtype not in DTYPES:
                raise UserError(f"{path}: tensor {name!r} has type {entry.dtype}, expected one of {', '.join(DTYPES)}")
        if copied_head in self.place:
            self._check_copied_head(copied_head)

    def _check_copied_head(self, head: str) -> None:
        """Some writers store the tied head too: harmless when it equals the embedding, another model when not."""
        rows, step = self.shape.vocab_size, 4096
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            pair = [self.read(name, axis=0, start=start, stop=stop) for name in (head, EMBEDDING.hf[0])]
            if not torch.equal(*pair):
                raise UserError(
                    f"{self.place[head][0]}: config.json ties the embeddings, but {head!r} differs from "
                    f"{EMBEDDING.hf[0]!r}"
                )

    def dtype_of(self, name: str) -> torch.dtype:
        """Type in which tensor `name` is stored."""
        return DTYPES[self.place[name][1].dtype]

    def read(self, name: str, *, axis: int, start: int, stop: int) -> torch.Tensor:
        """Entries [start, stop) of tensor `name` along `axis`, in the file's dtype, on the CPU.

        Raises:
            UserError: the shard became shorter or unreadable since it was opened.
        """
        path, entry = self.place[name]
        with open_descriptor(path) as fd:
            try:
                return read_slice(fd, entry, axis=axis, start=start, stop=stop)
            except EOFError:
                raise UserError(f"{path}: truncated inside tensor {name!r}") from None

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's bytes, in hex.

        Raises:
            UserError: the shard became shorter since it was opened.
        """
        path, entry = self.place[name]
        try:
            return digest_entry(path, entry)
        except EOFError:
            raise UserError(f"{path}: truncated inside tensor {name!r}") from None


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
