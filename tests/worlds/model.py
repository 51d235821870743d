"""A tiny fp32 model in the running one-process runtime, and packed streams for it."""

from typing import Any

import torch
from torch import Tensor

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig, ModelShape
from megatron_medllm.parallel.packed import PackedSequences, Segment

CPU = torch.device("cpu")


def build_tiny(shape: ModelShape, *, dtype: str = "float32", ffn_multiple: int | None = None, **built: Any) -> Any:
    """The unwrapped model with weights that depend on their names alone; `built` goes to `build_model`."""
    from megatron_medllm.models.gpt import build_model, unwrap
    from megatron_medllm.models.initialize import initialize_weights

    config = ModelConfig(shape=shape, dtype=dtype, init_std=0.1, ffn_multiple=ffn_multiple)
    chunks = build_model(config, LayoutConfig(), device=CPU, **built)
    initialize_weights(chunks, seed=1, tp_rank=0, tp_size=1)
    return unwrap(chunks[0])


def documents(*lengths: int) -> tuple[Segment, ...]:
    """Segments of that many tokens, one behind the other, none with a prefix."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return tuple(Segment(end - length, end) for end, length in zip(ends, lengths, strict=True))


def positions_of(segments: tuple[Segment, ...]) -> Tensor:
    """Positions that restart in every segment and go on after a prefix."""
    return torch.cat([torch.arange(s.prefix_length, s.length) for s in segments])


def run(model: Any, ids: Tensor, segments: tuple[Segment, ...], labels: Tensor | None = None) -> Any:
    """Logits [t, v] without labels; log-probs [t] and log-sum-exps [t] with labels."""
    positions = positions_of(segments)
    packed = PackedSequences.from_segments(segments, positions, backend="torch")
    output = model(
        ids[None], positions[None], None, labels=labels if labels is None else labels[None], packed_seq_params=packed
    )
    return output[0] if labels is None else output


def gradients(model: Any) -> dict[str, Tensor]:
    """Copies of all gradients; cleared on the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())
