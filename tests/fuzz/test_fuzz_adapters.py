"""Adapters as PEFT and other trainers write them: settings, names and contents of the tensors."""

from pathlib import Path
from typing import Any

import orjson
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_medllm.checkpoint.names import hf_shape, hf_shapes
from megatron_medllm.checkpoint.peft_adapter import Adapter, adapted_weights, read_peft
from tests.fuzz.surface import fuzz, right_or_one_line
from tests.worlds.shapes import tiny_shape

SHAPE = tiny_shape(
    num_layers=2, hidden_size=8, num_attention_heads=2, num_query_groups=1, ffn_hidden_size=12, vocab_size=16
)
MODULES = [name.removesuffix(".weight") for name in hf_shapes(SHAPE) if name.endswith("_proj.weight")]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
    max_leaves=4,
)
LEFT_OUT = "left out"
SETTINGS = st.sampled_from(
    [
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "bias",
        "init_lora_weights",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "alora_invocation_tokens",
        "fan_in_fan_out",
        "lora_bias",
        "target_parameters",
        "eva_config",
        "trainable_token_indices",
        "layer_replication",
        "loftq_config",
        "qalora_group_size",
        "peft_version",
        "revision",
    ]
)
COMMON = st.sampled_from(
    [LEFT_OUT, None, True, False, 1, "1", "true", [], {}, "all-linear", "gaussian", "pissa", "LORA"]
)
SPELLINGS = (
    lambda name: name,
    lambda name: name.replace(".weight", ".default.weight"),
    lambda name: "_orig_mod." + name,
    lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    lambda name: name.replace(".layers.", "._fsdp_wrapped_module.layers."),
    lambda name: name.removeprefix("base_model.model."),
)


@st.composite
def adapters(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, tuple[int, float]], Any]:
    """Settings of plain LoRA with patterns; rank and alpha / r of every adapted module; a spelling of the names."""
    modules = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=4, unique=True))
    rank, alpha, rslora = draw(st.integers(1, 3)), draw(st.integers(1, 9) | st.floats(0.5, 9)), draw(st.booleans())
    ranks = draw(st.dictionaries(st.sampled_from(modules), st.integers(1, 4), max_size=2))
    alphas = draw(st.dictionaries(st.sampled_from(modules), st.integers(1, 9), max_size=2))
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "target_modules": modules,
        "rank_pattern": {_pattern(draw, name): value for name, value in ranks.items()},
        "alpha_pattern": {_pattern(draw, name): value for name, value in alphas.items()},
    }
    sizes = {}
    for name in modules:
        own = ranks.get(name, rank)
        sizes[name] = (own, alphas.get(name, alpha) / (own**0.5 if rslora else own))
    return settings, sizes, draw(st.sampled_from(SPELLINGS))


def _pattern(draw: st.DrawFn, module: str) -> str:
    """One of the ways to name exactly this module."""
    return draw(st.sampled_from([module, f"^{module}", module.replace(".", r"\."), module.removeprefix("model.")]))


