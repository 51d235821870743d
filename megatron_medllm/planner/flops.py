"""Floating-point operations of a training step, by both conventions in use."""

from megatron_medllm.config.model import ModelShape
from megatron_medllm.planner.parameters import matmul_parameters
from megatron_medllm.planner.workload import Workload


def attention_flops_per_token(shape: ModelShape, length: float) -> float:
    """Forward FLOPs per token and layer of QK^T and PV over `length` keys, all of them (no causal mask)."""
    return 4.0 * length * shape.hidden_size


def model_flops_per_token(workload: Workload, *, causal: bool) -> float:
    """FLOPs that the model needs per trained token; recomputation is not counted.

    A trained matrix costs 6 per parameter (forward, input gradient, weight gradient), a frozen one 4. Attention costs
    three forwards. `causal` halves attention's work as flash kernels do; without it this is Megatron's convention,
    which counts the masked half too. Ours counts the unpadded vocabulary.
    """
    shape = workload.shape
    length = workload.mean_attended_length / (2 if causal else 1)
    attention = 3 * shape.num_layers * attention_flops_per_token(shape, length)
    return (4 if workload.frozen_base else 6) * matmul_parameters(shape) + attention


def packed_flops(workload: Workload, *, tokens: int, attended: int) -> float:
    """FLOPs of training on packed documents that attended to so many (query, key) pairs, masked ones left out."""
    shape = workload.shape
    attention = 3 * shape.num_layers * attention_flops_per_token(shape, attended)
    return (4 if workload.frozen_base else 6) * matmul_parameters(shape) * tokens + attention
