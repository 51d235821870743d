"""Adam with moments held in bf16: half the memory, widened and rounded again part by part.

Rounding is stochastic: a number between two of bf16 becomes either, the nearer one more often, and is right on average.
Rounded to nearest, a second moment would stop falling: beta2 = 0.999 takes a thousandth off it, and bf16's steps are
four to eight thousandths. The random bits depend on the step alone, so that a run goes on bitwise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Numbers widened at once: 4 tensors of 128 MiB beside the optimizer's state.
PART = 2**25


def update_narrow(
    update: Callable[..., None],
    params: list[Tensor],
    moments: list[tuple[Tensor, Tensor]],
    *,
    step: Tensor,
    seed: int,
    **settings: Any,
) -> None:
    """One step of torch's fused Adam on fp32 parameters with bf16 moments.

    Args:
        update: `torch._fused_adamw_` or `torch._fused_adam_`.
        params: fp32, contiguous, with fp32 gradients.
        moments: first and second of each, bf16, of its shape.
        step: number of this step, a scalar on the parameters' device.
        seed: of the rounding; the step's number.
        settings: the update's own.
    """
    if not params:
        return
    generator = torch.Generator(params[0].device).manual_seed(seed)
    for param, pair in zip(params, moments, strict=True):
        assert param.grad is not None
        flat = [tensor.view(-1).split(PART) for tensor in (param, param.grad, *pair)]
        for weight, gradient, *narrow in zip(*flat, strict=True):
            first, second = (moment.float() for moment in narrow)
            update([weight], [gradient], [first], [second], [], [step], **settings)
            for moment, wide in zip(narrow, (first, second), strict=True):
                moment.copy_(round_stochastically_(wide, generator))


def round_stochastically_(wide: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 in place to values of bf16, up with a probability of the part cut off. Infinities stay."""
    bits = wide.view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << 16, generator=generator)
    bits.add_(noise).bitwise_and_(-(1 << 16))
    return wide
