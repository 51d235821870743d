"""What the recipes in examples/ expect under ${data}, made small: their names, none of their size."""

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megatron_medllm.config.model import SIZES
from tests.worlds.exam import write_exam
from tests.worlds.model_dir import write_config

EOD_ID = 151643  # Qwen2.5's
DOCUMENTS = 8


def write_example_inputs(data: Path) -> Path:
    """Fill `data` for any of the example recipes."""
    models = {"Qwen2.5-0.5B": "0.5b", "Qwen2.5-7B": "7b", "Qwen2.5-72B": "72b", "Qwen3-8B-Base": "qwen3-8b"}
    for name, size in models.items():
        # Without weights, which nothing before training reads.
        write_tokenizer(data / name)
        write_config(data / name, SIZES[size], max_position_embeddings=131072, eos_token_id=None)
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
