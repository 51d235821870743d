"""An MLP that keeps gate and up for the backward pass, and not what SwiGLU makes of them.

The layer behind keeps its input for a weight's gradient, LoRA's A among them. That input is a cheap function of gate
and up, which are kept anyway: its storage is given back after the forward pass and filled again when the gradient
arrives.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.mlp import MLP
from torch import Tensor


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
