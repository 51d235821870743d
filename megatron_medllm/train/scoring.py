"""Reference scoring: the model's log-probabilities of every pair, once, in any layout, resumable."""

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import RpoConfig
from megatron_medllm.data.pair_streams import PairMicroBatch, pack_pairs, plan_micro_batches
from megatron_medllm.data.pairs import Pair, PairSet, load_pairs
from megatron_medllm.data.reference import ReferenceCache
from megatron_medllm.errors import UserError
from megatron_medllm.parallel import mcore, runtime
from megatron_medllm.parallel.staging import runs_ahead
from megatron_medllm.progress import progress
from megatron_medllm.train.model import build_chunks, refuse_random_reference
from megatron_medllm.train.reference import reference_adapter, reference_key
from megatron_medllm.train.response_sums import sum_by_response

log = logging.getLogger(__name__)

PAIRS_PER_PART = 1024


def shares_prompt(run: RunConfig, config: RpoConfig) -> bool:
    """Whether both responses stand behind one copy of their prompt; the te backend's kernels cannot mask that."""
    return config.share_prompt and run.model.backend == "torch"


def _rows_multiple(run: RunConfig, config: RpoConfig) -> int:
    """What the tokens of every rank's part of a stream must be a multiple of: TE's FP8 products want 16."""
    return 16 if run.model.backend == "te" and config.fp8_gemms is not None else 1


def load_run_pairs(run: RunConfig, config: RpoConfig) -> PairSet:
    """The pairs of a run, tokenized with its model's tokenizer.

    Raises:
        UserError: as `load_pairs`, a token lies outside the model's vocabulary, or the layout cannot share streams
            out evenly.
    """
    run.layout.check_stream(config.stream_length)
    share = shares_prompt(run, config)
    pair_set = load_pairs(config, run.tokenizer_dir(), cut_length=config.stream_length, share_prompt=share)
    vocab_size = run.model.resolve_shape().vocab_size
    for pair in pair_set.pairs:
        largest = max(int(ids.max()) for ids in (pair.prompt, pair.chosen.ids, pair.rejected.ids))
        if largest >= vocab_size:
            raise UserError(
                f"{config.pairs}:{pair.row + 1}: token {largest}, but the model's vocabulary has {vocab_size}: "
                f"{run.tokenizer_dir()} is not its tokenizer"
            )
    return pair_set


def pack_batch(pairs: list[Pair], run: RunConfig, config: RpoConfig, ranks: runtime.Runtime) -> list[PairMicroBatch]:
    """This replica's share of some pairs, as streams of at most `micro_batch_size` x `sequence_length` tokens."""
    layout, share = ranks.layout, shares_prompt(run, config)
    plan = plan_micro_batches(
        [pair.packed_length(share_prompt=share) for pair in pairs],
        capacity=config.stream_length,
        replicas=ranks.dp_size,
        rounds_multiple=layout.pp if layout.vpp > 1 else 1,
    )
    # A pipeline exchanges tensors of one fixed shape; without one, padding would be wasted work.
    fixed = config.stream_length if layout.pp > 1 else None
    multiple = _rows_multiple(run, config) * math.lcm(layout.tp, layout.stream_multiple)
    return [
        pack_pairs([pairs[i] for i in stream], share_prompt=share, stream_length=fixed, multiple=multiple)
        for stream in plan[ranks.dp_rank]
    ]


def score(run: RunConfig) -> Path:
    """Run the reference over the pairs of `run.rpo` and write its log-probabilities. Collective.

    Returns:
        the cache's folder.

    Raises:
        UserError: no rpo section, no pairs, or no model directory.
    """
    if run.rpo is None:
        raise UserError("medllm score needs the section 'rpo'")
    refuse_random_reference(run)
    ranks = runtime.start(run.layout, seed=run.seed)
    try:
        return score_run_pairs(run, run.rpo, ranks)
    finally:
        runtime.stop()


def score_run_pairs(run: RunConfig, config: RpoConfig, ranks: runtime.Runtime) -> Path:
    """What `score` does, on ranks that have started."""
    pair_set = load_run_pairs(run, config)
    chunks = build_reference(run, config, ranks)
    cache = ReferenceCache(config.reference or run.run_dir / "reference")
    key = reference_key(run, config, pair_set)
    done: list[Any] = [None]
    if ranks.is_main:
        done = [cache.open_for_writing(key)]
    dist.broadcast_object_list(done, src=0)
    parts = [pair_set.pairs[i : i + PAIRS_PER_PART] for i in range(0, len(pair_set.pairs), PAIRS_PER_PART)]
    with progress("score", total=len(pair_set.pairs)) as bar:
        for number, part in enumerate(parts):
            if any(pair.row not in done[0] for pair in part):
                streams = pack_batch(part, run, config, ranks)
                columns = score_streams(streams, [pair.row for pair in part], run, config, ranks, chunks)
                if ranks.is_main:
                    cache.write_part(number, columns)
            bar.update(min((number + 1) * PAIRS_PER_PART, len(pair_set.pairs)))
    log.info("scored %d pairs, dropped %d", len(pair_set.pairs), len(pair_set.dropped))
    return cache.directory


def build_reference(run: RunConfig, config: RpoConfig, ranks: runtime.Runtime) -> list[nn.Module]:
    """This rank's chunks of the reference, ready to score."""
    chunks = build_chunks(run, ranks, adapter=reference_adapter(run, config), fp8=config.fp8_gemms)
    for chunk in chunks:
        chunk.eval()
    return chunks


@torch.no_grad()
def score_streams(
    streams: list[PairMicroBatch],
    rows: list[int],
    run: RunConfig,
    config: RpoConfig,
    ranks: runtime.Runtime,
    chunks: list[nn.Module],
) -> dict[str, np.ndarray]:
    """Log-probabilities and lengths of the pairs `rows`, gathered from all replicas; `streams` are this one's share."""

    ahead = runs_ahead(run.kernels.copies, ranks.device)

    def forward(iterator: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
        stream = next(iterator)
        inputs = stream.model_inputs(ranks.device, backend=run.model.backend, split=ranks.split, ahead=ahead)
        return chunk(**inputs), partial(_collect, stream, ranks, ahead)

    found = mcore.run_micro_batches(forward, chunks, streams, stream_length=config.stream_length, forward_only=True)
    scored: dict[int, list[float]] = {}
    if ranks.tp_rank == 0:
        for part in found:
            scored |= zip(part["rows"], part["columns"].tolist(), strict=True)
    gathered: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(gathered, scored)
    table = {row: values for part in gathered for row, values in part.items()}
    names = ("chosen_logprob", "rejected_logprob", "chosen_tokens", "rejected_tokens")
    values = np.array([table[row] for row in rows], dtype=np.float64)
    return {"row": np.array(rows), **{name: values[:, i] for i, name in enumerate(names)}}


def _collect(
    stream: PairMicroBatch, ranks: runtime.Runtime, ahead: bool, output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, dict]:
    token_logprobs = output[0]
    count = torch.full((), len(stream.rows), dtype=torch.int32, device=token_logprobs.device)
    sums = sum_by_response(token_logprobs, stream, ranks, ahead=ahead)
    columns = torch.stack([sums[name] for name in ("chosen", "rejected", "chosen_tokens", "rejected_tokens")], dim=1)
    return token_logprobs.sum(), count, {"rows": stream.rows, "columns": columns}
