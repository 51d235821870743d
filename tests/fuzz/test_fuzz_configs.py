"""Recipes and Hugging Face (HF) configs as people write them, copy them and break them."""

import math
from pathlib import Path
from typing import Any

import orjson
import yaml
from hypothesis import strategies as st

from megatron_medllm.config.cluster import parse_slurm_time
from megatron_medllm.config.model import SIZES, ModelShape, shape_from_hf_config
from megatron_medllm.config.run import RunConfig, load
from tests.fuzz.surface import fuzz, right_or_one_line
from tests.worlds.model_dir import config_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
QWEN: dict[str, Any] = config_json(SIZES["7b"]) | {"use_sliding_window": False}
ROPE = st.dictionaries(
    st.sampled_from(["rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "full_attention"]),
    JSON | st.sampled_from(["default", "linear", "yarn", "dynamic", 1e6, 5e5, 1.0, {"rope_theta": 1e6}]),
    max_size=3,
)
NAMES = st.sampled_from(
    [
        *QWEN,
        "head_dim",
        "layer_types",
        "attention_bias",
        "mlp_bias",
        "is_causal",
        "attention_dropout",
        "partial_rotary_factor",
        "quantization_config",
        "transformers_version",
        "sliding_window",
    ]
)
LEFT_OUT = "left out"


@st.composite
def hf_configs(draw: st.DrawFn) -> Any:
    """A published config with up to three keys changed, left out or added."""
    config = dict(QWEN)
    for name in draw(st.lists(NAMES | st.text(max_size=6), max_size=3)):
        config[name] = draw(JSON | st.sampled_from([LEFT_OUT, "true", "28", 1.0, True, 128, "silu"]))
    for name in draw(st.lists(st.sampled_from(["rope_scaling", "rope_parameters"]), max_size=2)):
        config[name] = draw(ROPE)
    return {name: value for name, value in config.items() if value != LEFT_OUT}


def as_transformers_would(config: dict[str, Any]) -> tuple[Any, ...]:
    """The numbers of the config, by the rules of transformers, written down a second time."""
    places = [config.get("rope_scaling") or {}, config.get("rope_parameters") or {}]
    nested = [place.get("full_attention") or {} for place in places]
    bases = [place["rope_theta"] for place in (*nested, *places) if place.get("rope_theta") is not None]
    base = (bases or [config.get("rope_theta")])[0]
    return (
        config["num_hidden_layers"],
        config["hidden_size"],
        config["num_attention_heads"],
        config.get("num_key_value_heads") or config["num_attention_heads"],
        config["intermediate_size"],
        config["vocab_size"],
        config.get("tie_word_embeddings", False),
        config.get("rms_norm_eps", 1e-6),
        10_000.0 if base is None else base,
        config.get("max_position_embeddings", 32768),
    )


@fuzz("HF configs", config=hf_configs())
def test_hf_configs(folder: Path, config: Any) -> None:
    (folder / "config.json").write_bytes(orjson.dumps(config))
    outcome = right_or_one_line(lambda: shape_from_hf_config(folder))
    if outcome.refusal is None:
        found: ModelShape = outcome.value
        assert tuple(found.model_dump().values()) == as_transformers_would(config)
        assert found.hidden_size == found.kv_channels * found.num_attention_heads
    else:
        assert str(folder / "config.json") in outcome.refusal


@fuzz("HF config bytes", config=JSON, cut=st.integers(0, 40), tail=st.binary(max_size=4))
def test_any_bytes_as_hf_config(folder: Path, config: object, cut: int, tail: bytes) -> None:
    """Any JSON, cut short, with something behind it: none of these is a Qwen2."""
    content = orjson.dumps(config)
    (folder / "config.json").write_bytes(content[: max(0, len(content) - cut)] + tail)
    assert right_or_one_line(lambda: shape_from_hf_config(folder)).refusal is not None


RECIPE: dict[str, Any] = {
    "name": "a",
    "run_dir": "runs/a",
    "stage": "cpt",
    "model": {"size": "0.5b", "dtype": "bfloat16"},
    "layout": {"nodes": 1, "gpus_per_node": 1, "tp": 1},
    "tokenizer": "tokenizer",
    "cpt": {
        "data": [{"path": "corpus", "weight": 1.0}],
        "train_tokens": 1000000,
        "sequence_length": 128,
        "global_batch_size": 2,
        "optimizer": {"lr": 1e-4, "schedule": "cosine"},
        "adapter": {"rank": 4, "targets": ["linear_qkv"]},
        "guard": {"walltime_s": 100},
    },
    "cluster": {"max_time": "24:00:00", "exclude": ["a"], "extra_options": []},
}


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in the recipe."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, part in items for path in paths_of(part, (*at, key)))]


PLACES = [path for path in paths_of(RECIPE) if path]
VALUES = JSON | st.sampled_from(
    [LEFT_OUT, "${name}", "${nowhere}", "???", "${", "12:00:00", "1e-5", "yes", "0o7", ".nan"]
)


def set_at(recipe: Any, path: tuple[Any, ...], value: Any) -> None:
    """Change one place, where it is still there."""
    for key in path[:-1]:
        if not isinstance(recipe, dict | list) or (
            isinstance(recipe, list) and not (isinstance(key, int) and key < len(recipe))
        ):
            return
        recipe = recipe[key] if isinstance(recipe, list) else recipe.get(key)
    if isinstance(recipe, dict):
        recipe.pop(path[-1], None) if value == LEFT_OUT else recipe.update({path[-1]: value})


@st.composite
def recipes(draw: st.DrawFn) -> str:
    """A good recipe with up to three places changed, as YAML, its texts quoted or not."""
    recipe = orjson.loads(orjson.dumps(RECIPE))
    for path in draw(st.lists(st.sampled_from(PLACES), max_size=3)):
        set_at(recipe, path, draw(VALUES))
    if draw(st.booleans()):
        set_at(recipe, (draw(st.text(max_size=6)),), draw(VALUES))
    text = yaml.safe_dump(recipe, allow_unicode=draw(st.booleans()), sort_keys=False)
    if draw(st.booleans()):  # as people write it: without the quotes
        text = text.replace("'", "")
    return text


OVERRIDES = st.lists(
    st.sampled_from(
        ["cpt.train_tokens=5", "model.size=null", "cluster.max_time=1:30", "layout.tp=2", "cpt.=1", "=", "a"]
    )
    | st.builds(lambda path, value: f"{'.'.join(map(str, path))}={value}", st.sampled_from(PLACES), VALUES)
    | st.text(max_size=10),
    max_size=2,
)


@fuzz("recipes", text=recipes(), overrides=OVERRIDES)
def test_recipes(folder: Path, text: str, overrides: list[str]) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    outcome = right_or_one_line(lambda: load(path, overrides))
    if outcome.refusal is None:
        run: RunConfig = outcome.value
        path.write_text(yaml.safe_dump(run.model_dump(mode="json"), allow_unicode=True))
        assert load(path, []) == run  # what a job gets is what was read
        assert run.cluster is None or parse_slurm_time(run.cluster.max_time) > 0


@fuzz("recipe bytes", content=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-16")))
def test_any_bytes_as_recipe(folder: Path, content: bytes) -> None:
    (folder / "recipe.yaml").write_bytes(content)
    assert right_or_one_line(lambda: load(folder / "recipe.yaml", [])).refusal is not None


@fuzz(
    "Slurm times",
    text=st.from_regex(r"[0-9:\-]{1,12}", fullmatch=True) | st.text(max_size=9),
    fields=st.lists(st.integers(0, 99), min_size=1, max_size=3),
    days=st.none() | st.integers(0, 30),
)
def test_slurm_times(folder: Path, text: str, fields: list[int], days: int | None) -> None:
    path = folder / "recipe.yaml"
    good = ("" if days is None else f"{days}-") + ":".join(f"{field:02d}" for field in fields)
    for spelled in (good, text):
        path.write_text(yaml.safe_dump({**RECIPE, "cluster": {"max_time": spelled}}, allow_unicode=True))
        outcome = right_or_one_line(lambda: load(path, []))
        if spelled == good:
            scales = (60, 1) if days is None and len(fields) < 3 else (3600, 60, 1)
            seconds = (days or 0) * 86400 + sum(n * scale for n, scale in zip(fields, scales, strict=False))
            assert (outcome.refusal is None) == (seconds > 0)
            assert outcome.refusal is not None or parse_slurm_time(outcome.value.cluster.max_time) == seconds


def test_the_recipe_that_is_changed_is_good(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert load(tmp_path / "recipe.yaml", []).cpt is not None
    (tmp_path / "config.json").write_bytes(orjson.dumps(QWEN))
    assert shape_from_hf_config(tmp_path) == SIZES["7b"]
    assert math.isclose(SIZES["7b"].rotary_base, 1e6)
