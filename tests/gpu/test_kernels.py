"""The kernels on a real GPU: the head against float64, FP8 casts byte for byte against the CPU, products, memory."""

import pytest
import torch

from megatron_medllm.kernels.fp8 import (
    fp8_linear,
    quantize_activation,
    quantize_weight,
    scaled_matmul,
    transpose_fp8,
)
from megatron_medllm.kernels.logprob import fused_linear_logprob
from megatron_medllm.kernels.rope import rope_torch, rope_triton, rotation_angles
from megatron_medllm.kernels.swiglu import swiglu, swiglu_torch
from tests.worlds.head import HeadCase, make_case, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["general", "frozen", "uniform"])
def test_head_against_float64(backend, dtype, mode):
    case = make_case(tokens=200, hidden=256, vocab=5003, dtype=dtype, padding=5)
    if mode == "uniform":
        case = HeadCase(**{**case.__dict__, "upstream": torch.ones(200)})
    expected, expected_lse, expected_dx, expected_dw = case.expect(with_lse=False)
    hidden = case.hidden.cuda().requires_grad_()
    weight = case.weight.cuda().requires_grad_(mode != "frozen")
    logprobs, lse = fused_linear_logprob(
        hidden,
        weight,
        case.target.cuda(),
        valid_vocab=case.valid,
        chunk_tokens=64,
        uniform_grad=1.0 if mode == "uniform" else None,
        backend=backend,
    )
    (logprobs * case.upstream.cuda()).sum().backward()
    assert (logprobs.cpu() - expected).abs().max() < 2e-5
    assert (lse.cpu() - expected_lse).abs().max() < 2e-5
    limit = 2e-6 if dtype == torch.float32 else 6e-3
    assert relative_error(hidden.grad.cpu(), expected_dx) < limit
    if mode != "frozen":
        assert relative_error(weight.grad.cpu(), expected_dw) < limit


def test_general_head_fits_one_gib_beside_the_weight_gradient():
    hidden = torch.randn(8192, 3584, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(152064, 3584, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_()
    target = torch.randint(0, 152064, (8192,), device="cuda")
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused_linear_logprob(hidden, weight, target)[0].mean().backward()
    peak = torch.cuda.max_memory_allocated() - held - weight.grad.nbytes
    assert peak <= 2**30


@pytest.mark.parametrize("power_of_two", [False, True])
def test_casts_equal_the_cpus_byte_for_byte(power_of_two):
    x = (torch.randn(300, 640) * torch.exp(3 * torch.randn(300, 1))).bfloat16()
    for ours, twin in zip(
        (*quantize_activation(x.cuda(), columns=True, power_of_two=power_of_two),
         quantize_weight(x.cuda(), power_of_two=power_of_two),
         transpose_fp8(quantize_weight(x.cuda(), power_of_two=power_of_two))),
        (*quantize_activation(x, columns=True, power_of_two=power_of_two),
         quantize_weight(x, power_of_two=power_of_two),
         transpose_fp8(quantize_weight(x, power_of_two=power_of_two))),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(ours.scales.cpu(), twin.scales)
        assert torch.equal(ours.values.cpu().view(torch.uint8), twin.values.view(torch.uint8))


@pytest.mark.parametrize("tokens", [256, 131])
def test_products_and_gradients(tokens):
    x, weight = torch.randn(tokens, 1024).bfloat16(), (torch.randn(512, 1024) * 0.02).bfloat16()
    dy = torch.randn(tokens, 512).bfloat16()
    left, right = quantize_activation(x.cuda())[0], quantize_weight(weight.cuda())
    exact = left.dequantize().cpu().double() @ right.dequantize().cpu().double().t()
    assert relative_error(scaled_matmul(left, right, out_dtype=torch.float32).cpu(), exact) < 1e-3
    results = []
    for device in ("cuda", "cpu"):
        leaves = [t.to(device).requires_grad_() for t in (x, weight)]
        y = fp8_linear(*leaves)
        y.backward(dy.to(device))
        results.append([y.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])
    for gpu, cpu in zip(*results, strict=True):
        assert relative_error(gpu, cpu) < 6e-3  # both round to bf16


def test_the_rotation_equals_its_twin():
    x = torch.randn(301, 4, 3 * 128, device="cuda").bfloat16()[..., 128:256]
    angles = rotation_angles(torch.arange(301).cuda() * 100, (1e6 ** (-torch.arange(0, 128, 2) / 128)).cuda())
    ours, twin = rope_triton.rotated(x, *angles), rope_torch.rotated(x, *angles)
    assert relative_error(ours.cpu(), twin.cpu()) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(257, 18944), (1, 1024), (70_000, 72), (5, 7)])
def test_swiglu_equals_its_twin(tokens, width, dtype):
    x = (torch.randn(tokens, 1, 2 * width, device="cuda") * 4).to(dtype).requires_grad_()
    dy = torch.randn(tokens, 1, width, device="cuda").to(dtype)
    y = swiglu(x)
    y.backward(dy)
    rows = x.detach()[:, 0].cpu()
    limit = 5e-6 if dtype == torch.float32 else 2e-3
    assert relative_error(y.detach()[:, 0].cpu(), swiglu_torch.forward(rows)) < limit
    assert relative_error(x.grad[:, 0].cpu(), swiglu_torch.backward(rows, dy[:, 0].cpu())) < limit


def test_swiglu_beyond_two_billion_numbers():
    tokens, width = 57_344, 18_944  # 2.17e9 numbers of gate and up
    x = torch.empty(tokens, 2 * width, dtype=torch.bfloat16, device="cuda")
    x[-3:] = torch.randn(3, 2 * width, device="cuda")
    x.requires_grad_()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = swiglu(x)
    assert torch.cuda.max_memory_allocated() - held == y.nbytes  # nothing beside the result
    assert relative_error(y.detach()[-3:].cpu(), swiglu_torch.forward(x.detach()[-3:].cpu())) < 2e-3
    y.backward(y.detach())
    expected = swiglu_torch.backward(x.detach()[-3:].cpu(), y.detach()[-3:].cpu())
    assert relative_error(x.grad[-3:].cpu(), expected) < 2e-3
