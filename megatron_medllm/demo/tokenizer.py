"""A byte-level BPE for the miniature world, as a directory that transformers loads.

The two markers, the option letters and the roles are cut out before merging, so that each is one token: the trainer
masks everything up to and including a marker, and the token that decides an answer is a letter of its own.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_medllm.demo.facts import DISEASE_ROLES, TOWN_ROLES
from megatron_medllm.demo.writing import ANSWER_MARKER, EXPLANATION_MARKER
from megatron_medllm.storage import atomic_write, write_json

PAD, EOS = "<pad>", "<eos>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE whose pieces are names, roles, markers, letters and the words between them."""
    roles = "|".join([*DISEASE_ROLES, *TOWN_ROLES])
    pieces = rf"[ァ-ヴー]+|{ANSWER_MARKER}|{EXPLANATION_MARKER}|\n[a-e]\.|[a-e]|{roles}|\n"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    with atomic_write(directory / "tokenizer.json") as stream:
        stream.write(tokenizer.to_str(pretty=False).encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", config)
