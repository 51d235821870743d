"""Every recipe in examples/ goes through the commands that come before training, with its own globs, on small inputs.

`medllm certify` of every recipe is in tests/dist/test_certify.py.
"""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_medllm.cli.app import app
from megatron_medllm.shipped import shipped
from megatron_medllm.storage import read_json
from tests.worlds.example_inputs import write_example_inputs

RECIPES = sorted(shipped("examples").glob("*.yaml"))
# The invented world of examples/laptop.yaml, made small.
SMALL_DEMO = [
    f"demo.{name}={count}"
    for name, count in {
        "diseases": 16, "known_diseases": 6, "towns": 8, "base_documents": 60, "medical_documents": 60,
        "exam_questions": 12, "development_questions": 8, "train_questions": 16, "vocab_size": 700,
    }.items()
]  # fmt: skip
EXPECTED = {"laptop": {"base", "medical"}, "laptop-real": {"general", "medical"}, "laptop-qwen2.5-0.5b": set()}
STAGES = {"laptop": ["base", "cpt"], "laptop-real": ["base", "cpt"], "laptop-qwen2.5-0.5b": ["rpo"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_example_inputs(tmp_path_factory.mktemp("inputs") / "data")


def medllm(*arguments: object) -> str:
    """Run a command; what it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_up_to_its_training(tmp_path, data, recipe):
    run_dir = tmp_path / "run"
    settings = [f"run_dir={run_dir}"]
    if recipe.stem == "laptop":
        settings += SMALL_DEMO
        medllm("demo", recipe, *settings)
    else:
        settings.append(f"data={data}")
    if recipe.stem == "laptop-qwen2.5-0.5b":
        settings.append(f"model.path={data / 'Qwen2.5-0.5B'}")

    printed = medllm("corpus", "build", recipe, *settings, "--workers", 1)
    names = EXPECTED.get(recipe.stem, set() if recipe.stem.startswith("rpo") else {"medical"})
    manifests = {name: read_json(run_dir / "corpus" / name / "manifest.json") for name in names}
    assert {path.parent.name for path in run_dir.glob("corpus/*/manifest.json")} == names
    for name, manifest in manifests.items():
        for source, facts in manifest["sources"].items():
            assert f"{name}/{source}: {facts['documents']:,} documents" in printed
            assert facts["documents"] == facts["documents_read"] > 0
    if recipe.stem.startswith("cpt"):
        inputs = {"/".join(Path(path).parts[-2:]) for path in manifests["medical"]["inputs"]}
        assert inputs == {f"{folder}/part-{part}.jsonl" for folder in ("medical", "general") for part in range(2)}
        assert manifests["medical"]["sources"]["general"]["weight"] == pytest.approx(0.2)
        assert len(manifests["medical"]["built_from"]["exams"]) > 0

    stages = STAGES.get(recipe.stem, [recipe.stem[:3]])
    for stage in stages:
        assert json.loads(medllm("plan", recipe, *settings, f"stage={stage}", "--json"))["fits"] is True
    scripts = medllm("submit", recipe, *settings, "--dry-run")
    assert scripts.count("#SBATCH --job-name=") >= len(stages)
