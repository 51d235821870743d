"""Random documents as an indexed data set, so that throughput can be measured without a corpus."""

from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import CptConfig, DataSource
from megatron_medllm.corpus.index import bin_path, idx_path, token_dtype, write_index
from megatron_medllm.errors import UserError
from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.storage import atomic_write, write_json


def with_synthetic_data(
    run: RunConfig, directory: Path, *, steps: int, document_length: int, ranks: Runtime
) -> RunConfig:
    """The run with random data for `steps` steps in place of its own. Collective; rank 0 writes.

    Raises:
        UserError: the stage is RPO, whose pairs and reference scores cannot be made up.
    """
    section = run.stage_config()
    if not isinstance(section, CptConfig):
        raise UserError("--synthetic is for base and cpt; rpo needs its pairs and their reference scores")
    tokens = steps * section.global_batch_size * section.sequence_length
    if ranks.is_main:
        spare = section.global_batch_size * section.sequence_length
        write_documents(directory, tokens=tokens + spare, document_length=document_length,
                        vocab_size=run.model.resolve_shape().vocab_size, seed=run.seed)  # fmt: skip
    dist.barrier()
    changes = {
        "data": (DataSource(path=directory),),
        "train_tokens": tokens,
        "epochs": None,
        "loss_after": (),
        "batch_ramp_steps": 0,
    }
    return run.model_copy(update={run.stage: section.model_copy(update=changes)})


def write_documents(directory: Path, *, tokens: int, document_length: int, vocab_size: int, seed: int) -> None:
    """Write documents of exponentially distributed lengths (mean `document_length`), each ended by token 0."""
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = generator.exponential(document_length, size=max(16, tokens // document_length))
        lengths += [int(n) + 2 for n in drawn]
    array = np.array(lengths, np.int32)
    ids = generator.integers(1, vocab_size, size=int(array.sum())).astype(token_dtype(vocab_size))
    ids[np.cumsum(array) - 1] = 0
    prefix = directory / "synthetic"
    with atomic_write(bin_path(prefix)) as stream:
        stream.write(ids.data)
    with atomic_write(idx_path(prefix)) as stream:
        write_index(stream, array, ids.dtype)
    write_json(
        directory / "manifest.json",
        {
            "format": 1,
            "sources": {
                "synthetic": {"prefix": prefix.name, "weight": 1.0, "tokens": len(ids), "documents": len(lengths)}
            },
            "split": [1.0, 0.0, 0.0],
            "tokenizer": {"digest": "synthetic", "vocab_size": vocab_size, "eod_id": 0},
        },
    )
