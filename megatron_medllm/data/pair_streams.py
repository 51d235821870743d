"""Tokenized pairs as streams, packed so that chosen and rejected share one copy of their prompt.

With prompt tokens p1..pn, the shared stream is p1..p(n-1) | pn c1..c(k-1) | pn r1..r(m-1). The last prompt token
stands once in each response, because it is the token that predicts the response's first: its row has one target in
each. Labels are c1..ck and r1..rm, the responses' last tokens are never inputs, and positions continue from the prompt.
Side by side, each response carries its whole prompt as a document of its own.
"""

from dataclasses import dataclass

import numpy as np

from megatron_medllm.data.microbatch import IGNORED, MicroBatch, concatenate
from megatron_medllm.data.pairs import Pair
from megatron_medllm.parallel.packed import Segment

CHOSEN, REJECTED = 0, 1


@dataclass(frozen=True)
class PairMicroBatch(MicroBatch):
    """A stream of packed pairs. `response[i]` is 2*pair + CHOSEN or REJECTED for labels, -1 elsewhere."""

    response: np.ndarray  # [t] int64
    preferred: np.ndarray  # [t] bool, labels that count in the preference term
    rows: tuple[int, ...]  # the pairs' rows, in stream order


def pack_pairs(pairs: list[Pair], *, share_prompt: bool, stream_length: int | None, multiple: int) -> PairMicroBatch:
    """Lay pairs behind one another.

    Args:
        pairs: may be empty (a micro-batch that only keeps a pipeline in step).
        share_prompt: one copy of the prompt for both responses, or one each.
        stream_length: pad to this; None: to a multiple of `multiple`.
        multiple: what tensor parallelism needs the stream's length to be a multiple of.
    """
    streams = [_pair_stream(pair, share_prompt=share_prompt) for pair in pairs]
    used = sum(len(stream.tokens) for stream, _ in streams)
    length = stream_length or max(-(-used // multiple) * multiple, multiple)
    padding = length - used
    batches = [stream for stream, _ in streams]
    if padding:
        batches.append(_padding(padding))
    stream = concatenate(batches)
    response = np.full(length, -1, dtype=np.int64)
    preferred = np.zeros(length, dtype=bool)
    position = 0
    for index, (part, tails) in enumerate(streams):
        for which, (start, mask) in enumerate(tails):
            at = position + start
            response[at : at + len(mask)] = 2 * index + which
            preferred[at : at + len(mask)] = mask
        position += len(part.tokens)
    return PairMicroBatch(
        stream.tokens, stream.labels, stream.position_ids, stream.segments, response, preferred,
        tuple(pair.row for pair in pairs),
    )  # fmt: skip


def _padding(length: int) -> MicroBatch:
    zeros = np.zeros(length, dtype=np.int64)
    return MicroBatch(zeros, np.full(length, IGNORED, dtype=np.int64), zeros, (Segment(0, length),))


def _pair_stream(pair: Pair, *, share_prompt: bool) -> tuple[MicroBatch, list[tuple[int, np.ndarray]]]:
    """One pair's stream, and for chosen and rejected where its labels begin and which of them are preferred."""
    context, last = pair.prompt[:-1], pair.prompt[-1:]
    n = len(context)
    tokens, labels, positions, segments, tails = [], [], [], [], []
    start = 0
    if share_prompt and n:
        tokens, labels, positions = [context], [np.full(n, IGNORED)], [np.arange(n)]
        segments.append(Segment(0, n))
        start = n
    for response in (pair.chosen, pair.rejected):
        k = len(response.ids)
        if share_prompt:
            tokens += [last, response.ids[:-1]]
            labels.append(response.ids)
            positions.append(np.arange(n, n + k))
            segments.append(Segment(start, start + k, 0, n) if n else Segment(start, start + k))
            tails.append((start, response.preferred))
            start += k
        else:
            tokens += [context, last, response.ids[:-1]]
            labels += [np.full(n, IGNORED), response.ids]
            positions.append(np.arange(n + k))
            segments.append(Segment(start, start + n + k))
            tails.append((start + n, response.preferred))
            start += n + k
    stream = MicroBatch(
        np.concatenate(tokens), np.concatenate(labels).astype(np.int64), np.concatenate(positions), tuple(segments)
    )
    return stream, tails


def plan_micro_batches(
    lengths: list[int], *, capacity: int, replicas: int, rounds_multiple: int = 1
) -> list[list[list[int]]]:
    """Spread one global batch over replicas: first-fit decreasing into streams, streams dealt by length.

    Args:
        lengths: tokens of each pair.
        capacity: tokens of a stream.
        replicas: data-parallel size.
        rounds_multiple: what the number of streams a replica gets must be a multiple of (interleaved pipelines).

    Returns:
        for every replica the same number of streams, the last ones possibly empty: lists of indices into `lengths`.
        Depends on nothing but the arguments, so every rank finds the same plan.
    """
    streams: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = next((s for s, free in enumerate(room) if free >= lengths[index]), None)
        if fits is None:
            streams.append([])
            room.append(capacity)
            fits = len(streams) - 1
        streams[fits].append(index)
        room[fits] -= lengths[index]
    rounds = -(-len(streams) // (replicas * rounds_multiple)) * rounds_multiple
    plan: list[list[list[int]]] = [[] for _ in range(replicas)]
    loads = [0] * replicas
    for stream, free in sorted(zip(streams, room, strict=True), key=lambda pair: pair[1]):
        open_replicas = [r for r in range(replicas) if len(plan[r]) < rounds]
        lightest = min(open_replicas, key=lambda r: (loads[r], r))
        plan[lightest].append(sorted(stream))
        loads[lightest] += capacity - free
    for streams_of_replica in plan:
        streams_of_replica += [[] for _ in range(rounds - len(streams_of_replica))]
    return plan
