"""The optimizer step's norm, scaling and copies of many small tensors, in one call each.

The problem: an adapter has hundreds of small tensors. Where neither Transformer Engine nor apex is installed,
Megatron-Core 0.16.1 takes them one by one: its norm reads every tensor's from the device (a wait each), scaling is two
kernels a tensor, and the copy of fp32 parameters into the model's one kernel and three views a tensor. The method:
torch's `_foreach_` kernels, and views that are made once and kept. The results are the same.

What still waits for the device in a step: the gradient norm, once, as a Python float that decides whether to clip.
"""

import logging
from collections.abc import Iterable
from typing import Any, Literal

import torch
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer, clip_grads
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

log = logging.getLogger(__name__)

Choice = Literal["auto", "foreach", "megatron"]

# Norm and scaling as Megatron-Core has chosen them: apex's, Transformer Engine's or its own.
MEGATRONS = (clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *_: Any
) -> tuple[Tensor, None]:
    """The L2 norm [1] fp32 over all tensors of the first list; the arguments are those of apex's function.

    It stays on the device. Tensors of one dtype are one kernel; norms are taken in fp32 whatever the dtype.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensor_lists[0]:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    if not by_dtype:
        return torch.zeros(1, device=noop_flag.device), None
    norms = [norm for part in by_dtype.values() for norm in torch._foreach_norm(part, 2, torch.float32)]
    return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float) -> None:
    """Write `scale` times the first list's tensors into the second's; they may be the same tensors."""
    sources, targets = tensor_lists
    if not len(sources):
        return
    if all(source is target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_mul_(targets, scale)
    else:
        torch._foreach_copy_(targets, torch._foreach_mul(sources, scale))


def use(optimizer: MegatronOptimizer, choice: Choice) -> None:
    """Make the optimizer, and Megatron-Core's gradient clipping in this process, work as chosen.

    Args:
        optimizer: as just built.
        choice: "auto" keeps Transformer Engine's or apex's own kernels for norm and scaling where they are installed.
    """
    kernels, copies = MEGATRONS, "one by one"
    if choice != "megatron":
        if choice == "foreach" or MEGATRONS[0].__module__ == "megatron.core.utils":
            kernels = (multi_tensor_l2norm, multi_tensor_scale)
        for leaf in leaves(optimizer):
            _use_kept_views(leaf)
        copies = "in one call"
    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = kernels
    names = "torch's foreach" if kernels is not MEGATRONS else MEGATRONS[0].__module__
    log.info("optimizer step: norm and scaling by %s, copies %s (asked for: %s)", names, copies, choice)


def leaves(optimizer: MegatronOptimizer) -> Iterable[MegatronOptimizer]:
    """The optimizers behind Megatron's chain of them."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _use_kept_views(leaf: MegatronOptimizer) -> None:
    """Replace a mixed-precision optimizer's copies; fp32 training has none, and other kinds keep their own."""
    if leaf.is_stub_optimizer or leaf.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        return
    if type(leaf) is DistributedOptimizer:
        if leaf.ddp_config.use_megatron_fsdp or leaf.ddp_config.fp8_param_gather:  # never set here
            return
        _DistributedCopies(leaf).install()
    elif type(leaf) is Float16OptimizerWithFloat16Params:
        leaf._copy_main_params_to_model_params = lambda: _copy_to_model(leaf)


@torch.no_grad()
def _copy_to_model(leaf: Float16OptimizerWithFloat16Params) -> None:
    model, main = leaf._get_model_and_main_params_data_float16()
    copy_each(main, model)


def copy_each(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy tensors of any dtypes into others of the same sizes: one call a pair of dtypes."""
    by_dtypes: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        froms, tos = by_dtypes.setdefault((source.dtype, target.dtype), ([], []))
        froms.append(source)
        tos.append(target)
    for froms, tos in by_dtypes.values():
        torch._foreach_copy_(tos, froms)


class _DistributedCopies:
    """The two copies of Megatron's distributed optimizer, with its views of the buffers made once.

    The views are made again when a tensor has moved (an optimizer that was offloaded and restored).
    """

    def __init__(self, leaf: DistributedOptimizer) -> None:
        self._leaf = leaf
        self._addresses: list[int] = []
        self._gradients: list[tuple[Tensor, Tensor]] = []  # main parameter, view of its gradient in the buffer
        self._parameters: tuple[list[Tensor], list[Tensor]] = [], []  # main ones, views of the model's in the buffer

    def install(self) -> None:
        """Take the place of the optimizer's own methods."""
        if all(model.main_grad.dtype is torch.float32 for model, _ in self._pairs()):  # others have to be cast
            self._leaf._copy_model_grads_to_main_grads = self.copy_model_grads_to_main_grads
        self._leaf._copy_main_params_to_model_params = self.copy_main_params_to_model_params

    @torch.no_grad()
    def copy_model_grads_to_main_grads(self) -> None:
        """Hand the reduced fp32 gradients to Adam, as views of the buffer: nothing is copied."""
        self._refresh()
        for main, gradient in self._gradients:
            main.grad = gradient

    @torch.no_grad()
    def copy_main_params_to_model_params(self) -> None:
        """Round the updated fp32 parameters into the model's buffer, where the all-gather finds them."""
        self._refresh()
        copy_each(*self._parameters)

    def _pairs(self) -> list[tuple[Any, Tensor]]:
        leaf = self._leaf
        groups = [
            *zip(leaf.model_float16_groups, leaf.shard_fp32_from_float16_groups, strict=True),
            *zip(leaf.model_fp32_groups, leaf.shard_fp32_groups, strict=True),
        ]
        return [pair for model, main in groups for pair in zip(model, main, strict=True)]

    def _refresh(self) -> None:
        pairs = self._pairs()
        addresses = [t.data_ptr() for model, main in pairs for t in (model, model.main_grad, main)]
        if addresses == self._addresses:
            return
        self._gradients, self._parameters = [], ([], [])
        for model, main in pairs:
            ranges = self._leaf._get_model_param_range_map(model)
            own, place = ranges["param"], ranges["gbuf_world_in_bucket"]
            buffer, _, bucket = self._leaf.model_param_gbuf_map[model]
            parameters = self._leaf.buffers[buffer].buckets[bucket].param_data.view(-1)
            self._gradients.append((main, model.main_grad.view(-1)[own.start : own.end]))
            target = parameters[place.start : place.end].detach()
            if target.data_ptr() != main.data_ptr():  # fp32 training updates the model's parameters themselves
                self._parameters[0].append(main)
                self._parameters[1].append(target)
        self._addresses = addresses
