"""fused_linear_logprob on one rank, torch backend, against float64 with the logits written out."""

import logging

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_medllm.errors import UserError
from megatron_medllm.kernels.logprob import fused_linear_logprob
from megatron_medllm.kernels.logprob.head import row_backend
from tests.worlds.head import HeadCase, make_case, relative_error


def run(case: HeadCase, **options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden leaf, weight leaf, log-probs, log-sum-exp)."""
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_(not options.get("frozen_weight", False))
    settings = {"chunk_tokens": 8, "valid_vocab": case.valid, "backend": "torch"} | options
    logprobs, lse = fused_linear_logprob(hidden, weight, case.target, **settings)
    return hidden, weight, logprobs, lse


@pytest.mark.parametrize("ignored", ["none", "some"])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_matches_float64(ignored, with_lse, frozen):
    case = make_case(ignored=ignored)
    expected, expected_lse, expected_dx, expected_dw = case.expect(with_lse=with_lse)
    hidden, weight, logprobs, lse = run(case, frozen_weight=frozen)
    loss = (logprobs * case.upstream).sum()
    if with_lse:
        loss = loss + (lse * case.upstream_lse).sum()
    loss.backward()
    assert logprobs.dtype == lse.dtype == torch.float32
    assert (logprobs - expected).abs().max() < 1e-5
    assert (lse - expected_lse).abs().max() < 1e-5
    assert relative_error(hidden.grad, expected_dx) < 1e-6
    if frozen:
        assert weight.grad is None
    else:
        assert relative_error(weight.grad, expected_dw) < 1e-6
        assert weight.grad[case.valid :].abs().max() == 0
    ignored_rows = case.target == -100
    assert logprobs[ignored_rows].abs().sum() == 0 and lse[ignored_rows].abs().sum() == 0
    assert hidden.grad[ignored_rows].abs().sum() == 0


def test_gradient_through_the_log_sum_exp_alone():
    case = make_case()
    hidden, weight, _, lse = run(case)
    (lse * case.upstream_lse).sum().backward()
    frozen_hidden, _, _, frozen_lse = run(case, frozen_weight=True)
    (frozen_lse * case.upstream_lse).sum().backward()
    full = case.hidden.double().requires_grad_()
    words = case.weight.double().requires_grad_()
    logits = full @ words[: case.valid].t()
    (torch.logsumexp(logits, -1) * (case.target != -100) * case.upstream_lse).sum().backward()
    assert relative_error(hidden.grad, full.grad) < 1e-6
    # the frozen mode takes it as the target word's row less d log p: two like numbers, a digit is lost
    assert relative_error(frozen_hidden.grad, full.grad) < 3e-6
    assert relative_error(weight.grad, words.grad) < 1e-6


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("ignored", ["none", "some"])
def test_uniform_mode_finds_the_factor(per_token, ignored):
    case = make_case(ignored=ignored)
    weights = torch.rand(len(case.target)) if per_token else torch.ones(len(case.target))
    hidden, weight, logprobs, lse = run(case, uniform_grad=weights if per_token else 1.0)
    assert not lse.requires_grad
    ((logprobs * weights).sum() * -3e-4).backward()
    scaled = HeadCase(**{**case.__dict__, "upstream": weights * -3e-4})
    expected, _, expected_dx, expected_dw = scaled.expect(with_lse=False)
    assert (logprobs - expected).abs().max() < 1e-5
    assert relative_error(hidden.grad, expected_dx) < 1e-6
    assert relative_error(weight.grad, expected_dw) < 1e-6


def test_uniform_mode_refuses_another_upstream():
    case = make_case()
    _, _, logprobs, _ = run(case, uniform_grad=1.0)
    with pytest.raises(RuntimeError, match="not proportional to uniform_grad"):
        (logprobs * case.upstream).sum().backward()


def test_uniform_mode_refuses_a_second_backward():
    _, _, logprobs, _ = run(make_case(), uniform_grad=1.0)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


@pytest.mark.parametrize("options", [{}, {"frozen_weight": True}, {"uniform_grad": 1.0}])
def test_all_rows_ignored(options):
    case = make_case(ignored="all")
    hidden, weight, logprobs, lse = run(case, **options)
    logprobs.sum().backward()
    assert logprobs.abs().sum() == 0 and lse.abs().sum() == 0
    assert hidden.grad.abs().sum() == 0
    if not options.get("frozen_weight"):
        assert weight.grad.abs().sum() == 0


@pytest.mark.parametrize("options", [{}, {"frozen_weight": True}, {"uniform_grad": 1.0}])
def test_bf16_is_as_good_as_its_rounding(options):
    case = make_case(dtype=torch.bfloat16, hidden=64, vocab=500)
    case = HeadCase(**{**case.__dict__, "upstream": torch.ones(len(case.target))})
    expected, expected_lse, expected_dx, expected_dw = case.expect(with_lse=False)
    hidden, weight, logprobs, lse = run(case, **options)
    logprobs.sum().backward()
    assert (logprobs - expected).abs().max() < 1e-5  # logits are summed and kept in fp32
    assert (lse - expected_lse).abs().max() < 1e-5
    assert hidden.grad.dtype == torch.bfloat16
    assert relative_error(hidden.grad, expected_dx) < 4e-3  # one or two roundings of 2^-9
    if weight.grad is not None:
        assert weight.grad.dtype == torch.bfloat16
        assert relative_error(weight.grad, expected_dw) < 4e-3


def test_bf16_logits_are_rounded_and_no_worse():
    case = make_case(hidden=64, vocab=500)
    expected = case.expect(with_lse=False)[0]
    _, _, logprobs, _ = run(case, logits_dtype=torch.bfloat16)
    error = (logprobs - expected).abs().max()
    assert 1e-4 < error < 0.1


def test_chunk_size_does_not_matter():
    case = make_case()
    results = []
    for chunk in (1, 7, 64, None):
        hidden, weight, logprobs, _ = run(case, chunk_tokens=chunk)
        (logprobs * case.upstream).sum().backward()
        results.append((logprobs, hidden.grad, weight.grad))
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)), 0)
        return result


@pytest.mark.parametrize("options", [{}, {"frozen_weight": True}, {"uniform_grad": 1.0}])
def test_no_logits_tensor_is_made(options):
    case = make_case(tokens=64, hidden=8, vocab=4000, padding=0, ignored="none")
    chunk_of_logits, weight_sized, all_logits = 4 * 4000, 4000 * 8, 64 * 4000
    with LargestTensor() as largest:
        _, _, logprobs, _ = run(case, chunk_tokens=4, **options)
        logprobs.sum().backward()
    assert largest.numbers <= max(chunk_of_logits, weight_sized) < all_logits / 4


def test_the_general_backward_on_a_cpu_makes_a_quarter_of_a_chunk_at_a_time():
    """Beside it stands d weight, which the forward pass does not have."""
    case = make_case(tokens=32, hidden=2, vocab=4000, padding=0, ignored="none")
    _, weight, logprobs, _ = run(case, chunk_tokens=8)
    with LargestTensor() as largest:
        logprobs.sum().backward()
    assert largest.numbers == 4000 * 2 == 8 * 4000 // 4
    assert weight.grad is not None


def test_ignored_rows_never_reach_the_head():
    case = make_case(tokens=64, hidden=8, vocab=4000, padding=0, ignored="none")
    case.target[3:] = -100
    with LargestTensor() as largest:
        _, _, logprobs, _ = run(case, chunk_tokens=64, frozen_weight=True)
        logprobs.sum().backward()
    assert largest.numbers == 4000 * 8  # the weight's transpose; the logits of three rows are 12,000


def test_scoring_keeps_nothing():
    case = make_case()
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    with torch.no_grad():
        logprobs, _ = fused_linear_logprob(hidden, weight, case.target, valid_vocab=case.valid)
    assert not logprobs.requires_grad
    torch.testing.assert_close(logprobs, case.expect(with_lse=False)[0].float(), rtol=0, atol=1e-5)


def test_hand_computed():
    """Two words, logits (0, ln 3): probabilities 1/4 and 3/4."""
    hidden = torch.tensor([[1.0986122886681098]], requires_grad=True)
    weight = torch.tensor([[0.0], [1.0]], requires_grad=True)
    logprobs, lse = fused_linear_logprob(hidden, weight, torch.tensor([0]))
    logprobs.sum().backward()
    assert logprobs.item() == pytest.approx(-1.3862943611198906, abs=1e-6)
    assert lse.item() == pytest.approx(1.3862943611198906, abs=1e-6)
    assert hidden.grad.item() == pytest.approx(-0.75, abs=1e-6)
    torch.testing.assert_close(weight.grad, torch.tensor([[0.75], [-0.75]]) * 1.0986122886681098)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.tensor([0, 203])}, r"target\[1\] is 203: outside the vocabulary of 203"),
        ({"target": torch.tensor([-1, 0])}, r"target\[0\] is -1"),
        ({"target": torch.tensor([0, 1], dtype=torch.int32)}, "must be int64"),
        ({"hidden": torch.zeros(2, 3)}, r"must be \[T, H\]"),
        ({"weight": torch.zeros(203, 24, dtype=torch.bfloat16)}, "must be the same"),
    ],
)
def test_refuses(change, message):
    arguments = {"hidden": torch.zeros(2, 24), "weight": torch.zeros(203, 24), "target": torch.tensor([0, 1])} | change
    with pytest.raises(ValueError, match=message):
        fused_linear_logprob(**arguments)


def test_backend_choice_is_logged_and_unknown_names_refused(caplog):
    row_backend.cache_clear()
    with caplog.at_level(logging.INFO):
        case = make_case()
        run(case)
        run(case)
    assert [record.message for record in caplog.records if "row passes" in record.message] == [
        "fused_linear_logprob: megatron_medllm.kernels.logprob.rows_torch row passes on cpu (asked for: torch)"
    ]
    with pytest.raises(UserError, match="expected auto, torch or triton"):
        run(case, backend="magic")
