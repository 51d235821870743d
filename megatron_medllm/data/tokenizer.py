"""The tokenizer of a model directory, exactly as its tokenizer.json says."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

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
