"""Where a model's weights are read from: the tensors of a Hugging Face (HF) model by name, slice by slice."""

import logging
from abc import ABC, abstractmethod
from pathlib import Path

import torch

from megatron_medllm.checkpoint.names import EMBEDDING, HFSlice, Weight, hf_shape, hf_shapes, local_pieces
from megatron_medllm.checkpoint.safetensors_file import DTYPE_NAMES
from megatron_medllm.config.model import ModelShape

log = logging.getLogger(__name__)


class WeightSource(ABC):
    """The weights of one model, under their HF names, wherever they lie."""

    def __init__(self, directory: Path, shape: ModelShape) -> None:
        self.directory, self.shape = directory, shape

    @abstractmethod
    def dtype_of(self, name: str) -> torch.dtype:
        """Type in which tensor `name` is stored."""

    @abstractmethod
    def read(self, name: str, *, axis: int, start: int, stop: int) -> torch.Tensor:
        """Entries [start, stop) of tensor `name` along `axis`, in its stored dtype, on the CPU.

        Raises:
            UserError: a file is missing, truncated or damaged.
        """

    def own_dtype(self) -> torch.dtype:
        """The type of the first tensor, as which the whole model is taken where nobody asks for another."""
        dtype = self.dtype_of(EMBEDDING.hf[0])
        self.tell_rounding(dtype)
        return dtype

    def tell_rounding(self, dtype: torch.dtype) -> None:
        """Warn where tensors lose digits when they become `dtype`: a bf16 model may keep its norms in fp32."""
        names = hf_shapes(self.shape)
        wide = [name for name in names if not _holds(dtype, self.dtype_of(name))]
        if wide:
            kinds = " and ".join(sorted({DTYPE_NAMES[self.dtype_of(name)] for name in wide}))
            what = "%s: %d of %d tensors are stored in %s and are rounded to %s, %r the first"
            log.warning(what, self.directory, len(wide), len(names), kinds, str(dtype).removeprefix("torch."), wide[0])

    def read_local(self, weight: Weight, *, local_size: int, tp_rank: int, tp_size: int) -> torch.Tensor:
        """One TP rank's slice of a Megatron tensor, padding filled with zeros, in the stored dtype, on the CPU.

        Args:
            weight: a row of the name table.
            local_size: entries of the rank's slice along the axis that TP splits.
            tp_rank: this rank within its tensor-parallel group.
            tp_size: size of that group.
        """
        pieces = local_pieces(weight, self.shape, local_size=local_size, tp_rank=tp_rank, tp_size=tp_size)
        return self.read_pieces(weight, pieces)

    def read_pieces(self, weight: Weight, pieces: list[HFSlice]) -> torch.Tensor:
        """Consecutive pieces of a Megatron tensor, joined along its axis, in the stored dtype, on the CPU."""
        axis = weight.axis or 0
        parts = []
        for piece in pieces:
            if piece.hf is None:
                padding = list(hf_shape(weight.hf[0], self.shape))
                padding[axis] = len(piece)
                parts.append(torch.zeros(padding, dtype=self.dtype_of(weight.hf[0])))
            else:
                parts.append(self.read(piece.hf, axis=axis, start=piece.start, stop=piece.stop))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def _holds(dtype: torch.dtype, stored: torch.dtype) -> bool:
    """Whether every number of type `stored` is one of type `dtype` too."""
    return dtype in (stored, torch.float32)
