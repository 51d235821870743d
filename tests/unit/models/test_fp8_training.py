"""Full training in FP8 on the torch backend, and the zeros that make an FFN whole blocks."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_medllm.checkpoint.hf_reader import load_hf_weights
from megatron_medllm.checkpoint.hf_writer import export_hf
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import SIZES, ModelConfig
from megatron_medllm.config.train import AdapterConfig, OptimizerConfig, TrainConfig
from megatron_medllm.config.train import Fp8Recipe as Recipe
from megatron_medllm.data.microbatch import MicroBatch
from megatron_medllm.errors import UserError
from megatron_medllm.losses.cpt import cpt_loss
from megatron_medllm.parallel import mcore
from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.train.one_step import forward_backward
from tests.worlds.model import CPU, build_tiny, documents, relative, run
from tests.worlds.model_dir import twin_shape, write_twin
from tests.worlds.shapes import tiny_shape

pytestmark = pytest.mark.usefixtures("one_process")

FFN = 200  # built 256 wide
SHAPE = tiny_shape(num_layers=2, hidden_size=128, ffn_hidden_size=FFN, vocab_size=64)
STREAM = 128
IDS = torch.arange(24) * 7 % 64


def streams(step: int) -> list[MicroBatch]:
    """Two documents of a language in which three of four tokens follow from the one before."""
    generator = np.random.default_rng(step)
    tokens = np.zeros(STREAM + 1, dtype=np.int64)
    for i in range(1, len(tokens)):
        tokens[i] = (5 * tokens[i - 1] + 3) % 64 if generator.random() < 0.75 else generator.integers(64)
    positions = np.arange(STREAM) % (STREAM // 2)
    return [MicroBatch(tokens[:-1], tokens[1:].copy(), positions, documents(STREAM // 2, STREAM // 2))]


def train(model: Any, steps: int, *, lr: float = 3e-3) -> list[float]:
    """Losses of Megatron's own optimizer and schedule, as the training loop calls them."""
    from megatron.core.transformer.module import Float16Module

    from megatron_medllm.models.gpt import unwrap

    layout = LayoutConfig()
    chunks = mcore.wrap_ddp(
        [Float16Module(model.config, model)] if model.config.bf16 else [model], model.config, layout
    )
    settings = OptimizerConfig(lr=lr, weight_decay=0.1)
    optimizer = mcore.build_optimizer(chunks, model.config, settings, layout)

    def forward(iterator: Any, chunk: Any) -> tuple[Any, Any]:
        return chunk(**next(iterator).model_inputs(CPU, backend="torch", uniform_grad=-1.0)), loss

    def loss(output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict]:
        total = cpt_loss(*output, torch.ones(STREAM, dtype=torch.bool), z_loss=0.0)
        return total, torch.tensor(STREAM, dtype=torch.int32), {"loss": float(total.detach()) / STREAM}

    assert unwrap(chunks[0]) is model
    model.train()
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10, 2 * (1 - step / steps))
        parts = forward_backward(forward, chunks, optimizer, streams(step), stream_length=STREAM)
        losses.append(parts[0]["loss"])
        mcore.clip_and_step(optimizer, norm=mcore.gradient_norm(optimizer), clip_grad=1.0)
    return losses


def rms(found: Tensor, expected: Tensor) -> float:
    """Root-mean-square difference relative to the expected values."""
    return float((found - expected).detach().norm() / expected.detach().norm())


def padding(model: Any) -> list[Tensor]:
    """The entries of every FFN weight that are no part of the model."""
    found = []
    for layer in model.decoder.layers:
        gate, up = layer.mlp.linear_fc1.weight.chunk(2)
        found += [gate[FFN:], up[FFN:], layer.mlp.linear_fc2.weight[:, FFN:]]
    return found


@pytest.mark.parametrize(
    ("size", "tp", "width"),
    [("72b", 8, 29696), ("72b", 4, 29696), ("72b", 1, 29568), ("7b", 8, 19456), ("7b", 4, 18944)],
)
def test_width_of_a_padded_ffn(size: str, tp: int, width: int):
    from megatron_medllm.models.config import padded_ffn_size

    model, layout = ModelConfig(size=size), LayoutConfig(tp=tp)
    assert padded_ffn_size(SIZES[size], layout, model, fp8_weights=True) == width
    assert padded_ffn_size(SIZES[size], layout, model, fp8_weights=False) == SIZES[size].ffn_hidden_size
    fixed = ModelConfig(size=size, ffn_multiple=1024)
    assert padded_ffn_size(SIZES[size], layout, fixed, fp8_weights=False) == {"72b": 29696, "7b": 19456}[size]


