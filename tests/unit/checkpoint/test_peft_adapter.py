"""An adapter merges into its base the same way everywhere, and goes to PEFT and back."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_medllm.checkpoint.convert import export_checkpoint
from megatron_medllm.checkpoint.description import describe_checkpoint
from megatron_medllm.checkpoint.hf_writer import export_hf
from megatron_medllm.checkpoint.peft_adapter import export_peft, load_adapter, read_peft
from megatron_medllm.checkpoint.state_writer import StateWriter
from megatron_medllm.config.model import shape_from_hf_config
from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.errors import UserError
from megatron_medllm.models.adapters import add_adapters
from megatron_medllm.parallel import mcore
from tests.worlds.model_dir import read_tensors, twin_shape, write_twin
from tests.worlds.running import IDS, assert_close, megatron_logits, running, transformers_logits

SHAPE = twin_shape("0.5b")
CONFIG = AdapterConfig(rank=3, alpha=5.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twin(tmp_path_factory.mktemp("base") / "hf", SHAPE, dtype=torch.float32)


@pytest.fixture(scope="module", params=["0.5b", "qwen3-4b"])
def any_base(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The twin of a model of every family."""
    return write_twin(tmp_path_factory.mktemp("base") / "hf", twin_shape(request.param), dtype=torch.float32)


def adapter_parameters(chunk) -> dict[str, torch.Tensor]:
    return {name: p for name, p in chunk.named_parameters() if "lora_" in name}


@torch.no_grad()
def trained_adapter(chunk, config: AdapterConfig) -> None:
    """Adapters whose B is not zero any more."""
    add_adapters([chunk], config, seed=1, tp_rank=0, tp_size=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter_parameters(chunk).values():
        parameter.normal_(generator=generator).mul_(0.2)


@torch.no_grad()
def test_one_adapter_every_way_out_and_back(any_base: Path, tmp_path: Path):
    base, shape = any_base, shape_from_hf_config(any_base)
    with running(base) as (chunk, here):
        plain = megatron_logits(chunk)
        trained_adapter(chunk, CONFIG)
        expected = megatron_logits(chunk)
        assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
        export_hf([chunk], shape, tmp_path / "live", runtime=here, source_dir=base, dtype=torch.float32)
        ckpt = tmp_path / "ckpt"
        ckpt.mkdir()
        StateWriter().start(mcore.sharded_state([chunk], None, is_loading=False), ckpt, wait=True)
        describe_checkpoint(ckpt, shape, dtype=torch.float32, source_dir=base, adapter=CONFIG)
        trained = {name: p.clone() for name, p in adapter_parameters(chunk).items()}

    with pytest.raises(UserError, match="holds an adapter; name the HF directory of the base"):
        export_checkpoint(ckpt, tmp_path / "merged")
    export_checkpoint(ckpt, tmp_path / "merged", base_dir=base)
    live, merged = read_tensors(tmp_path / "live"), read_tensors(tmp_path / "merged")
    assert live.keys() == merged.keys()
    for name in live:
        torch.testing.assert_close(merged[name], live[name], rtol=0, atol=1e-6)
    assert_close(transformers_logits(tmp_path / "live"), expected)
    assert_close(transformers_logits(tmp_path / "merged"), expected)

    export_peft(ckpt, tmp_path / "peft", base_model=str(base))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft")
    assert_close(theirs(IDS[None]).logits[0], expected)

    (tmp_path / "run" / "step-00000009.bak").mkdir(parents=True)
    (tmp_path / "run" / "step-00000003").mkdir()
    shutil.copytree(ckpt, tmp_path / "run" / "step-00000007")
    export_peft(tmp_path / "run", tmp_path / "bf16", base_model=None, dtype=torch.bfloat16)
    narrow, wide = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("bf16", "peft"))
    assert {t.dtype for t in narrow.values()} == {torch.bfloat16}
    assert {t.dtype for t in wide.values()} == {torch.float32}  # as the checkpoint
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in wide)
    assert json.loads((tmp_path / "bf16" / "adapter_config.json").read_text())["base_model_name_or_path"] is None

    adapter = read_peft(tmp_path / "peft", shape)
    assert adapter.config == CONFIG
    with running(base) as (chunk, _):
        add_adapters([chunk], adapter.config, seed=9, tp_rank=0, tp_size=1)
        load_adapter([chunk], adapter, tp_rank=0, tp_size=1)
        for name, parameter in adapter_parameters(chunk).items():
            assert torch.equal(parameter, trained[name]), name


