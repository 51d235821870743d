"""Merges the adapter of a training checkpoint into the Hugging Face (HF) weights it was trained on, row by row.

W + (alpha / r) B A, summed in fp32 and rounded once. A and B are in Megatron's order, fused like the weight they
belong to; they are small enough to be held whole, the weight is not.
"""

import torch
from torch import Tensor

from megatron_medllm.checkpoint.hf_target import COPIED_BYTES, HFTarget
from megatron_medllm.checkpoint.names import Weight, hf_shape, local_pieces
from megatron_medllm.checkpoint.stored import MegatronTensors, StoredWeight
from megatron_medllm.checkpoint.weight_source import WeightSource
from megatron_medllm.config.model import ModelShape
from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.errors import UserError

# The halves A and B behind a linear's name: ours, and those of Megatron-Bridge and NeMo.
SPELLINGS = (("lora_a", "lora_b"), ("adapter.linear_in.weight", "adapter.linear_out.weight"))


class AdapterReader:
    """The halves of an adapter in a Megatron checkpoint."""

    def __init__(
        self, tensors: MegatronTensors, adapter: AdapterConfig, shape: ModelShape, *, in_every_layer: bool = True
    ) -> None:
        """Nothing is read yet. Other trainers may put adapters into some layers only: `in_every_layer` False."""
        self.tensors, self.adapter, self.shape = tensors, adapter, shape
        self._in_every_layer = in_every_layer

    def halves(self, weight: Weight) -> tuple[Tensor, Tensor] | None:
        """A [r, k] and B [n, r] of a weight in their stored type, None where it has no adapter.

        Raises:
            UserError: one of them is missing, or does not fit the linear or the adapter's rank.
        """
        module, _, kind = weight.mcore.rpartition(".")
        if kind != "weight" or module.rpartition(".")[2] not in self.adapter.targets:
            return None
        for names in SPELLINGS:
            a, b = (self.tensors.find(f"{module}.{name}") for name in names)
            if a is not None and b is not None:
                self._check(weight, a, b)
                return a.read(0, 0, a.sizes[0]), b.read(0, 0, b.sizes[0])
            if a is not None or b is not None:
                missing = names[0] if a is None else names[1]
                raise UserError(f"{self.tensors.directory}: tensor '{module}.{missing}' is missing")
        if self._in_every_layer:
            raise UserError(f"{self.tensors.directory}: tensor '{module}.{SPELLINGS[0][0]}' is missing")
        return None

    def _check(self, weight: Weight, a: StoredWeight, b: StoredWeight) -> None:
        rank, inputs = self.adapter.rank, hf_shape(weight.hf[0], self.shape)[1]
        outputs = sum(hf_shape(name, self.shape)[0] for name in weight.hf)
        for half, wanted in ((a, (rank, inputs)), (b, (outputs, rank))):
            padded = weight.may_pad and len(half.sizes) == 2 and all(map(int.__ge__, half.sizes, wanted))
            if half.sizes != wanted and not (padded and rank in half.sizes):
                what = f"tensor {half.name!r} of shape {list(half.sizes)}"
                raise UserError(f"{self.tensors.directory}: {what}, expected {list(wanted)}")


class AdapterMerge:
    """An adapter checkpoint over its base."""

    def __init__(self, stored: AdapterReader, base: WeightSource, shape: ModelShape) -> None:
        adapter = stored.adapter
        if adapter.base != "bf16":
            raise UserError(
                f"{stored.tensors.directory}: the adapter was trained on a {adapter.base} base, which only the run "
                "itself can merge as it was trained; take the run's own export, or export the adapter for PEFT"
            )
        self.stored, self.base, self.shape = stored, base, shape
        self.scale = adapter.alpha / adapter.rank

    def write(self, weight: Weight, target: HFTarget) -> None:
        """Write the HF tensors of one weight, merged where it has an adapter."""
        halves = self.stored.halves(weight)
        if halves is None:
            for name in weight.hf:
                target.copy(self.base, name)
            return
        a, b = (half.float() for half in halves)
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

    def _write_rows(self, target: HFTarget, name: str, start: int, stop: int, a: Tensor, b: Tensor) -> None:
        """Write rows [start, stop) of an HF tensor, a few at a time; `b` holds the adapter's rows for just these."""
        columns = hf_shape(name, self.shape)[1:]
        step = max(1, COPIED_BYTES // (4 * torch.Size(columns).numel()))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            rows = self.base.read(name, axis=0, start=first, stop=last)
            rows = torch.addmm(rows.float(), b[first - start : last - start], a, alpha=self.scale)
            target.write(name, rows.to(target.dtype), first_row=first)
