"""Checkpoints of Megatron-LM, Megatron-Bridge and NeMo: to Hugging Face, bit for bit, and nothing in them is run."""

import argparse
import logging
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_medllm.checkpoint.convert import export_checkpoint, import_hf
from megatron_medllm.checkpoint.peft_adapter import export_peft, read_peft
from megatron_medllm.checkpoint.verify import compare_checkpoints
from megatron_medllm.config.model import ModelConfig, shape_from_hf_config
from megatron_medllm.errors import UserError
from tests.worlds import peers
from tests.worlds.model_dir import assert_same_tensors, read_tensors, twin_shape, write_twin

UNTIED, TIED = twin_shape("7b", layers=4), twin_shape("1.5b", layers=4)


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    return write_twin(tmp_path / "hf", UNTIED)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return write_twin(tmp_path / "hf", TIED)


def assert_exports(checkpoint: Path, hf_dir: Path, *, source: bool = True) -> None:
    out = checkpoint.parent / f"{checkpoint.name}-out"
    export_checkpoint(checkpoint, out, source_dir=hf_dir if source else None)
    assert_same_tensors(read_tensors(out), read_tensors(hf_dir))


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tp": 2},
        {"tp": 4, "local_names": False},
        {"pp": 2},
        {"tp": 2, "pp": 2, "vpp": 2},
        {"pp": 2, "vpp": 2},
        {"pp": 4},
    ],
    ids=["one", "tp2", "tp4 te", "pp2", "tp2 pp2 vpp2", "pp2 vpp2", "pp4"],
)
def test_legacy_layouts(untied: Path, tmp_path: Path, layout: dict):
    peers.write_legacy(tmp_path / "mlm", peers.whole(untied, vocab=320), UNTIED, **layout)
    assert_exports(tmp_path / "mlm", untied)
    assert_exports(tmp_path / "mlm" / "iter_0000010", untied)


def test_legacy_tied_on_two_stages(tied: Path, tmp_path: Path):
    tensors = peers.whole(tied, vocab=312)
    repeated = tensors | {"output_layer.weight": tensors["embedding.word_embeddings.weight"].clone()}
    repeated["output_layer.weight"][307:] = 9  # padding may hold anything
    peers.write_legacy(tmp_path / "mlm", repeated, TIED, pp=2, tp=2)
    assert_exports(tmp_path / "mlm", tied)