@torch.no_grad()
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_made_by_peft(any_base: Path, tmp_path: Path, rslora: bool):
    """q and v each with their own A, no k; nothing on gate; one layer only for down."""
    base, shape = any_base, shape_from_hf_config(any_base)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=r".*(q_proj|v_proj|up_proj)|.*\.1\.mlp\.down_proj", use_rslora=rslora
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.normal_().mul_(0.3)
    theirs.save_pretrained(tmp_path / "peft")
    expected = theirs(IDS[None]).logits[0]

    adapter = read_peft(tmp_path / "peft", shape)
    assert adapter.config.targets == ("linear_qkv", "linear_fc1", "linear_fc2")
    assert adapter.config.rank == 4  # q's A above v's
    with running(base) as (chunk, _):
        add_adapters([chunk], adapter.config, seed=9, tp_rank=0, tp_size=1)
        load_adapter([chunk], adapter, tp_rank=0, tp_size=1)
        assert_close(megatron_logits(chunk), expected)


def peft_directory(directory: Path, **changes: object) -> Path:
    directory.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_dora": False}
    (directory / "adapter_config.json").write_text(json.dumps(settings | changes))
    stem = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
    halves = {f"{stem}A.weight": torch.ones(2, 56), f"{stem}B.weight": torch.ones(56, 2)}
    save_file(halves, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("o_proj.lora_B", None, r"o_proj.lora_B.weight' is missing, expected \[56, 2\]"),
        ("o_proj.lora_A", torch.ones(3, 56), r"o_proj.lora_A.weight' has shape \[3, 56\], expected \[2, 56\]"),
        ("rotary.lora_A", torch.ones(2, 2), r"rotary.lora_A.weight' belongs to no linear of this model"),
    ],
)
def test_wrong_adapter_tensors_are_named(tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str):
    directory = peft_directory(tmp_path / "peft")
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    full = f"base_model.model.model.layers.0.self_attn.{name}.weight"
    tensors.pop(full) if tensor is None else tensors.update({full: tensor})
    save_file(tensors, path)
    with pytest.raises(UserError, match=message):
        read_peft(directory, SHAPE)


def test_a_quantized_base_is_not_merged_as_if_it_were_whole(tmp_path: Path, base: Path):
    with running(base) as (chunk, _):
        trained_adapter(chunk, CONFIG)
        (tmp_path / "ckpt").mkdir()
        StateWriter().start(mcore.sharded_state([chunk], None, is_loading=False), tmp_path / "ckpt", wait=True)
    fp8 = CONFIG.model_copy(update={"base": "fp8"})
    describe_checkpoint(tmp_path / "ckpt", SHAPE, dtype=torch.float32, source_dir=base, adapter=fp8)
    with pytest.raises(UserError, match="trained on a fp8 base"):
        export_checkpoint(tmp_path / "ckpt", tmp_path / "merged", base_dir=base)


def test_a_damaged_checkpoint_or_adapter_is_refused(tmp_path: Path, base: Path):
    with running(base) as (chunk, _):
        trained_adapter(chunk, CONFIG)
        (tmp_path / "ckpt").mkdir()
        StateWriter().start(mcore.sharded_state([chunk], None, is_loading=False), tmp_path / "ckpt", wait=True)
    describe_checkpoint(tmp_path / "ckpt", SHAPE, dtype=torch.float32, source_dir=base, adapter=CONFIG)
    export_peft(tmp_path / "ckpt", tmp_path / "peft", base_model=None)
    path = tmp_path / "peft" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model.safetensors: tensor '.*' does not match its digest"):
        read_peft(tmp_path / "peft", SHAPE)

    (tmp_path / "ckpt" / "digests.json").write_text(json.dumps({"common.pt": "0" * 64}))
    with pytest.raises(UserError, match=r"common.pt: does not match its digest: a damaged file"):
        export_peft(tmp_path / "ckpt", tmp_path / "again", base_model=None)
    assert not (tmp_path / "again").exists()
