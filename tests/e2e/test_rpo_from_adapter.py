"""Preference training that goes on from the adapter of continued pretraining: its reference is base and adapter."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_medllm.checkpoint.peft_adapter import export_peft
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json, write_json
from megatron_medllm.train.loop import train
from megatron_medllm.train.scoring import score
from tests.worlds.pairs import random_pairs, rpo_settings, write_model, write_pairs
from tests.worlds.run import metrics, run_config


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, pairs, and a PEFT adapter of rank 6 that SFT trained on that base."""
    directory = tmp_path_factory.mktemp("adapter")
    model = write_model(directory / "hf", layers=2, hidden=128, ffn=128)
    pairs = write_pairs(directory / "pairs.jsonl", random_pairs(16))
    adapter = {"rank": 6, "alpha": 12.0, "targets": ["linear_qkv", "linear_fc1", "linear_fc2"]}
    sft = {"loss": {"kind": "sft"}, "adapter": adapter, "optimizer": {"lr": 1e-2}, "epochs": 2}
    assert train(run_config(rpo_settings(model, pairs, directory / "sft", **sft))) == 0
    newest = sorted((directory / "sft" / "rpo" / "checkpoints").iterdir())[-1]
    export_peft(newest, directory / "peft", base_model=str(model))
    return {"model": model, "pairs": pairs, "adapter": directory / "peft"}


@pytest.mark.parametrize("base", ["bf16", "fp8", "nf4"])
def test_the_first_margin_is_zero(start, tmp_path, base):
    if base == "nf4":
        pytest.importorskip("bitsandbytes")

    def settings(name: str, adapter: dict) -> dict:
        return rpo_settings(start["model"], start["pairs"], tmp_path / name, adapter={"base": base} | adapter, epochs=2)

    run = run_config(settings("run", {"path": str(start["adapter"])}))
    bare = run_config(settings("bare", {"rank": 4}))
    ours, bares = (
        parquet.read_table(score(r) / "part-00000.parquet")["chosen_logprob"].to_numpy() for r in (run, bare)
    )
    assert np.abs(ours - bares).max() > 1.0  # the adapter is part of the reference
    assert train(run) == 0
    margins = metrics(tmp_path / "run" / "rpo", "abs_margin")
    assert margins[0] < 1e-3 < margins[1]
    stored = json.loads((sorted((tmp_path / "run/rpo/checkpoints").iterdir())[-1] / "model.json").read_text())
    assert stored["adapter"]["rank"] % 6 == 0

    # Dropout on an adapter that is not zero: the first policy differs from its reference by design.
    noisy = settings("noisy", {"path": str(start["adapter"]), "dropout": 0.3})
    noisy["rpo"]["reference"] = str(tmp_path / "run" / "reference")
    assert train(run_config(noisy)) == 0
    assert metrics(tmp_path / "noisy" / "rpo", "abs_margin")[0] > 1e-2


def test_another_adapter_is_another_reference(start, tmp_path):
    def settings(adapter: dict) -> dict:
        found = rpo_settings(start["model"], start["pairs"], tmp_path, adapter=adapter)
        return found

    score(run_config(settings({"path": str(start["adapter"])})))
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(start["adapter"] / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = tensors[name] + torch.eye(*tensors[name].shape) * 1e-2
    save_file(tensors, other / "adapter_model.safetensors")
    config = read_json(start["adapter"] / "adapter_config.json")
    write_json(other / "adapter_config.json", config)
    for adapter in ({"path": str(other)}, {"rank": 4}):
        with pytest.raises(UserError, match=r"stale reference .* other adapter;"):
            train(run_config(settings(adapter)))
    save_file(load_file(start["adapter"] / "adapter_model.safetensors"), other / "adapter_model.safetensors")
    write_json(other / "adapter_config.json", config | {"lora_alpha": 2 * config["lora_alpha"]})
    with pytest.raises(UserError, match=r"stale reference .* other adapter;"):
        train(run_config(settings({"path": str(other)})))
    # Keys written before there was an adapter among their parts are still good where there is none.
    key_path = score(run_config(settings({"rank": 4}))) / "key.json"
    key = read_json(key_path)
    assert key.pop("adapter") == "none"
    write_json(key_path, key)
    assert train(run_config(settings({"rank": 4}))) == 0