def test_legacy_that_does_not_fit(untied: Path, tmp_path: Path):
    tensors = peers.whole(untied)
    root = peers.write_legacy(tmp_path / "mlm", tensors, UNTIED, tp=1)
    (root / "iter_0000010" / "mp_rank_00").rename(root / "iter_0000010" / "mp_rank_01")
    with pytest.raises(UserError, match="no folder of tensor-parallel rank 0, pipeline stage 0"):
        export_checkpoint(root, tmp_path / "out", source_dir=untied)
    peers.write_legacy(tmp_path / "half", peers.whole(untied, vocab=320), UNTIED, tp=2)
    second = tmp_path / "half" / "iter_0000010" / "mp_rank_01"
    (second / "model_optim_rng.pt").unlink()
    with pytest.raises(UserError, match=r"mp_rank_01/model_optim_rng.pt: no such file"):
        export_checkpoint(tmp_path / "half", tmp_path / "out", source_dir=untied)
    second.rmdir()
    with pytest.raises(UserError, match=r"1 of 2 ranks are there \(tensor_model_parallel_size\)"):
        export_checkpoint(tmp_path / "half", tmp_path / "out", source_dir=untied)
    peers.write_legacy(tmp_path / "heads", tensors, UNTIED, num_attention_heads=14)
    with pytest.raises(UserError, match=r"args.num_attention_heads is 14, but the source's model has 28"):
        export_checkpoint(tmp_path / "heads", tmp_path / "out", source_dir=untied)
    cut = root / "iter_0000010" / "mp_rank_01" / "model_optim_rng.pt"
    cut.parent.rename(cut.parents[1] / "mp_rank_00")
    os.truncate(root / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt", 20_000)
    with pytest.raises(UserError, match=r"model_optim_rng.pt: damaged"):
        export_checkpoint(root, tmp_path / "out", source_dir=untied)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layers", ["stacked", "apart", "singleton"])
@pytest.mark.parametrize("tp", [1, 2])
def test_torch_dist_layouts(untied: Path, tmp_path: Path, layers: str, tp: int):
    """With optimizer and random states beside the model, as a training run leaves them."""
    tensors = peers.whole(untied, vocab=320)
    extra = {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(112)}
    objects = {"rng_state/shard_0.0_1.1": peers.pickled([{"random": torch.arange(3)}])}
    folder = tmp_path / "mlm" / "iter_0000010"
    peers.write_dist(folder, tensors, layers=layers, tp=tp, extra=extra, objects=objects, common={"iteration": 10})
    (tmp_path / "mlm" / "latest_checkpointed_iteration.txt").write_text("10\n")
    assert_exports(tmp_path / "mlm", untied)


@pytest.mark.parametrize("place", ["common.pt", "common_state"])
def test_arguments_beside_the_tensors_must_agree(untied: Path, tmp_path: Path, place: str):
    """Heads cannot be seen from the tensors; Megatron-Core 0.19 keeps the arguments in an object of the checkpoint."""
    args = {"args": argparse.Namespace(num_attention_heads=14, num_query_groups=4)}
    objects = {"common_state/shard_0_1": peers.pickled([args])} if place == "common_state" else None
    peers.write_dist(
        tmp_path / "mlm", peers.whole(untied), common=args if place == "common.pt" else None, objects=objects
    )
    with pytest.raises(UserError, match=r"args.num_attention_heads is 14, but the source's model has 28"):
        export_checkpoint(tmp_path / "mlm", tmp_path / "out", source_dir=untied)


def test_release_and_trackers(untied: Path, tmp_path: Path):
    root = tmp_path / "mlm"
    peers.write_dist(root / "release", peers.whole(untied))
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    assert_exports(root, untied)
    (root / "latest_checkpointed_iteration.txt").write_text("20")
    with pytest.raises(UserError, match="names iter_0000020, which is not there"):
        export_checkpoint(root, tmp_path / "out", source_dir=untied)
    (root / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(UserError, match="expected a number or 'release'"):
        export_checkpoint(root, tmp_path / "out", source_dir=untied)
    (root / "latest_checkpointed_iteration.txt").unlink()
    for number in (1, 2):
        (root / f"iter_{number:07d}").mkdir()
    with pytest.raises(UserError, match="name one of its iterations"):
        export_checkpoint(root, tmp_path / "out", source_dir=untied)


def test_bridge_and_nemo_bring_their_shape(tied: Path, tmp_path: Path):
    tensors = peers.whole(tied)
    peers.write_bridge(tmp_path / "bridge", tensors, TIED)
    peers.write_nemo(tmp_path / "nemo", tensors, TIED)
    for place in ("bridge", "bridge/iter_0000000", "nemo", "nemo/weights"):
        assert_exports(tmp_path / place, tied, source=False)
        assert shape_from_hf_config(tmp_path / f"{place}-out") == TIED
        assert_exports_again = tmp_path / f"{place}-out"
        assert assert_exports_again.is_dir()
    for place in ("bridge", "nemo"):
        out = tmp_path / f"{place}-with-source"
        export_checkpoint(tmp_path / place, out, source_dir=tied)
        assert_same_tensors(read_tensors(out), read_tensors(tied))


def test_bridge_may_nest_its_settings(tied: Path, tmp_path: Path):
    """As `GPTModelConfig.as_dict` writes it: the transformer's settings in a section of their own."""
    peers.write_bridge(tmp_path / "bridge", peers.whole(tied), TIED)
    path = tmp_path / "bridge" / "iter_0000000" / "run_config.yaml"
    flat = yaml.safe_load(path.read_text())["model"]
    outer = {key: flat.pop(key) for key in ("vocab_size", "seq_length", "rotary_base", "position_embedding_type")}
    outer["share_embeddings_and_output_weights"] = flat.pop("share_embeddings_and_output_weights")
    path.write_text(yaml.safe_dump({"model": outer | {"_builder_": "x.GPTModelBuilder", "transformer": flat}}))
    assert ModelConfig(path=tmp_path / "bridge").resolve_shape() == TIED
    path.write_text(yaml.safe_dump({"model": outer | {"transformer": flat | {"num_moe_experts": 4}}}))
    with pytest.raises(UserError, match=r"model.num_moe_experts is 4"):
        ModelConfig(path=tmp_path / "bridge").resolve_shape()


def test_a_head_that_differs_is_never_dropped(tied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tensors = peers.whole(tied)
    head = tensors["embedding.word_embeddings.weight"].clone()
    head[306, 3] += 1  # the last row that is no padding
    peers.write_nemo(tmp_path / "nemo", tensors | {"output_layer.weight": head}, TIED)
    peers.write_bridge(tmp_path / "bridge", tensors | {"output_layer.weight": head}, TIED)
    peers.write_legacy(tmp_path / "mlm", tensors | {"output_layer.weight": head}, TIED, pp=2)
    for name in ("nemo", "bridge", "mlm"):
        out = tmp_path / f"{name}-out"
        with caplog.at_level(logging.WARNING):
            export_checkpoint(tmp_path / name, out, source_dir=tied)
        assert "the head differs: taken as untied" in caplog.text
        assert not shape_from_hf_config(out).tie_embeddings
        assert_same_tensors(read_tensors(out), read_tensors(tied) | {"lm_head.weight": head})
        caplog.clear()


def test_a_tied_start_with_another_head_is_refused(tied: Path, tmp_path: Path):
    from tests.worlds.running import running

    tensors = peers.whole(tied)
    head = tensors["embedding.word_embeddings.weight"] + 1
    peers.write_bridge(tmp_path / "bridge", tensors | {"output_layer.weight": head}, TIED)
    with pytest.raises(UserError, match=r"ties the embeddings, but 'output_layer.weight' differs"):
        with running(tmp_path / "bridge"):
            pass


def lora_tensors(shape, *, rank: int = 4, seed: int = 1) -> peers.Tensors:
    """An adapter on every linear, in Bridge's spelling."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    qkv = hidden + 2 * shape.num_query_groups * shape.kv_channels
    sizes = {
        "self_attention.linear_qkv": (hidden, qkv),
        "self_attention.linear_proj": (hidden, hidden),
        "mlp.linear_fc1": (hidden, 2 * ffn),
        "mlp.linear_fc2": (ffn, hidden),
    }
    found = {}
    for layer in range(shape.num_layers):
        for linear, (inputs, outputs) in sizes.items():
            stem = f"decoder.layers.{layer}.{linear}.adapter."
            for half, size in (("linear_in", (rank, inputs)), ("linear_out", (outputs, rank))):
                found[f"{stem}{half}.weight"] = torch.randn(size, generator=generator).to(torch.bfloat16) / 8
    return found


LORA = {"dim": 4, "alpha": 8, "dropout": 0.0}


def test_lora_to_peft_and_merged(untied: Path, tmp_path: Path):
    tensors = lora_tensors(UNTIED)
    peers.write_bridge(
        tmp_path / "bridge", tensors, UNTIED, peft={"_target_": "megatron.bridge.peft.lora.LoRA", **LORA}
    )
    lora = {"_target_": "nemo.collections.llm.peft.lora.LoRA", **LORA}
    peers.write_nemo(tmp_path / "nemo", tensors, UNTIED, peft=lora)
    base = read_tensors(untied)
    for name in ("bridge", "nemo"):
        export_peft(tmp_path / name, tmp_path / f"{name}-peft", base_model=str(untied))
        adapter = read_peft(tmp_path / f"{name}-peft", UNTIED)
        assert (adapter.config.rank, adapter.config.alpha) == (4, 8.0)
        for key, value in adapter.tensors.items():
            half = "linear_in" if key.endswith("lora_a") else "linear_out"
            assert torch.equal(value, tensors[f"{key.rpartition('.')[0]}.adapter.{half}.weight"].float()), key
        export_checkpoint(tmp_path / name, tmp_path / f"{name}-merged", base_dir=untied)
        merged = read_tensors(tmp_path / f"{name}-merged")
        stem = "decoder.layers.2.mlp.linear_fc2.adapter."
        a, b = (tensors[f"{stem}linear_{half}.weight"].float() for half in ("in", "out"))
        name_2 = "model.layers.2.mlp.down_proj.weight"
        assert torch.equal(merged[name_2], torch.addmm(base[name_2].float(), b, a, alpha=2).to(torch.bfloat16))
        assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])
        with pytest.raises(UserError, match="holds an adapter; name the HF directory of the base"):
            export_checkpoint(tmp_path / name, tmp_path / "out", source_dir=untied)


def test_lora_on_some_layers(untied: Path, tmp_path: Path):
    some = {name: t for name, t in lora_tensors(UNTIED).items() if ".layers.1." in name}
    folder = peers.write_dist(tmp_path / "iter_0000003", some, layers="apart")
    config = {"model": peers.megatron_settings(UNTIED), "peft": {"_target_": "a.LoRA", **LORA}}
    (folder / "run_config.yaml").write_text(yaml.safe_dump(config))
    export_peft(folder, tmp_path / "peft", base_model=None)
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(stored) == 14 and all(".layers.1." in name for name in stored)


def test_adapters_that_are_refused(untied: Path, tmp_path: Path):
    tensors = lora_tensors(UNTIED)
    peers.write_bridge(tmp_path / "a", tensors, UNTIED, peft={"_target_": "megatron.bridge.peft.dora.DoRA", **LORA})
    peers.write_bridge(tmp_path / "b", tensors, UNTIED, peft={"_target_": "x.LoRA", **LORA, "dim": 8})
    peers.write_bridge(tmp_path / "c", tensors, UNTIED)
    peers.write_bridge(tmp_path / "d", tensors | peers.whole(untied), UNTIED, peft={"_target_": "x.LoRA", **LORA})
    for name, message in {
        "a": "'megatron.bridge.peft.dora.DoRA'; only LoRA is read",
        "b": r"of shape \[4, 112\], expected \[8, 112\]",
        "c": "no section 'peft', which would say the adapter's alpha",
        "d": "holds a whole model and an adapter",
    }.items():
        with pytest.raises(UserError, match=message):
            export_peft(tmp_path / name, tmp_path / "out", base_model=str(untied))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_moe_experts": 8}, "model.num_moe_experts is 8"),
        ({"normalization": "LayerNorm"}, "model.normalization is 'LayerNorm'"),
        ({"add_qkv_bias": False}, r"add_qkv_bias is False \(GPTModelProvider\); only dense Qwen2.5"),
        (
            {"activation_func": {"_target_": "torch.nn.functional.gelu"}},
            "activation_func is 'torch.nn.functional.gelu'",
        ),
        ({"position_embedding_type": "yarn"}, "position_embedding_type is 'yarn'"),
        ({"qk_layernorm": True}, "qk_layernorm is True"),
        ({"vocab_size": None}, "model.vocab_size is not given"),
        ({"num_layers": "4"}, r"num_layers: Input should be a valid integer \(found '4'\)"),
        ({"kv_channels": 8}, "kv_channels is 8"),
    ],
)
def test_configurations_of_other_models(untied: Path, tmp_path: Path, settings: dict, message: str):
    peers.write_bridge(tmp_path / "bridge", peers.whole(untied), UNTIED, **settings)
    with pytest.raises(UserError, match=message):
        export_checkpoint(tmp_path / "bridge", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"decoder.layers.0.mlp.router.weight": torch.ones(8, 112)}, "a mixture of experts"),
        (lambda t: t | {"decoder.layers.0.mlp.linear_fc1.layer_norm_bias": torch.ones(112)}, "LayerNorm biases"),
        (lambda t: t | {"embedding.position_embeddings.weight": torch.ones(9, 112)}, "learned positions"),
        (lambda t: t | {"decoder.layers.0.self_attention.q_layernorm.weight": torch.ones(4)}, "Qwen3"),
        (lambda t: t | {"vision_model.class_token": torch.ones(4)}, "a multimodal model"),
        (lambda t: t | {"decoder.strange.weight": torch.ones(4)}, "'decoder.strange.weight' belongs to no Qwen2.5"),
        (lambda t: {n: v for n, v in t.items() if "qkv.bias" not in n}, "Llama, Mistral"),
        (lambda t: {n: v for n, v in t.items() if "final" not in n}, "'decoder.final_layernorm.weight' is missing"),
        (lambda t: t | {"output_layer.weight": torch.ones(300, 112)}, "'output_layer.weight' .* is another model's"),
    ],
)
@pytest.mark.parametrize("is_legacy", [False, True])
def test_tensors_of_other_models(untied: Path, tmp_path: Path, change, message: str, is_legacy: bool):
    tensors = change(peers.whole(untied))
    if is_legacy:
        peers.write_legacy(tmp_path / "mlm", tensors, UNTIED)
    else:
        peers.write_dist(tmp_path / "mlm", tensors, layers="apart")
    with pytest.raises(UserError, match=message):
        export_checkpoint(tmp_path / "mlm", tmp_path / "out", source_dir=untied)
    assert not (tmp_path / "out").exists()


def test_verify_is_exact(untied: Path, tmp_path: Path):
    tensors = peers.whole(untied, vocab=320)
    peers.write_legacy(tmp_path / "mlm", tensors, UNTIED, tp=2, pp=2)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"ids": [5, 300, 17, 42, 8]}\n')
    import_hf(untied, tmp_path / "ours")
    for first, second in (("mlm", "hf"), ("ours", "mlm")):
        source = None if second == "hf" else untied
        found = compare_checkpoints(tmp_path / first, tmp_path / second, prompts, new_tokens=2, source_dir=source)
        assert found.agree and found.same_continuations == 1
    assert found.max_difference == 0  # the same weights in the same model


def test_train_reads_its_start_from_one(tied: Path, tmp_path: Path):
    """The model of a run, from Bridge's root and from a legacy checkpoint with a source, as from the HF directory."""
    from megatron_medllm.checkpoint.open_model import open_weights

    peers.write_bridge(tmp_path / "bridge", peers.whole(tied), TIED)
    peers.write_legacy(tmp_path / "mlm", peers.whole(tied, vocab=312), TIED, tp=2)
    assert ModelConfig(path=tmp_path / "bridge").resolve_shape() == TIED
    assert ModelConfig(path=tmp_path / "mlm", source=tied).resolve_shape() == TIED
    with pytest.raises(UserError, match=r"carries no config.json; name the model's HF directory"):
        ModelConfig(path=tmp_path / "mlm").resolve_shape()
    expected = read_tensors(tied)
    for name in ("bridge", "mlm"):
        weights = open_weights(tmp_path / name, TIED)
        for tensor, value in expected.items():
            assert torch.equal(weights.read(tensor, axis=0, start=0, stop=len(value)), value)
            middle = weights.read(tensor, axis=0, start=1, stop=len(value) - 1)
            assert torch.equal(middle, value[1:-1])
        down = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(weights.read(down, axis=1, start=5, stop=50), expected[down][:, 5:50])
