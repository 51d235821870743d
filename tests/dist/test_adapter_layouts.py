"""Adapters in every layout against one process: losses, gradients, quantized bases, checkpoints between layouts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_medllm.checkpoint.description import describe_checkpoint
from megatron_medllm.checkpoint.peft_adapter import export_peft
from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.models.adapters import LINEARS
from tests.dist.adapter_ranks import SHAPE
from tests.worlds.ranks import run_ranks

LORA = {"rank": 4, "alpha": 8.0}
# B is random, so that A has a gradient too; one step.
FILLED = {"adapter": LORA, "fill_b": True, "steps": [0]}
SP, PP = {"tp": 2, "sp": True}, {"pp": 2}
LAYOUTS = {
    "tp": {"tp": 2},
    "sp": SP,
    "sp_recompute": SP | {"recompute": "full"},
    "sp_swiglu": SP | {"recompute": "swiglu"},
    "vpp": PP | {"vpp": 2},
    "dp": {"dp": 2},
    "cp": {"cp": 2, "distributed_optimizer": False},
}
DROPOUT = FILLED | {"adapter": LORA | {"dropout": 0.3}}
LOADED = {"adapter": LORA, "steps": [2, 3]}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Job name -> what each of its ranks left."""
    directory = tmp_path_factory.mktemp("adapters")
    one, two = str(directory / "saved_by_one"), str(directory / "saved_by_two")
    bases = {name: FILLED | {"adapter": LORA | {"base": name}} for name in quantized_bases()}
    run(
        directory,
        1,
        {
            "one": FILLED | {"layout": {}},
            "continuous": {"adapter": LORA, "steps": [0, 1, 2, 3, 4], "layout": {}},
            "first": {"adapter": LORA, "steps": [0, 1], "layout": {}, "save": one},
            "dropout_one": DROPOUT | {"layout": {}},
            **{f"{name}_one": job | {"layout": {}} for name, job in bases.items()},
        },
    )
    from_one = exported(Path(one))
    run(
        directory,
        2,
        {
            **{name: FILLED | {"layout": layout} for name, layout in LAYOUTS.items()},
            "loaded_pp": LOADED | {"layout": PP, "load": one},
            "loaded_sp": LOADED | {"layout": SP, "load": one, "save": two},
            "peft_sp": {"adapter": LORA, "steps": [2], "layout": SP, "peft": from_one},
            "peft_vpp": {"adapter": LORA, "steps": [2], "layout": LAYOUTS["vpp"], "peft": from_one},
            "dropout_tp": DROPOUT | {"layout": {"tp": 2}},
            "dropout_cp": DROPOUT | {"layout": {"cp": 2}},
            **{f"{name}_sp": job | {"layout": SP} for name, job in bases.items()},
        },
    )
    last = {"adapter": LORA, "steps": [4], "layout": {}}
    run(directory, 1, {"back": last | {"load": two}, "peft_back": last | {"peft": exported(Path(two))}})
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(directory.glob("*.pt")):
        found.setdefault(path.name.split(".")[0], []).append(torch.load(path))
    return found


def exported(checkpoint: Path) -> str:
    """The checkpoint's adapters as a PEFT directory."""
    peft_dir = checkpoint.with_name(f"{checkpoint.name}_peft")
    describe_checkpoint(checkpoint, SHAPE, dtype=torch.float32, source_dir=None, adapter=AdapterConfig(**LORA))
    export_peft(checkpoint, peft_dir, base_model="random")
    return str(peft_dir)


def quantized_bases() -> list[str]:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return ["fp8"]
    return ["fp8", "nf4"]


def run(directory: Path, world_size: int, jobs: dict[str, dict]) -> None:
    path = directory / "jobs.json"
    path.write_text(json.dumps([job | {"name": name, "out": str(directory)} for name, job in jobs.items()]))
    run_ranks(world_size, "tests.dist.adapter_ranks", str(path), timeout_s=400, runtimes=len(jobs))


def whole_gradients(ranks: list[dict[str, Any]], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients of all ranks put together, in one process's order."""
    whole = {}
    for name, expected in like.items():
        linear, half = name.split(".")[-2:]
        parts = [rank["gradients"][name] for rank in ranks if name in rank["gradients"]]
        if parts[0].shape == expected.shape:
            whole[name] = parts[0]
            assert all(torch.allclose(part, parts[0], atol=1e-9) for part in parts), f"{name}: copies differ"
        elif half == "lora_a":
            whole[name] = torch.cat(parts, dim=1)
        elif linear == "linear_fc1":  # gate and up are split each on its own
            whole[name] = torch.cat([part.chunk(2)[block] for block in (0, 1) for part in parts])
        else:
            whole[name] = torch.cat(parts)
    return whole


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "dp"])
def test_loss_and_gradients_equal_one_process(results: dict, layout: str):
    one, ranks = results["one"][0], results[layout]
    assert ranks[0]["losses"] == pytest.approx(one["losses"], abs=2e-6)
    assert len(one["gradients"]) == 2 * 4 * len(LINEARS)
    for name, found in whole_gradients(ranks, one["gradients"]).items():
        expected = one["gradients"][name]
        assert expected.norm() > 0, name
        assert (found - expected).norm() < 1e-5 * expected.norm(), name


def test_replicas_share_the_batch(results: dict):
    assert results["dp"][0]["losses"] == pytest.approx(results["one"][0]["losses"], abs=2e-6)


@pytest.mark.parametrize("base", quantized_bases())
def test_a_quantized_base_is_the_same_model_under_tensor_parallelism(results: dict, base: str):
    one, sp = results[f"{base}_one"][0], results[f"{base}_sp"][0]
    # Sums in another order move an activation by 1e-7, so now and then to the next FP8 value; NF4 casts weights only.
    tolerance = 5e-4 if base == "fp8" else 2e-6
    assert sp["losses"] == pytest.approx(one["losses"], abs=tolerance)
    assert abs(one["losses"][0] - results["one"][0]["losses"][0]) > 2 * tolerance, "the base was not quantized"


@pytest.mark.parametrize("name", ["dropout_tp", "dropout_cp"])
def test_dropout_drops_the_same_where_tokens_or_weights_are_split(results: dict, name: str):
    one = results["dropout_one"][0]["losses"]
    assert results[name][0]["losses"] == pytest.approx(one, abs=2e-6)
    assert abs(one[0] - results["one"][0]["losses"][0]) > 1e-4, "nothing was dropped"


@pytest.mark.parametrize("loaded", ["loaded_sp", "loaded_pp"])
def test_another_layout_goes_on_where_one_process_stopped(results: dict, loaded: str):
    assert results[loaded][0]["losses"] == pytest.approx(results["continuous"][0]["losses"][2:4], abs=2e-6)


@pytest.mark.parametrize(("loaded", "step"), [("peft_sp", 2), ("peft_vpp", 2), ("peft_back", 4)])
def test_peft_directories_carry_adapters_between_layouts(results: dict, loaded: str, step: int):
    assert results[loaded][0]["losses"] == pytest.approx([results["continuous"][0]["losses"][step]], abs=2e-6)


def test_and_back(results: dict):
    assert results["back"][0]["losses"] == pytest.approx(results["continuous"][0]["losses"][4:], abs=2e-6)