def tensors_of(sizes: dict[str, tuple[int, float]]) -> dict[str, torch.Tensor]:
    """Random A and B by PEFT's names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, (rank, _) in sizes.items():
        rows, columns = hf_shape(f"{module}.weight", SHAPE)
        stem = f"base_model.model.{module}.lora_"
        tensors[f"{stem}A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"{stem}B.weight"] = torch.randn(rows, rank, generator=generator)
    return tensors


def write(folder: Path, settings: Any, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "adapter_config.json").write_bytes(orjson.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")


def change_of(adapter: Adapter, module: str) -> torch.Tensor:
    """What the adapter adds to an HF weight: its rows of the fused alpha / r B A."""
    weight = next(w for w, _ in adapted_weights(SHAPE) if f"{module}.weight" in w.hf)
    stem = weight.mcore.removesuffix("weight")
    scale = adapter.config.alpha / adapter.config.rank
    fused = scale * adapter.tensors[f"{stem}lora_b"] @ adapter.tensors[f"{stem}lora_a"]
    if weight.fuse == "qkv":  # one group: its heads, its key, its value
        rows = dict(zip(weight.hf, fused.split([hf_shape(name, SHAPE)[0] for name in weight.hf]), strict=True))
        return rows[f"{module}.weight"]
    return fused.chunk(len(weight.hf))[weight.hf.index(f"{module}.weight")]


def assert_right(adapter: Adapter, tensors: dict[str, torch.Tensor], sizes: dict[str, tuple[int, float]]) -> None:
    """Every module is changed by its own alpha / r B A."""
    for module, (_, scale) in sizes.items():
        stem = f"base_model.model.{module}.lora_"
        expected = scale * tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"]
        torch.testing.assert_close(change_of(adapter, module), expected, rtol=1e-4, atol=1e-5)


@fuzz("adapters", adapter=adapters())
def test_adapters_of_any_shape_are_read_right(folder: Path, adapter: Any) -> None:
    settings, sizes, spelling = adapter
    tensors = tensors_of(sizes)
    write(folder, settings, {spelling(name): tensor for name, tensor in tensors.items()})
    outcome = right_or_one_line(lambda: read_peft(folder, SHAPE))
    assert outcome.refusal is None, outcome.refusal
    assert_right(outcome.value, tensors, sizes)


@fuzz(
    "adapter configs",
    adapter=adapters(),
    changes=st.dictionaries(SETTINGS | st.text(max_size=5), COMMON | JSON, max_size=2),
)
def test_settings_are_reproduced_or_refused(folder: Path, adapter: Any, changes: dict[str, Any]) -> None:
    settings, sizes, _ = adapter
    changed = {name: value for name, value in (settings | changes).items() if value != LEFT_OUT}
    tensors = tensors_of(sizes)
    write(folder, changed, tensors)
    outcome = right_or_one_line(lambda: read_peft(folder, SHAPE))
    scaling = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
    if outcome.refusal is None and not scaling & changes.keys():
        assert_right(outcome.value, tensors, sizes)  # what was accepted has no effect
    elif outcome.refusal is not None:
        assert str(folder) in outcome.refusal


@fuzz("adapter config bytes", value=JSON, cut=st.integers(0, 20))
def test_any_json_as_settings(folder: Path, value: Any, cut: int) -> None:
    content = orjson.dumps(value)
    write(folder, {}, tensors_of({MODULES[0]: (1, 1.0)}))
    (folder / "adapter_config.json").write_bytes(content[: max(0, len(content) - cut)])
    assert right_or_one_line(lambda: read_peft(folder, SHAPE)).refusal is not None


@fuzz(
    "adapter tensors",
    adapter=adapters(),
    at=st.floats(0, 1),
    new=st.binary(max_size=3),
    cut=st.integers(0, 30),
    name=st.text(max_size=8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.bool]),
)
def test_damaged_tensors(
    folder: Path, adapter: Any, at: float, new: bytes, cut: int, name: str, dtype: torch.dtype
) -> None:
    """A file cut short, overwritten inside its header, with a tensor of another name or type."""
    settings, sizes, _ = adapter
    tensors = tensors_of(sizes)
    odd = tensors | {name: torch.ones(2, 2).to(dtype)}
    write(folder, settings, odd)
    assert right_or_one_line(lambda: read_peft(folder, SHAPE)).refusal is not None
    write(folder, settings, {key: tensor.to(dtype) for key, tensor in tensors.items()})
    outcome = right_or_one_line(lambda: read_peft(folder, SHAPE))
    assert (outcome.refusal is None) == (dtype in (torch.float32, torch.bfloat16))
    write(folder, settings, tensors)
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    start = int(at * (header - 1))
    content[start : start + len(new)] = new
    path.write_bytes(content[: len(content) - cut])
    outcome = right_or_one_line(lambda: read_peft(folder, SHAPE))
    if outcome.refusal is None and cut == 0 and not new:
        assert_right(outcome.value, tensors, sizes)
