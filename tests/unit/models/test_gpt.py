"""The model on one process: what packing, shared prompts and padding may not change."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn.functional import log_softmax

from megatron_medllm.checkpoint.state_writer import StateWriter
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import SIZES, ModelConfig, shape_from_hf_config
from megatron_medllm.errors import UserError
from megatron_medllm.parallel.packed import Segment
from tests.worlds.model import build_tiny, documents, gradients, relative, run
from tests.worlds.model_dir import write_config
from tests.worlds.shapes import tiny_shape

pytestmark = pytest.mark.usefixtures("one_process")

# GQA 7:1 as in 0.5B and 7B; untied, so that the embedding's gradient comes from the input alone.
SHAPE = tiny_shape(
    num_layers=2, hidden_size=56, num_attention_heads=14, ffn_hidden_size=96, vocab_size=150, tie_embeddings=False
)
LENGTHS = (9, 30, 1, 12, 28)  # two batches of similar length, a document of one token
IDS = torch.randperm(150, generator=torch.Generator().manual_seed(0))[:80]  # no token twice
LABELS = IDS.roll(-1)


def test_packed_documents_equal_the_same_documents_alone():
    model = build_tiny(SHAPE)
    segments = documents(*LENGTHS)
    weights = torch.randn(len(IDS), generator=torch.Generator().manual_seed(1))
    logits = run(model, IDS, segments)
    logprobs, lse = run(model, IDS, segments, LABELS)
    (logprobs * weights + lse).sum().backward()
    packed = gradients(model)
    for s in segments:
        part = slice(s.start, s.end)
        alone = run(model, IDS[part], documents(s.end - s.start))
        assert relative(logits[part], alone) < 2e-6
        alone_logprobs, alone_lse = run(model, IDS[part], documents(s.end - s.start), LABELS[part])
        assert relative(logprobs[part], alone_logprobs) < 2e-6
        (alone_logprobs * weights[part] + alone_lse).sum().backward()  # gradients add up over the documents
    alone_sum = gradients(model)
    assert packed.keys() == alone_sum.keys() and len(packed) == 3 + 2 * 7
    for name, gradient in packed.items():
        assert gradient.norm() > 0 and relative(gradient, alone_sum[name]) < 1e-5, name


def test_norms_that_te_fuses_into_linears_start_at_one():
    """There they are called `linear_qkv.layer_norm_weight`, and biases `layer_norm_bias` where a norm has one."""
    from megatron_medllm.models.initialize import initialize_weights

    model = build_tiny(SHAPE)
    linear = model.decoder.layers[0].self_attention.linear_qkv
    linear.layer_norm_weight = torch.nn.Parameter(torch.full((56,), 7.0))
    before = linear.weight.detach().clone()
    initialize_weights([model], seed=1, tp_rank=0, tp_size=1)
    assert torch.equal(linear.layer_norm_weight, torch.ones(56))
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize(("cp", "ours"), [(1, False), (2, True)])
def test_te_layers_attend_with_our_core_where_a_stream_is_split(monkeypatch: pytest.MonkeyPatch, cp: int, ours: bool):
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_medllm.models.attention import PackedAttention
    from megatron_medllm.models.layer_spec import block_spec

    config = TransformerConfig(
        num_layers=2, hidden_size=56, num_attention_heads=14, context_parallel_size=cp, use_cpu_initialization=True
    )
    # A stand-in: upstream defines TE's provider only where TE is installed.
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", LocalSpecProvider, raising=False)
    spec = block_spec(config, "te", None)
    cores = [layer.submodules.self_attention.submodules.core_attention for layer in spec.layer_specs]
    assert [core is PackedAttention for core in cores] == [ours] * 2


def test_te_finds_no_state_of_its_final_norm_in_a_checkpoint_of_torchs(tmp_path: Path):
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_medllm.parallel import mcore

    model = build_tiny(SHAPE)
    StateWriter().start(mcore.sharded_state([model], None, is_loading=False), tmp_path, wait=True)
    state = mcore.sharded_state([model], None, is_loading=True)
    assert any(isinstance(entry, ShardedObject) for entry in state["model"].values())
    key = "decoder.final_layernorm._extra_state"
    state["model"][key] = ShardedObject(key, torch.arange(3), (1,), (0,))
    expected = model.decoder.final_layernorm.weight.detach().clone() + 0.5
    with torch.no_grad():
        model.decoder.final_layernorm.weight.copy_(expected)  # it is read again, over this
    loaded = mcore.load_sharded(state, tmp_path)["model"]
    assert loaded[key].tolist() == [0, 1, 2]
    assert torch.equal(loaded["decoder.final_layernorm.weight"], expected - 0.5)
    state["model"]["another.object"] = ShardedObject("another.object", None, (1,), (0,))
    with pytest.raises(CheckpointException, match=r"another\.object"):
        mcore.load_sharded(state, tmp_path)


def test_no_gradient_crosses_documents_or_goes_back_in_time():
    model = build_tiny(SHAPE)
    segments = documents(*LENGTHS)
    second = segments[1]
    middle = (second.start + second.end) // 2
    run(model, IDS, segments)[middle, :150].square().sum().backward()
    touched = model.embedding.word_embeddings.weight.grad.abs().sum(1)[IDS] > 0
    seen = torch.zeros(len(IDS), dtype=torch.bool)
    seen[second.start : middle + 1] = True
    assert torch.equal(touched, seen)  # exactly 0 elsewhere


def test_answers_behind_one_copy_of_their_prompt_equal_side_by_side():
    model = build_tiny(SHAPE)
    n, chosen, rejected = 20, 12, 25
    total = n + chosen + rejected
    ids, labels = IDS[:total], LABELS[:total]
    shared = (Segment(0, n), Segment(n, n + chosen, 0, n), Segment(n + chosen, total, 0, n))
    order = torch.cat((torch.arange(n + chosen), torch.arange(n), torch.arange(n + chosen, total)))
    answers = order[n:] >= n  # in the side-by-side stream
    answers = torch.cat((torch.zeros(n, dtype=torch.bool), answers))
    together = run(model, ids, shared, labels)[0][n:]
    (together * torch.linspace(-1, 1, len(together))).sum().backward()
    from_shared = gradients(model)
    apart = run(model, ids[order], documents(n + chosen, n + rejected), labels[order])[0][answers]
    (apart * torch.linspace(-1, 1, len(apart))).sum().backward()
    assert relative(together, apart) < 2e-6
    for name, gradient in gradients(model).items():
        assert relative(from_shared[name], gradient) < 1e-5, name


def test_padded_vocabulary_is_no_part_of_any_softmax():
    model = build_tiny(SHAPE)
    weight = model.output_layer.weight
    assert weight.shape[0] == 256 and not weight[150:].any()
    segments = documents(len(IDS))
    before = run(model, IDS, segments, LABELS)
    with torch.no_grad():
        weight[150:] = 1e3
    after = run(model, IDS, segments, LABELS)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    logits = run(model, IDS, segments)[:, :150]
    expected = log_softmax(logits.double(), -1).gather(1, LABELS[:, None])[:, 0]
    assert relative(after[0].double(), expected) < 1e-6
    assert relative(after[1].double(), torch.logsumexp(logits.double(), -1)) < 1e-6
    after[0].sum().backward()
    assert not weight.grad[150:].any()


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient(recompute: str):
    from megatron_medllm.models.gpt import build_model, unwrap
    from megatron_medllm.models.initialize import initialize_weights

    found = []
    for layout in (LayoutConfig(), LayoutConfig(recompute=recompute)):
        chunks = build_model(ModelConfig(shape=SHAPE, dtype="float32"), layout, device=torch.device("cpu"))
        initialize_weights(chunks, seed=1, tp_rank=0, tp_size=1)
        model = unwrap(chunks[0]).train()
        run(model, IDS, documents(*LENGTHS), LABELS)[0].sum().backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_one_place_translates_the_shape_to_megatron():
    from megatron_medllm.models.config import transformer_config

    layout = LayoutConfig(tp=8, pp=4, vpp=5, sp=True, recompute="selective")
    config = transformer_config(SIZES["72b"], layout, ModelConfig(size="72b"))
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (80, 8192, 29568)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (64, 8, 128)
    assert config.add_qkv_bias and not config.add_bias_linear and config.gated_linear_unit
    assert config.layernorm_epsilon == 1e-5 and config.normalization == "RMSNorm"
    assert config.bf16 and config.params_dtype == config.pipeline_dtype == torch.bfloat16
    # Interleaved stages: the default pair corrupts the loss without an error.
    assert config.overlap_p2p_comm and not config.batch_p2p_comm and not config.deallocate_pipeline_outputs


def test_both_spellings_of_a_hugging_face_config(tmp_path: Path):
    spelled_by_4 = shape_from_hf_config(
        write_config(tmp_path, SIZES["7b"], use_sliding_window=False, sliding_window=131072)
    )
    new = {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "dtype": "bfloat16"}
    spelled_by_5 = shape_from_hf_config(write_config(tmp_path, SIZES["7b"], rope_theta=None, torch_dtype=None, **new))
    assert spelled_by_4 == spelled_by_5 == SIZES["7b"]
    assert shape_from_hf_config(write_config(tmp_path, SIZES["7b"], rope_theta=None)).rotary_base == 10_000.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window is true; sliding-window attention is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}}, "RoPE type 'linear' is not supported"),
        ({"model_type": "llama"}, "model_type is 'llama'; this package trains 'qwen2' .Qwen2.5., 'qwen3'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_hidden_layers": None}, "missing field 'num_hidden_layers'"),
        ({"num_key_value_heads": 5}, "28 heads are not a multiple of 5 KV heads"),
        ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ({"layer_types": ["full_attention"] * 27}, "layer_types has not one entry a layer"),
        ({"layer_types": []}, "layer_types has not one entry a layer"),
        ({"num_hidden_layers": 10_000}, "num_hidden_layers: Input should be less than 10000"),
        ({"head_dim": 64}, "head_dim is 64; Qwen2.5 has hidden_size / heads, 128"),
        ({"attention_bias": False}, "attention_bias is false"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"is_causal": False}, "is_causal is false"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; it is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not 1"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config is there; take the directory of the unq",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta is given twice, as 500000.0 and 10",
        ),
        ({"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": {"rope_type": "default"}}, "RoPE type 'llama3'"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}},
            "RoPE for 'sliding_attention' is not supported",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "proportional"}}}, "RoPE type 'proportional' is not sup"),
        ({"rope_parameters": {"full_attention": 3}}, "RoPE's 'full_attention' is no JSON object"),
        ({"rope_scaling": "linear"}, "rope_scaling: Input should be a valid dictionary"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings: Input should be a valid boolean \(found 'false'\)"),
        ({"use_sliding_window": "false"}, r"use_sliding_window: Input should be a valid boolean \(found 'false'\)"),
        ({"num_hidden_layers": "28"}, r"num_hidden_layers: Input should be a valid integer \(found '28'\)"),
        ({"num_hidden_layers": True}, r"num_hidden_layers: Input should be a valid integer \(found True\)"),
        ({"hidden_size": 3584.5}, r"hidden_size: Input should be a valid integer"),
        ({"rms_norm_eps": "1e-06"}, r"rms_norm_eps: Input should be a valid number"),
        ({"rms_norm_eps": 0}, r"rms_norm_eps: Input should be greater than 0"),
        ({"rope_theta": -1}, r"rope_theta: Input should be greater than 0"),
        ({"hidden_size": 3585}, r"hidden_size 3585 is not a multiple of 28 heads"),
    ],
)
def test_models_that_are_not_qwen25_are_refused(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        shape_from_hf_config(write_config(tmp_path, SIZES["7b"], **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [[], "qwen2", 3, None])
def test_a_config_that_is_no_object(tmp_path: Path, config: object):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json: expected a JSON object, found"):
        shape_from_hf_config(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 128},
        {"sliding_window": 4096, "max_window_layers": 3, "use_sliding_window": False},
        {"layer_types": ["full_attention"] * 28},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000, "partial_rotary_factor": 1.0}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 1000000},
        {"transformers_version": "9.0", "torch_dtype": "float8", "a_key_of_tomorrow": {"x": 1}},
    ],
    ids=str,
)
def test_spellings_of_the_same_model(tmp_path: Path, changes: dict):
    assert shape_from_hf_config(write_config(tmp_path, SIZES["7b"], **changes)) == SIZES["7b"]


def test_rope_nested_by_kind_of_layer_is_read_as_transformers_reads_it(tmp_path: Path):
    nested = {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}, "rope_theta": None}
    assert shape_from_hf_config(write_config(tmp_path, SIZES["7b"], **nested)).rotary_base == 5e5
