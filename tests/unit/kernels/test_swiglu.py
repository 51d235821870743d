"""SwiGLU: literal values, autograd's gradient of the plain formula, and what is kept."""

import pytest
import torch
import torch.nn.functional as F

from megatron_medllm.kernels.swiglu import swiglu
from tests.worlds.head import relative_error


def test_literal_values():
    x = torch.tensor([[0.0, 1.0, -2.0, 3.0, 5.0, 2.0]], requires_grad=True)  # gate 0, 1, -2; up 3, 5, 2
    y = swiglu(x)
    y.backward(torch.tensor([[1.0, 2.0, -1.0]]))
    assert y.detach()[0].tolist() == pytest.approx([0.0, 3.6552929, -0.4768117], rel=1e-6)
    d_gate = [1.5, 9.2767051, 0.1815685]  # dy * up * (s + gate * s * (1 - s))
    d_up = [0.0, 1.4621172, 0.2384058]  # dy * silu(gate)
    assert x.grad[0].tolist() == pytest.approx(d_gate + d_up, rel=1e-6)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
@pytest.mark.parametrize("shape", [(5, 14), (1, 2), (7, 1, 6), (0, 1, 8)])
def test_against_autograd(shape, dtype, limit):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 4).to(dtype).requires_grad_()
    dy = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).to(dtype)
    y = swiglu(x)
    assert y.dtype == dtype and y.shape == dy.shape
    exact = x.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    (ours,) = torch.autograd.grad(y, x, dy)
    (theirs,) = torch.autograd.grad(expected, exact, dy.double())
    assert ours.dtype == dtype and ours.shape == x.shape
    if len(x):
        assert relative_error(y.detach(), expected.detach()) < limit
        assert relative_error(ours, theirs) < limit


def test_gate_and_up_alone_are_kept():
    kept = []
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        swiglu(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_far_out_numbers_stay_finite():
    x = torch.tensor([[-1e4, 1e4, -90.0, 1.0, 1.0, 1.0]], requires_grad=True)
    y = swiglu(x)
    y.sum().backward()
    assert y.detach()[0].tolist() == pytest.approx([0.0, 1e4, 0.0], abs=1e-30)
    assert x.grad[0].tolist() == pytest.approx([0.0, 1.0, 0.0, 0.0, 1e4, 0.0], abs=1e-30)
