"""`medllm certify` passes for right layouts: a few here, all of them and every example with `make certify-faults`."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.worlds.run import REPOSITORY, run_config, write_recipe

from megatron_medllm.certify.certificate import certificate_report
from megatron_medllm.certify.run import certify, prove
from megatron_medllm.certify.stages import certificates, certify_stages
from megatron_medllm.config.run import RunConfig, load

ALL = "MEDLLM_CERTIFY_ALL"  # a file that takes a line of JSON for every certificate
SP, LORA = {"tp": 2, "sp": True}, {"adapter": {"rank": 16, "alpha": 32}}
FP8_LORA = {"adapter": {"rank": 16, "alpha": 32, "base": "fp8"}}
QWEN3 = {"family": "qwen3", "head_dim": 32}  # hidden_size / heads is 16
YARN = {"yarn": {"factor": 4.0, "original_max_position_embeddings": 32}}  # documents are longer than that
LAYOUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "one": ("cpt", {}, {}),
    "tp-sp pp vpp dp": ("cpt", SP | {"pp": 2, "vpp": 2, "dp": 2}, {}),
    # Several gradient buckets with padding at their ends: what Megatron-Core 0.16 saves shifted.
    "tied pp dp": ("cpt", {"pp": 2, "dp": 2}, {"tied": True}),
    "cp tp-sp": ("cpt", SP | {"cp": 2}, {"z_loss": 1e-3, "loss_after": ["x"]}),
    "uneven pp": ("cpt", {"pp": 2, "first_stage_layers": 3}, {}),
    "dp plain optimizer": ("cpt", {"dp": 2, "distributed_optimizer": False, "recompute": "selective"}, {}),
    "tp4 2 KV heads": ("cpt", {"tp": 4}, {"groups": 2}),
    "fp8 tp-sp": ("cpt", SP, {"fp8": "hybrid"}),
    "lora dp tp async": ("cpt", {"dp": 2, "tp": 2}, LORA | {"checkpoint": {"async_save": True}}),
    "fp8 lora tp-sp": ("cpt", SP, FP8_LORA),
    "rpo tp pp": ("rpo", {"tp": 2, "pp": 2}, {}),
    "rpo dp cp": ("rpo", {"dp": 2, "cp": 2}, {}),
    "rpo tp-sp pp vpp recompute": ("rpo", SP | {"pp": 2, "vpp": 2, "recompute": "full"}, {}),
    "rpo lora tp-sp recompute": ("rpo", SP | {"recompute": "full"}, LORA),
    "rpo fp8 lora pp": ("rpo", {"pp": 2}, FP8_LORA),
    "qwen3 tp dp": ("cpt", {"tp": 2, "dp": 2}, QWEN3),
    "qwen3 tp-sp pp": ("cpt", SP | {"pp": 2}, QWEN3 | {"tied": True}),
    "qwen3 cp dp": ("cpt", {"cp": 2, "dp": 2}, QWEN3),
    "qwen3 fp8 tp-sp": ("cpt", SP, QWEN3 | {"fp8": "hybrid"}),
    "qwen3 rpo lora tp-sp recompute": ("rpo", SP | {"recompute": "full"}, LORA | QWEN3),
    "qwen3 rpo fp8 lora pp": ("rpo", {"pp": 2}, FP8_LORA | QWEN3),
    "yarn tp": ("cpt", {"tp": 2}, YARN),
    "qwen3 yarn rpo cp": ("rpo", {"cp": 2}, QWEN3 | YARN),
    "rpo side by side ipo": ("rpo", {"tp": 2, "dp": 2}, {"share_prompt": False, "loss": {"kind": "ipo"}}),
}
IN_CI = ("tied pp dp", "rpo lora tp-sp recompute", "qwen3 tp dp", "qwen3 yarn rpo cp")
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.yaml"))


def run_of(name: str, run_dir: Path) -> RunConfig:
    stage, layout, more = LAYOUTS[name]
    more = dict(more)
    shape = {
        "num_layers": 8, "hidden_size": 256, "num_attention_heads": 16, "num_query_groups": more.pop("groups", 4),
        "ffn_hidden_size": 768, "vocab_size": 1500, "tie_embeddings": more.pop("tied", False),
        **{key: more.pop(key) for key in ("family", "head_dim", "yarn") if key in more},
    }  # fmt: skip
    data = {"pairs": "x"} if stage == "rpo" else {"data": [{"path": "x"}], "epochs": 1}
    section = {"sequence_length": 128, "global_batch_size": 16, "optimizer": {"lr": 1e-3}} | data | more
    model = {"shape": shape, "dtype": "float32"}
    settings = {"run_dir": str(run_dir), "stage": stage, "model": model, "layout": layout, stage: section}
    return run_config(settings)


def example_stages(path: Path) -> list[RunConfig]:
    """An example's run for every stage that trains, its model given by size."""
    size = next((f"model.size={size}" for size in ("qwen3-8b", "72b", "7b", "0.5b") if f"-{size}-" in f"{path.stem}-"), None)
    run = load(path, ["data=none", *(["model.path=null", size] if size else [])])
    return [run.model_copy(update={"stage": name}) for name in ("base", "cpt", "rpo") if getattr(run, name) is not None]


def assert_certified(run: RunConfig, name: str) -> None:
    certificate = prove(run, max_ranks=8)
    if ALL in os.environ:
        line = {"name": name, "stage": run.stage, "ranks": certificate.ranks, "seconds": certificate.seconds,
                "folding": certificate.folding, "passed": certificate.passed,
                "differences": {c.name: c.difference for c in certificate.checks}}  # fmt: skip
        with open(os.environ[ALL], "a") as stream:
            stream.write(json.dumps(line) + "\n")
    assert certificate.passed, certificate_report(certificate)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_right_layout_is_certified(name: str, tmp_path: Path) -> None:
    if name not in IN_CI and ALL not in os.environ:
        pytest.skip("runs with make certify-faults")
    assert_certified(run_of(name, tmp_path), name)


@pytest.mark.skipif(ALL not in os.environ, reason="runs with make certify-faults")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_certified(path: Path) -> None:
    for run in example_stages(path):
        assert_certified(run, path.stem)


def test_a_certificate_is_made_once(tmp_path: Path) -> None:
    run = run_of("one", tmp_path)
    made, was_there = certify(run)
    assert made.passed and not was_there
    assert (tmp_path / "certificate.json").is_file()
    found, was_there = certify(run)
    assert was_there and found.made == made.made and found.checks == made.checks


def test_submit_says_whether_the_layout_is_certified(tmp_path: Path) -> None:
    settings = run_of("one", tmp_path / "run").model_dump(mode="json") | {"cluster": {"gpus": False}}
    recipe = load(write_recipe(settings, tmp_path / "recipe.yaml"), [])
    assert certificates(recipe) == "certificate cpt   no certificate (medllm certify makes one on CPUs)"

    certify_stages(recipe)  # what `submit --certify` does first
    assert certificates(recipe).startswith("certificate cpt   certified 20")
