"""Floating-point operations of a training step, by both conventions in use."""

from megatron_medllm.config.model import ModelShape
from megatron_medllm.planner.parameters import matmul_parameters
from megatron_medllm.planner.workload import Workload


def attention_flops_per_token(shape: ModelShape, length: float) -> float:
    """Forward FLOPs per token and layer of QK^T and PV over `length` keys, all of them (no causal mask)."""
    return 4.0 * length * shape.query_width


def model_flops_per_token(workload: Workload, *, causal: bool, forward_only: bool = False) -> float:
    """FLOPs that the model needs per token, trained or (`forward_only`) scored; recomputation is not counted.

    A trained matrix costs 6 per parameter (forward, input gradient, weight gradient), a frozen one 4, a forward pass 2.
    Attention costs three forwards in training. `causal` halves attention's work as flash kernels do; without it this is
    Megatron's convention, which counts the masked half too. Ours counts the unpadded vocabulary.
    """
    length = workload.mean_attended_length / (2 if causal else 1)
    return packed_flops(workload, tokens=1, attended=length, forward_only=forward_only)


def packed_flops(workload: Workload, *, tokens: int, attended: float, forward_only: bool = False) -> float:
    """FLOPs on packed documents whose tokens attended to so many (query, key) pairs, masked ones left out."""
    shape = workload.shape
    attention = shape.num_layers * attention_flops_per_token(shape, attended)
    if forward_only:
        return 2 * matmul_parameters(shape) * tokens + attention
    return (4 if workload.frozen_base else 6) * matmul_parameters(shape) * tokens + 3 * attention
