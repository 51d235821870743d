"""Our FusedAdam against torch's own, and what a resume needs of it."""

import pytest
import torch

from megatron_medllm.config.train import OptimizerConfig
from megatron_medllm.errors import UserError
from megatron_medllm.parallel.adam import FusedAdam


class Leaves(torch.nn.Module):
    """Two parameters, one of which has no gradient for a while."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = torch.nn.Parameter(torch.randn(5, 3, generator=generator))
        self.b = torch.nn.Parameter(torch.randn(4, generator=generator))


def updates(optimizer: torch.optim.Optimizer, leaves: Leaves, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        leaves.a.grad = torch.randn(5, 3, generator=generator)
        leaves.b.grad = torch.randn(4, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()


SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize(("decoupled", "peer"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_fused_adam_is_torchs(decoupled: bool, peer: type[torch.optim.Optimizer]):
    ours, theirs = Leaves(), Leaves()
    updates(FusedAdam(ours.parameters(), adam_w_mode=decoupled, **SETTINGS), ours, range(10))
    updates(peer(theirs.parameters(), **SETTINGS), theirs, range(10))
    assert (ours.a - Leaves().a).abs().max() > 1e-2
    torch.testing.assert_close(ours.a, theirs.a, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.b, theirs.b, rtol=1e-6, atol=1e-7)


def test_fused_adam_goes_on_from_its_state_bitwise():
    whole, first = Leaves(), Leaves()
    updates(FusedAdam(whole.parameters(), **SETTINGS), whole, range(6))
    optimizer = FusedAdam(first.parameters(), **SETTINGS)
    updates(optimizer, first, range(3))
    assert optimizer.param_groups[0]["step"] == 3  # in the group, where the distributed optimizer looks for it
    second = Leaves()
    second.load_state_dict(first.state_dict())
    resumed = FusedAdam(second.parameters(), **SETTINGS)
    resumed.load_state_dict(optimizer.state_dict())
    updates(resumed, second, range(3, 6))
    assert torch.equal(second.a, whole.a) and torch.equal(second.b, whole.b)


def test_fused_adam_has_no_other_modes():
    with pytest.raises(ValueError, match="bias correction"):
        FusedAdam(Leaves().parameters(), bias_correction=False)


def test_bf16_moments_need_the_fused_optimizer():
    from megatron_medllm.parallel.mcore import moments_dtype

    full, half = OptimizerConfig(lr=1.0), OptimizerConfig(lr=1.0, moments_dtype="bfloat16")
    assert moments_dtype(full, fused=False) is moments_dtype(full, fused=True) is torch.float32
    assert moments_dtype(half, fused=True) is torch.bfloat16
    with pytest.raises(UserError, match="bfloat16 needs Transformer Engine and CUDA"):
        moments_dtype(half, fused=False)
