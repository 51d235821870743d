"""A training step that starts from a checkpoint of another tool is the step that starts from its HF directory."""

from pathlib import Path

import torch

from megatron_medllm.checkpoint.foreign.bridge_out import import_to_bridge
from megatron_medllm.config.model import ModelShape
from megatron_medllm.train.loop import train
from megatron_medllm.train.reference import digest_weights
from tests.worlds import peers
from tests.worlds.model_dir import read_tensors, write_twin
from tests.worlds.run import cpt_settings, metrics, run_config
from tests.worlds.shapes import SHAPE


def test_one_step_from_each(tiny_world: Path, tmp_path: Path):
    shape = ModelShape(**SHAPE)
    hf_dir = write_twin(tmp_path / "hf", shape, dtype=torch.float32)
    tensors = peers.megatron_tensors(read_tensors(hf_dir), shape)
    peers.write_legacy(tmp_path / "mlm", tensors, shape, tp=2, pp=2)
    peers.write_nemo(tmp_path / "nemo", tensors, shape)
    import_to_bridge(hf_dir, tmp_path / "bridge")
    starts = {
        "hf": {"path": str(hf_dir)},
        "mlm": {"path": str(tmp_path / "mlm"), "source": str(hf_dir)},
        "nemo": {"path": str(tmp_path / "nemo"), "source": str(hf_dir)},
        "bridge": {"path": str(tmp_path / "bridge")},
    }
    losses = {}
    for name, model in starts.items():
        settings = cpt_settings(tiny_world, tmp_path / f"run-{name}", cpt={"train_tokens": 8 * 64})
        assert train(run_config(settings | {"model": model | {"dtype": "float32"}})) == 0
        losses[name] = metrics(tmp_path / f"run-{name}" / "cpt")
    assert len(losses["hf"]) == 1
    assert all(loss == losses["hf"] for loss in losses.values()), losses
    assert len({digest_weights(tmp_path / name) for name in starts}) == len(starts)
