"""Configuration: what is accepted, what is refused, and in which words."""

from pathlib import Path

import pytest

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import SIZES, ModelShape
from megatron_medllm.config.run import load
from megatron_medllm.errors import UserError

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))
RECIPE = """
run_dir: runs/x
model: {size: mini}
cpt:
  data: [{path: corpus}]
  train_tokens: 1000
  sequence_length: 16
  global_batch_size: 4
  optimizer: {lr: 1e-4}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_loads_and_its_layout_fits_its_model(path):
    run = load(path, ["data=inputs", *(["model.path=base"] if path.stem == "laptop-qwen2.5-0.5b" else [])])
    if run.model.path is None:
        run.layout.check_model(run.model.resolve_shape())


def test_there_are_examples():
    assert EXAMPLES


def test_overrides_and_interpolation(recipe):
    run = load(recipe, ["cpt.optimizer.lr=3e-5", "seed=7", "output=${run_dir}/there", "layout.tp=2"])
    assert run.cpt.optimizer.lr == 3e-5
    assert (run.seed, run.output, run.layout.world_size) == (7, Path("runs/x/there"), 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cpt.optimizer.lrr=1"], "unknown key 'cpt.optimizer.lrr'; did you mean 'lr'?"),
        (["sedd=1"], "unknown key 'sedd'; did you mean 'seed'?"),
        (
            ["cpt.data=[{pth: x}]"],
            r"unknown key 'cpt.data.0.pth'; did you mean 'path'\?|cpt.data.0.path: Field required",
        ),
        (["cpt.sequence_length=long"], "cpt.sequence_length: .*integer.*found 'long'"),
        (["cpt.optimizer.lr=-1"], "cpt.optimizer.lr: .*greater than 0"),
        (["cpt.epochs=2"], "exactly one of train_tokens and epochs"),
        (["model.size=8b"], "unknown size '8b'; known: mini, 0.5b"),
        (["model.path=somewhere"], "exactly one of size, path and shape"),
        (["layout.tp=3", "layout.gpus_per_node=8"], "world of 8 processes is not a multiple of tp"),
        (["layout.sp=true"], "sp=true needs tp > 1"),
        (["seed"], "'seed': expected key=value"),
        (["output=${nowhere}"], "nowhere"),
    ],
)
def test_what_is_wrong_is_named(recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        load(recipe, overrides)


def test_a_key_of_an_earlier_version_is_refused_with_the_new_one(recipe):
    rpo = "pairs: p.jsonl, sequence_length: 8, global_batch_size: 1, optimizer: {lr: 1.0e-3}"
    message = "unknown key 'rpo.rpo_guard': it is now rpo.guard, and its min_edit_distance is rpo.filters"
    with pytest.raises(UserError, match=message):
        load(recipe, [f"rpo={{{rpo}, rpo_guard: {{min_edit_distance: 0.1}}}}"])
    run = load(recipe, [f"rpo={{{rpo}, guard: {{max_margin: 5, stop_after: 3}}, filters: {{min_edit_distance: 0.1}}}}"])
    assert (run.rpo.guard.max_margin, run.rpo.guard.stop_after, run.rpo.filters.min_edit_distance) == (5.0, 3, 0.1)


def test_a_mandatory_value_is_asked_for(recipe):
    recipe.write_text(RECIPE + "data: ???\n")
    with pytest.raises(UserError, match="data must be given, as data=…"):
        load(recipe, [])
    assert load(recipe, ["data=here"]).data == Path("here")


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none.yaml: no such file"):
        load(tmp_path / "none.yaml", [])
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [")
    with pytest.raises(UserError, match=r"broken.yaml"):
        load(broken, [])


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tp": 3}, "layout.tp=3 does not divide the model's num_attention_heads = 4"),
        ({"pp": 3}, "layout.pp=3 x vpp=1 does not divide the model's 2 layers"),
        ({"pp": 2, "first_stage_layers": 2}, "does not divide"),
    ],
)
def test_layouts_that_do_not_fit_the_model_are_refused(layout, message):
    with pytest.raises(UserError, match=message):
        LayoutConfig(**layout).check_model(SIZES["mini"])


@pytest.mark.parametrize(
    ("layout", "length", "message"),
    [
        ({"cp": 2}, 66, r"= 66 tokens are not a multiple of 2 x cp = 4, over which layout splits them"),
        ({"tp": 2, "sp": True, "cp": 2}, 68, r"= 68 tokens are not a multiple of 2 x cp = 4 x tp = 2, over"),
        ({"tp": 4, "sp": True}, 66, r"= 66 tokens are not a multiple of tp = 4, over"),
    ],
)
def test_streams_that_a_layout_cannot_share_out_are_refused(layout, length, message):
    with pytest.raises(UserError, match=message):
        LayoutConfig(**layout).check_stream(length)
    LayoutConfig(**layout).check_stream(72 if layout == {"cp": 2} else 64)
    assert LayoutConfig(tp=4).stream_multiple == 1


def test_uneven_stages_fit():
    shape = SIZES["mini"].model_copy(update={"num_layers": 4})
    LayoutConfig(pp=3, first_stage_layers=1, last_stage_layers=1).check_model(shape)


def test_the_size_table_is_that_of_the_published_models():
    """Parameters counted by hand from the published configurations, in millions."""

    def millions(shape: ModelShape) -> int:
        width = 128 if shape.family == "qwen3" else shape.hidden_size // shape.num_attention_heads
        query, kv = width * shape.num_attention_heads, width * shape.num_query_groups
        attention = shape.hidden_size * (2 * query + 2 * kv) + (2 * 128 if shape.family == "qwen3" else query + 2 * kv)
        layer = attention + 3 * shape.hidden_size * shape.ffn_hidden_size + 2 * shape.hidden_size
        embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2)
        return round((shape.num_layers * layer + embeddings + shape.hidden_size) / 1e6)

    assert {name: millions(shape) for name, shape in SIZES.items() if name != "mini"} == {
        "0.5b": 494, "1.5b": 1544, "3b": 3086, "7b": 7616, "14b": 14770, "32b": 32764, "72b": 72706,
        "qwen3-0.6b": 596, "qwen3-1.7b": 1721, "qwen3-4b": 4022, "qwen3-8b": 8191, "qwen3-14b": 14768,
        "qwen3-32b": 32762,
    }  # fmt: skip


@pytest.mark.parametrize(("cpt", "override"), [("[]", "cpt.train_tokens=5"), ("{data: []}", "cpt.data.path=a")])
def test_an_override_below_a_list_is_refused(tmp_path: Path, cpt: str, override: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run_dir: runs/a\nmodel: {{size: mini}}\ncpt: {cpt}\n")
    with pytest.raises(UserError, match=rf"recipe.yaml: a list and a section meet under one key of {override}"):
        load(path, [override])
