"""The rotation in plain torch: the twin of `rope_triton`, and what runs on a CPU."""

import torch
from torch import Tensor


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """As `megatron_medllm.kernels.rope.rotate`, without a gradient."""
    first, second = x.float().chunk(2, dim=-1)  # [t, n, hn/2]
    c, s = cosines[:, None], sines[:, None]
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)
