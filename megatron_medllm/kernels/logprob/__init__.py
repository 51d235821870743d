"""The language-model head that never makes a logits tensor: log-probabilities of given tokens, and their gradients."""

from megatron_medllm.kernels.logprob.head import fused_linear_logprob

__all__ = ["fused_linear_logprob"]
