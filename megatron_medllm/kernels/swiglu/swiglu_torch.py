"""SwiGLU in plain torch: the twin of `swiglu_triton`, and what runs on a CPU."""

import torch
from torch import Tensor


def forward(gate_up: Tensor) -> Tensor:
    """[t, 2f] -> [t, f], as `megatron_medllm.kernels.swiglu.swiglu`, without a gradient."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


def backward(gate_up: Tensor, dy: Tensor) -> Tensor:
    """The gradient of `gate_up`, [t, 2f], from that of the result, [t, f]."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    dy, sigmoid = _wide(dy), gate.sigmoid()
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((d_gate, dy * gate * sigmoid), dim=-1).to(gate_up.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
