"""LoRA (arXiv 2106.09685): y = x W^T + (alpha / r) dropout(x) A^T B^T, with W frozen and B zero at the start.

t: tokens of the stream, k and n: inputs and outputs of a linear layer, r: rank, tp: size of the tensor-parallel group.

Under tensor parallelism the half that touches the split axis is split, the other is replicated, and what the ranks
exchange for the adapter is r wide:

    layer               W          A          B          exchanged
    column (qkv, fc1)   [n/tp, k]  [r, k]     [n/tp, r]  x A^T: gathered (sequence parallel), or d of it summed
    row (proj, fc2)     [n, k/tp]  [r, k/tp]  [n, r]     x A^T: summed

Under sequence parallelism the replicated half sees a slice of the sequence only; its mark asks Megatron-Core to sum
its gradient over the group. On one tensor-parallel rank and without dropout nothing lies between the products, and
they are one function (`folded_lora`). Parameters keep the base's names (`linear_qkv.weight`) beside `lora_a` and
`lora_b`, so everything that knows the base by name goes on doing so.
"""

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.errors import UserError
from megatron_medllm.models.folded_lora import folded_linear
from megatron_medllm.models.frozen_base import FORMATS, FrozenWeight
from megatron_medllm.models.gpt import PackedGPTModel, global_parameters
from megatron_medllm.models.materialize import Fill, materialize, parts_beside_layers
from megatron_medllm.parallel.context import WHOLE, ContextSplit

log = logging.getLogger(__name__)

Split = Literal["column", "row"]

# where in a transformer layer -> how tensor parallelism splits it
LINEARS: dict[str, tuple[str, Split]] = {
    "linear_qkv": ("self_attention", "column"),
    "linear_proj": ("self_attention", "row"),
    "linear_fc1": ("mlp", "column"),
    "linear_fc2": ("mlp", "row"),
}


