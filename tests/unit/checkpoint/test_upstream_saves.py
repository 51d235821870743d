"""Export reads what the installed Megatron-Core saves itself: with `common.pt`, from 0.19 on without."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_medllm.checkpoint.convert import export_checkpoint
from megatron_medllm.checkpoint.description import describe_checkpoint
from megatron_medllm.checkpoint.state_writer import StateWriter
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelShape
from megatron_medllm.parallel import mcore, runtime
from megatron_medllm.versions import installed
from tests.worlds.model import build_tiny
from tests.worlds.shapes import SHAPE


def test_export_reads_what_megatron_saves(tmp_path: Path) -> None:
    """The same files as of a checkpoint that our own writer made of the same model."""
    from megatron.core import dist_checkpointing

    shape = ModelShape.model_validate(SHAPE)
    upstream, own = tmp_path / "iter_0000007", tmp_path / "own"
    runtime.start(LayoutConfig(), seed=0)
    try:
        model = build_tiny(shape)
        for directory in (upstream, own):
            directory.mkdir()
            state = mcore.sharded_state([model], None, is_loading=False) | {"iteration": 7, "checkpoint_version": 3.0}
            if directory == upstream:
                dist_checkpointing.save(state, str(directory))
            else:
                StateWriter().start(state, directory, wait=True)
            assert dist_checkpointing.load_common_state_dict(str(directory))["iteration"] == 7
    finally:
        runtime.stop()
    assert (own / "common.pt").exists()  # which every version loads
    assert (upstream / "common.pt").exists() == installed("megatron-core").startswith("0.16.")
    exported = []
    for directory in (upstream, own):
        describe_checkpoint(directory, shape, dtype=torch.float32, source_dir=None)
        export_checkpoint(directory, tmp_path / f"hf-{directory.name}", workers=1)
        exported.append(load_file(tmp_path / f"hf-{directory.name}" / "model.safetensors"))
    assert exported[0].keys() == exported[1].keys() and len(exported[0]) > 10
    assert all(torch.equal(exported[0][name], tensor) for name, tensor in exported[1].items())
