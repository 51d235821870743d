"""generation_config.json of a release: where an answer ends, whichever way the model is asked."""

from pathlib import Path
from typing import Any

from megatron_medllm.data.tokenizer import end_of_turn, load_tokenizer
from megatron_medllm.release.finished_run import FinishedRun
from megatron_medllm.storage import read_json

NAME = "generation_config.json"


def generation_config(run: FinishedRun) -> dict[str, Any]:
    """What the export carried along, and every token that ended a text in training.

    That is what the base named, the tokenizer's eos, the token that ends the corpora's documents and, with a chat
    template, what ends a turn. A base model's own file names `<|endoftext|>` alone: chatting would go on for ever.
    """
    path = run.model_dir / NAME
    config: dict[str, Any] = dict(read_json(path)) if path.is_file() else {}
    before = config.get("eos_token_id")
    ends = [before] if isinstance(before, int) else [number for number in before or [] if isinstance(number, int)]
    tokenizer = load_tokenizer(run.model_dir)
    ends.append(tokenizer.eos_token_id)
    ends += [run.manifest(name)["tokenizer"].get("eod_id") for name in run.corpora()]
    if tokenizer.chat_template:
        text = end_of_turn(tokenizer, directory=run.model_dir)
        ids = tokenizer.encode(text, add_special_tokens=False)
        ends += ids if len(ids) == 1 else []
    known = list(dict.fromkeys(number for number in ends if number is not None))
    if known:
        config["eos_token_id"] = known[0] if len(known) == 1 else known
    if tokenizer.pad_token_id is not None:
        config.setdefault("pad_token_id", tokenizer.pad_token_id)
    return config


def has_chat_template(model_dir: Path) -> bool:
    """Whether the tokenizer brings one."""
    return bool(load_tokenizer(model_dir).chat_template)
