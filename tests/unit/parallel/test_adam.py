"""Our FusedAdam against torch's own, and what a resume needs of it."""

import pytest
import torch

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


def narrow(leaves: Leaves, **changes: float) -> FusedAdam:
    optimizer = FusedAdam(leaves.parameters(), **(SETTINGS | changes))
    optimizer.moments_dtype = torch.bfloat16
    return optimizer


def test_bf16_moments_follow_the_fp32_ones():
    wide, leaves = Leaves(), Leaves()
    updates(FusedAdam(wide.parameters(), **SETTINGS), wide, range(30))
    optimizer = narrow(leaves)
    updates(optimizer, leaves, range(30))
    assert {m.dtype for state in optimizer.state.values() for m in state.values()} == {torch.bfloat16}
    moved = (wide.a - Leaves().a).abs().max()
    assert 0 < (leaves.a - wide.a).abs().max() < 0.02 * moved


def test_bf16_moments_go_on_bitwise():
    whole, first, second = Leaves(), Leaves(), Leaves()
    updates(narrow(whole), whole, range(6))
    optimizer = narrow(first)
    updates(optimizer, first, range(3))
    second.load_state_dict(first.state_dict())
    resumed = narrow(second)
    resumed.load_state_dict(optimizer.state_dict())
    assert {m.dtype for state in resumed.state.values() for m in state.values()} == {torch.bfloat16}
    updates(resumed, second, range(3, 6))
    assert torch.equal(second.a, whole.a) and torch.equal(second.b, whole.b)


def test_bf16_moments_of_many_parts_are_those_of_one(monkeypatch: pytest.MonkeyPatch):
    """Parts draw other bits, but every number is updated once: without gradients' noise both fall alike."""
    from megatron_medllm.parallel import moments

    monkeypatch.setattr(moments, "PART", 4)
    parts, wide = Leaves(), Leaves()
    updates(narrow(parts), parts, range(5))
    updates(FusedAdam(wide.parameters(), **SETTINGS), wide, range(5))
    torch.testing.assert_close(parts.a, wide.a, rtol=0.01, atol=5e-4)


def test_a_second_moment_in_bf16_goes_on_falling():
    """Rounded to nearest it would stay: beta2 = 0.999 takes a thousandth off, a step of bf16 is at least four."""
    leaf = torch.nn.Parameter(torch.zeros(4096))
    optimizer = FusedAdam([leaf], lr=0.0, betas=(0.9, 0.999))
    optimizer.moments_dtype = torch.bfloat16
    leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    start = optimizer.state[leaf]["exp_avg_sq"].float().mean()
    leaf.grad = torch.zeros_like(leaf)
    for _ in range(1000):
        optimizer.step()
    fallen = optimizer.state[leaf]["exp_avg_sq"].float().mean() / start
    assert abs(fallen - 0.999**1000) < 0.01


def test_rounding_is_right_on_average_and_exact_on_bf16s_own_numbers():
    from megatron_medllm.parallel.moments import round_stochastically_

    generator = torch.Generator().manual_seed(0)
    value = 1 + 0.3 * 2**-7  # three tenths of the way between two of bf16's numbers
    rounded = round_stochastically_(torch.full((100_000,), value), generator)
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert abs(float(rounded.mean()) - value) < 0.01 * 2**-7
    own = torch.tensor([0.0, -2.5, 1.0, float("inf"), -float("inf"), 2.0**-130])
    assert torch.equal(round_stochastically_(own.clone(), generator), own)
