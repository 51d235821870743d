"""Adapters in PEFT's format, against peft and transformers themselves: out, in, and merged."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron_medllm.checkpoint.peft import export_peft, merge_peft, read_peft
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig
from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.errors import UserError
from megatron_medllm.parallel import runtime
from megatron_medllm.parallel.packed import PackedSequences, Segment
from tests.unit.checkpoint.twins import read_tensors, twin_shape, write_twin

SHAPE = twin_shape("7b")
LORA = AdapterConfig(rank=4, alpha=8.0)
IDS = torch.arange(20) * 11 % SHAPE.vocab_size


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    runtime.start(LayoutConfig(), seed=0)
    yield
    runtime.stop()


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twin(tmp_path_factory.mktemp("peft") / "base", SHAPE, dtype=torch.float32)


def build(base_dir: Path, adapter: AdapterConfig) -> Any:
    from megatron_medllm.checkpoint.hf_reader import load_hf_weights
    from megatron_medllm.models.adapters import add_adapters
    from megatron_medllm.models.qwen25 import build_model, unwrap

    chunks = build_model(ModelConfig(shape=SHAPE, dtype="float32"), LayoutConfig(), device=torch.device("cpu"))
    load_hf_weights(chunks, base_dir, SHAPE, tp_rank=0, tp_size=1)
    model = unwrap(chunks[0])
    add_adapters([model], adapter, seed=2, tp_rank=0, tp_size=1)
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Adapters that show in the logits."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("lora_b"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    positions = torch.arange(len(IDS))
    packed = PackedSequences.from_segments((Segment(0, len(IDS)),), positions, backend="torch")
    model.eval()
    return model(IDS[None], positions[None], None, packed_seq_params=packed)[0, :, : SHAPE.vocab_size]


@torch.no_grad()
def hf_logits(model: Any) -> Tensor:
    return model.eval()(IDS[None]).logits[0]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def trained(base_dir: Path) -> tuple[Any, Path]:
    """An adapted model and its adapters as PEFT's directory, by way of a training checkpoint."""
    from megatron_medllm.parallel import mcore

    model = build(base_dir, LORA)
    randomize(model)
    checkpoint = base_dir.parent / "checkpoint"
    checkpoint.mkdir()
    mcore.save_sharded(mcore.sharded_state([model], None, is_loading=False), checkpoint)
    peft_dir = base_dir.parent / "adapter"
    export_peft(checkpoint, peft_dir, shape=SHAPE, adapter=LORA, base=str(base_dir))
    return model, peft_dir


def test_peft_loads_ours(base_dir: Path, trained: tuple[Any, Path]):
    model, peft_dir = trained
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    plain = hf_logits(base)
    adapted = PeftModel.from_pretrained(base, peft_dir)
    assert relative(hf_logits(adapted), logits(model)) < 1e-5
    assert relative(plain, logits(model)) > 0.1
    stored = load_file(peft_dir / "adapter_model.safetensors")
    assert len(stored) == 2 * 7 * 2  # layers, projections, halves


