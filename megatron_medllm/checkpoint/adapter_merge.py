"""Merges the adapter of a training checkpoint into the Hugging Face (HF) weights it was trained on, row by row.

W + (alpha / r) B A, summed in fp32 and rounded once. A and B are in Megatron's order, fused like the weight they
belong to; they are small enough to be held whole, the weight is not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_medllm.checkpoint.hf_source import HFWeights
from megatron_medllm.checkpoint.hf_target import HFTarget
from megatron_medllm.checkpoint.names import Weight, hf_shape, local_pieces, stacked_name
from megatron_medllm.checkpoint.torch_dist import TorchDistReader
from megatron_medllm.config.model import ModelShape
from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.errors import UserError

_ROWS_BYTES = 32 * 1024 * 1024


class AdapterReader:
    """The halves of an adapter in a distributed checkpoint."""

    def __init__(self, reader: TorchDistReader, targets: Sequence[str]) -> None:
        self.reader, self.targets = reader, targets

    def halves(self, weight: Weight) -> tuple[Tensor, Tensor] | None:
        """A [r, k] and B [n, r] of a weight in fp32, None where it has no adapter."""
        module, _, kind = weight.mcore.rpartition(".")
        if kind != "weight" or module.rpartition(".")[2] not in self.targets:
            return None
        key, layer = stacked_name(weight)
        stem = key.removesuffix("weight")
        return self._whole(f"{stem}lora_a", layer), self._whole(f"{stem}lora_b", layer)

    def _whole(self, key: str, layer: int | None) -> Tensor:
        stored = self.reader.shape_of(key)
        if stored is None:
            raise UserError(f"{self.reader.directory}: tensor {key!r} is missing")
        whole = torch.empty(stored if layer is None else stored[1:])
        for chunk in self.reader.chunks(key, layer):
            rows, columns = chunk.sizes
            place = whole[chunk.row : chunk.row + rows, chunk.column : chunk.column + columns]
            place.copy_(self.reader.load(chunk, layer))
        return whole


class AdapterMerge:
    """An adapter checkpoint over its base."""

    def __init__(self, reader: TorchDistReader, base: HFWeights, shape: ModelShape, adapter: AdapterConfig) -> None:
        if adapter.base != "bf16":
            raise UserError(
                f"{reader.directory}: the adapter was trained on a {adapter.base} base, which only the run itself can "
                "merge as it was trained; take the run's own export, or export the adapter for PEFT"
            )
        self.stored, self.base, self.shape = AdapterReader(reader, adapter.targets), base, shape
        self.scale = adapter.alpha / adapter.rank

    def write(self, weight: Weight, target: HFTarget) -> None:
        """Write the HF tensors of one weight, merged where it has an adapter."""
        halves = self.stored.halves(weight)
        if halves is None:
            for name in weight.hf:
                self._write_rows(target, name, 0, hf_shape(name, self.shape)[0], None, None)
            return
        a, b = halves
        if weight.axis == 1:
            name = weight.hf[0]
            rows, columns = hf_shape(name, self.shape)
            self._write_rows(target, name, 0, rows, a[:, :columns], b)
            return
        at = 0
        for piece in local_pieces(weight, self.shape, local_size=b.shape[0], tp_rank=0, tp_size=1):
            if piece.hf is not None:
                self._write_rows(target, piece.hf, piece.start, piece.stop, a, b[at : at + len(piece)])
            at += len(piece)

    def _write_rows(
        self, target: HFTarget, name: str, start: int, stop: int, a: Tensor | None, b: Tensor | None
    ) -> None:
        """Write rows [start, stop) of an HF tensor, a few at a time; `b` holds the adapter's rows for just these."""
        columns = hf_shape(name, self.shape)[1:]
        step = max(1, _ROWS_BYTES // (4 * torch.Size(columns).numel()))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            rows = self.base.read(name, axis=0, start=first, stop=last)
            if a is not None and b is not None:
                rows = torch.addmm(rows.float(), b[first - start : last - start], a, alpha=self.scale)
            target.write(name, rows.to(target.dtype), first_row=first)
