"""Recipes and Hugging Face (HF) configs that people might write."""

from pathlib import Path

import orjson
from hypothesis import strategies as st

from megatron_medllm.config.model import shape_from_hf_config
from tests.fuzz.surface import fuzz, right_or_one_line

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@fuzz("HF configs", config=JSON)
def test_any_json_as_hf_config(folder: Path, config: object) -> None:
    (folder / "config.json").write_bytes(orjson.dumps(config))
    assert right_or_one_line(lambda: shape_from_hf_config(folder)).refusal is not None