class AdaptedLinear(nn.Module):
    """A frozen column- or row-parallel linear layer, its weight held in some format, with or without an adapter.

    It takes over the parameters of Megatron-Core's layer and its place in the model.
    """

    weight: nn.Parameter | None  # None where `frozen` holds it
    bias: nn.Parameter | None
    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None

    def __init__(
        self,
        linear: ColumnParallelLinear | RowParallelLinear,
        *,
        split: Split,
        gated: bool,
        config: AdapterConfig,
        adapted: bool,
        device: torch.device,
        context: ContextSplit = WHOLE,
        folded: bool = False,
    ) -> None:
        """Args:
        linear: Megatron-Core's ColumnParallelLinear or RowParallelLinear.
        split: which of the two.
        gated: its outputs are gate and up, each split over the ranks on its own.
        config: rank, dropout and the format of the base.
        adapted: False: only freeze the weight and hold it in the base's format.
        device: where the adapter and a quantized weight are put.
        context: which tokens of a stream are this rank's.
        folded: compute base and adapter as one function; only where `folds` allows it.
        """
        super().__init__()
        if linear.bias is not None and linear.skip_bias_add:
            raise ValueError("a bias that is left to the caller is not supported")
        self.split, self.gated, self.context = split, gated, context
        self.tp_group, self.sequence_parallel = linear.tp_group, linear.sequence_parallel
        self.dropout, self.scale = config.dropout, config.alpha / config.rank
        self.bias, self.dtype = linear.bias, linear.weight.dtype
        self.frozen: FrozenWeight | None = None
        self.weight = linear.weight
        if config.base != "bf16":
            self.frozen, self.weight = FORMATS[config.base](linear.weight.detach().to(device)), None
        self.lora_a = self.lora_b = None
        # A row layer's bias comes after its ranks' sum, rounded on its own.
        self.folded = folded and (split == "column" or self.bias is None)
        if adapted:
            outputs, inputs = linear.weight.shape
            self.lora_a = self._half((config.rank, inputs), device, split_dim=1 if split == "row" else None)
            self.lora_b = self._half((outputs, config.rank), device, split_dim=0 if split == "column" else None)

    def _half(self, shape: tuple[int, int], device: torch.device, *, split_dim: int | None) -> nn.Parameter:
        half = nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=device))
        if split_dim is None:
            half.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark
        else:
            set_tensor_model_parallel_attributes(half, is_parallel=True, dim=split_dim, stride=1)
        return half

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """One layer's product.

        Args:
            x: [t, 1, k] (column; [t/tp, 1, k] under sequence parallelism) or [t, 1, k/tp] (row).

        Returns:
            [t, 1, n/tp] (column) or [t, 1, n] (row; [t/tp, 1, n] under sequence parallelism), the bias added.
        """
        x = x.flatten(0, 1)
        if self.folded and self.lora_a is not None and self.lora_b is not None:
            base = self.weight if self.frozen is None else self.frozen
            assert base is not None
            y = folded_linear(x, base, self.bias, self.lora_a, self.lora_b, scale=self.scale)
            return y[:, None], None
        y = self._base_column(x) if self.split == "column" else self._base_row(x)
        if self.lora_a is not None and self.lora_b is not None:
            narrow = self._share(F.linear(self.dropped(x), self.lora_a))  # [t, r]
            y = _add_low_rank(y, narrow, self.lora_b, self.scale)
        return y[:, None], None

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.frozen is not None:
            return self.frozen.product(x, bias)
        assert self.weight is not None
        return F.linear(x, self.weight, bias)

    def _base_column(self, x: Tensor) -> Tensor:
        if self.tp_group.size() == 1:
            return self._product(x, self.bias)
        enter = gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
        return self._product(enter(x, group=self.tp_group), self.bias)

    def _base_row(self, x: Tensor) -> Tensor:
        y = self._sum(self._product(x, None))
        return y if self.bias is None else y + self.bias

    def _sum(self, part: Tensor) -> Tensor:
        if self.tp_group.size() == 1:  # Megatron's mapping would return a view of it
            return part
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(part, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(part, group=self.tp_group)

    def _share(self, narrow: Tensor) -> Tensor:
        """x A^T as B needs it: whole, and the same tokens as the base's result."""
        if self.split == "row":
            return self._sum(narrow)
        if self.tp_group.size() == 1:
            return narrow
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(narrow, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(narrow, group=self.tp_group)

    def dropped(self, x: Tensor) -> Tensor:
        """x with dropout: every rank draws the mask of the whole input and takes its slice, as one process would.

        That needs nothing but torch's default random state, which is the same on all ranks of the group.
        """
        if not self.dropout or not self.training:
            return x
        axis = -1 if self.split == "row" else 0
        ranks = self.tp_group.size() if self.split == "row" or self.sequence_parallel else 1
        shape = list(x.shape)
        shape[axis] *= ranks
        shape[0] *= self.context.size
        keep = torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1 - self.dropout)
        if self.context.size > 1:
            keep = torch.cat([keep[start:end] for start, end in self.context.chunks(len(keep))])
        mine = keep.chunk(ranks, axis)[self.tp_group.rank() if ranks > 1 else 0]
        return x * mine / (1 - self.dropout)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """This rank's slice of W + (alpha / r) B A, summed in fp32, [n/tp, k] or [n, k/tp]."""
        if self.frozen is not None:
            base = self.frozen.dense()
        else:
            assert self.weight is not None
            base = self.weight.float()
        if self.lora_a is None or self.lora_b is None:
            return base
        return torch.addmm(base, self.lora_b.float(), self.lora_a.float(), alpha=self.scale)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The parameters as Megatron-Core's sharded tensors. An FP8 or NF4 base is not among them."""
        axes = {"weight": 0, "bias": 0, "lora_b": 0} if self.split == "column" else {"weight": 1, "lora_a": 1}
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        key = f"{prefix}lora_b"
        if self.gated and key in state:  # Megatron's MLP does this for its own weight and bias only
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state


def can_fold(config: AdapterConfig, tp_size: int) -> bool:
    """Whether base and adapter may be one function: no exchange between ranks and no mask lies between them."""
    return tp_size == 1 and not config.dropout


def folds(choice: Literal["auto", "folded", "separate"], config: AdapterConfig, tp_size: int) -> bool:
    """What `kernels.lora` comes to; says so in the log.

    Raises:
        UserError: it asks for folded products where something lies between them.
    """
    possible = can_fold(config, tp_size)
    if choice == "folded" and not possible:
        between = f"layout.tp={tp_size}" if tp_size > 1 else f"adapter.dropout={config.dropout:g}"
        raise UserError(f"kernels.lora=folded is for layout.tp=1 without adapter.dropout, here {between}; use auto")
    folded = possible and choice != "separate"
    log.info("LoRA: products %s (asked for: %s)", "folded into the base's" if folded else "one by one", choice)
    return folded


def _add_low_rank(y: Tensor, narrow: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """y [t, n] + scale * narrow [t, r] B^T, in place where autograd allows it: gate and up are too large to copy."""
    if y._is_view():  # an all-reduce hands its input on
        return torch.addmm(y, narrow, lora_b.t(), alpha=scale)
    return _AddLowRank.apply(y, narrow, lora_b, scale)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, narrow: Tensor, lora_b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(narrow, lora_b)
        ctx.scale = scale
        ctx.mark_dirty(y)
        return y.addmm_(narrow, lora_b.t(), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        narrow, lora_b = ctx.saved_tensors
        return dy, (dy @ lora_b).mul_(ctx.scale), (dy.t() @ narrow).mul_(ctx.scale), None


def add_adapters(
    chunks: Iterable[PackedGPTModel],
    config: AdapterConfig,
    *,
    seed: int,
    tp_rank: int,
    tp_size: int,
    device: torch.device | None = None,
    products: Literal["auto", "folded", "separate"] = "auto",
    fill: Fill | None = None,
) -> None:
    """Freeze the model and put an adapter on every target; call it once the base weights are loaded.

    A is uniform in +-1/sqrt(k), as PEFT draws it (Kaiming's rule with a = sqrt(5)), from a generator that depends on
    the seed and the parameter's global name alone: the same adapter in every layout. B is zero, so the model's output
    does not change. With an FP8 or NF4 base all four linears of a layer are held in that format, targets or not.

    Args:
        chunks: this rank's unwrapped model chunks.
        config: rank, scale, targets, format of the base.
        seed: of A.
        tp_rank: this rank within its tensor-parallel group.
        tp_size: size of that group.
        device: where the model goes, layer by layer as it is quantized, if it was built elsewhere. Default: where it
            is.
        fill: starting values of a model built on the meta device, because it fits `device` only in FP8 or NF4; each
            layer is filled and quantized before the next.
        products: `kernels.lora`.

    Raises:
        UserError: products that cannot be folded, layers that have no adapter here (Transformer Engine's), or an NF4
            base without bitsandbytes.
    """
    folded = folds(products, config, tp_size)
    for chunk in chunks:
        chunk.requires_grad_(False)
        target_device = device or next(chunk.parameters()).device
        if fill is not None:
            for part in parts_beside_layers(chunk):
                materialize(part, chunk, fill, device=target_device)
        for layer in chunk.decoder.layers:
            if fill is not None:
                materialize(layer, chunk, fill, device=target_device)
            for name, (parent_name, split) in LINEARS.items():
                if name in config.targets or config.base != "bf16":
                    parent = getattr(layer, parent_name)
                    linear = getattr(parent, name)
                    _refuse_foreign(linear)
                    adapted = AdaptedLinear(
                        linear,
                        split=split,
                        gated=name == "linear_fc1",
                        config=config,
                        adapted=name in config.targets,
                        device=target_device,
                        context=ContextSplit.of(chunk.pg_collection.cp),
                        folded=folded,
                    )
                    setattr(parent, name, adapted)
        chunk.to(target_device)
        for name, parameter in global_parameters(chunk):
            if name.endswith("lora_a"):
                drawn = chunk.shape.ffn_hidden_size if "linear_fc2" in name else None
                _draw_a(parameter, name, drawn=drawn, seed=seed, tp_rank=tp_rank, tp_size=tp_size)


def _refuse_foreign(linear: nn.Module) -> None:
    if type(linear).__name__ not in ("ColumnParallelLinear", "RowParallelLinear"):
        raise UserError(
            f"adapter: {type(linear).__name__} takes no adapter; set model.backend=torch (its FP8 needs no TE)"
        )


@torch.no_grad()
def _draw_a(parameter: nn.Parameter, name: str, *, drawn: int | None, seed: int, tp_rank: int, tp_size: int) -> None:
    """Fill this rank's slice of A; what pads the FFN beyond its first `drawn` columns is zero in every layout."""
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    rank, inputs = parameter.shape
    is_split = LINEARS[name.split(".")[-2]][1] == "row"
    whole = inputs * tp_size if is_split else inputs
    drawn = drawn or whole
    bound = 1 / math.sqrt(drawn)
    values = F.pad(torch.empty(rank, drawn).uniform_(-bound, bound, generator=generator), (0, whole - drawn))
    parameter.copy_(values.chunk(tp_size, dim=1)[tp_rank] if is_split else values)


def adapted_linears(chunks: Iterable[nn.Module]) -> Iterator[AdaptedLinear]:
    """Every layer that `add_adapters` put in."""
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, AdaptedLinear))


def merged_parameters(chunk: PackedGPTModel) -> Iterator[tuple[str, Tensor]]:
    """The chunk as a model without adapters, one tensor at a time, under the names of `global_parameters`.

    Merged weights and those of an FP8 or NF4 base are fp32, others as they are. Values are the adapted model's own:
    a quantized base is merged as quantized.
    """
    held = {
        id(parameter)
        for linear in adapted_linears([chunk])
        for parameter in (linear.weight, linear.lora_a, linear.lora_b)
        if parameter is not None
    }
    for name, parameter in global_parameters(chunk):
        if id(parameter) not in held:
            yield name, parameter
    for layer in chunk.decoder.layers:
        for name, (parent, _) in LINEARS.items():
            linear = getattr(getattr(layer, parent), name)
            if isinstance(linear, AdaptedLinear):
                yield f"decoder.layers.{layer.layer_number - 1}.{parent}.{name}.weight", linear.merged_weight()
