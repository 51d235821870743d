"""What the recipes in examples/ expect under ${data}, made small: their names, none of their size."""

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tests.exam_world import write_exam

EOD_ID = 151643  # Qwen2.5's
# (layers, hidden, heads, KV heads, FFN, vocabulary) of the published config.json files.
QWEN = {
    "0.5B": (24, 896, 14, 2, 4864, 151936),
    "7B": (28, 3584, 28, 4, 18944, 152064),
    "72B": (80, 8192, 64, 8, 29568, 152064),
}
DOCUMENTS = 8


def write_example_inputs(data: Path) -> Path:
    """Fill `data` for any of the example recipes."""
    for size, shape in QWEN.items():
        write_model(data / f"Qwen2.5-{size}", shape)
    write_tokenizer(data / "qwen2.5-tokenizer")
    # Two files each, so that the recipes' globs have something to match.
    names = [f"{folder}/part-{part}.jsonl" for folder in ("medical", "general") for part in range(2)]
    for seed, name in enumerate([*names, "medical_ja.jsonl", "bench_ja_20mb.jsonl"]):
        write_texts(data / name, seed=seed)
    write_exam(data / "igakuqa")
    question = {
        "problem_id": "109001",
        "problem_text": "正しいのはどれか。",
        "choices": ["甲", "乙", "丙"],
        "answer": ["a"],
    }
    (data / "yakugakuqa").mkdir()
    (data / "yakugakuqa" / "2023.jsonl").write_text(json.dumps(question | {"points": "1"}, ensure_ascii=False) + "\n")
    (data / "pairs.jsonl").write_text(json.dumps({"prompt": "問い", "chosen": "正", "rejected": "誤"}) + "\n")
    return data


def write_texts(path: Path, *, seed: int) -> None:
    """JSON lines with a field `text`: kanji at random, so that no document is another's near copy."""
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = ["".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(80)) for _ in range(DOCUMENTS)]
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


def write_model(folder: Path, shape: tuple[int, ...]) -> None:
    """A Hugging Face folder without weights, which nothing before training reads."""
    write_tokenizer(folder)
    layers, hidden, heads, groups, ffn, vocabulary = shape
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": groups, "intermediate_size": ffn, "vocab_size": vocabulary,
        "max_position_embeddings": 131072, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": hidden == 896,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def write_tokenizer(folder: Path) -> None:
    """Bytes only, with the end of a document at Qwen2.5's id."""
    folder.mkdir(parents=True)
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary | {"<|endoftext|>": EOD_ID}, []))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
