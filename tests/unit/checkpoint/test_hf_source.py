"""An HF directory that is not exactly the model is refused, with the name of the tensor at fault."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_medllm.checkpoint.convert import import_hf
from megatron_medllm.checkpoint.hf_source import HFWeights
from megatron_medllm.errors import UserError
from tests.worlds.model_dir import random_tensors, twin_shape, write_twin
from tests.worlds.running import running

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


def test_a_single_file_beside_an_index_that_does_not_name_it(tmp_path: Path):
    """transformers loads the single file, others the shards: one of them is left over from an earlier export."""
    hf_dir = write_twin(tmp_path / "hf", SHAPE)
    save_file(random_tensors(SHAPE, seed=1), hf_dir / "model.safetensors")
    with pytest.raises(UserError, match=r"hf/model.safetensors: lies beside model.safetensors.index.json"):
        HFWeights(hf_dir, SHAPE)


def test_a_shard_that_the_index_does_not_name(tmp_path: Path):
    hf_dir = write_twin(tmp_path / "hf", SHAPE)
    save_file({"x": torch.ones(1)}, hf_dir / "model-00003-of-00003.safetensors")
    with pytest.raises(UserError, match=r"model-00003-of-00003.safetensors: lies beside model.safetensors.index.json"):
        HFWeights(hf_dir, SHAPE)


def test_shards_without_their_index(tmp_path: Path):
    hf_dir = write_twin(tmp_path / "hf", SHAPE)
    (hf_dir / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"index.json is missing, though model-00001-of-00002.safetensors is there"):
        HFWeights(hf_dir, SHAPE)
    save_file(random_tensors(SHAPE, seed=1), hf_dir / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors: lies beside model-00001-of-00002.safetensors, and no"):
        HFWeights(hf_dir, SHAPE)


def test_an_index_of_one_file_is_no_choice(tmp_path: Path):
    hf_dir = write_twin(tmp_path / "hf", SHAPE, shards=1)
    names = dict.fromkeys(random_tensors(SHAPE), "model.safetensors")
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    HFWeights(hf_dir, SHAPE)


def test_an_adapter_beside_the_model(single: Path):
    (single / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"hf/adapter_config.json: lies beside a model's weights; transformers would"):
        HFWeights(single, SHAPE)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "consolidated.00.pth"])
def test_weights_in_another_format(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"only safetensors are read; {name} is there: load it with transformers and"):
        HFWeights(tmp_path, SHAPE)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "no 'weight_map'"),
        ({"weight_map": []}, "no 'weight_map'"),
        ({"weight_map": {}}, "'weight_map' is empty"),
        ({"weight_map": {NAME: 3}}, rf"'{NAME}': expected a file's name, found int"),
    ],
    ids=["list", "list inside", "empty", "number"],
)
def test_malformed_index(tmp_path: Path, index: object, message: str):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"model.safetensors.index.json: {message}"):
        HFWeights(tmp_path, SHAPE)


def test_an_index_with_a_wrong_total_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    hf_dir = write_twin(tmp_path / "hf", SHAPE)
    path = hf_dir / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    right = sum(tensor.nbytes for tensor in random_tensors(SHAPE).values())
    path.write_text(json.dumps(index | {"metadata": {"total_size": right}}))
    HFWeights(hf_dir, SHAPE)
    assert not caplog.messages
    path.write_text(json.dumps(index | {"metadata": {"total_size": right + 1}}))
    HFWeights(hf_dir, SHAPE)
    assert f"total_size is {right + 1}, the tensors have {right} bytes" in caplog.text


def test_a_git_lfs_pointer_is_called_one(single: Path):
    (single / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"model.safetensors: a git-lfs pointer, not the file itself; run `git lfs"):
        HFWeights(single, SHAPE)


@pytest.mark.parametrize(
    "header", [b"[]   ", b'"a"  ', b'{"a":[1]}', b'{"a":{"dtype":"BF16","shape":[-1],"data_offsets":[0,0]}}']
)
def test_malformed_headers(single: Path, header: bytes):
    (single / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(
        UserError, match=r"model.safetensors: (the header is no JSON object|tensor 'a' has a malformed)"
    ):
        HFWeights(single, SHAPE)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
    ],
)
def test_tables_that_are_computed_anew_are_not_read(single: Path, name: str):
    change(single, **{name.replace(".", "__"): torch.ones(2)})
    assert name not in HFWeights(single, SHAPE).place
    change(single, **{name.replace(".", "__") + "x": torch.ones(2)})
    with pytest.raises(UserError, match=rf"tensor '{name}x' is not part of this model"):
        HFWeights(single, SHAPE)


def test_tensors_that_are_rounded_are_told(single: Path, caplog: pytest.LogCaptureFixture):
    weights = HFWeights(single, SHAPE)
    assert weights.own_dtype() is torch.bfloat16
    weights.tell_rounding(torch.float32)
    assert not caplog.messages
    weights.tell_rounding(torch.float16)
    assert "15 of 15 tensors are stored in BF16 and are rounded to float16" in caplog.text
    caplog.clear()
    change(single, model__norm__weight=torch.ones(112), lm_head__weight=torch.ones(307, 112, dtype=torch.float16))
    assert HFWeights(single, SHAPE).own_dtype() is torch.bfloat16
    assert (
        "2 of 15 tensors are stored in F16 and F32 and are rounded to bfloat16, 'model.norm.weight' the" in caplog.text
    )


def test_every_way_in_tells_what_it_rounds(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    hf_dir = write_twin(tmp_path / "hf", SHAPE, shards=1)
    change(hf_dir, model__norm__weight=torch.full((112,), 1 + 2**-10))
    import_hf(hf_dir, tmp_path / "asked", dtype=torch.bfloat16)
    assert not caplog.messages  # it was asked for
    import_hf(hf_dir, tmp_path / "by itself")
    assert "1 of 15 tensors are stored in F32 and are rounded to bfloat16, 'model.norm.weight' the" in caplog.text
    caplog.clear()
    with running(hf_dir, dtype="bfloat16"):
        assert "1 of 15 tensors are stored in F32 and are rounded to bfloat16" in caplog.text