def test_ours_comes_back_bit_by_bit(base_dir: Path, trained: tuple[Any, Path]):
    from megatron_medllm.checkpoint.peft_model import load_peft

    model, peft_dir = trained
    again = build(base_dir, AdapterConfig(rank=4, alpha=8.0))
    load_peft([again], read_peft(peft_dir, SHAPE), SHAPE, tp_rank=0, tp_size=1)
    expected = dict(model.named_parameters())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_merged_directory_equals_the_adapted_model(base_dir: Path, trained: tuple[Any, Path], tmp_path: Path):
    model, peft_dir = trained
    merge_peft(base_dir, read_peft(peft_dir, SHAPE), tmp_path / "merged", SHAPE, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(hf_logits(merged), logits(model)) < 1e-5


def test_both_ways_of_merging_write_the_same_tensors(base_dir: Path, trained: tuple[Any, Path], tmp_path: Path):
    from megatron_medllm.checkpoint.hf_writer import export_hf

    model, peft_dir = trained
    merge_peft(base_dir, read_peft(peft_dir, SHAPE), tmp_path / "from_disk", SHAPE)
    runtime.stop()
    here = runtime.start(LayoutConfig(), seed=0)
    export_hf([model], SHAPE, tmp_path / "from_run", runtime=here, source_dir=base_dir)
    left, right = read_tensors(tmp_path / "from_disk"), read_tensors(tmp_path / "from_run")
    assert left.keys() == right.keys()
    for name in left:  # bf16: the last bit of the fp32 sums may differ with the shape of the product
        assert relative(left[name].float(), right[name].float()) < 2**-7, name


@pytest.mark.parametrize(
    ("targets", "rank", "rslora"),
    [
        (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 6, False),
        (["q_proj", "v_proj"], 4, True),
    ],
)
def test_we_load_pefts(base_dir: Path, tmp_path: Path, targets: list[str], rank: int, rslora: bool):
    from megatron_medllm.checkpoint.peft_model import load_peft

    base = AutoModelForCausalLM.from_pretrained(base_dir)
    adapted = get_peft_model(base, LoraConfig(r=2, lora_alpha=5, target_modules=targets, use_rslora=rslora))
    randomize(adapted)
    adapted.save_pretrained(tmp_path)
    ours = build(base_dir, AdapterConfig(rank=rank, alpha=7.0))
    load_peft([ours], read_peft(tmp_path, SHAPE), SHAPE, tp_rank=0, tp_size=1)
    assert relative(logits(ours), hf_logits(adapted)) < 1e-5


def test_too_small_a_rank_is_refused(base_dir: Path, tmp_path: Path):
    from megatron_medllm.checkpoint.peft_model import load_peft

    base = AutoModelForCausalLM.from_pretrained(base_dir)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).save_pretrained(tmp_path)
    adapter = read_peft(tmp_path, SHAPE)
    with pytest.raises(UserError, match=r"linear_qkv needs adapter\.rank >= 4, not 3"):
        load_peft([build(base_dir, AdapterConfig(rank=3))], adapter, SHAPE, tp_rank=0, tp_size=1)
    with pytest.raises(UserError, match=r"adapter\.targets needs linear_qkv"):
        load_peft([build(base_dir, AdapterConfig(targets=("linear_fc1",)))], adapter, SHAPE, tp_rank=0, tp_size=1)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("use_dora", True, "use_dora = True is not supported"),
        ("rank_pattern", {"q_proj": 8}, "rank_pattern = "),
        ("modules_to_save", ["lm_head"], "modules_to_save = "),
        ("peft_type", "LOHA", "peft_type is 'LOHA', expected 'LORA'"),
        ("r", None, "r and lora_alpha must be numbers"),
    ],
)
def test_settings_that_are_not_understood_are_refused(
    trained: tuple[Any, Path], tmp_path: Path, setting: str, value: Any, message: str
):
    config = json.loads((trained[1] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {setting: value}))
    with pytest.raises(UserError, match=message):
        read_peft(tmp_path, SHAPE)


def test_foreign_or_missing_tensors_are_named(trained: tuple[Any, Path], tmp_path: Path):
    (tmp_path / "adapter_config.json").write_bytes((trained[1] / "adapter_config.json").read_bytes())
    tensors = load_file(trained[1] / "adapter_model.safetensors")
    path = tmp_path / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    with pytest.raises(UserError, match=f"{path}: tensor '{name}' is missing, though its other half is there"):
        read_peft(tmp_path, SHAPE)
    save_file(tensors | {name: tensors[name][:3].clone()}, path)
    with pytest.raises(UserError, match=r"up_proj.lora_A.weight' has shape \[3, 112\], expected \[4, 112\]"):
        read_peft(tmp_path, SHAPE)
    save_file(tensors | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": tensors[name].clone()}, path)
    with pytest.raises(UserError, match=r"layers.9.mlp.up_proj.lora_A.weight' belongs to no linear layer"):
        read_peft(tmp_path, SHAPE)


def test_nothing_is_overwritten(trained: tuple[Any, Path], base_dir: Path):
    with pytest.raises(UserError, match="already exists"):
        export_peft(base_dir.parent / "checkpoint", trained[1], shape=SHAPE, adapter=LORA, base=None)
    with pytest.raises(UserError, match="already exists"):
        merge_peft(base_dir, read_peft(trained[1], SHAPE), base_dir, SHAPE)
