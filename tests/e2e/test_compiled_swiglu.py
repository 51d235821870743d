"""The FFN's activation compiled by torch, as on CUDA, trains like the one that runs op by op."""

import shutil

import pytest
from torch._dynamo.utils import counters

from megatron_medllm.config.model import ModelConfig
from megatron_medllm.models.config import compiles_swiglu
from megatron_medllm.train.loop import train
from tests.worlds.run import cpt_settings, metrics, run_config


def test_auto_compiles_on_cuda_only():
    for swiglu, on_cuda, on_cpu in (("auto", True, False), ("compiled", True, True), ("eager", False, False)):
        model = ModelConfig(size="7b", swiglu=swiglu)
        assert (compiles_swiglu(model, cuda=True), compiles_swiglu(model, cuda=False)) == (on_cuda, on_cpu)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with a C++ compiler")
def test_compiled_and_eager_losses_agree(tiny_world, tmp_path):
    counters.clear()
    for swiglu in ("eager", "compiled"):
        assert not counters["stats"]["unique_graphs"]
        settings = cpt_settings(tiny_world, tmp_path / swiglu)
        settings["model"]["swiglu"] = swiglu
        assert train(run_config(settings)) == 0
    assert counters["stats"]["unique_graphs"] >= 2  # forward and backward
    for name, limit in (("loss", 1e-6), ("grad_norm", 3e-6)):
        ours, theirs = (metrics(tmp_path / swiglu / "cpt", name) for swiglu in ("compiled", "eager"))
        assert ours == pytest.approx(theirs, rel=limit)
