"""Every recipe in examples/: it loads, says in its name what it is, and fits the hardware it names."""

import re
from pathlib import Path

import pytest

from megatron_medllm.config.run import RunConfig, load
from megatron_medllm.errors import UserError
from megatron_medllm.planner import plan, require_fit
from megatron_medllm.planner.from_config import workload_of

EXAMPLES = Path(__file__).parents[3] / "examples"
RECIPES = sorted(EXAMPLES.glob("[cr]p[to]-qwen*.yaml"))
NAME = re.compile(
    r"(?P<stage>cpt|rpo)-(qwen2\.5-)?(?P<size>(qwen3-)?[\d.]+b)-(?P<nodes>\d+)n(?P<gpus>\d+)g(-tp(?P<tp>\d+)pp(?P<pp>\d+))?"
    r"(-(?P<kind>lora|qlora|fp8lora|fp8))?"
)


def recipe(path: Path) -> tuple[RunConfig, re.Match]:
    """The recipe with its model given by size, as the weights are not here, and its name taken apart."""
    name = NAME.fullmatch(path.stem)
    assert name is not None, f"{path.name} is not named <stage>-<family>-<size>-<N>n<G>g[-tpXppY][-kind].yaml"
    return load(path, ["data=inputs", "model.path=null", f"model.size={name['size']}"]), name


def test_the_recipes_that_are_promised_are_there():
    assert [path.stem for path in RECIPES] == [
        "cpt-qwen2.5-72b-1n4g-tp4pp1-qlora",
        "cpt-qwen2.5-72b-4n8g-tp8pp4-fp8",
        "cpt-qwen2.5-72b-8n8g-tp8pp2-fp8",
        "cpt-qwen2.5-7b-1n1g-fp8lora",
        "cpt-qwen2.5-7b-1n1g-lora",
        "cpt-qwen2.5-7b-1n8g-tp2pp1",
        "cpt-qwen3-8b-1n1g-lora",
        "rpo-qwen2.5-72b-1n2g-tp2pp1-qlora",
        "rpo-qwen2.5-7b-1n1g-lora",
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_is_what_its_name_says(path):
    run, name = recipe(path)
    config, layout = run.stage_config(), run.layout
    assert (run.name, run.stage) == (path.stem, name["stage"])
    assert (layout.nodes, layout.gpus_per_node) == (int(name["nodes"]), int(name["gpus"]))
    assert (layout.tp, layout.pp) == (int(name["tp"] or 1), int(name["pp"] or 1))
    assert layout.world_size == layout.tp * layout.pp * layout.cp * layout.data_parallel_size
    kind = {None: "full", "bf16": "lora", "nf4": "qlora", "fp8": "fp8lora"}[config.adapter and config.adapter.base]
    assert kind == {None: "full", "fp8": "full"}.get(name["kind"], name["kind"])
    assert (config.fp8 == "hybrid") == (name["kind"] == "fp8") == (run.model.backend == "te")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_fits_the_hardware_it_names(path):
    run, _ = recipe(path)
    run.layout.check_model(run.model.resolve_shape())
    found = plan(workload_of(run), run.cluster.hardware)
    require_fit(found)
    assert found.peak_stage.total_bytes < 0.92 * found.hardware.memory_bytes  # room for what the planner cannot know


def test_a_recipe_asks_for_its_inputs():
    with pytest.raises(UserError, match="data must be given, as data="):
        load(RECIPES[0], [])
