"""YaRN (arXiv 2309.00071, sections 3.2 to 3.4): the frequencies of a context stretched by `factor`."""

import math

import torch
from torch import Tensor

from megatron_medllm.config.rope import Yarn


def yarn_frequencies(yarn: Yarn, *, width: int, base: float) -> tuple[Tensor, float]:
    """What `rotation_angles` takes: inverse frequencies [width/2] in fp32, on the CPU, and the factor.

    A dimension that turns more than `beta_fast` times within the context before keeps its frequency; one that turns
    less than `beta_slow` times is slowed down by `factor`; a ramp lies between. In transformers' order of operations,
    so that the numbers are the same to the last bit.

    Args:
        yarn: the settings.
        width: of a head.
        base: of RoPE.
    """
    low, high = (
        width * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (yarn.beta_fast or 32, yarn.beta_slow or 1)
    )
    if yarn.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    steps = torch.arange(width // 2, dtype=torch.float32, device="cpu")
    ramp = ((steps - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    powers = base ** (torch.arange(0, width, 2, device="cpu").float() / width)
    kept = 1 - ramp
    frequencies = 1 / (yarn.factor * powers) * (1 - kept) + 1 / powers * kept
    return frequencies, attention_factor(yarn)


def attention_factor(yarn: Yarn) -> float:
    """What cosines and sines are multiplied by."""
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _concentration(yarn.factor, yarn.mscale) / _concentration(yarn.factor, yarn.mscale_all_dim)
    return _concentration(yarn.factor, 1.0)


def _concentration(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0
