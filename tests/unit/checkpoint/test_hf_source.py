"""An HF directory that is not exactly the model is refused, with the name of the tensor at fault."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_medllm.checkpoint.hf_source import HFWeights
from megatron_medllm.errors import UserError
from tests.unit.checkpoint.twins import random_tensors, twin_shape, write_twin

SHAPE = twin_shape("7b", layers=1)
TIED = twin_shape("0.5b", layers=1)
NAME = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_twin(tmp_path / "hf", SHAPE, shards=1)


def change(hf_dir: Path, **changes: torch.Tensor | None) -> None:
    path = hf_dir / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None) if tensor is None else tensors.update({name: tensor})
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, r"hf: tensor 'model.norm.weight' is missing"),
        ({"model__layers__9__mlp__bias": torch.ones(1)}, r"tensor 'model.layers.9.mlp.bias' is not part of this model"),
        (
            {"model__norm__weight": torch.ones(5)},
            r"model.safetensors: tensor 'model.norm.weight' has shape \[5\], expected \[112\]",
        ),
        (
            {"model__norm__weight": torch.ones(112, dtype=torch.int32)},
            r"tensor 'model.norm.weight' has type I32, expected one of F32, BF16, F16",
        ),
    ],
    ids=["missing", "extra", "shape", "type"],
)
def test_wrong_tensors_are_named(single: Path, changes: dict, message: str):
    change(single, **changes)
    with pytest.raises(UserError, match=message):
        HFWeights(single, SHAPE)


def test_truncated_shard(single: Path):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model.safetensors: truncated: tensor '.*' ends at byte \d+, the file at"):
        HFWeights(single, SHAPE)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, (3).to_bytes(8, "little") + b"not json at all"])
def test_not_safetensors(single: Path, content: bytes):
    (single / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors: (not a safetensors file|the header is not JSON)"):
        HFWeights(single, SHAPE)


def test_header_that_points_outside_its_file(single: Path):
    header = json.dumps({NAME: {"dtype": "BF16", "shape": [2, 2], "data_offsets": [-8, 0]}}).encode()
    (single / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="k_proj"):
        HFWeights(single, SHAPE)


def edit_index(hf_dir: Path, **entries: str | None) -> None:
    path = hf_dir / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name, file_name in entries.items():
        name = name.replace("__", ".")
        index["weight_map"].pop(name) if file_name is None else index["weight_map"].update({name: file_name})
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "index.json: no entry for tensor 'model.norm.weight', which is in model-0000"),
        ("../elsewhere.safetensors", "points outside the directory"),
    ],
    ids=["missing entry", "escape"],
)
def test_wrong_index(tmp_path: Path, entry: str | None, message: str):
    hf_dir = write_twin(tmp_path / "hf", SHAPE)
    edit_index(hf_dir, model__norm__weight=entry)
    with pytest.raises(UserError, match=message):
        HFWeights(hf_dir, SHAPE)


def test_missing_shard(tmp_path: Path):
    hf_dir = write_twin(tmp_path / "hf", SHAPE)
    (hf_dir / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors: no such file"):
        HFWeights(hf_dir, SHAPE)


def test_index_that_promises_too_much(tmp_path: Path):
    hf_dir = write_twin(tmp_path / "hf", SHAPE)
    edit_index(hf_dir, model__norm__bias="model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"model-00001-of-00002.safetensors: tensor 'model.norm.bias' is missing"):
        HFWeights(hf_dir, SHAPE)


def test_directory_without_safetensors(tmp_path: Path):
    with pytest.raises(UserError, match="only safetensors are read"):
        HFWeights(tmp_path, SHAPE)


def test_copy_of_a_tied_head_must_equal_the_embedding(tmp_path: Path):
    hf_dir = write_twin(tmp_path / "hf", TIED, shards=1)
    embedding = random_tensors(TIED)["model.embed_tokens.weight"]
    change(hf_dir, lm_head__weight=embedding.clone())
    HFWeights(hf_dir, TIED)
    embedding[-1, -1] += 1
    change(hf_dir, lm_head__weight=embedding)
    with pytest.raises(UserError, match=r"config.json ties the embeddings, but 'lm_head.weight' differs"):
        HFWeights(hf_dir, TIED)


def test_slices_along_both_axes(single: Path):
    weights = HFWeights(single, SHAPE)
    expected = random_tensors(SHAPE)[NAME]
    assert torch.equal(weights.read(NAME, axis=0, start=3, stop=9), expected[3:9])
    assert torch.equal(weights.read(NAME, axis=1, start=5, stop=7), expected[:, 5:7])
    assert weights.read(NAME, axis=0, start=4, stop=4).shape == (0, 112)


def test_shard_cut_short_after_opening(single: Path):
    weights = HFWeights(single, SHAPE)
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"truncated inside tensor 'lm_head.weight'"):
        weights.read("lm_head.weight", axis=0, start=0, stop=307)
