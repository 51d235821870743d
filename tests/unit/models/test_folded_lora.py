"""Base and adapter as one function, against the products one by one and against float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.errors import UserError
from megatron_medllm.models.adapters import add_adapters, can_fold, folds
from megatron_medllm.models.folded_lora import folded_linear
from megatron_medllm.models.frozen_base import FP8Weight
from tests.worlds.model import build_tiny, documents, relative, run
from tests.worlds.shapes import tiny_shape

pytestmark = pytest.mark.usefixtures("one_process")

SHAPE = tiny_shape(num_layers=2, hidden_size=128, ffn_hidden_size=256, vocab_size=96)
SEGMENTS, IDS = documents(10, 14), torch.arange(24) * 7 % 96
SCALE = 2.5


class Case:
    """One layer's tensors, [t, k] = [40, 128] to [t, n] = [40, 256], rank 4."""

    def __init__(self, dtype: torch.dtype, *, biased: bool, base: str = "bf16", zero_b: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.x, self.dy = draw(40, 128).requires_grad_(), draw(40, 256)
        self.weight = draw(256, 128) / 128**0.5
        self.bias = draw(256) if biased else None
        self.a, self.b = (draw(4, 128) / 128**0.5).requires_grad_(), (draw(256, 4) / 8).requires_grad_()
        if zero_b:
            self.b = torch.zeros_like(self.b).requires_grad_()
        self.base: Any = FP8Weight(self.weight) if base == "fp8" else self.weight

    def plain(self) -> Tensor:
        """The base layer alone."""
        if isinstance(self.base, Tensor):
            return F.linear(self.x, self.base, self.bias)
        return self.base.product(self.x, self.bias)

    def folded(self) -> Tensor:
        return folded_linear(self.x, self.base, self.bias, self.a, self.b, scale=SCALE)

    def separate(self) -> Tensor:
        return self.plain() + SCALE * ((self.x @ self.a.t()) @ self.b.t())

    def gradients(self, y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(y, [self.x, self.a, self.b], self.dy))

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """Result and gradients in float64, of the values that the base really multiplies by."""
        x, a, b = (t.detach().double().requires_grad_() for t in (self.x, self.a, self.b))
        dense = self.weight if isinstance(self.base, Tensor) else self.base.dense()
        y = F.linear(x, dense.double(), None if self.bias is None else self.bias.double())
        y = y + SCALE * ((x @ a.t()) @ b.t())
        return y, list(torch.autograd.grad(y, [x, a, b], self.dy.double()))


def rms(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).detach().norm() / expected.detach().norm())


