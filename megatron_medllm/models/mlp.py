"""SwiGLU in Megatron-Core's MLP: what computes it, and what is kept of it for the backward pass.

With `layout.recompute=swiglu` what SwiGLU makes of gate and up is not kept. The layer behind keeps its input for a
weight's gradient, LoRA's A among them. That input is a cheap function of gate and up, which are kept anyway: its
storage is given back after the forward pass and filled again when the gradient arrives.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from megatron_medllm.config.model import ModelConfig
from megatron_medllm.errors import UserError
from megatron_medllm.kernels.backend import missing_cuda, triton_installed
from megatron_medllm.kernels.swiglu import swiglu

log = logging.getLogger(__name__)


class RecomputedSwiGLU(MLP):
    """Megatron-Core's MLP with `layout.recompute=swiglu`: the same values in the forward and the backward pass."""

    def forward(self, hidden_states: Tensor, per_token_scale: None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        """[t, 1, h] -> [t, 1, h]; `per_token_scale` is for experts."""
        if per_token_scale is not None:
            raise ValueError("experts are not supported")
        gate_up, _bias = self.linear_fc1(hidden_states)
        activated = self._swiglu(gate_up)
        output, bias = self.linear_fc2(activated)
        if output.requires_grad:
            kept = gate_up.detach()
            drop_until_backward(activated, output, lambda: self._swiglu(kept))
        return output, bias

    def _swiglu(self, gate_up: Tensor) -> Tensor:
        if self.config.use_te_activation_func:  # `use_own_swiglu`
            return self.activation_func(gate_up)
        if self.config.bias_activation_fusion:
            return bias_swiglu_impl(gate_up, None, False, False)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


def drop_until_backward(dropped: Tensor, output: Tensor, again: Callable[[], Tensor]) -> None:
    """Give back the storage of `dropped`, and fill it with `again()` as soon as the gradient of `output` is there.

    Autograd does not see it: what the layers between the two saved of `dropped` is whole again before they need it.
    """
    storage = dropped.untyped_storage()
    storage.resize_(0)

    def restore(_: Tensor) -> None:
        with torch.no_grad():
            source = again().untyped_storage()
        storage.resize_(source.nbytes())
        storage.copy_(source)

    output.register_hook(restore)


def choose_swiglu(
    chunks: Iterable[nn.Module],
    wanted: Literal["auto", "triton", "megatron"],
    device: torch.device,
    model: ModelConfig,
) -> None:
    """Tell every MLP what computes its activation: `kernels.swiglu`. Says so in the log.

    Args:
        chunks: this rank's model chunks.
        wanted: ours in Triton, Megatron-Core's, or auto: ours where it runs.
        device: where the model is or will be.
        model: its backend; `swiglu` is about Megatron-Core's, and unless it is auto, that is what `auto` takes.

    Raises:
        UserError: `triton` was asked for and cannot run here.
    """
    mlps = [module for chunk in chunks for module in chunk.modules() if isinstance(module, MLP)]
    missing = _missing(device, model.backend)
    if wanted == "triton" and missing is not None:
        raise UserError(f"kernels.swiglu=triton needs {missing}")
    if missing is None and (wanted == "triton" or (wanted == "auto" and model.swiglu == "auto")):
        use_own_swiglu(mlps)
        said = "our Triton kernels"
    else:
        compiled = any(mlp.config.bias_activation_fusion for mlp in mlps)
        said = f"Megatron-Core's, {'compiled' if compiled else 'op by op'}"
        if wanted == "auto":
            said += f"; model.swiglu={model.swiglu}" if missing is None else f"; Triton needs {missing}"
    log.info("SwiGLU: %s (asked for: %s)", said, wanted)


def use_own_swiglu(mlps: Iterable[MLP]) -> None:
    """Have these MLPs call `kernels.swiglu`, through Megatron-Core's hook for what takes all of fc1's output.

    The hook is named for Transformer Engine's activations, which came first.
    """
    for mlp in mlps:
        mlp.config.bias_activation_fusion = False
        mlp.config.use_te_activation_func = True
        mlp.activation_func = swiglu


def _missing(device: torch.device, backend: str) -> str | None:
    if backend != "torch":
        return "model.backend=torch"
    if (missing := missing_cuda(device)) is not None:
        return missing
    return None if triton_installed() else "the triton package"
