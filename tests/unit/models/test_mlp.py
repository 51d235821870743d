"""SwiGLU computed again in the backward pass: the same gradients, less kept."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig
from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.errors import UserError
from megatron_medllm.kernels.swiglu import swiglu
from megatron_medllm.models import mlp
from megatron_medllm.models.mlp import choose_swiglu, use_own_swiglu
from megatron_medllm.parallel import runtime
from megatron_medllm.parallel.packed import PackedSequences, Segment
from tests.worlds.shapes import tiny_shape

SHAPE = tiny_shape(num_layers=3, hidden_size=128, ffn_hidden_size=256, vocab_size=96)
TOKENS = 24


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    runtime.start(LayoutConfig(), seed=0)
    yield
    runtime.stop()


def build(recompute: str, *, adapter: dict[str, Any] | None, dtype: str = "float32", fp8: bool = False) -> Any:
    from megatron_medllm.models.adapters import add_adapters
    from megatron_medllm.models.gpt import build_model, unwrap
    from megatron_medllm.models.initialize import initialize_weights

    layout = LayoutConfig(recompute=recompute)
    cpu = torch.device("cpu")
    chunks = build_model(ModelConfig(shape=SHAPE, dtype=dtype), layout, device=cpu, fp8="blockwise" if fp8 else None)
    initialize_weights(chunks, seed=1, tp_rank=0, tp_size=1)
    model = unwrap(chunks[0])
    if adapter is not None:
        add_adapters([model], AdapterConfig(**adapter), seed=2, tp_rank=0, tp_size=1)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(3))
    return model


def gradients(model: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Of two passes, summed; and the bytes that autograd held before the first backward pass."""
    positions = torch.arange(TOKENS)
    packed = PackedSequences.from_segments((Segment(0, 10), Segment(10, TOKENS)), positions, backend="torch")
    held: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    sizes = []
    for shift in (7, 5):
        torch.manual_seed(0)  # of dropout
        ids = (torch.arange(TOKENS) * shift % 96)[None]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logits = model(ids, positions[None], None, packed_seq_params=packed)
        sizes.append(sum(storage.nbytes() for storage in held.values()))
        logits[..., :96].float().square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sizes[0]


CASES = {
    "full": {"adapter": None},
    "full fp8": {"adapter": None, "fp8": True},
    "lora": {"adapter": {"rank": 4}},
    "lora bf16": {"adapter": {"rank": 4}, "dtype": "bfloat16"},
    "lora with dropout": {"adapter": {"rank": 4, "dropout": 0.3}},
    "lora on fp8": {"adapter": {"rank": 4, "base": "fp8"}},
    "lora beside fc2": {"adapter": {"rank": 4, "targets": ("linear_qkv", "linear_fc1")}},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_gradients(case: dict[str, Any]):
    expected, _ = gradients(build("none", **case))
    found, _ = gradients(build("swiglu", **case))
    assert expected and list(found) == list(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(found[name], gradient), name


def test_less_is_held_between_the_passes():
    """Of every layer fc2's input, and a copy of up: upstream's MLP, not compiled, adds an offset of 0 to it."""
    _, whole = gradients(build("none", adapter={"rank": 4}))
    _, lean = gradients(build("swiglu", adapter={"rank": 4}))
    assert whole - lean == SHAPE.num_layers * 2 * TOKENS * SHAPE.ffn_hidden_size * 4


def test_not_under_transformer_engine():
    from megatron_medllm.models.config import transformer_config
    from megatron_medllm.models.layer_spec import block_spec

    layout = LayoutConfig(recompute="swiglu")
    config = transformer_config(SHAPE, layout, ModelConfig(shape=SHAPE))
    with pytest.raises(UserError, match=r"needs model\.backend=torch"):
        block_spec(config, "te", None, recompute_swiglu=True)


@pytest.mark.parametrize("recompute", ["none", "swiglu"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_our_swiglu_trains_like_megatrons(case: dict[str, Any], recompute: str):
    """The plain twin stands in for the kernels. In fp32 both differ by rounding, of which FP8 casts make steps."""
    expected, held_by_theirs = gradients(build(recompute, **case))
    model = build(recompute, **case)
    use_own_swiglu([layer.mlp for layer in model.decoder.layers])
    found, held = gradients(model)
    limit = 0.02 if case.get("dtype") == "bfloat16" else 0.05 if "fp8" in str(case) else 1e-5
    assert expected and list(found) == list(expected)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < limit * gradient.norm(), name
    assert held <= held_by_theirs


def test_the_mlps_call_ours(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(mlp, "swiglu", lambda x: (calls.append(x.shape), swiglu(x))[1])
    for recompute in ("none", "swiglu"):
        model = build(recompute, adapter={"rank": 4})
        use_own_swiglu([layer.mlp for layer in model.decoder.layers])
        gradients(model)
    width = 2 * SHAPE.ffn_hidden_size
    # two passes of three layers; with recomputation twice as many
    assert calls == [(TOKENS, 1, width)] * 18


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("wanted", "form", "device", "installed", "ours", "said"),
    [
        ("auto", "auto", CUDA, True, True, "our Triton kernels"),
        ("triton", "compiled", CUDA, True, True, "our Triton kernels"),
        ("auto", "eager", CUDA, True, False, "Megatron-Core's, op by op; model.swiglu=eager"),
        ("auto", "auto", CUDA, False, False, "Megatron-Core's, op by op; Triton needs the triton package"),
        ("auto", "auto", CPU, True, False, "Megatron-Core's, op by op; Triton needs a CUDA device (this one is cpu)"),
        ("megatron", "auto", CUDA, True, False, "Megatron-Core's, op by op"),
    ],
)
def test_the_choice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    wanted: Any, form: Any, device: torch.device, installed: bool, ours: bool, said: str,
):  # fmt: skip
    monkeypatch.setattr(mlp, "triton_installed", lambda: installed)
    model = build("none", adapter=None)
    with caplog.at_level(logging.INFO, logger=mlp.__name__):
        choose_swiglu([model], wanted, device, ModelConfig(shape=SHAPE, swiglu=form))
    assert caplog.messages == [f"SwiGLU: {said} (asked for: {wanted})"]
    assert [layer.mlp.activation_func is swiglu for layer in model.decoder.layers] == [ours] * SHAPE.num_layers
    assert model.config.use_te_activation_func == ours


def test_triton_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch):
    config = ModelConfig(shape=SHAPE)
    with pytest.raises(UserError, match=r"^kernels\.swiglu=triton needs a CUDA device \(this one is cpu\)$"):
        choose_swiglu([], "triton", CPU, config)
    with pytest.raises(UserError, match=r"^kernels\.swiglu=triton needs model\.backend=torch$"):
        choose_swiglu([], "triton", CUDA, ModelConfig(shape=SHAPE, backend="te"))
    monkeypatch.setattr(mlp, "triton_installed", lambda: False)
    with pytest.raises(UserError, match=r"^kernels\.swiglu=triton needs the triton package$"):
        choose_swiglu([], "triton", CUDA, config)