def test_a_multiple_that_tp_does_not_divide_is_refused():
    from megatron_medllm.models.config import padded_ffn_size

    with pytest.raises(UserError, match=r"model\.ffn_multiple=29569: layout\.tp=8 does not divide .* 29569"):
        padded_ffn_size(SIZES["72b"], LayoutConfig(tp=8), ModelConfig(size="72b", ffn_multiple=29569), fp8_weights=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_is_exact_and_stays_zero_in_training(dtype: str):
    plain, padded = build_tiny(SHAPE, dtype=dtype), build_tiny(SHAPE, dtype=dtype, ffn_multiple=128)
    assert padded.decoder.layers[0].mlp.linear_fc1.weight.shape == (512, 128)
    assert relative(run(padded, IDS, documents(24)), run(plain, IDS, documents(24))) < (
        1e-6 if dtype == "float32" else 1e-2
    )
    losses, padded_losses = train(plain, 6), train(padded, 6)
    assert losses[-1] < losses[0] - 0.1
    assert padded_losses == pytest.approx(losses, rel=1e-6 if dtype == "float32" else 1e-3)
    assert all(not part.any() for part in padding(padded))
    for mine, theirs in zip(padded.decoder.layers, plain.decoder.layers, strict=True):
        gate, up = mine.mlp.linear_fc1.weight.chunk(2)
        trained = torch.cat((gate[:FFN], up[:FFN]))
        assert relative(trained, theirs.mlp.linear_fc1.weight) < (1e-4 if dtype == "float32" else 2e-2)


def test_padding_stays_zero_in_fp8_training():
    model = build_tiny(SHAPE, fp8="blockwise")
    assert model.config.ffn_hidden_size == 256
    losses = train(model, 6)
    assert losses[-1] < losses[0] - 0.1
    assert all(not part.any() for part in padding(model))


def test_padding_is_read_over_and_stripped_on_export(tmp_path: Path, one_process: Runtime):
    from megatron_medllm.models.gpt import build_model, unwrap

    shape = twin_shape("72b")
    hf_dir = write_twin(tmp_path / "hf", shape, dtype=torch.float32, shards=1)
    config = ModelConfig(path=hf_dir, dtype="float32", ffn_multiple=128)
    chunks = build_model(config, LayoutConfig(), device=CPU)
    load_hf_weights(chunks, hf_dir, shape, tp_rank=0, tp_size=1)
    assert shape.ffn_hidden_size % 128 and unwrap(chunks[0]).config.ffn_hidden_size % 128 == 0
    export_hf(chunks, shape, tmp_path / "out", runtime=one_process, source_dir=hf_dir, dtype=torch.float32)
    expected, found = load_file(hf_dir / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_adapter_on_a_padded_base_is_the_same_adapter():
    from megatron_medllm.checkpoint.peft_adapter import Adapter, load_adapter
    from megatron_medllm.models.adapters import add_adapters
    from megatron_medllm.models.gpt import global_parameters

    models = []
    for width in ({}, {"fp8_weights": True}):
        model = build_tiny(SHAPE, **width)
        add_adapters([model], AdapterConfig(rank=4), seed=2, tp_rank=0, tp_size=1)
        train(model, 3, lr=1e-2)
        models.append(model)
    plain, padded = models
    assert padded.config.ffn_hidden_size == 256
    mine, theirs = padded.decoder.layers[0].mlp, plain.decoder.layers[0].mlp
    assert relative(mine.linear_fc2.lora_a[:, :FFN], theirs.linear_fc2.lora_a) < 1e-4
    assert not mine.linear_fc2.lora_a[:, FFN:].any()
    gate, up = mine.linear_fc1.lora_b.chunk(2)
    assert gate.any() and not gate[FFN:].any() and not up[FFN:].any()
    assert relative(run(padded, IDS, documents(24)), run(plain, IDS, documents(24))) < 1e-5
    # PEFT's own files know nothing of the padding.
    tensors = {name: p.detach() for name, p in global_parameters(plain) if "lora" in name}
    again = build_tiny(SHAPE, fp8_weights=True)
    add_adapters([again], AdapterConfig(rank=4), seed=3, tp_rank=0, tp_size=1)
    load_adapter([again], Adapter(AdapterConfig(rank=4), tensors), tp_rank=0, tp_size=1)
    assert relative(run(again, IDS, documents(24)), run(plain, IDS, documents(24))) < 1e-5


@pytest.mark.parametrize(
    ("parent", "name"),
    [("self_attention", "linear_qkv"), ("self_attention", "linear_proj"), ("mlp", "linear_fc1"), ("mlp", "linear_fc2")],
)
def test_all_three_products_of_every_linear_run_in_fp8(parent: str, name: str):
    """With the same input and upstream gradient, each of a layer's results differs by FP8's rounding."""
    results = []
    for built in ({"ffn_multiple": 128}, {"fp8": "blockwise"}):
        linear = getattr(getattr(build_tiny(SHAPE, **built).decoder.layers[0], parent), name)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(24, 1, linear.weight.shape[1], generator=generator, requires_grad=True)
        y, left = linear(x)
        assert left is None
        y.backward(torch.randn(y.shape, generator=generator))
        results.append((y, x.grad, linear.weight.grad))
    for found, expected in zip(*results, strict=True):
        assert 0.02 < rms(found, expected) < 0.045  # block-scaled e4m3 on Gaussian data: 0.037


@pytest.mark.slow
def test_two_hundred_steps_in_fp8_learn_as_bf16_does():
    bf16 = train(build_tiny(SHAPE, dtype="bfloat16"), 200)
    fp8 = train(build_tiny(SHAPE, dtype="bfloat16", fp8="blockwise"), 200)
    ends = [sum(losses[-20:]) / 20 for losses in (bf16, fp8)]
    assert ends[0] < bf16[0] - 1.5, "nothing was learned"
    assert fp8 != bf16
    assert abs(ends[1] / ends[0] - 1) < 0.01, ends


def test_slices_that_are_not_whole_blocks_are_refused():
    shape = SHAPE.model_copy(update={"hidden_size": 64})
    with pytest.raises(UserError, match=r"linear proj is 64 x 64 on each rank; both sizes must be multiples of 128"):
        build_tiny(shape, fp8="blockwise")


def test_recipes_and_backends():
    from megatron_medllm.models.config import te_fp8_fields

    te, ours = (ModelConfig(size="7b", backend=backend) for backend in ("te", "torch"))
    assert te_fp8_fields(te, None) == te_fp8_fields(ours, None) == te_fp8_fields(ours, "blockwise") == {}
    assert te_fp8_fields(te, "blockwise") == {"fp8": "e4m3", "fp8_recipe": "blockwise"}
    assert te_fp8_fields(te, "delayed") == {"fp8": "hybrid", "fp8_recipe": "delayed"}
    assert te_fp8_fields(te, "tensorwise") == {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    with pytest.raises(UserError, match=r"fp8_recipe=delayed needs model\.backend=te"):
        build_tiny(SHAPE, fp8="delayed")


def test_recipes_are_megatrons():
    """As its configuration takes them, where the settings that need Transformer Engine itself are left out."""
    from megatron.core.enums import Fp8Recipe
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_medllm.models.config import te_fp8_fields

    for recipe in get_args(Recipe):
        settings = te_fp8_fields(ModelConfig(size="7b", backend="te"), recipe)
        config = TransformerConfig(num_layers=1, hidden_size=128, num_attention_heads=1, **settings)
        assert Fp8Recipe(config.fp8_recipe) == recipe


def test_a_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    from megatron_medllm.models.config import transformer_config

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Transformer Engine is not installed; model\.backend=torch"):
        transformer_config(SIZES["7b"], LayoutConfig(), ModelConfig(size="7b", backend="te"))


def test_a_backend_that_megatron_could_not_import(monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    from megatron.core.extensions import transformer_engine

    from megatron_medllm.models.config import transformer_config

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(transformer_engine, "HAVE_TE", False)
    with pytest.raises(UserError, match="is installed, but megatron-core could not import it"):
        transformer_config(SIZES["7b"], LayoutConfig(), ModelConfig(size="7b", backend="te"))


def test_fp8_settings_of_a_stage():
    required = {"optimizer": {"lr": 1e-4}, "sequence_length": 8, "global_batch_size": 1}
    assert TrainConfig(**required).fp8_gemms is None
    assert TrainConfig(**required, fp8="hybrid").fp8_gemms == "blockwise"
    assert TrainConfig(**required, fp8="hybrid", fp8_recipe="delayed").fp8_gemms == "delayed"
    with pytest.raises(ValueError, match=r"for LoRA on FP8 weights set adapter\.base=fp8"):
        TrainConfig(**required, fp8="hybrid", adapter={"rank": 4})
