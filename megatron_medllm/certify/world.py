"""What the small run reads: a random model, a tokenizer whose words are the token numbers, documents or pairs."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_medllm.certify.shrink import MARKER, STEPS
from megatron_medllm.checkpoint.hf_target import hf_config
from megatron_medllm.checkpoint.names import hf_shapes
from megatron_medllm.config.model import ModelShape
from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import RpoConfig
from megatron_medllm.data.number_words import END, NumberWords, write_corpus, write_tokenizer
from megatron_medllm.storage import write_json, write_jsonl

_DOCUMENT = 20  # tokens, on average
_PROMPT, _ANSWER = (4, 20), (3, 14)


def write_inputs(run: RunConfig, shape: ModelShape, place: Path) -> None:
    """Write the model, and the documents or the pairs that `run` names, under `place`."""
    write_model(place / "model", shape, seed=run.seed)
    section = run.stage_config()
    if isinstance(section, RpoConfig):
        count = STEPS * section.global_batch_size
        write_jsonl(section.pairs, random_pairs(count, vocab_size=shape.vocab_size, seed=run.seed))
    else:
        rows = STEPS * section.global_batch_size + 2
        write_documents(
            section.data[0].path, tokens=rows * section.sequence_length, vocab_size=shape.vocab_size, seed=run.seed
        )


def write_model(directory: Path, shape: ModelShape, *, seed: int) -> None:
    """An HF directory of random weights. Norms are around 1 and biases around 0, so that every parameter matters."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in hf_shapes(shape).items():
        if name == "lm_head.weight" and shape.tie_embeddings:
            continue
        drawn = torch.randn(size, generator=generator)
        if len(size) == 1:
            weights[name] = float("norm" in name) + 0.1 * drawn
        else:
            weights[name] = drawn / size[1] ** 0.5
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", hf_config(shape, torch.float32, None) | {"eos_token_id": END})
    write_tokenizer(directory, vocab_size=shape.vocab_size)


def write_documents(directory: Path, *, tokens: int, vocab_size: int, seed: int) -> None:
    """Documents of exponentially distributed lengths; two of three hold the marker of `loss_after`."""
    generator = np.random.default_rng(seed)
    marker = [int(word) for word in MARKER.split()]
    documents: list[np.ndarray] = []
    while sum(map(len, documents)) < tokens:
        body = generator.integers(END + 1, vocab_size, size=2 + int(generator.exponential(_DOCUMENT)))
        if len(documents) % 3:
            body[: len(marker)] = marker
        documents.append(np.append(body, END))
    lengths = [len(document) for document in documents]
    write_corpus(directory, "documents", np.concatenate(documents), lengths, vocab_size=vocab_size)


def random_pairs(count: int, *, vocab_size: int, seed: int) -> list[dict[str, str | float]]:
    """Preference pairs of random words and of three weights."""
    texts = NumberWords(vocab_size, seed)
    return [
        {
            "prompt": texts.draw(*_PROMPT),
            "chosen": texts.draw(*_ANSWER),
            "rejected": texts.draw(*_ANSWER),
            "weight": [0.5, 1.0, 2.0][i % 3],
        }
        for i in range(count)
    ]
