"""Every Triton kernel in the interpreter, against its torch twin. Run by test_triton_interpreted.py in a process of
its own: TRITON_INTERPRET must be set before triton is imported, and would turn every other kernel's launch too."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_medllm.kernels.fp8 import (
    BlockScaled,
    quantize_activation,
    quantize_weight,
    transpose_fp8,
)
from megatron_medllm.kernels.logprob import fused_linear_logprob, rows_torch, rows_triton
from megatron_medllm.kernels.rope import rope_torch, rope_triton, rotation_angles
from megatron_medllm.kernels.swiglu import swiglu_torch, swiglu_triton
from tests.unit.kernels.interpreter import cast_like_gpu, repair_casts
from tests.worlds.head import HeadCase, make_case, relative_error

repair_casts()


@triton.jit
def cast_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes, mask=lanes < n, other=0.0)
    tl.store(out_ptr + lanes, x.to(out_ptr.dtype.element_ty), mask=lanes < n)


def every_bf16() -> Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def fp32_samples() -> Tensor:
    """Random bit patterns, and every e4m3 value with its rounding borders from both sides."""
    bits = torch.randint(-(2**31), 2**31, (2**15,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    random = bits.to(torch.int32).view(torch.float32)
    values = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    borders = (values[1:] + values[:-1]) / 2
    near = torch.cat([values, borders, borders.nextafter(torch.tensor(9e9)), borders.nextafter(torch.tensor(-9e9))])
    return torch.cat([random, near, -near, torch.tensor([0.0, -0.0, 449.0, 464.0, 465.0, 1e30, float("inf")])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_from_fp32_are_torchs_byte_for_byte(dtype):
    x = fp32_samples()
    x = x[~x.isnan()]
    out = torch.empty(len(x), dtype=dtype)
    cast_kernel[(1,)](x, out, len(x), BLOCK=triton.next_power_of_2(len(x)))
    assert torch.equal(out.view(torch.uint8), cast_like_gpu(x, dtype).view(torch.uint8))


def test_every_bf16_reaches_fp32_and_comes_back():
    x = every_bf16()
    wide = torch.empty(len(x), dtype=torch.float32)
    cast_kernel[(1,)](x, wide, len(x), BLOCK=2**16)
    assert torch.equal(wide.view(torch.int32), x.float().view(torch.int32))
    back = torch.empty(len(x), dtype=torch.bfloat16)
    cast_kernel[(1,)](wide, back, len(x), BLOCK=2**16)
    finite = ~x.isnan()
    assert torch.equal(back[finite].view(torch.int16), x[finite].view(torch.int16))


def same_bytes(a: BlockScaled, b: BlockScaled) -> bool:
    layout = a.scales.stride() == b.scales.stride() or a.scales.shape[1] == 1
    return (
        layout
        and torch.equal(a.scales, b.scales)
        and torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8))
    )


def activations(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of very unlike size, an outlier column, and a block of zeros."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns, generator=generator) * torch.exp(3 * torch.randn(rows, 1, generator=generator))
    x[:, 3] *= 1000
    x[0, :128] = 0
    return x.to(dtype)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(70, 384), (128, 256), (3, 200)])
def test_quantize_activation(rows, width, columns, power_of_two):
    x = activations(rows, width)
    ours = quantize_activation(x, columns=columns, power_of_two=power_of_two, backend="triton")
    twin = quantize_activation(x, columns=columns, power_of_two=power_of_two, backend="torch")
    assert same_bytes(ours[0], twin[0])
    assert (ours[1] is None) == (twin[1] is None)
    if ours[1] is not None:
        assert same_bytes(ours[1], twin[1])


def test_quantize_a_view_with_strides():
    x = activations(40, 512)[:, 128:384]
    assert same_bytes(quantize_activation(x, backend="triton")[0], quantize_activation(x, backend="torch")[0])
    turned = activations(128, 40).t()
    assert same_bytes(quantize_activation(turned, backend="triton")[0], quantize_activation(turned, backend="torch")[0])


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(300, 384), (128, 130), (5, 7)])
def test_quantize_and_transpose_weight(rows, width, power_of_two):
    weight = activations(rows, width, torch.float32)
    ours = quantize_weight(weight, power_of_two=power_of_two, backend="triton")
    twin = quantize_weight(weight, power_of_two=power_of_two, backend="torch")
    assert same_bytes(ours, twin)
    assert same_bytes(transpose_fp8(ours, backend="triton"), transpose_fp8(twin, backend="torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_passes(dtype):
    generator = torch.Generator().manual_seed(3)
    rows, columns = 5, 9001  # three blocks, the last one short
    z = (torch.randn(rows, columns, generator=generator) * 4).to(dtype)
    target = torch.tensor([0, columns - 1, 4096, -3, columns])  # the last two lie on other shards
    stats, twin = rows_triton.row_stats(z, target), rows_torch.row_stats(z, target)
    torch.testing.assert_close(stats, twin, rtol=2e-6, atol=2e-6)
    lse = twin[0] + twin[1].log()
    gradients = {
        "lse": lse,
        "grad_logprob": torch.randn(rows, generator=generator),
        "grad_lse": torch.randn(rows, generator=generator),
        "dtype": dtype,
    }
    ours = rows_triton.logits_gradient(z.clone(), target, **gradients)
    expected = rows_torch.logits_gradient(z.clone(), target, **gradients)
    assert ours.dtype == dtype
    assert relative_error(ours, expected) < (2e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("mode", ["general", "frozen", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_against_float64(mode, dtype):
    case = make_case(dtype=dtype, vocab=500, tokens=19)
    if mode == "uniform":
        case = HeadCase(**{**case.__dict__, "upstream": torch.ones(19)})
    expected, expected_lse, expected_dx, expected_dw = case.expect(with_lse=False)
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_(mode != "frozen")
    logprobs, lse = fused_linear_logprob(
        hidden,
        weight,
        case.target,
        valid_vocab=case.valid,
        chunk_tokens=8,
        uniform_grad=1.0 if mode == "uniform" else None,
        backend="triton",
    )
    (logprobs * case.upstream).sum().backward()
    assert (logprobs - expected).abs().max() < 1e-5
    assert (lse - expected_lse).abs().max() < 1e-5
    limit = 2e-6 if dtype == torch.float32 else 4e-3
    assert relative_error(hidden.grad, expected_dx) < limit
    if mode != "frozen":
        assert relative_error(weight.grad, expected_dw) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(28, 128), (3, 64), (2, 6)])
def test_the_rotation_equals_its_twin(heads, width, dtype):
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(17, heads, 3 * width, generator=generator).to(dtype)
    x = groups[..., width : 2 * width]  # as keys lie in Megatron's grouped qkv
    angles = rotation_angles(torch.arange(17) * 1000, 1e6 ** (-torch.arange(0, width, 2) / width))
    ours, twin = rope_triton.rotated(x, *angles), rope_torch.rotated(x, *angles)
    assert ours.is_contiguous()
    assert relative_error(ours, twin) < (1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(3, 2368), (1, 1024), (5, 7), (2, 1), (0, 8)])
def test_swiglu_equals_its_twin(tokens, width, dtype):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(tokens, 2 * width, generator=generator).mul(4).to(dtype)
    dy = torch.randn(tokens, width, generator=generator).to(dtype)
    limit = 1e-6 if dtype == torch.float32 else 2e-3
    for ours, twin in (
        (swiglu_triton.forward(x), swiglu_torch.forward(x)),
        (swiglu_triton.backward(x, dy), swiglu_torch.backward(x, dy)),
    ):
        assert ours.shape == twin.shape and ours.dtype == dtype and ours.is_contiguous()
        assert not tokens or relative_error(ours, twin) < limit


def test_swiglu_of_rows_that_lie_far_apart():
    """Strides beyond 32 bits, where virtual memory is untouched; a column stride other than one; one dy for all."""
    memory = torch.empty(2**32, dtype=torch.uint8).view(torch.bfloat16)
    x = memory.as_strided((2, 12), (2**31 - 16, 1))
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(2, 12, generator=generator).bfloat16()
    x.copy_(dense)
    row = torch.randn(1, 6, generator=generator).bfloat16()
    for gate_up, dy in ((x, row.expand(2, 6)), (dense.t().contiguous().t(), row[:, :1].expand(2, 6))):
        assert torch.equal(swiglu_triton.forward(gate_up), swiglu_triton.forward(dense))
        ours = swiglu_triton.backward(gate_up, dy)
        assert relative_error(ours, swiglu_torch.backward(dense, dy)) < 2e-3
