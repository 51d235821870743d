"""YaRN against transformers, far beyond the context that a model was first trained on."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from megatron_medllm.checkpoint.hf_target import hf_config
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import SIZES, ModelConfig, ModelShape, shape_from_hf_config
from megatron_medllm.config.rope import Yarn
from megatron_medllm.errors import UserError
from megatron_medllm.kernels.rope import rotation_angles
from megatron_medllm.models.config import transformer_config
from megatron_medllm.models.gpt import build_model
from megatron_medllm.models.yarn import yarn_frequencies
from megatron_medllm.parallel import runtime
from megatron_medllm.parallel.packed import PackedSequences, Segment
from tests.worlds.model_dir import twin_shape, write_config, write_twin
from tests.worlds.running import IDS, assert_close, running

# As Qwen2.5's model cards give it, for contexts of up to 131072 tokens.
QWEN_128K = {"factor": 4.0, "original_max_position_embeddings": 32768}
POSITIONS = torch.tensor([0, 1, 31, 4097, 32767, 32768, 40001, 65537, 99999, 131071])


def with_yarn(shape: ModelShape, **changes: object) -> ModelShape:
    return shape.model_copy(update={"yarn": Yarn.model_validate(QWEN_128K | changes)})


def transformers_angles(hf_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [t, hn/2] at `POSITIONS`."""
    rope = Qwen2RotaryEmbedding(AutoConfig.from_pretrained(hf_dir))
    cosines, sines = rope(torch.zeros(1, dtype=torch.float32), POSITIONS[None])
    return tuple(table[0, :, : table.shape[-1] // 2] for table in (cosines, sines))


@pytest.mark.parametrize("size", ["0.5b", "7b", "qwen3-8b"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 2.0, "original_max_position_embeddings": 4096},
        {"attention_factor": 1.5},
        {"beta_fast": 16.0, "beta_slow": 2.0},
        {"mscale": 0.7, "mscale_all_dim": 1.3},
        {"truncate": False},
        {"factor": 1.0},
        {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},  # a ramp of no width
    ],
    ids=str,
)
def test_angles_are_transformers_to_the_last_bit(tmp_path: Path, size: str, changes: dict):
    shape = with_yarn(SIZES[size], **changes)
    frequencies, factor = yarn_frequencies(shape.yarn, width=shape.kv_channels, base=shape.rotary_base)
    ours = rotation_angles(POSITIONS, frequencies, factor=factor)
    for found, expected in zip(ours, transformers_angles(write_config(tmp_path, shape)), strict=True):
        assert torch.equal(found, expected)


def test_the_factor_and_the_ramp_of_the_128k_configuration():
    """By hand: 0.1 ln 4 + 1; of 64 frequencies the first 24 stay, those from 40 on are a quarter."""
    frequencies, factor = yarn_frequencies(Yarn.model_validate(QWEN_128K), width=128, base=1e6)
    plain = 1 / 1e6 ** (torch.arange(0, 128, 2).float() / 128)
    ratio = frequencies / plain
    assert factor == pytest.approx(1.138629436111989)
    # 128 ln(32768 / (32 * 2 pi)) / (2 ln 1e6) = 23.6 -> 23; 128 ln(32768 / 2 pi) / (2 ln 1e6) = 39.7 -> 40
    assert torch.allclose(ratio[:24], torch.ones(24)) and torch.allclose(ratio[40:], torch.full((24,), 0.25))
    assert ratio[24] == pytest.approx(1 - 0.75 / 17) and bool((ratio[24:40].diff() < 0).all())


@pytest.mark.parametrize("size", ["7b", "qwen3-8b"])
@torch.no_grad()
def test_logits_beyond_32k(tmp_path: Path, size: str):
    hf_dir = write_twin(tmp_path, with_yarn(twin_shape(size)))
    positions = torch.arange(len(IDS)) * 2203 + 17  # up to 129994
    packed = PackedSequences.from_segments((Segment(0, len(IDS)),), positions, backend="torch")
    with running(hf_dir) as (chunk, _):
        found = chunk.eval()(IDS[None], positions[None], None, packed_seq_params=packed)[0, :, :307]
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    mask = torch.ones_like(IDS)[None]  # without one, transformers takes the gaps for borders of documents
    expected = model(IDS[None], attention_mask=mask, position_ids=positions[None]).logits[0]
    assert_close(found, expected, 1e-5)
    config = json.loads((hf_dir / "config.json").read_text())
    (hf_dir / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    plain = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    gap = plain(IDS[None], attention_mask=mask, position_ids=positions[None]).logits[0] - expected
    assert gap.abs().max() > 0.05 * expected.abs().max(), "nothing was scaled"


@pytest.mark.parametrize(
    "spelled",
    [
        {"rope_scaling": {"type": "yarn", **QWEN_128K}},
        {"rope_scaling": {"rope_type": "yarn", **QWEN_128K}},
        {"rope_scaling": {"rope_type": "yarn", "type": "yarn", "factor": 4}},  # the context before is the model's
        {"rope_theta": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **QWEN_128K}},
        {"rope_theta": None, "rope_parameters": {"full_attention": {"type": "yarn", "rope_theta": 1e6, **QWEN_128K}}},
    ],
    ids=str,
)
def test_every_spelling_is_read_and_written_back(tmp_path: Path, spelled: dict):
    source = write_config(tmp_path / "source", SIZES["7b"], **spelled)
    shape = shape_from_hf_config(source)
    assert shape == with_yarn(SIZES["7b"]) and shape.model_dump()["yarn"] == QWEN_128K
    written = hf_config(shape, torch.bfloat16, source)
    assert written["rope_theta"] == 1e6 and "rope_parameters" not in written
    assert written["rope_scaling"] == spelled.get("rope_scaling", {"rope_type": "yarn", **QWEN_128K})
    target = write_config(tmp_path / "target", SIZES["7b"])
    (target / "config.json").write_text(json.dumps(written))
    assert shape_from_hf_config(target) == shape
    plainly = write_config(tmp_path / "plainly", with_yarn(SIZES["7b"]))
    assert all(map(torch.equal, transformers_angles(plainly), transformers_angles(target)))


def test_a_source_that_scales_otherwise_does_not_win(tmp_path: Path):
    shape = with_yarn(SIZES["7b"], factor=2.0)
    for number, scaling in enumerate(({"type": "yarn", **QWEN_128K}, {"type": "linear", "factor": 8.0}, None)):
        source = write_config(tmp_path / str(number), SIZES["7b"], rope_scaling=scaling)
        written = hf_config(shape, torch.bfloat16, source)["rope_scaling"]
        assert written == {"rope_type": "yarn", **QWEN_128K, "factor": 2.0}
    assert "rope_scaling" not in hf_config(SIZES["7b"], torch.bfloat16, tmp_path / "0")


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "linear", "factor": 4.0}, "RoPE type 'linear' is not supported; only 'default' and 'yarn' are"),
        ({"type": "dynamic", "factor": 4.0}, "RoPE type 'dynamic' is not supported"),
        ({"rope_type": "longrope"}, "RoPE type 'longrope' is not supported"),
        ({"rope_type": "llama3", "factor": 8.0}, "RoPE type 'llama3' is not supported"),
        ({"type": "yarn"}, "RoPE type 'yarn': factor: Field required"),
        ({"type": "yarn", "factor": 0.5}, "RoPE type 'yarn': factor: Input should be greater than or equal to 1"),
        ({"type": "yarn", "factor": "4"}, "RoPE type 'yarn': factor: Input should be a valid number"),
        ({"type": "yarn", "factor": 4.0, "finetuned": True}, "RoPE type 'yarn': finetuned: Extra inputs"),
        ({"type": "yarn", "factor": 4.0, "beta_fast": -1}, "RoPE type 'yarn': beta_fast: Input should be greater"),
    ],
)
def test_other_scaling_is_refused_by_name(tmp_path: Path, scaling: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        shape_from_hf_config(write_config(tmp_path, SIZES["7b"], rope_scaling=scaling))
    assert "\n" not in str(caught.value)


def test_two_places_that_contradict_each_other(tmp_path: Path):
    both = {"rope_scaling": {"type": "yarn", **QWEN_128K}, "rope_parameters": {"rope_type": "default"}}
    with pytest.raises(UserError, match="rope_scaling and rope_parameters scale RoPE differently"):
        shape_from_hf_config(write_config(tmp_path, SIZES["7b"], **both))


def test_a_model_built_without_storage_knows_its_frequencies():
    here = runtime.start(LayoutConfig(), seed=0)
    try:
        shape = with_yarn(twin_shape("qwen3-0.6b"))
        expected, factor = yarn_frequencies(shape.yarn, width=8, base=1e6)
        for device in (here.device, torch.device("meta")):
            (chunk,) = build_model(ModelConfig(shape=shape, dtype="float32"), LayoutConfig(), device=device)
            assert torch.equal(chunk.rotary_pos_emb.inv_freq, expected) and chunk.rotation_factor == factor
    finally:
        runtime.stop()


def test_transformer_engine_is_not_asked_for_yarn():
    with pytest.raises(UserError, match=r"model\.backend=te: YaRN is computed by model\.backend=torch only"):
        transformer_config(with_yarn(SIZES["7b"]), LayoutConfig(), ModelConfig(size="7b", backend="te"))
