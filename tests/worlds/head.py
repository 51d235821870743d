"""The head written out in float64, and one comparison that every backend and mode is put through."""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class HeadCase:
    """Inputs of a head, and what float64 says of its results; `valid` < rows of weight means padding."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    upstream: Tensor
    upstream_lse: Tensor
    valid: int

    def expect(self, *, with_lse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log-probs, log-sum-exp, d hidden, d weight) in float64, logits made in full."""
        hidden = self.hidden.double().requires_grad_()
        weight = self.weight.double().requires_grad_()
        logits = hidden @ weight[: self.valid].t()
        counted = self.target != IGNORED
        lse = torch.logsumexp(logits, -1) * counted
        picked = torch.log_softmax(logits, -1).gather(1, self.target.clamp_min(0)[:, None])[:, 0] * counted
        loss = (picked * self.upstream.double()).sum()
        if with_lse:
            loss = loss + (lse * self.upstream_lse.double()).sum()
        loss.backward()
        return picked.detach(), lse.detach(), hidden.grad, weight.grad


def make_case(
    *,
    tokens: int = 37,
    hidden: int = 24,
    vocab: int = 203,
    padding: int = 5,
    dtype: torch.dtype = torch.float32,
    ignored: str = "some",
    seed: int = 0,
) -> HeadCase:
    """A case with targets on the first and the last real word, and with the rows that `ignored` names left out."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    target[1], target[2] = vocab - 1, 0
    if ignored == "some":
        target[::5] = IGNORED
    elif ignored == "all":
        target[:] = IGNORED
    return HeadCase(
        hidden=torch.randn(tokens, hidden, generator=generator).to(dtype),
        weight=(torch.randn(vocab + padding, hidden, generator=generator) * 0.5).to(dtype),
        target=target,
        upstream=torch.randn(tokens, generator=generator),
        upstream_lse=torch.randn(tokens, generator=generator),
        valid=vocab,
    )


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected` (which may be 0 if the difference is)."""
    difference = (value.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if float(difference) else 0.0
