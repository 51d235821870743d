"""From log-probabilities per token to sums per response."""

import numpy as np
import torch
from torch import Tensor

from megatron_medllm.data.pair_streams import PairMicroBatch
from megatron_medllm.parallel.context import sum_over_context
from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.parallel.staging import to_device


def sum_by_response(
    token_logprobs: Tensor, micro_batch: PairMicroBatch, ranks: Runtime, *, ahead: bool = False
) -> dict[str, Tensor]:
    """Sum token log-probabilities over each response: `PairLogprobs`' policy fields and lengths, [p] each.

    Args:
        token_logprobs: [t/cp], of this rank's tokens.
        micro_batch: the whole stream.
        ranks: where this process stands; every context-parallel rank gets the sums over all of them.
        ahead: never wait for the device.
    """
    device, split = token_logprobs.device, ranks.split
    own = split.take(micro_batch.response)
    at = np.flatnonzero(own >= 0)
    counts = [_count(micro_batch, weights) for weights in (None, micro_batch.preferred)]
    labelled, slots, preferred, full_tokens, scored_tokens = to_device(
        [at, own[at], split.take(micro_batch.preferred)[at], *counts], device, ahead=ahead
    )
    values = token_logprobs[labelled]
    full, scored = (
        torch.zeros(2 * len(micro_batch.rows), device=device).index_add(0, slots, what.float())
        for what in (values, values * preferred)
    )
    if split.size > 1 and micro_batch.rows:
        full, scored = sum_over_context(torch.stack((full, scored)), ranks.cp_group)
    scored, full = scored.view(-1, 2), full.view(-1, 2)
    return {
        "chosen": scored[:, 0],
        "rejected": scored[:, 1],
        "chosen_full": full[:, 0],
        "chosen_tokens": scored_tokens[:, 0].clamp(min=1),
        "rejected_tokens": scored_tokens[:, 1].clamp(min=1),
        "chosen_full_tokens": full_tokens[:, 0],
    }


def _count(micro_batch: PairMicroBatch, weights: np.ndarray | None) -> np.ndarray:
    """Tokens [p, 2] fp32 of every response."""
    labelled = micro_batch.response >= 0
    weights = None if weights is None else weights[labelled]
    counts = np.bincount(micro_batch.response[labelled], weights, minlength=2 * len(micro_batch.rows))
    return counts.astype(np.float32).reshape(-1, 2)
