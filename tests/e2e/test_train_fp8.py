"""`fp8: hybrid` reaches the model: a CPT stage trains in FP8 with a padded FFN, and exports without the padding."""

import pytest
from safetensors.torch import load_file

from megatron_medllm.errors import UserError
from megatron_medllm.train.loop import train
from tests.worlds.run import cpt_settings, metrics, run_config
from tests.worlds.shapes import SHAPE

MODEL = {"shape": SHAPE | {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 200}, "dtype": "bfloat16"}


def settings(world, run_dir, **cpt):
    return cpt_settings(world, run_dir, model=MODEL, cpt={"train_tokens": 4 * 8 * 64, **cpt})


def test_a_stage_trains_in_fp8_and_exports_the_model_as_it_was(tiny_world, tmp_path):
    for name, fp8 in (("exact", "none"), ("cast", "hybrid")):
        assert train(run_config(settings(tiny_world, tmp_path / name, fp8=fp8))) == 0
    exact, cast = metrics(tmp_path / "exact" / "cpt"), metrics(tmp_path / "cast" / "cpt")
    assert cast != exact and cast == pytest.approx(exact, rel=0.01)
    assert cast[-1] < cast[0] - 0.2
    tensors = load_file(tmp_path / "cast/cpt/hf/model.safetensors")
    assert tensors["model.layers.1.mlp.gate_proj.weight"].shape == (200, 128)
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (128, 200)


def test_a_checkpoint_of_another_width_is_named(tiny_world, tmp_path):
    run = settings(tiny_world, tmp_path, fp8="hybrid")
    assert train(run_config(run)) == 0
    with pytest.raises(UserError, match="ffn_hidden_size is 256, here 200"):
        train(run_config(settings(tiny_world, tmp_path)))


def test_what_fp8_cannot_do_is_told_before_any_step(tiny_world, tmp_path):
    with pytest.raises(UserError, match=r"fp8_recipe=delayed needs model\.backend=te"):
        train(run_config(settings(tiny_world, tmp_path, fp8="hybrid", fp8_recipe="delayed")))
    narrow = cpt_settings(tiny_world, tmp_path, cpt={"fp8": "hybrid"})
    with pytest.raises(UserError, match=r"linear proj is 32 x 32 on each rank; both sizes must be multiples of 128"):
        train(run_config(narrow))
