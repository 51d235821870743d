"""`import --layout bridge`: what Megatron-Bridge looks for, and back."""

from pathlib import Path

import pytest
import torch
import yaml

from megatron_medllm.checkpoint import convert
from megatron_medllm.checkpoint.convert import export_checkpoint
from megatron_medllm.checkpoint.foreign.bridge_out import import_to_bridge
from megatron_medllm.config.megatron_dirs import find_megatron
from megatron_medllm.config.model import ModelConfig
from megatron_medllm.errors import UserError
from tests.worlds.model_dir import assert_same_tensors, read_tensors, twin_shape, write_tiny_model, write_twin


@pytest.mark.parametrize("size", ["1.5b", "7b"])
def test_there_and_back(tmp_path: Path, size: str):
    shape = twin_shape(size)
    hf_dir = write_twin(tmp_path / "hf", shape)
    import_to_bridge(hf_dir, tmp_path / "bridge")
    place = find_megatron(tmp_path / "bridge")
    assert place is not None and place.writer == "bridge"
    assert ModelConfig(path=tmp_path / "bridge").resolve_shape() == shape
    export_checkpoint(tmp_path / "bridge", tmp_path / "back")
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(hf_dir))
    with pytest.raises(UserError, match="bridge: already exists"):
        import_to_bridge(hf_dir, tmp_path / "bridge")


def test_what_bridge_looks_for(tmp_path: Path):
    hf_dir = write_tiny_model(tmp_path / "hf")
    import_to_bridge(hf_dir, tmp_path / "bridge", dtype=torch.float32)
    folder = tmp_path / "bridge" / "iter_0000000"
    config = yaml.safe_load((folder / "run_config.yaml").read_text())
    assert config["model"]["params_dtype"] == {"_target_": "torch.float32", "_call_": False}
    assert not config["model"]["bf16"] and config["model"]["should_pad_vocab"] is False
    assert not config["checkpoint"]["save_optim"] and not config["checkpoint"]["save_rng"]
    assert (folder / "tokenizer" / "tokenizer.json").read_bytes() == (hf_dir / "tokenizer.json").read_bytes()
    assert torch.load(folder / "train_state.pt", weights_only=True)["step"] == 0
    assert torch.load(folder / "common.pt", weights_only=True)["checkpoint_version"] == 3.0
    assert (tmp_path / "bridge" / "latest_checkpointed_iteration.txt").read_text() == "0"


def test_a_killed_import_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing has its name before it is whole; the next call ends with what one call would have written."""
    hf_dir = write_twin(tmp_path / "hf", twin_shape("7b"))
    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_index", lambda *_args, **_settings: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            import_to_bridge(hf_dir, tmp_path / "bridge")
    assert not (tmp_path / "bridge").exists()
    import_to_bridge(hf_dir, tmp_path / "bridge")
    import_to_bridge(hf_dir, tmp_path / "straight")
    for path in (tmp_path / "straight").rglob("*.distcp"):
        assert path.read_bytes() == (tmp_path / "bridge" / path.relative_to(tmp_path / "straight")).read_bytes()
    assert not list(tmp_path.glob(".*"))
