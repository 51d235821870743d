"""Random starting weights that are the same in every layout."""

import hashlib
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_medllm.models.gpt import PackedGPTModel
from megatron_medllm.models.materialize import Fill, fill_parameters


def initialize_weights(
    chunks: list[nn.Module], *, seed: int, tp_rank: int, tp_size: int, device: torch.device | None = None
) -> None:
    """Fill with random weights that depend on the seed and the parameter's global name only, not on the layout.

    Normal with the configured standard deviation; the two projections into the residual stream are scaled by
    1/sqrt(2*layers), as Megatron does (GPT-2, section 2.3). Norm weights are 1, biases 0, padding is 0.

    Args:
        chunks: this rank's model chunks.
        seed: of the draws.
        tp_rank: this rank within its tensor-parallel group.
        tp_size: size of that group.
        device: draws the numbers (7B on one core: 80 s; CPU and GPU draw different ones). Default: the parameter's.
    """
    fill_parameters(chunks, random_values(seed=seed, tp_rank=tp_rank, tp_size=tp_size, device=device))


def random_values(*, seed: int, tp_rank: int, tp_size: int, device: torch.device | None = None) -> Fill:
    """Fills one parameter; arguments as in `initialize_weights`."""

    def fill(chunk: PackedGPTModel, name: str, parameter: nn.Parameter) -> None:
        if name.endswith("bias"):
            parameter.zero_()
        elif "layernorm" in name or name.endswith("layer_norm_weight"):  # the latter are TE's, fused into linears
            parameter.fill_(1.0)
        else:
            draw = _draw(chunk, name, seed=seed, device=device or parameter.device)
            parameter.copy_(_random_slice(chunk, name, parameter, draw, tp_rank=tp_rank, tp_size=tp_size))

    return fill


def _draw(chunk: PackedGPTModel, name: str, *, seed: int, device: torch.device) -> Callable[..., Tensor]:
    """Standard normal numbers in a given shape, the same for a parameter's name on every rank."""
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        name = "embedding.word_embeddings.weight"
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(key[:7], "little"))
    return partial(torch.randn, generator=generator, device=device)


def _random_slice(
    chunk: PackedGPTModel, name: str, parameter: Tensor, draw: Callable[..., Tensor], *, tp_rank: int, tp_size: int
) -> Tensor:
    config, shape = chunk.config, chunk.shape
    std = config.init_method_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * shape.num_layers)
    rows, columns = parameter.shape
    # In place: an embedding's numbers in fp32 are 5 GB at 72B, and each copy as much. Padding depends on the layout, so
    # it is not drawn.
    ffn_padding = config.ffn_hidden_size - shape.ffn_hidden_size
    if name.endswith("linear_proj.weight"):  # row-parallel: split over columns
        return draw(rows, columns * tp_size).chunk(tp_size, dim=1)[tp_rank].mul_(std)
    if name.endswith("linear_fc2.weight"):
        full = _padded(draw(rows, shape.ffn_hidden_size), (0, ffn_padding))
        return full.chunk(tp_size, dim=1)[tp_rank].mul_(std)
    if name.endswith("linear_fc1.weight"):  # gate and up are padded and split each on its own
        full = _padded(draw(2, shape.ffn_hidden_size, columns), (0, 0, 0, ffn_padding))
        return full.chunk(tp_size, dim=1)[tp_rank].flatten(0, 1).mul_(std)
    if "word_embeddings" in name or "output_layer" in name:
        full = _padded(draw(shape.vocab_size, columns), (0, 0, 0, rows * tp_size - shape.vocab_size))
        return full.chunk(tp_size)[tp_rank].mul_(std)
    return draw(rows * tp_size, columns).chunk(tp_size)[tp_rank].mul_(std)


def _padded(drawn: Tensor, padding: tuple[int, ...]) -> Tensor:
    return F.pad(drawn, padding) if any(padding) else drawn
