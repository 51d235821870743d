"""PEFT's settings are reproduced or refused by name; other trainers' spellings of the tensors' names are read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_medllm.checkpoint.peft_adapter import load_adapter, read_peft
from megatron_medllm.checkpoint.peft_settings import WITHOUT_EFFECT, PeftSettings, read_settings
from megatron_medllm.errors import UserError
from megatron_medllm.models.adapters import add_adapters
from tests.worlds.model_dir import twin_shape, write_twin
from tests.worlds.running import IDS, assert_close, megatron_logits, running

SHAPE = twin_shape("0.5b")
O_PROJ = "base_model.model.model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twin(tmp_path_factory.mktemp("base") / "hf", SHAPE, dtype=torch.float32)


@torch.no_grad()
def made_by_peft(base: Path, directory: Path, **settings: Any) -> Path:
    """An adapter whose A and B are both random, as PEFT saves it."""
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_().mul_(0.3)
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def loaded_by_peft(base: Path, directory: Path) -> torch.Tensor:
    """Logits of a fresh base with the adapter."""
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)(IDS[None]).logits[0]


@torch.no_grad()
def loaded_by_us(base: Path, directory: Path) -> torch.Tensor:
    adapter = read_peft(directory, SHAPE)
    with running(base) as (chunk, _):
        add_adapters([chunk], adapter.config, seed=9, tp_rank=0, tp_size=1)
        load_adapter([chunk], adapter, tp_rank=0, tp_size=1)
        return megatron_logits(chunk)


QV = ["q_proj", "v_proj"]
READ = {
    "ranks by name": {"r": 4, "lora_alpha": 8, "target_modules": QV, "rank_pattern": {"q_proj": 2, "v_proj": 6}},
    "ranks and alphas of one layer": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "rank_pattern": {r"layers\.1\.self_attn\.k_proj": 1, "down_proj": 5},
        "alpha_pattern": {"^model.layers.0.mlp.up_proj": 31, "o_proj|gate_proj": 2.5},
    },
    "the first pattern counts": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["o_proj"],
        "rank_pattern": {r"layers\.1.*": 5, "o_proj": 3},
    },
    "rsLoRA with patterns": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"down_proj": 12},
    },
    "one layer": {"r": 2, "lora_alpha": 3, "target_modules": QV, "layers_to_transform": 1},
    "layers of a pattern": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["up_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "without some": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": r".*_proj",
        "exclude_modules": r".*layers\.0\..*|.*\.gate_proj",
    },
    "gaussian": {"r": 2, "lora_alpha": 3, "target_modules": QV, "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 2, "lora_alpha": 3, "target_modules": QV, "init_lora_weights": "orthogonal"},
    "eva": {"r": 2, "lora_alpha": 3, "target_modules": QV, "init_lora_weights": "eva"},
    "any start": {"r": 2, "lora_alpha": 3, "target_modules": QV, "init_lora_weights": False},
}


@pytest.mark.parametrize("settings", READ.values(), ids=READ)
def test_what_is_read_gives_peft_s_logits(base: Path, tmp_path: Path, settings: dict):
    directory = made_by_peft(base, tmp_path / "peft", **settings)
    expected = loaded_by_peft(base, directory)
    with running(base) as (chunk, _):
        assert (megatron_logits(chunk) - expected).abs().max() > 0.1 * expected.abs().max()
    assert_close(loaded_by_us(base, directory), expected)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "mica"])
def test_a_start_that_changes_more_than_the_adapter_is_refused(base: Path, tmp_path: Path, start: str):
    directory = made_by_peft(base, tmp_path / "peft", r=2, target_modules=QV, init_lora_weights=start)
    with pytest.raises(
        UserError, match=rf"adapter_config.json: init_lora_weights='{start}' is not supported: PEFT may"
    ):
        read_peft(directory, SHAPE)


def handmade(directory: Path, settings: Any = None, **changes: Any) -> Path:
    """An adapter on one o_proj."""
    directory.mkdir()
    if settings is None:
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]} | changes
        settings = {name: value for name, value in settings.items() if value != "left out"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    halves = {f"{O_PROJ}.lora_A.weight": torch.ones(2, 56), f"{O_PROJ}.lora_B.weight": torch.ones(56, 2)}
    save_file(halves, directory / "adapter_model.safetensors")
    return directory


REFUSED: dict[str, Any] = {
    "peft_type": "IA3",
    "task_type": "SEQ_CLS",
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "layers_pattern": "blocks",
    "megatron_config": {"hidden_size": 8},
    "trainable_token_indices": [3],
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "ArB2r"},
    "use_dora": True,
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "monteclora_config": {"x": 1},
    "layer_replication": [[0, 2], [1, 2]],
    "lora_bias": True,
    "target_parameters": ["mlp.gate_up_proj"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"x": 1},
    "init_lora_weights": "loftq",
    "a_setting_of_tomorrow": "on",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_with_another_effect_is_refused_by_name(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=rf"adapter_config.json: {name}=.*"):
        read_settings(handmade(tmp_path / "peft", **{name: REFUSED[name]}))


@pytest.mark.parametrize("value", [None, False, [], {}, 0, ""])
def test_an_unknown_setting_that_is_off_is_accepted(tmp_path: Path, value: object):
    assert read_settings(handmade(tmp_path / "peft", a_setting_of_tomorrow=value)).r == 2


def test_every_setting_of_the_installed_peft_is_known(tmp_path: Path):
    """A new PEFT with a new setting turns this red: decide what it does."""
    known = PeftSettings.model_fields.keys() | WITHOUT_EFFECT | REFUSED.keys()
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known
    peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]).save_pretrained(tmp_path)
    read = read_settings(tmp_path)
    assert (read.r, read.lora_alpha, read.scale_of("model.layers.0.self_attn.q_proj")) == (3, 5, 5 / 3)


MALFORMED = {
    "r": ("left out", "r: Field required"),
    "lora_alpha": ("left out", "lora_alpha: Field required"),
    "peft_type": ("left out", "peft_type: Field required"),
    "lora_dropout": ("0.1", r"lora_dropout: Input should be a valid number \(found '0.1'\)"),
    "use_rslora": ("true", r"use_rslora: Input should be a valid boolean \(found 'true'\)"),
    "rank_pattern": ({"q_proj": 0}, r"rank_pattern.q_proj: Input should be greater than 0 \(found 0\)"),
    "alpha_pattern": ({"(": 1}, r"alpha_pattern: '\(' is no regular expression"),
    "target_modules": ("(", r"target_modules: '\(' is no regular expression"),
    "layers_to_transform": (["0"], r"layers_to_transform.* valid integer \(found '0'\)"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_setting_is_one_line(tmp_path: Path, name: str):
    value, message = MALFORMED[name]
    with pytest.raises(UserError, match=f"adapter_config.json: {message}") as caught:
        read_settings(handmade(tmp_path / "peft", **{name: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["8", True, 0, -1, 2.5, None], ids=repr)
def test_a_rank_is_a_positive_whole_number(tmp_path: Path, value: object):
    with pytest.raises(UserError, match=r"adapter_config.json: r: Input should be"):
        read_settings(handmade(tmp_path / "peft", r=value))


@pytest.mark.parametrize("value", [[], "x", 3])
def test_settings_that_are_no_object(tmp_path: Path, value: object):
    with pytest.raises(UserError, match=r"adapter_config.json: expected a JSON object of settings, found"):
        read_settings(handmade(tmp_path / "peft", settings=value))


RENAMED = {
    "the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "another adapter's name": lambda name: name.replace(".weight", ".policy.weight"),
    "torch.compile inside": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "torch.compile outside": lambda name: "_orig_mod." + name,
    "DDP": lambda name: "module." + name,
    "FSDP": lambda name: name.replace(".layers.", "._fsdp_wrapped_module.layers."),
    "checkpointed layers": lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "without prefix": lambda name: name.removeprefix("base_model.model."),
    "two at once": lambda name: "_orig_mod." + name.replace(".weight", ".default.weight"),
}


def rename(directory: Path, change: Any) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = {change(name): tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path)


@pytest.mark.parametrize("change", RENAMED.values(), ids=RENAMED)
def test_names_as_other_trainers_write_them(tmp_path: Path, change: Any):
    plain = read_peft(handmade(tmp_path / "plain"), SHAPE)
    rename(handmade(tmp_path / "renamed"), change)
    read = read_peft(tmp_path / "renamed", SHAPE)
    assert read.config == plain.config
    assert read.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(read.tensors[name], plain.tensors[name]) for name in plain.tensors)


def test_two_adapters_in_one_file_are_not_mixed(tmp_path: Path):
    directory = handmade(tmp_path / "peft")
    rename(directory, lambda name: name.replace(".weight", ".a.weight" if "lora_A" in name else ".b.weight"))
    with pytest.raises(UserError, match=r"adapter_model.safetensors: holds several adapters: a, b"):
        read_peft(directory, SHAPE)


def test_one_tensor_under_two_spellings(tmp_path: Path):
    directory = handmade(tmp_path / "peft")
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {f"_orig_mod.{O_PROJ}.lora_A.weight": torch.zeros(2, 56)}, path)
    with pytest.raises(UserError, match=r"tensor '.*' is there twice"):
        read_peft(directory, SHAPE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj"]}, "adapter_config.json puts no adapter on model.layers.0.self_attn.o_proj"),
        ({"layers_to_transform": [1]}, "adapter_config.json puts no adapter on model.layers.0.self_attn.o_proj"),
        ({"exclude_modules": ["o_proj"]}, "adapter_config.json puts no adapter on model.layers.0.self_attn.o_proj"),
        ({"init_lora_weights": False}, r"layers.1.self_attn.o_proj.lora_A.weight' is missing, and would start at ran"),
        ({"rank_pattern": {"o_proj": 3}}, r"has shape \[2, 56\], expected \[3, 56\]"),
    ],
)
def test_settings_and_tensors_that_contradict_each_other(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        read_peft(handmade(tmp_path / "peft", **changes), SHAPE)


def test_an_adapter_in_another_format_is_told_the_way_out(tmp_path: Path):
    directory = handmade(tmp_path / "peft")
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(UserError, match=r"only safetensors are read; adapter_model.bin is there: load it with PEFT"):
        read_peft(directory, SHAPE)
