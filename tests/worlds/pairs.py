"""A tiny random model with a tokenizer of words, and preference pairs in its language."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(94)]
CHAT_TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}w2 "


def write_model(
    directory: Path,
    *,
    seed: int = 0,
    layers: int = 4,
    hidden: int = 32,
    ffn: int = 64,
    std: float = 0.15,
    family: str = "qwen2",
    **more: object,
) -> Path:
    """An HF directory: random weights and biases, and `<eos>` = 0; `more` goes to its configuration."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(WORDS) + 2,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=std,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
        **more,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    vocabulary = {word: i for i, word in enumerate(["<eos>", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return directory


def random_pairs(count: int, *, seed: int = 0, chosen_words: int | None = None) -> list[dict]:
    """Pairs of random words; all chosen answers `chosen_words` long, or of mixed lengths."""
    generator = np.random.default_rng(seed)

    def words(least: int, most: int) -> str:
        return " ".join(generator.choice(WORDS, int(generator.integers(least, most + 1))))

    return [
        {
            "prompt": words(4, 20) + " ",
            "chosen": words(chosen_words or 3, chosen_words or 14),
            "rejected": words(3, 14),
        }
        for _ in range(count)
    ]


def write_pairs(path: Path, pairs: list[dict]) -> Path:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def rpo_settings(model: Path, pairs: Path, run_dir: Path, *, layout: dict | None = None, **rpo) -> dict:
    """A recipe's settings for an RPO stage in fp32: 8 pairs a step, constant learning rate."""
    training = {
        "pairs": str(pairs),
        "sequence_length": 64,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "optimizer": {"lr": 1e-3, "warmup_ratio": 0.0, "schedule": "constant"},
        "guard": {"max_margin": 1e5},
    }
    return {
        "run_dir": str(run_dir),
        "seed": 5,
        "stage": "rpo",
        "model": {"path": str(model), "dtype": "float32"},
        "layout": layout or {},
        "rpo": training | rpo,
    }
