"""Random data and weights, so that throughput can be measured without a corpus, pairs or a model.

They take the same way as real ones: documents as an indexed data set, pairs as JSON lines that are tokenized (every
token is a word of its own, its number), reference log-probabilities scored and cached, models as HF directories.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import CptConfig, DataSource, RpoConfig
from megatron_medllm.data.number_words import END, NumberWords, write_corpus, write_tokenizer
from megatron_medllm.errors import UserError
from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.storage import write_jsonl
from megatron_medllm.train.scoring import shares_prompt


@dataclass(frozen=True, kw_only=True)
class SyntheticData:
    """Mean lengths in tokens. Documents' are exponentially distributed, prompts' and answers' even within +-50 %."""

    document_length: int = 1024
    prompt_length: int = 256
    response_length: int = 256


def with_synthetic_data(
    run: RunConfig, directory: Path, lengths: SyntheticData, *, steps: int, ranks: Runtime
) -> RunConfig:
    """The run with random data for `steps` steps in place of its own, from random weights. Collective; rank 0 writes.

    Raises:
        UserError: pairs of these lengths do not fit a row of the recipe's.
    """
    section = run.stage_config()
    changes = (
        _pairs(run, section, directory, lengths, steps=steps, ranks=ranks)
        if isinstance(section, RpoConfig)
        else _documents(run, section, directory, lengths, steps=steps, ranks=ranks)
    )
    dist.barrier()
    return with_random_weights(run, directory).model_copy(update={run.stage: section.model_copy(update=changes)})


def with_random_weights(run: RunConfig, tokenizer_dir: Path) -> RunConfig:
    """The run with a model of the same shape, but random weights and no tokenizer of its own."""
    shape = run.model.resolve_shape()
    model = run.model.model_copy(update={"path": None, "size": None, "shape": shape})
    return run.model_copy(update={"model": model, "tokenizer": tokenizer_dir})


def _documents(
    run: RunConfig, section: CptConfig, directory: Path, lengths: SyntheticData, *, steps: int, ranks: Runtime
) -> dict[str, object]:
    tokens = steps * section.global_batch_size * section.sequence_length
    if ranks.is_main:
        spare = section.global_batch_size * section.sequence_length
        write_documents(directory, tokens=tokens + spare, document_length=lengths.document_length,
                        vocab_size=run.model.resolve_shape().vocab_size, seed=run.seed)  # fmt: skip
    return {
        "data": (DataSource(path=directory),),
        "train_tokens": tokens,
        "epochs": None,
        "loss_after": (),
        "batch_ramp_steps": 0,
        **_unvalidated(section),
    }


def _unvalidated(section: CptConfig | RpoConfig) -> dict[str, object]:
    """Nothing is held out of random data."""
    return {
        "validate_every_steps": 0,
        "checkpoint": section.checkpoint.model_copy(update={"best": None, "export": None}),
        "guard": section.guard.model_copy(update={"patience": 0}),
    }


def _pairs(
    run: RunConfig, section: RpoConfig, directory: Path, lengths: SyntheticData, *, steps: int, ranks: Runtime
) -> dict[str, object]:
    prompts = 1 if shares_prompt(run, section) else 2
    longest = (3 * (prompts * lengths.prompt_length + 2 * lengths.response_length)) // 2 + 2
    if longest > section.stream_length:
        raise UserError(
            f"synthetic pairs take up to {longest} tokens, but rpo.micro_batch_size x rpo.sequence_length is "
            f"{section.stream_length}: lower --prompt-length or --response-length"
        )
    if ranks.is_main:
        vocab_size = run.model.resolve_shape().vocab_size
        write_tokenizer(directory, vocab_size=vocab_size)
        count = steps * section.global_batch_size
        write_jsonl(directory / "pairs.jsonl", random_pairs(count, lengths, vocab_size=vocab_size, seed=run.seed))
    return {
        "pairs": directory / "pairs.jsonl",
        "reference": directory / "reference",
        "epochs": 1.0,
        "template": "plain",
        "validation_share": 0.0,
        **_unvalidated(section),
    }


def random_pairs(count: int, lengths: SyntheticData, *, vocab_size: int, seed: int) -> list[dict[str, str]]:
    """Pairs whose words are token numbers."""
    texts = RandomTexts(vocab_size, seed)
    return [
        {
            "prompt": texts.draw(lengths.prompt_length),
            "chosen": texts.draw(lengths.response_length),
            "rejected": texts.draw(lengths.response_length),
        }
        for _ in range(count)
    ]


class RandomTexts:
    """Draws texts of random words, even within +-50 % of a mean length, from one seed."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._words = NumberWords(vocab_size, seed)

    def draw(self, mean_length: int) -> str:
        """A text of mean_length / 2 to 3 / 2 mean_length tokens."""
        return self._words.draw(-(-mean_length // 2), 3 * mean_length // 2)


def write_documents(directory: Path, *, tokens: int, document_length: int, vocab_size: int, seed: int) -> None:
    """Write documents of exponentially distributed lengths (mean `document_length`), each ended by `END`."""
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = generator.exponential(document_length, size=max(16, tokens // document_length))
        lengths += [int(n) + 2 for n in drawn]
    array = np.array(lengths, np.int32)
    ids = generator.integers(END + 1, vocab_size, size=int(array.sum()))
    ids[np.cumsum(array) - 1] = END
    write_corpus(directory, "synthetic", ids, lengths, vocab_size=vocab_size)
