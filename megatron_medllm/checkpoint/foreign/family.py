"""Which family of models a checkpoint's tensor names tell of: Qwen2.5, or something else that is named."""

import re
from collections.abc import Iterable

# A part of a tensor's name, and what has it. The first that is found is told.
_MARKS: tuple[tuple[str, str], ...] = (
    (r"^(vision_model|vision_projection|image_|audio_|thinker|llava)|vision", "a multimodal model"),
    (r"^language_model\.", "a model from before Megatron-Core, or the language part of a multimodal one"),
    (r"\.mixer\.|\.in_proj\.|\.A_log$", "a Mamba or hybrid model"),
    (r"\.experts\.|\.router\.|shared_experts", "a mixture of experts"),
    (r"^mtp\.", "a model with multi-token prediction"),
    (r"^encoder\.|cross_attention|\.inter_attention|^lm_head\.dense|^binary_head|^pooler", "an encoder (BERT, T5)"),
    (r"position_embeddings?\.", "a model with learned positions (GPT)"),
    (r"linear_q_(down|up)_proj|linear_kv_(down|up)_proj|linear_q_proj", "multi-head latent attention (DeepSeek)"),
    (r"\.(q_layernorm|k_layernorm|q_norm|k_norm)\.", "a model with norms on queries and keys (Qwen3)"),
    (r"layer_norm_bias$|layernorm\.bias$", "a model with LayerNorm biases (GPT)"),
    (r"linear_(proj|fc1|fc2)\.bias$", "a model with biases on every linear (GPT)"),
    (r"post_(self_attn|mlp)_layernorm", "a model with norms behind its blocks (Gemma)"),
    (r"magnitude", "a DoRA adapter"),
    (r"adapter_(q|k|v|up|gate)\.|\.lora_", "adapters on parts of the fused linears (canonical LoRA)"),
)
_KNOWN = re.compile(
    r"embedding\.word_embeddings\.weight|output_layer\.weight|decoder\.final_layernorm\.weight"
    r"|decoder\.layers\.(\d+\.)?("
    r"self_attention\.linear_qkv\.(weight|bias|layer_norm_weight)|self_attention\.linear_proj\.weight"
    r"|mlp\.linear_fc1\.(weight(_[wv])?|layer_norm_weight)|mlp\.linear_fc2\.weight"
    r"|(input|pre_mlp)_layernorm\.weight"
    r"|self_attention\.linear_(qkv|proj)\.(lora_[ab]|adapter\.linear_(in|out)\.weight)"
    r"|mlp\.linear_fc[12]\.(lora_[ab]|adapter\.linear_(in|out)\.weight))"
    r"|.*\._extra_state(/.*)?|rotary_pos_emb\.inv_freq|decoder\.layers\.(\d+\.)?.*inv_freq"
)
_BIAS = re.compile(r"decoder\.layers\.(\d+\.)?self_attention\.linear_qkv\.bias")
_HEAD_NORM = re.compile(r"decoder\.layers\.(\d+\.)?self_attention\.[qk]_layernorm\.weight")
_QKV = re.compile(r"decoder\.layers\.(\d+\.)?self_attention\.linear_qkv\.weight")


def has_head_norms(names: Iterable[str]) -> bool:
    """Whether queries and keys have norms (Qwen3)."""
    return any(map(_HEAD_NORM.fullmatch, names))


def other_family(names: Iterable[str], *, ours: bool = False) -> str | None:
    """What a model with these tensors is, where it is no Qwen2.5; None where it is one (or an adapter for one).

    Args:
        names: of the model's tensors, without `module.` before them; layers may be stacked.
        ours: this package wrote them: Qwen3 is one of its families, while of other tools only Qwen2.5 is read.
    """
    names = list(names)
    if ours and has_head_norms(names):
        names = [name for name in names if not _HEAD_NORM.fullmatch(name)]
        return None if all(map(_KNOWN.fullmatch, names)) else "tensors that belong to no Qwen3 model"
    strange = [name for name in names if not _KNOWN.fullmatch(name)]
    for pattern, what in _MARKS:
        found = next((name for name in strange if re.search(pattern, name)), None)
        if found is not None:
            return f"{what}: tensor {found!r}; only dense Qwen2.5 models are read"
    if strange:
        return f"tensor {strange[0]!r} belongs to no Qwen2.5 model"
    if any(map(_QKV.fullmatch, names)) and not any(map(_BIAS.fullmatch, names)):
        return "a model without biases on queries, keys and values (Llama, Mistral); only Qwen2.5 is read"
    return None
