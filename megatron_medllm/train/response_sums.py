"""From log-probabilities per token to sums per response."""

import numpy as np
import torch
from torch import Tensor

from megatron_medllm.data.pairs import PairMicroBatch


def sum_by_response(token_logprobs: Tensor, micro_batch: PairMicroBatch) -> dict[str, Tensor]:
    """Sum token log-probabilities [t] over each response: `PairLogprobs`' policy fields and lengths, [p] each."""
    device = token_logprobs.device
    labelled = torch.from_numpy(np.flatnonzero(micro_batch.response >= 0)).to(device)
    slots = torch.from_numpy(micro_batch.response).to(device)[labelled]
    preferred = torch.from_numpy(micro_batch.preferred).to(device)[labelled]
    values = token_logprobs[labelled]

    def total(what: Tensor) -> Tensor:
        sums = torch.zeros(2 * len(micro_batch.rows), device=device)
        return sums.index_add(0, slots, what.float()).view(-1, 2)

    scored, full = total(values * preferred), total(values)
    scored_tokens, full_tokens = total(preferred), total(torch.ones_like(values))
    return {
        "chosen": scored[:, 0],
        "rejected": scored[:, 1],
        "chosen_full": full[:, 0],
        "chosen_tokens": scored_tokens[:, 0].clamp(min=1),
        "rejected_tokens": scored_tokens[:, 1].clamp(min=1),
        "chosen_full_tokens": full_tokens[:, 0],
    }
