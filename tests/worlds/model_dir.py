"""Tiny random models with the shape ratios of every published size, as Hugging Face directories."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_medllm.checkpoint.names import hf_shapes
from megatron_medllm.config.model import SIZES, ModelShape

PUBLISHED = tuple(size for size in SIZES if size != "mini")


def twin_shape(size: str, *, layers: int = 2) -> ModelShape:
    """Heads, KV heads, and FFN and heads in proportion to the published size; heads 4 (8) wide, an odd vocabulary."""
    real = SIZES[size]
    head_dim = None if real.head_dim is None else 8
    hidden = 4 * real.num_attention_heads
    if head_dim is not None:
        hidden = head_dim * real.num_attention_heads * real.hidden_size // real.query_width
    ffn = 4 * round(hidden * real.ffn_hidden_size / real.hidden_size / 4)
    return real.model_copy(
        update={
            "num_layers": layers,
            "hidden_size": hidden,
            "head_dim": head_dim,
            "ffn_hidden_size": ffn,
            "vocab_size": 307,
            "max_position_embeddings": 512,
        }
    )


def config_json(shape: ModelShape, dtype: str = "bfloat16") -> dict:
    """transformers 4's spelling, as the published directories have it."""
    own = {} if shape.head_dim is None else {"head_dim": shape.head_dim, "attention_bias": False}
    if shape.yarn is not None:
        own["rope_scaling"] = {"type": "yarn", **shape.yarn.model_dump()}
    return own | {
        "architectures": ["Qwen2ForCausalLM" if shape.family == "qwen2" else "Qwen3ForCausalLM"],
        "model_type": shape.family,
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "intermediate_size": shape.ffn_hidden_size,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tie_embeddings,
        "rms_norm_eps": shape.layernorm_epsilon,
        "rope_theta": shape.rotary_base,
        "max_position_embeddings": shape.max_position_embeddings,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "eos_token_id": 0,
    }


def write_config(hf_dir: Path, shape: ModelShape, **changes: object) -> Path:
    """`config.json` alone, with changes; a key set to None is left out."""
    hf_dir.mkdir(parents=True, exist_ok=True)
    config = config_json(shape) | changes
    (hf_dir / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return hf_dir


def random_tensors(shape: ModelShape, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights large enough that every one of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in hf_shapes(shape).items():
        values = torch.randn(size, generator=generator)
        tensors[name] = (1 + values / 10 if name.endswith("norm.weight") else values / 5).to(dtype)
    return tensors


def write_twin(hf_dir: Path, shape: ModelShape, *, dtype: torch.dtype = torch.bfloat16, shards: int = 2) -> Path:
    """An HF directory of random weights in `shards` safetensors files."""
    write_config(hf_dir, shape, torch_dtype=str(dtype).removeprefix("torch."))
    tensors = random_tensors(shape, dtype=dtype)
    if shards == 1:
        save_file(tensors, hf_dir / "model.safetensors", metadata={"format": "pt"})
        return hf_dir
    weight_map = {}
    names = list(tensors)
    for number in range(shards):
        file_name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, hf_dir / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return hf_dir


def read_tensors(hf_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of an HF directory, by the safetensors library."""
    return {name: t for path in sorted(hf_dir.glob("*.safetensors")) for name, t in load_file(path).items()}


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Same names, types, shapes and bytes."""
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def write_tiny_model(directory: Path, *, texts: list[str] | None = None, vocab_size: int = 400, seed: int = 0) -> Path:
    """A random two-layer Qwen2 with a byte-level tokenizer of its own, saved as an HF directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from tests.worlds.exam import QUESTIONS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts or [row[1] for row in QUESTIONS], trainer)
    torch.manual_seed(seed)
    # Wide weights: the likeliest token leads clearly, so that rounding cannot change a greedy answer.
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.4,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(directory)
    return directory
