"""Block-scaled FP8 on a CPU: literal casts, products against float64, and training with it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_medllm.kernels.fp8 import (
    BlockScaled,
    fp8_frozen_linear,
    fp8_linear,
    quantize_activation,
    quantize_weight,
    scaled_matmul,
    transpose_fp8,
)
from megatron_medllm.kernels.fp8.blocks import block_scale, cast_e4m3
from tests.worlds.head import relative_error


def signal_to_noise_db(value: Tensor, expected: Tensor) -> float:
    expected = expected.detach().double()
    noise = (value.detach().double() - expected).norm()
    return float(20 * torch.log10(expected.norm() / noise))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cast_rounds_to_even_and_saturates():
    x = torch.tensor([17.0, 18.0, 19.0, 464.0, 465.0, -1e9, float("inf"), 0.0009765625, 0.0009766, 0.0])
    # e4m3 steps by 2 from 16 to 32; its smallest number is 2^-9, and 2^-10 lies halfway to 0
    expected = torch.tensor([16.0, 18.0, 20.0, 448.0, 448.0, -448.0, 448.0, 0.0, 0.001953125, 0.0])
    assert torch.equal(cast_e4m3(x).float(), expected)
    assert cast_e4m3(torch.tensor([float("nan")])).float().isnan().all()


def test_scales_are_the_written_formula():
    amax = torch.tensor([448.0, 896.0, 100.0, 0.0])
    assert block_scale(amax, power_of_two=False).tolist() == pytest.approx([1.0, 2.0, 0.2232142857, 2.2321e-15], 1e-4)
    assert block_scale(amax, power_of_two=True)[:3].tolist() == [1.0, 2.0, 0.25]


def test_blocks_do_not_see_each_other():
    x = torch.ones(3, 256)
    x[0, 128:] = 1000.0
    rows, _ = quantize_activation(x)
    expected = torch.tensor([[1.0, 1000.0], [1.0, 1.0], [1.0, 1.0]]) / 448
    torch.testing.assert_close(rows.scales, expected, rtol=1e-7, atol=0)
    assert rows.scales.stride() == (1, 3)  # cuBLAS reads them token after token
    weight = quantize_weight(x)
    torch.testing.assert_close(weight.scales, torch.tensor([[1.0, 1000.0]]) / 448, rtol=1e-7, atol=0)
    torch.testing.assert_close(rows.dequantize(), x, rtol=1e-6, atol=0)


def test_columns_are_the_transpose_filled_up():
    x = gaussian(70, 256)
    _, columns = quantize_activation(x, columns=True)
    alone, _ = quantize_activation(F.pad(x, (0, 0, 0, 58)).t().contiguous())
    assert columns.values.shape == (256, 128)
    assert torch.equal(columns.values.view(torch.uint8), alone.values.view(torch.uint8))
    assert torch.equal(columns.scales, alone.scales)
    assert columns.dequantize()[:, 70:].abs().max() == 0


def test_transpose_moves_bytes_only():
    weight = quantize_weight(gaussian(300, 200))
    across = transpose_fp8(weight)
    assert torch.equal(across.dequantize(), weight.dequantize().t())
    with pytest.raises(ValueError, match="128 x 128"):
        transpose_fp8(quantize_activation(gaussian(4, 128))[0])


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("tokens", "k", "n"), [(70, 384, 256), (33, 200, 72)])
def test_product_of_the_dequantised(tokens, k, n, power_of_two):
    left, _ = quantize_activation(gaussian(tokens, k), power_of_two=power_of_two)
    for right in (
        quantize_weight(gaussian(n, k, seed=1), power_of_two=power_of_two),
        quantize_activation(gaussian(n, k, seed=1), power_of_two=power_of_two)[0],
    ):
        product = scaled_matmul(left, right, out_dtype=torch.float32)
        exact = left.dequantize(torch.float64).double() @ right.dequantize(torch.float64).double().t()
        assert relative_error(product, exact) < 1e-6
    with pytest.raises(ValueError, match="cannot multiply"):
        scaled_matmul(left, quantize_weight(gaussian(n, k + 1)), out_dtype=torch.float32)


def test_shapes_of_scales_are_checked():
    weight = quantize_weight(gaussian(256, 128))
    with pytest.raises(ValueError, match="need scales"):
        BlockScaled(weight.values, weight.scales, 1)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_trained_linear_is_27_db_from_bf16(power_of_two):
    x, weight = gaussian(256, 1024).bfloat16(), (gaussian(512, 1024, seed=1) * 0.02).bfloat16()
    dy, bias = gaussian(256, 512, seed=2).bfloat16(), gaussian(512, seed=3).bfloat16()
    results = []
    for layer in (lambda x, w, b: fp8_linear(x, w, b, power_of_two=power_of_two), F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = layer(*leaves)
        y.backward(dy)
        assert y.dtype == torch.bfloat16
        results.append([y, *(leaf.grad for leaf in leaves)])
    for ours, bf16 in zip(results[0][:3], results[1][:3], strict=True):
        assert signal_to_noise_db(ours, bf16) >= 27
    assert relative_error(results[0][3], results[1][3]) < 0.01


def test_trained_linear_gradients_are_products_of_casts():
    """Exact: what the backward pass multiplies is dequantised and multiplied in float64."""
    x, weight = gaussian(40, 256), gaussian(128, 256, seed=1)
    dy = gaussian(40, 128, seed=2)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    fp8_linear(*leaves).backward(dy)
    dy_rows, dy_columns = quantize_activation(dy, columns=True)
    _, x_columns = quantize_activation(x, columns=True)
    dx = dy_rows.dequantize().double() @ quantize_weight(weight).dequantize().double()
    dw = dy_columns.dequantize().double() @ x_columns.dequantize().double().t()
    assert relative_error(leaves[0].grad, dx) < 1e-6
    assert relative_error(leaves[1].grad, dw) < 1e-6


def test_frozen_linear():
    x, weight, bias = gaussian(2, 35, 256), gaussian(128, 256, seed=1) * 0.05, gaussian(128, seed=4)
    dy = gaussian(2, 35, 128, seed=5)
    base = quantize_weight(weight)
    leaves = [t.clone().requires_grad_() for t in (x, bias)]
    y = fp8_frozen_linear(leaves[0], base, leaves[1])
    y.backward(dy)
    dequantised = base.dequantize().double()
    expected, expected_dx = x.double() @ dequantised.t() + bias.double(), dy.double() @ dequantised
    assert signal_to_noise_db(y, expected) > 27 and signal_to_noise_db(leaves[0].grad, expected_dx) > 27
    assert relative_error(leaves[1].grad, dy.double().sum((0, 1))) < 1e-6
    with pytest.raises(ValueError, match="does not fit"):
        fp8_frozen_linear(gaussian(4, 128), base)


class TinyLanguageModel(nn.Module):
    """Embedding, two SwiGLU layers whose linears `kind` chooses, head. A context of one word: a Markov chain."""

    WORDS, WIDTH, FFN = 48, 128, 256

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.WORDS, self.WIDTH)
        shapes = [(2 * self.FFN, self.WIDTH), (self.WIDTH, self.FFN)] * 2
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(*shape) * shape[1] ** -0.5) for shape in shapes)
        self.head = nn.Parameter(torch.randn(self.WORDS, self.WIDTH) * 0.05)
        self.adapters = nn.ParameterList()
        self.kind = "bf16"

    def add_adapters(self) -> None:
        self.requires_grad_(False)
        for weight in self.weights:
            n, k = weight.shape
            self.adapters += [nn.Parameter(torch.randn(8, k) * k**-0.5), nn.Parameter(torch.zeros(n, 8))]

    def linear(self, x: Tensor, index: int) -> Tensor:
        weight = self.weights[index].bfloat16()
        if not self.adapters:
            return fp8_linear(x, weight) if self.kind == "fp8" else F.linear(x, weight)
        a, b = (half.bfloat16() for half in self.adapters[2 * index : 2 * index + 2])
        base = fp8_frozen_linear(x, quantize_weight(weight)) if self.kind == "fp8" else F.linear(x, weight)
        return base + F.linear(F.linear(x, a), b)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words).bfloat16()
        for layer in (0, 2):
            gate, up = self.linear(F.rms_norm(x, (self.WIDTH,)), layer).chunk(2, -1)
            x = x + self.linear(F.silu(gate) * up, layer + 1)
        return F.linear(F.rms_norm(x, (self.WIDTH,)).float(), self.head)


def train(model: TinyLanguageModel, *, chain_seed: int, steps: int = 200) -> float:
    """Mean loss of the last 25 steps on words from a random Markov chain."""
    chain = torch.softmax(3 * gaussian(model.WORDS, model.WORDS, seed=chain_seed), -1)
    generator = torch.Generator().manual_seed(7)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(steps):
        words = torch.randint(0, model.WORDS, (256,), generator=generator)
        following = torch.multinomial(chain[words], 1, generator=generator)[:, 0]
        loss = F.cross_entropy(model(words), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-25:]) / 25


@pytest.mark.slow
def test_two_hundred_steps_in_fp8_learn_as_bf16_does():
    losses = {}
    for kind in ("bf16", "fp8"):
        torch.manual_seed(0)
        model = TinyLanguageModel()
        model.kind = kind
        losses[kind] = train(model, chain_seed=1)
    assert losses["bf16"] < 2.2  # from ln 48 = 3.87
    assert abs(losses["fp8"] / losses["bf16"] - 1) < 0.01, losses


@pytest.mark.slow
def test_adapters_on_an_fp8_base_learn_as_on_a_bf16_base():
    losses = {}
    for kind in ("bf16", "fp8"):
        torch.manual_seed(0)
        model = TinyLanguageModel()
        train(model, chain_seed=1, steps=60)
        model.add_adapters()
        model.kind = kind
        losses[kind] = train(model, chain_seed=2)
    assert losses["bf16"] < 2.0  # another chain than the base knows, where it starts above 5
    assert abs(losses["fp8"] / losses["bf16"] - 1) < 0.01, losses
