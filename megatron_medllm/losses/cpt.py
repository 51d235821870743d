"""The language-model loss of continued pretraining."""

import torch
from torch import Tensor


def cpt_loss(token_logprobs: Tensor, log_sum_exp: Tensor, counted: Tensor, *, z_loss: float) -> Tensor:
    """Sum over counted tokens of -log p + z_loss * (log Z)^2 (PaLM, arXiv 2204.02311, section 5).

    It is a sum: the schedule divides the gradients by the number of counted tokens of the whole global batch, so the
    loss is the token mean whatever the micro-batch, the data-parallel size or the packing.

    Args:
        token_logprobs: [t] fp32, log-probability of each target.
        log_sum_exp: [t] fp32, log Z of each row.
        counted: tokens that are predicted: [t] bool, or their indices, int64. On CUDA a mask makes the host wait.
        z_loss: coefficient; 0 leaves the second term out.

    Returns:
        scalar fp32.
    """
    loss = -_select(token_logprobs, counted).sum()
    if z_loss:
        loss = loss + z_loss * _select(log_sum_exp, counted).square().sum()
    return loss


def _select(values: Tensor, counted: Tensor) -> Tensor:
    return values[counted] if counted.dtype is torch.bool else values.index_select(0, counted)
