"""What Megatron-LM, Megatron-Bridge and NeMo wrote themselves, where it is at hand."""

import os
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from megatron_medllm.checkpoint.convert import export_checkpoint
from megatron_medllm.checkpoint.foreign.bridge_out import import_to_bridge
from megatron_medllm.checkpoint.peft_adapter import export_peft, read_peft
from megatron_medllm.checkpoint.torch_dist import TorchDistReader
from megatron_medllm.checkpoint.verify import compare_checkpoints
from megatron_medllm.config.model import shape_from_hf_config
from tests.worlds import peers
from tests.worlds.model_dir import assert_same_tensors, read_tensors


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    default = Path(__file__).parents[4] / "shared" / "data"
    place = Path(os.environ.get("MEDLLM_SHARED_DATA", default)) / "peers"
    if not (place / "hf").is_dir():
        pytest.skip(f"no checkpoints of other tools in {place} (set MEDLLM_SHARED_DATA)")
    there = tmp_path_factory.mktemp("peers")
    for archive in place.glob("*.tar.gz"):
        with tarfile.open(archive) as tar:
            tar.extractall(there, filter="data")
    for folder in place.iterdir():
        if folder.is_dir():
            (there / folder.name).symlink_to(folder)
    return there


FULL = ["bridge-0.6.2-tied", "mlm-0.16.1-torch_dist-tp2-untied", "mlm-0.16.1-torch-tp2-untied", "nemo-2.7.3-tied"]


@pytest.mark.parametrize("name", FULL)
def test_what_the_peers_wrote(written: Path, tmp_path: Path, name: str):
    hf_dir = written / "hf" / name.rpartition("-")[2]
    inner = {"nemo": "weights", "brid": "iter_0000000"}.get(name[:4], "iter_0000010")
    for number, checkpoint in enumerate((written / name, written / name / inner)):
        export_checkpoint(checkpoint, tmp_path / str(number), source_dir=hf_dir)
        assert_same_tensors(read_tensors(tmp_path / str(number)), read_tensors(hf_dir))
    if not name.startswith("mlm"):
        export_checkpoint(written / name, tmp_path / "alone")
        assert_same_tensors(read_tensors(tmp_path / "alone"), read_tensors(hf_dir))
        assert (tmp_path / "alone" / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", FULL)
def test_what_the_peers_wrote_is_verified(written: Path, tmp_path: Path, name: str):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"ids": [5, 30, 17, 42, 8]}\n')
    found = compare_checkpoints(written / "hf" / name.rpartition("-")[2], written / name, prompts, new_tokens=2)
    assert found.agree and found.same_continuations == 1


def test_the_peers_adapter_is_its_twin(written: Path, tmp_path: Path):
    export_peft(written / "bridge-0.6.2-lora-untied", tmp_path / "peft", base_model=None)
    twin = written / "bridge-0.6.2-lora-untied-peft"
    assert_same_tensors(read_tensors(tmp_path / "peft"), read_tensors(twin))
    shape = shape_from_hf_config(written / "hf" / "untied")
    assert read_peft(tmp_path / "peft", shape).config == read_peft(twin, shape).config


def test_ours_are_laid_out_as_theirs(written: Path, tmp_path: Path):
    """The checkpoints that these tests write: the same keys and sizes, and for legacy the same names and parts."""
    tied, untied = written / "hf" / "tied", written / "hf" / "untied"
    shapes = {path: shape_from_hf_config(path) for path in (tied, untied)}
    peers.write_bridge(tmp_path / "bridge", peers.whole(tied), shapes[tied])
    peers.write_nemo(tmp_path / "nemo", peers.whole(tied), shapes[tied])
    peers.write_dist(tmp_path / "mlm", peers.whole(untied, vocab=512), tp=2, common={})
    for mine, theirs in (
        ("bridge/iter_0000000", "bridge-0.6.2-tied/iter_0000000"),
        ("nemo/weights", "nemo-2.7.3-tied/weights"),
        ("mlm", "mlm-0.16.1-torch_dist-tp2-untied/iter_0000010"),
    ):
        ours, other = TorchDistReader(tmp_path / mine), TorchDistReader(written / theirs)
        assert {k: ours.shape_of(k) for k in ours.tensor_keys()} == {k: other.shape_of(k) for k in other.tensor_keys()}
        for key in ours.tensor_keys():
            layer = 3 if key.removeprefix("module.").startswith("decoder.layers") else None
            blocks = [{(b.row, b.column, b.sizes) for b in r.stored(key, layer).blocks} for r in (ours, other)]
            assert blocks[0] == blocks[1], key
    peers.write_legacy(tmp_path / "legacy", peers.whole(untied, vocab=512), shapes[untied], tp=2)
    for rank in range(2):
        file = f"iter_0000010/mp_rank_{rank:02d}/model_optim_rng.pt"
        ours, theirs = (
            torch_model(place / file) for place in (tmp_path / "legacy", written / "mlm-0.16.1-torch-tp2-untied")
        )
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


def torch_model(path: Path) -> dict:
    from megatron_medllm.checkpoint.foreign.archive import StoredTensor, read_archive

    return {n: t for n, t in read_archive(path)["model"].items() if isinstance(t, StoredTensor)}


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_our_bridge_checkpoint_is_as_theirs(written: Path, tmp_path: Path, name: str):
    """Every setting that we write is what Bridge writes for the same model; tensors, tracker and train state too."""
    import_to_bridge(written / "hf" / name, tmp_path / "ours")
    theirs = written / ("bridge-0.6.2-tied" if name == "tied" else "bridge-0.6.2-lora-untied")
    ours_config, their_config = (
        yaml.safe_load((root / "iter_0000000" / "run_config.yaml").read_text()) for root in (tmp_path / "ours", theirs)
    )
    for section in ("model", "checkpoint"):
        differing = {k for k, v in ours_config[section].items() if their_config[section].get(k, "absent") != v}
        assert differing == set(), section
    for file in ("iter_0000000/train_state.pt", "latest_train_state.pt"):
        states = [torch.load(root / file, weights_only=True) for root in (tmp_path / "ours", theirs)]
        assert {k: (v.dtype, v.item()) for k, v in states[0].items()} == {
            k: (v.dtype, v.item()) for k, v in states[1].items()
        }
    tracker = "latest_checkpointed_iteration.txt"
    assert (tmp_path / "ours" / tracker).read_text() == (theirs / tracker).read_text()
    if name == "tied":
        readers = [TorchDistReader(root / "iter_0000000") for root in (tmp_path / "ours", theirs)]
        keys = [{key: reader.shape_of(key) for key in reader.tensor_keys()} for reader in readers]
        assert keys[0] == keys[1]
        assert readers[0].common_state() == readers[1].common_state()