@pytest.fixture
def poisoned_memory() -> Any:
    """Fresh memory is NaN: a product that adds to what it should only overwrite shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("base", ["bf16", "fp8"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_b_zero_it_is_the_base_layer_bitwise(dtype: torch.dtype, biased: bool, base: str):
    case = Case(dtype, biased=biased, base=base, zero_b=True)
    assert torch.equal(case.folded(), case.plain())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("base", ["bf16", "fp8"])
@pytest.mark.parametrize("biased", [True, False])
def test_fp32_is_the_separate_products_and_float64(biased: bool, base: str):
    case = Case(torch.float32, biased=biased, base=base)
    folded, separate = case.folded(), case.separate()
    assert relative(folded, separate) < 1e-6
    gradients = case.gradients(folded)
    assert all(relative(own, other) < 1e-6 for own, other in zip(gradients, case.gradients(separate), strict=True))
    if base == "bf16":  # an FP8 layer casts its input too
        exact, exact_gradients = case.exact()
        assert rms(folded, exact) < 1e-6
        assert all(rms(own, known) < 1e-6 for own, known in zip(gradients, exact_gradients, strict=True))


@pytest.mark.parametrize("biased", [True, False])
def test_bf16_is_no_further_from_float64_than_the_separate_products(biased: bool):
    case = Case(torch.bfloat16, biased=biased)
    exact, gradients = case.exact()
    folded, separate = case.folded(), case.separate()
    assert rms(folded, exact) < min(0.003, 1.05 * rms(separate, exact))
    for own, other, known in zip(case.gradients(folded), case.gradients(separate), gradients, strict=True):
        assert rms(own, known) < min(0.004, 1.05 * rms(other, known))


def test_an_input_without_gradient_gets_none():
    case = Case(torch.float32, biased=True)
    expected = case.gradients(case.folded())
    case.x = case.x.detach()
    da, db = torch.autograd.grad(case.folded(), [case.a, case.b], case.dy)
    assert torch.equal(da, expected[1]) and torch.equal(db, expected[2])


def test_a_trained_base_is_refused():
    case = Case(torch.float32, biased=False)
    case.base = case.weight.requires_grad_()
    with pytest.raises(ValueError, match="frozen base"):
        case.folded()


def adapted(products: Any, *, base: str = "bf16", dtype: str = "float32", recompute: str = "none") -> Any:
    from megatron_medllm.models.gpt import unwrap

    model = build_tiny(SHAPE, dtype=dtype)
    model.config.recompute_granularity = "full" if recompute == "full" else None
    model.config.recompute_method, model.config.recompute_num_layers = (
        ("uniform", 1) if recompute == "full" else (None, None)
    )
    add_adapters([unwrap(model)], AdapterConfig(rank=4, base=base), seed=2, tp_rank=0, tp_size=1, products=products)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 20)
    return model.train()


def output_and_gradients(model: Any) -> tuple[Tensor, list[Tensor]]:
    y = run(model, IDS, SEGMENTS).float()
    y.square().mean().backward()
    return y.detach(), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(("base", "dtype", "bound"), [("bf16", "float32", 1e-5), ("bf16", "bfloat16", 0.03)])
def test_models_are_equal_both_ways(base: str, dtype: str, bound: float):
    y, gradients = output_and_gradients(adapted("folded", base=base, dtype=dtype))
    other, others = output_and_gradients(adapted("separate", base=base, dtype=dtype))
    assert relative(y, other) < bound
    assert len(gradients) == 16 and all(g.norm() > 0 for g in gradients)
    assert all(rms(own, known.double()) < bound for own, known in zip(gradients, others, strict=True))


@pytest.mark.parametrize("base", ["bf16", "fp8"])
def test_recompute_and_no_grad_change_nothing(base: str):
    y, gradients = output_and_gradients(adapted("folded", base=base))
    again, recomputed = output_and_gradients(adapted("folded", base=base, recompute="full"))
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))
    with torch.no_grad():
        assert torch.equal(run(adapted("folded", base=base).eval(), IDS, SEGMENTS), y)


def held_bytes(products: str) -> int:
    """Distinct memory that autograd holds between the passes, parameters left out."""
    model = adapted(products)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(model, IDS, SEGMENTS)  # alive while `held` is read, and with it every address
        assert y.requires_grad
        return sum(held.values())


def test_nothing_more_is_held_between_the_passes():
    assert held_bytes("folded") <= held_bytes("separate")


def test_what_cannot_be_folded_is_not():
    plain, dropped = AdapterConfig(), AdapterConfig(dropout=0.1)
    assert folds("auto", plain, 1) and folds("folded", plain, 1) and not folds("separate", plain, 1)
    assert not folds("auto", plain, 2) and not folds("auto", dropped, 1) and not can_fold(dropped, 1)
    with pytest.raises(UserError, match=r"without adapter.dropout, here layout.tp=2"):
        folds("folded", plain, 2)
    with pytest.raises(UserError, match=r"here adapter.dropout=0.1"):
        folds("folded", dropped, 1)


def test_the_models_layers_run_as_chosen(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="megatron_medllm.models.adapters"):
        for choice, folded in (("auto", True), ("folded", True), ("separate", False)):
            layer = adapted(choice).decoder.layers[0].mlp.linear_fc2
            assert layer.folded is folded
    assert caplog.messages[0] == "LoRA: products folded into the base's (asked for: auto)"
    assert caplog.messages[2] == "LoRA: products one by one (asked for: separate)"
