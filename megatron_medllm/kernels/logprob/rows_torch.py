"""Row-wise passes over a chunk of logits, in plain torch: the twin of `rows_triton`, and what runs on a CPU.

Notation: z = logits, a GEMM's output.
"""

import torch
from torch import Tensor

from megatron_medllm.kernels.logprob.products import tiles

# Rows at a time: on a CPU 16 x 152,064 fp32 temporaries stay near the last-level cache; on CUDA launches cost more.
_ROWS = {"cpu": 16, "cuda": 256}


def row_stats(logits: Tensor, local_target: Tensor) -> Tensor:
    """What log-sum-exp and target pick need of one vocabulary shard.

    Args:
        logits: z [r, v], left as it is.
        local_target: [r] int64, column of the target; outside [0, v) where another shard holds it.

    Returns:
        [3, r] fp32: max of z, sum of exp(z - max), and z at the target (0 where it is not here).
    """
    stats = torch.empty(3, logits.shape[0], dtype=torch.float32, device=logits.device)
    here, column = _locate(local_target, logits.shape[1])
    for rows in tiles(logits.shape[0], _ROWS[logits.device.type]):
        z = logits[rows].float()
        largest = z.amax(-1)
        stats[0, rows] = largest
        stats[2, rows] = z.gather(1, column[rows, None])[:, 0] * here[rows]
        stats[1, rows] = torch.exp_(z - largest[:, None]).sum(-1)
    return stats


def logits_gradient(
    logits: Tensor,
    local_target: Tensor,
    *,
    lse: Tensor,
    grad_logprob: Tensor,
    grad_lse: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """d loss / d z, where loss depends on log p(target) and on the log-sum-exp of each row.

    It is g (1[target] - p) + g_lse p with p = exp(z - lse).

    Args:
        logits: z [r, v]; overwritten.
        local_target: [r] int64 as in `row_stats`.
        lse: [r] fp32, over the whole vocabulary.
        grad_logprob: g [r] fp32.
        grad_lse: [r] fp32.
        dtype: of the result.

    Returns:
        [r, v]; shares memory with `logits` where the dtype is the same.
    """
    here, column = _locate(local_target, logits.shape[1])
    result = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    on_target = (grad_logprob * here)[:, None]
    on_probability = (grad_lse - grad_logprob)[:, None]
    for rows in tiles(logits.shape[0], _ROWS[logits.device.type]):
        gradient = torch.sub(logits[rows].float(), lse[rows, None]).exp_().mul_(on_probability[rows])
        gradient.scatter_add_(1, column[rows, None], on_target[rows])
        result[rows] = gradient
    return result


def _locate(local_target: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """(is the target in this shard [r] bool, a column that may be read in any case [r])."""
    return (local_target >= 0) & (local_target < columns), local_target.clamp(0, columns - 1)
