"""LoRA layers on one process: the formula, the frozen base in its three formats, merging, switching off."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig
from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.errors import UserError
from megatron_medllm.models import frozen_base
from megatron_medllm.parallel import runtime
from megatron_medllm.parallel.packed import PackedSequences, Segment
from tests.worlds.shapes import tiny_shape

SHAPE = tiny_shape(num_layers=2, hidden_size=128, ffn_hidden_size=256, vocab_size=96)
IDS = torch.arange(24) * 7 % 96


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    runtime.start(LayoutConfig(), seed=0)
    yield
    runtime.stop()


def build(dtype: str = "float32", recompute: str = "none", **adapter: Any) -> Any:
    from megatron_medllm.models.adapters import add_adapters
    from megatron_medllm.models.gpt import build_model, unwrap
    from megatron_medllm.models.initialize import initialize_weights

    layout = LayoutConfig(recompute=recompute)
    chunks = build_model(ModelConfig(shape=SHAPE, dtype=dtype), layout, device=torch.device("cpu"))
    initialize_weights(chunks, seed=1, tp_rank=0, tp_size=1)
    model = unwrap(chunks[0])
    if adapter:
        add_adapters([model], AdapterConfig(**adapter), seed=2, tp_rank=0, tp_size=1)
    return model


def fill_b(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 20)


def logits(model: Any) -> Tensor:
    positions = torch.arange(len(IDS))
    packed = PackedSequences.from_segments((Segment(0, 10), Segment(10, len(IDS))), positions, backend="torch")
    return model(IDS[None], positions[None], None, packed_seq_params=packed)[0, :, :96].float()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def test_formula_on_numbers_worked_out_by_hand():
    from megatron_medllm.models.adapters import AdaptedLinear

    model = build(rank=1, alpha=3.0)
    layer = model.decoder.layers[0].self_attention.linear_qkv
    assert isinstance(layer, AdaptedLinear)
    layer.weight, layer.bias = (
        nn.Parameter(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), requires_grad=False),
        nn.Parameter(torch.tensor([10.0, 0]), requires_grad=False),
    )
    layer.lora_a, layer.lora_b = nn.Parameter(torch.tensor([[1.0, -1.0]])), nn.Parameter(torch.tensor([[2.0], [5.0]]))
    y, bias = layer(torch.tensor([[[4.0, 1.0]]]))
    # W x + b = [16, 1]; A x = 3; alpha / r = 3; B A x 3 = [18, 45]
    assert y.tolist() == [[[34.0, 46.0]]]
    assert bias is None
    assert layer.merged_weight().tolist() == [[7.0, -4.0], [15.0, -14.0]]


def test_only_adapters_train_and_names_stay():
    plain, adapted = build(), build(rank=4)
    names = dict(adapted.named_parameters())
    assert {n for n in names if "lora" not in n} == set(dict(plain.named_parameters()))
    trained = [n for n, p in names.items() if p.requires_grad]
    assert len(trained) == 2 * 4 * 2 and all(n.endswith(("lora_a", "lora_b")) for n in trained)
    # rank 4: qkv 128 -> 256, proj 128 -> 128, fc1 128 -> 512, fc2 256 -> 128, two layers
    assert sum(names[n].numel() for n in trained) == 2 * 4 * (384 + 256 + 640 + 384)


def test_targets_choose_the_layers():
    adapted = build(rank=2, targets=("linear_qkv",))
    assert [n for n, p in adapted.named_parameters() if p.requires_grad] == [
        f"decoder.layers.{layer}.self_attention.linear_qkv.lora_{half}" for layer in (0, 1) for half in "ab"
    ]


def test_a_is_drawn_by_seed_and_name():
    first, again = build(rank=4), build(rank=4)
    a = [layer.self_attention.linear_qkv.lora_a for layer in first.decoder.layers]
    assert torch.equal(a[0], again.decoder.layers[0].self_attention.linear_qkv.lora_a)
    assert not torch.equal(a[0], a[1])
    assert 0.9 / 128**0.5 < a[0].abs().max() <= 1 / 128**0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_the_start_the_model_is_its_base(dtype: str):
    assert torch.equal(logits(build(dtype)), logits(build(dtype, rank=4)))


@torch.no_grad()
def copy_merged(adapted: Any, plain: Any) -> None:
    from megatron_medllm.models.adapters import merged_parameters
    from megatron_medllm.models.gpt import global_parameters

    merged = dict(merged_parameters(adapted))
    for name, parameter in global_parameters(plain):
        parameter.copy_(merged[name])


@pytest.mark.parametrize("base", ["bf16", "fp8"])
def test_merged_model_equals_adapted_model(base: str):
    from megatron_medllm.models.adapters import merged_parameters
    from megatron_medllm.models.gpt import global_parameters

    adapted = build(rank=4, base=base)
    fill_b(adapted)
    expected = logits(adapted)
    plain = build()
    assert dict(merged_parameters(adapted)).keys() == dict(global_parameters(plain)).keys()
    copy_merged(adapted, plain)
    # An FP8 layer casts its input too, a dense one does not.
    assert relative(logits(plain), expected) < (1e-5 if base == "bf16" else 0.1)


def test_merged_weight_of_a_bf16_model_is_summed_in_fp32():
    adapted = build("bfloat16", rank=4)
    fill_b(adapted)
    layer = adapted.decoder.layers[0].mlp.linear_fc1
    exact = layer.weight.double() + layer.scale * (layer.lora_b.double() @ layer.lora_a.double())
    assert relative(layer.merged_weight().double(), exact) < 1e-6


def test_fp8_base_is_held_once_in_fp8():
    plain, adapted = build(), build(rank=4, base="fp8", targets=("linear_qkv",))
    held = [n for n, p in adapted.named_parameters() if p.dim() == 2 and "lora" not in n]
    assert held == ["embedding.word_embeddings.weight"]  # all linears are, targets or not
    layer = adapted.decoder.layers[1].mlp.linear_fc2
    assert relative(layer.frozen.dense(), plain.decoder.layers[1].mlp.linear_fc2.weight) < 0.04
    assert 0 < relative(logits(adapted), logits(plain)) < 0.1


@pytest.mark.parametrize("base", ["bf16", "fp8"])
def test_recompute_gives_the_same_gradients(base: str):
    gradients = []
    for recompute in ("none", "full"):
        model = build(recompute=recompute, rank=4, base=base, dropout=0.2)
        fill_b(model)
        model.train()
        torch.manual_seed(5)
        logits(model).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 16 and all(g.norm() > 0 for g in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_is_for_training_alone():
    model = build(rank=4, dropout=0.5)
    fill_b(model)
    model.eval()
    evaluated = logits(model)
    assert torch.equal(evaluated, logits(model))
    model.train()
    assert not torch.equal(evaluated, logits(model))
    layer = model.decoder.layers[0].self_attention.linear_qkv
    dropped = layer.dropped(torch.ones(1000, 1, 128))
    assert dropped.unique().tolist() == [0.0, 2.0]
    assert 0.99 < dropped.mean() < 1.01


def test_transformer_engine_layers_are_refused():
    from megatron_medllm.models.adapters import add_adapters

    model = build()
    model.decoder.layers[0].self_attention.linear_qkv = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"Linear takes no adapter; set model\.backend=torch"):
        add_adapters([model], AdapterConfig(), seed=0, tp_rank=0, tp_size=1)


def test_nf4_without_bitsandbytes_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-medllm\[nf4\]'"):
        build(rank=4, base="nf4")


def halve(weight: Tensor, **_: Any) -> tuple[Tensor, None]:
    return weight / 2, None


def test_nf4_layer_multiplies_by_what_is_unpacked(monkeypatch: pytest.MonkeyPatch):
    stand_in = SimpleNamespace(quantize_4bit=halve, dequantize_4bit=lambda packed, _: packed * 2 + 1)
    monkeypatch.setattr(frozen_base, "bitsandbytes_functional", lambda: stand_in)
    weight = frozen_base.NF4Weight(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))  # unpacks to [[2, 3], [4, 5]]
    x = torch.tensor([[1.0, 10.0]], requires_grad=True)
    y = weight.product(x, torch.tensor([0.5, 0.0]))
    assert y.tolist() == [[32.5, 54.0]]
    y.backward(torch.tensor([[1.0, 2.0]]))
    assert x.grad is not None and x.grad.tolist() == [[10.0, 13.0]]


def test_nf4_base():
    pytest.importorskip("bitsandbytes")
    plain, adapted = build(), build(rank=4, base="nf4")
    assert 0 < relative(logits(adapted), logits(plain)) < 0.3
    layer = adapted.decoder.layers[0].self_attention.linear_qkv.frozen
    assert layer.packed.numel() == 256 * 128 // 2
    fill_b(adapted)
    expected = logits(adapted)
    expected.square().mean().backward()
    assert all(p.grad.norm() > 0 for p in adapted.parameters() if p.requires_grad)
    copy_merged(adapted, plain)
    assert relative(logits(plain), expected.detach()) < 1e-5
