"""generation_config.json names every token that ended a text in training."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_medllm.config.run import RunConfig
from megatron_medllm.release.finished_run import FinishedRun
from megatron_medllm.release.generation import generation_config
from tests.worlds.shapes import SHAPE

QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def finished_run(directory: Path, *, chat: bool, before: object) -> FinishedRun:
    """A run of which only the model's tokenizer and the corpus's manifest are there."""
    hf_dir = directory / "cpt" / "hf"
    vocabulary = {"a": 0, "<|endoftext|>": 1, "<|im_start|>": 2, "<|im_end|>": 3, "<doc>": 4, "<unk>": 5}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.add_special_tokens([token for token in vocabulary if token != "a"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    if chat:
        tokenizer.chat_template = QWEN_CHAT
    tokenizer.save_pretrained(hf_dir)
    if before is not None:
        (hf_dir / "generation_config.json").write_text(json.dumps(before))
    corpus = directory / "corpus" / "medical"
    corpus.mkdir(parents=True)
    (corpus / "manifest.json").write_text(json.dumps({"tokenizer": {"eod_id": 4}}))
    cpt = {"data": [{"path": str(corpus)}], "train_tokens": 64, "optimizer": {"lr": 1e-3}, "sequence_length": 64}
    config = RunConfig.model_validate(
        {"name": "x", "run_dir": str(directory), "model": {"shape": SHAPE}, "cpt": cpt | {"global_batch_size": 1}}
    )
    return FinishedRun(directory, config, "cpt")


@pytest.mark.parametrize(
    ("chat", "before", "ends"),
    [
        (False, None, [1, 4]),
        (True, None, [1, 4, 3]),
        (True, {"eos_token_id": [3, 1], "temperature": 0.7}, [3, 1, 4]),
        (False, {"eos_token_id": 4}, [4, 1]),
    ],
)
def test_every_end_is_named_once(tmp_path: Path, chat: bool, before: dict | None, ends: list[int]) -> None:
    found = generation_config(finished_run(tmp_path, chat=chat, before=before))
    assert found["eos_token_id"] == ends
    assert found["pad_token_id"] == 1
    assert found.get("temperature") == (before or {}).get("temperature")
