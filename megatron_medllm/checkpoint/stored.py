"""Megatron's tensors where they lie: whole weights put together from stored blocks, read a slice at a time.

Whatever a checkpoint's format, layout and spelling of names, here it is a table: for each weight of the whole model
(all tensor-parallel ranks together) its size and the blocks that make it up. `MegatronWeights` reads that as the
Hugging Face (HF) tensors in it, so that everything that takes an HF directory takes a Megatron checkpoint too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_medllm.checkpoint.names import (
    EMBEDDING,
    OUTPUT,
    HFSlice,
    Weight,
    cut_pieces,
    hf_shape,
    local_pieces,
    model_weights,
)
from megatron_medllm.checkpoint.safetensors_file import Entry, open_descriptor, read_slice
from megatron_medllm.checkpoint.weight_source import WeightSource
from megatron_medllm.config.model import ModelShape
from megatron_medllm.errors import UserError

_COMPARED_ROWS = 4096


@dataclass(frozen=True)
class Block:
    """A stored rectangle of a weight: its first row and column (0 for vectors), its sizes, and where it lies."""

    row: int
    column: int
    sizes: tuple[int, ...]
    path: Path
    locate: Callable[[], Entry]  # its first call may open and check the file


@dataclass(frozen=True)
class StoredWeight:
    """One weight of the whole model: `name` as the checkpoint spells it, sizes with padding."""

    name: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[Block, ...]

    def read(self, axis: int, start: int, stop: int) -> torch.Tensor:
        """Entries [start, stop) along `axis`, in the stored dtype, contiguous, on the CPU.

        Raises:
            UserError: a file is missing, truncated or damaged.
        """
        sizes = [*self.sizes]
        sizes[axis] = stop - start
        out = None
        for block in self.blocks:
            at = (block.row, block.column)
            low, high = max(start, at[axis]), min(stop, at[axis] + block.sizes[axis])
            if low >= high:
                continue
            part = _read(block, self.name, axis=axis, start=low - at[axis], stop=high - at[axis])
            if list(part.shape) == sizes:
                return part
            out = torch.empty(sizes, dtype=self.dtype) if out is None else out
            place = out.narrow(axis, low - start, high - low)
            if len(sizes) > 1:
                other = 1 - axis
                place = place.narrow(other, at[other], block.sizes[other])
            place.copy_(part)
        return torch.empty(sizes, dtype=self.dtype) if out is None else out


def _read(block: Block, name: str, *, axis: int, start: int, stop: int) -> torch.Tensor:
    entry = block.locate()
    with open_descriptor(block.path) as fd:
        try:
            return read_slice(fd, entry, axis=axis, start=start, stop=stop)
        except EOFError:
            raise UserError(f"{block.path}: truncated inside {name!r}") from None


class MegatronTensors(Protocol):
    """The tensors of a Megatron checkpoint of any format."""

    directory: Path
    names: tuple[str, ...]  # of all tensors of the model, without prefix; stacked layers have no number

    def find(self, mcore: str) -> StoredWeight | None:
        """The weight of this name (Transformer Engine's, layers numbered over the whole model), if it is stored.

        Raises:
            UserError: it is stored incompletely.
        """


class MegatronWeights(WeightSource):
    """A Megatron checkpoint as the HF tensors in it."""

    def __init__(self, tensors: MegatronTensors, shape: ModelShape) -> None:
        """Find and check every weight; no number is read.

        Raises:
            UserError: one is missing, incomplete, or of another shape.
        """
        super().__init__(tensors.directory, shape)
        self.tensors = tensors
        self._places: dict[str, tuple[Weight, StoredWeight, list[HFSlice]]] = {}
        for weight in model_weights(shape):
            stored = tensors.find(weight.mcore)
            if stored is None:
                raise UserError(f"{tensors.directory}: tensor {weight.mcore!r} is missing")
            pieces = self._pieces(weight, stored)
            self._places.update(dict.fromkeys(weight.hf, (weight, stored, pieces)))

    def _pieces(self, weight: Weight, stored: StoredWeight) -> list[HFSlice]:
        sizes, wanted, axis = stored.sizes, hf_shape(weight.hf[0], self.shape), weight.axis or 0
        try:
            if len(sizes) != len(wanted) or sizes[axis + 1 :] != wanted[axis + 1 :] or sizes[:axis] != wanted[:axis]:
                raise ValueError
            return local_pieces(weight, self.shape, local_size=sizes[axis], tp_rank=0, tp_size=1)
        except ValueError:
            what = f"tensor {stored.name!r} of shape {list(sizes)}"
            raise UserError(f"{self.directory}: {what} is another model's") from None

    def dtype_of(self, name: str) -> torch.dtype:
        """Type in which HF tensor `name` is stored."""
        return self._places[name][1].dtype

    def read(self, name: str, *, axis: int, start: int, stop: int) -> torch.Tensor:
        """Entries [start, stop) of HF tensor `name` along `axis`, in the stored dtype, on the CPU.

        Raises:
            UserError: a file is missing, truncated or damaged.
        """
        weight, stored, pieces = self._places[name]
        if weight.axis == 1:
            width = hf_shape(name, self.shape)[1]
            return stored.read(axis, start, stop)[:, : width if axis == 0 else stop - start].contiguous()
        if axis != 0:
            raise ValueError(f"{name}: is read by rows")
        parts, at = [], 0
        for piece in pieces:
            if piece.hf == name:
                for cut in cut_pieces([HFSlice(name, at, at + len(piece))], start - piece.start, stop - piece.start):
                    parts.append(stored.read(0, cut.start, cut.stop))
            at += len(piece)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def refuse_other_head(self) -> None:
        """Check that a head that is stored beside tied embeddings is the embedding.

        Raises:
            UserError: it is another one.
        """
        if self.shape.tie_embeddings and not has_tied_head(self.tensors, self.shape):
            raise UserError(
                f"{self.directory}: the configuration ties the embeddings, but {OUTPUT.mcore!r} differs from "
                f"{EMBEDDING.mcore!r}; `medllm export` writes such a model untied"
            )


def has_tied_head(tensors: MegatronTensors, shape: ModelShape) -> bool:
    """Whether no head is stored, or one that equals the embedding in every row but the padding."""
    head, embedding = tensors.find(OUTPUT.mcore), tensors.find(EMBEDDING.mcore)
    if head is None or embedding is None:
        return True
    if head.sizes[1:] != embedding.sizes[1:] or min(head.sizes[0], embedding.sizes[0]) < shape.vocab_size:
        return False
    for start in range(0, shape.vocab_size, _COMPARED_ROWS):
        stop = min(start + _COMPARED_ROWS, shape.vocab_size)
        if not torch.equal(head.read(0, start, stop), embedding.read(0, start, stop)):
            return False
    return True
