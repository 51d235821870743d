"""Preference losses on sequence log-probabilities: pure functions of policy, reference and lengths.

Notation: w the chosen and l the rejected response, |y| its number of tokens, r(y) = log pi(y|x) - log pi_ref(y|x),
m = r(w) - r(l) the margin. All tensors are [p] fp32, one entry a pair; every loss is per pair, so the caller's mean
over the global batch of pairs is the same in any layout and packing.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_medllm.config.train import RpoLossConfig


@dataclass(frozen=True)
class PairLogprobs:
    """What the policy and the reference think of a batch of pairs; all [p] fp32, sums over response tokens."""

    chosen: Tensor  # policy, tokens that count in the preference term
    rejected: Tensor
    chosen_full: Tensor  # policy, every token of the chosen response (the NLL)
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor  # |w|, tokens that count in the preference term
    rejected_tokens: Tensor  # |l|
    chosen_full_tokens: Tensor  # every token of the chosen response


def rpo_loss(pairs: PairLogprobs, config: RpoLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The preference term of `config.kind` plus alpha times the NLL of the chosen response.

    The default is IRPO (arXiv 2404.19733, equation 1): -log sigmoid(beta m) - alpha log pi(w|x) / |w|. Its DPO term
    sums over response tokens; only the NLL is divided by the pair's own length.

    Returns:
        loss [p], and detached metrics [p]: preference_loss, nll, accuracy, margin, chosen_reward, rejected_reward,
        chosen_logprob, rejected_logprob (policy), reference_chosen_logprob, reference_rejected_logprob, the four per
        token, kl (see below), chosen_tokens, rejected_tokens.

        `kl` estimates KL(policy || reference) on the pair's own tokens by the k3 estimator
        (Schulman, "Approximating KL Divergence", 2020) at sequence level, divided by the tokens.
    """
    preference = _preference_term(pairs, config)
    nll = -pairs.chosen_full / pairs.chosen_full_tokens
    loss = preference + config.alpha * nll
    chosen_reward = pairs.chosen - pairs.reference_chosen
    rejected_reward = pairs.rejected - pairs.reference_rejected
    margin = chosen_reward - rejected_reward
    tokens = pairs.chosen_tokens + pairs.rejected_tokens
    ratio = (-(chosen_reward + rejected_reward) / tokens).clamp(-20, 20)
    metrics = {
        "preference_loss": preference,
        "nll": nll,
        "accuracy": (margin > 0).float(),
        "margin": margin,
        "chosen_reward": config.beta * chosen_reward,
        "rejected_reward": config.beta * rejected_reward,
        "chosen_logprob": pairs.chosen,
        "rejected_logprob": pairs.rejected,
        "reference_chosen_logprob": pairs.reference_chosen,
        "reference_rejected_logprob": pairs.reference_rejected,
        "chosen_logprob_per_token": pairs.chosen / pairs.chosen_tokens,
        "rejected_logprob_per_token": pairs.rejected / pairs.rejected_tokens,
        "reference_chosen_logprob_per_token": pairs.reference_chosen / pairs.chosen_tokens,
        "reference_rejected_logprob_per_token": pairs.reference_rejected / pairs.rejected_tokens,
        "kl": torch.expm1(ratio) - ratio,
        "chosen_tokens": pairs.chosen_tokens.float(),
        "rejected_tokens": pairs.rejected_tokens.float(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def _preference_term(pairs: PairLogprobs, config: RpoLossConfig) -> Tensor:
    """Loss [p] of the preference term alone."""
    beta = config.beta
    chosen = pairs.chosen - pairs.reference_chosen
    rejected = pairs.rejected - pairs.reference_rejected
    margin = chosen - rejected
    match config.kind:
        case "rpo":  # DPO, arXiv 2305.18290, equation 7
            return -F.logsigmoid(beta * margin)
        case "dpo_norm":  # length-normalised DPO, Tulu 3, arXiv 2411.15124, equation 6
            return -F.logsigmoid(beta * (chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens))
        case "cdpo":  # Mitchell, "A note on DPO with noisy preferences", equation 3
            smoothing = config.label_smoothing
            return -(1 - smoothing) * F.logsigmoid(beta * margin) - smoothing * F.logsigmoid(-beta * margin)
        case "hinge":  # SLiC-HF, arXiv 2305.10425, with DPO's reward, arXiv 2309.06657
            return torch.relu(1 - beta * margin)
        case "ipo":  # arXiv 2310.12036, equation 17, on per-token means as TRL has it
            average = chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens
            return (average - 1 / (2 * beta)).square()
        case "dpop":  # arXiv 2402.13228, equation 3
            return -F.logsigmoid(beta * (margin - config.dpop_lambda * torch.relu(-chosen)))
        case "simpo":  # arXiv 2405.14734, equation 6; no reference
            average = pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens
            return -F.logsigmoid(beta * average - config.simpo_gamma)
        case "sft":  # the NLL alone
            return torch.zeros_like(margin)
