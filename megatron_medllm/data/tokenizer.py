"""The tokenizer of a model directory, exactly as its tokenizer.json says."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from megatron_medllm.config.base import Switch
from megatron_medllm.config.exam import THINKING_SWITCH
from megatron_medllm.errors import UserError


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Load `directory`/tokenizer.json with its special tokens and chat template.

    `AutoTokenizer` of transformers 5 keeps a Qwen2 directory's vocabulary and merges only and puts its own
    pre-tokenizer around them: the same for the published tokenizer, silently other ids for any other one.

    Raises:
        UserError: there is no tokenizer.json.
    """
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory / 'tokenizer.json'}: no such file")
    return PreTrainedTokenizerFast.from_pretrained(directory)


_ANSWER = "answer-7f3a"  # a text that no template holds


def apply_template(
    tokenizer: PreTrainedTokenizerFast,
    turns: list[dict[str, str]],
    *,
    directory: Path,
    thinking: Switch = "auto",
) -> str:
    """The prompt that the chat template makes of `turns`, up to where the answer begins.

    Args:
        thinking: Qwen3's switch; auto leaves it to the template.

    Raises:
        UserError: the template refuses the turns, or has no such switch.
    """
    if thinking != "auto" and THINKING_SWITCH not in str(tokenizer.chat_template):
        raise UserError(f"{directory}: thinking={thinking}, but the chat template has no switch `{THINKING_SWITCH}`")
    switch: dict[str, Any] = {} if thinking == "auto" else {THINKING_SWITCH: thinking == "on"}
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **switch))
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{directory}: the chat template cannot be used ({error})") from None


def end_of_turn(tokenizer: PreTrainedTokenizerFast, *, directory: Path) -> str:
    """What ends an answer in the chat template (`<|im_end|>`); else the tokenizer's eos_token; "" without either.

    A base model's tokenizer has another eos_token (`<|endoftext|>`), which ends documents, not turns.

    Raises:
        UserError: the template cannot be used, or does not show the answer.
    """
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{directory}: the chat template cannot be used ({error})") from None
    _, found, tail = text.rpartition(_ANSWER)
    if not found:
        raise UserError(f"{directory}: the chat template leaves the assistant's answers out")
    return tail.strip() or str(tokenizer.eos_token or "")
