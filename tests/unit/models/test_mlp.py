"""SwiGLU computed again in the backward pass: the same gradients, less kept."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig
from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.errors import UserError
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
    from megatron_medllm.models.initialize import initialize_weights
    from megatron_medllm.models.qwen25 import build_model, unwrap

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
