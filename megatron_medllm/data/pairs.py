"""Preference pairs: read, tokenized, and packed so that chosen and rejected share one copy of their prompt.

With prompt tokens p1..pn, the shared stream is p1..p(n-1) | pn c1..c(k-1) | pn r1..r(m-1). The last prompt token
stands once in each response, because it is the token that predicts the response's first: its row has one target in
each. Labels are c1..ck and r1..rm, the responses' last tokens are never inputs, and positions continue from the prompt.
Side by side, each response carries its whole prompt as a document of its own.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from tokenizers import Tokenizer

from megatron_medllm.config.train import RpoConfig
from megatron_medllm.data.microbatch import IGNORED, MicroBatch, concatenate
from megatron_medllm.errors import UserError
from megatron_medllm.parallel.packed import Segment
from megatron_medllm.storage import read_jsonl

CHOSEN, REJECTED = 0, 1

# Answers whose normalized edit distance is below this are reported as near-identical (arXiv 2402.13228, section 3).
NEAR_IDENTICAL = 0.1


@dataclass(frozen=True)
class Response:
    """A response's tokens, and which of them count in the preference term."""

    ids: np.ndarray  # [k] int64
    preferred: np.ndarray  # [k] bool


@dataclass(frozen=True)
class Pair:
    """A tokenized pair. `row` is its line in the file, from 0: the name under which everything else knows it."""

    row: int
    prompt: np.ndarray  # [n] int64, n >= 1
    chosen: Response
    rejected: Response
    weight: float

    def packed_length(self, *, share_prompt: bool) -> int:
        """Tokens that the pair takes in a stream."""
        prompts = 1 if share_prompt else 2
        return prompts * (len(self.prompt) - 1) + len(self.chosen.ids) + len(self.rejected.ids)


@dataclass(frozen=True)
class PairSet:
    """The pairs that will train, and why the others will not."""

    pairs: list[Pair]
    dropped: list[tuple[int, str]]  # (row, reason)
    near_identical: list[tuple[int, float]]  # (row, normalized edit distance of the answers), dropped or not

    def report(self) -> dict[str, Any]:
        """What was kept, what was dropped and why, and what sharing prompts saves; JSON-able."""
        shared, unshared = (
            sum(pair.packed_length(share_prompt=share) for pair in self.pairs) for share in (True, False)
        )
        return {
            "pairs": len(self.pairs),
            "dropped": Counter(reason for _, reason in self.dropped),
            "near_identical": len(self.near_identical),
            "tokens_side_by_side": unshared,
            "tokens_with_shared_prompts": shared,
            "saved_by_sharing": round(1 - shared / unshared, 4),
            "dropped_rows": [{"row": row, "reason": reason} for row, reason in self.dropped],
            "near_identical_rows": [{"row": row, "edit_distance": round(d, 4)} for row, d in self.near_identical],
        }


def load_pairs(config: RpoConfig, tokenizer_dir: Path, *, cut_length: int, share_prompt: bool = True) -> PairSet:
    """Read and tokenize `config.pairs`.

    Args:
        config: paths, template, masks and what happens to long pairs.
        tokenizer_dir: HF directory with tokenizer.json.
        cut_length: tokens that a packed stream can hold.
        share_prompt: whether a pair takes one copy of its prompt in that stream, or two.

    Raises:
        UserError: a line lacks a field, a field has a wrong type, an answer is empty, or no pair is left.
    """
    encode_prompt, encode_response = _encoders(config, tokenizer_dir)
    pairs: list[Pair] = []
    dropped: list[tuple[int, str]] = []
    near_identical: list[tuple[int, float]] = []
    for row, record in enumerate(_read_rows(config.pairs)):
        where = f"{config.pairs}:{row + 1}"
        for name in ("prompt", "chosen", "rejected"):
            if not isinstance(record.get(name), str | list) or not record[name]:
                raise UserError(f"{where}: field {name!r} must be a non-empty string or list of messages")
            if isinstance(record[name], list) and config.template != "chat":
                raise UserError(f"{where}: field {name!r} is a list of messages: set rpo.template=chat")
        pair = Pair(
            row=row,
            prompt=encode_prompt(record["prompt"]),
            chosen=encode_response(record["chosen"]),
            rejected=encode_response(record["rejected"]),
            weight=_weight(record, where),
        )
        if len(pair.prompt) == 0:
            raise UserError(f"{where}: the prompt has no tokens")
        distance = Levenshtein.normalized_distance(pair.chosen.ids.tolist(), pair.rejected.ids.tolist())
        if distance < NEAR_IDENTICAL:
            near_identical.append((row, distance))
        if distance == 0:
            reason: str | None = "answers identical"
        elif distance < config.rpo_guard.min_edit_distance:
            reason = "answers nearly identical"
        else:
            pair, reason = _fit(pair, config, cut_length, share_prompt=share_prompt)
        if reason:
            dropped.append((row, reason))
        else:
            pairs.append(pair)
    if not pairs:
        raise UserError(f"{config.pairs}: no pair is left to train on ({len(dropped)} dropped)")
    return PairSet(pairs, dropped, near_identical)


def _weight(record: dict, where: str) -> float:
    weight = record.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise UserError(f"{where}: field 'weight' must be a positive number, is {weight!r}")
    return float(weight)


def _read_rows(path: Path) -> Any:
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        if not path.is_file():
            raise UserError(f"{path}: no such file")
        return parquet.read_table(path).to_pylist()
    return read_jsonl(path)


def _fit(pair: Pair, config: RpoConfig, cut_length: int, *, share_prompt: bool) -> tuple[Pair, str | None]:
    """Never cut an answer: drop the pair, or cut its prompt from the left."""
    excess = pair.packed_length(share_prompt=share_prompt) - cut_length
    if excess <= 0:
        return pair, None
    if config.too_long == "drop":
        return pair, f"longer than {cut_length} tokens"
    cut = -(-excess // (1 if share_prompt else 2))
    if cut > len(pair.prompt) - 1:
        return pair, f"answers alone are longer than {cut_length} tokens"
    return Pair(pair.row, pair.prompt[cut:], pair.chosen, pair.rejected, pair.weight), None


def _encoders(config: RpoConfig, tokenizer_dir: Path) -> tuple[Callable, Callable]:
    path = tokenizer_dir / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; the model's directory must hold its tokenizer")
    tokenizer = Tokenizer.from_file(str(path))
    masks = [_compile(pattern) for pattern in config.mask_patterns]
    if config.template == "chat":
        return _chat_encoders(tokenizer, tokenizer_dir, masks)
    if config.template != "plain":
        raise UserError(f"rpo.template={config.template!r}: expected 'plain' or 'chat'")
    tail = [_eos_id(tokenizer, tokenizer_dir)] if config.add_eos else []

    def encode_prompt(prompt: str) -> np.ndarray:
        return np.array(tokenizer.encode(prompt, add_special_tokens=False).ids, dtype=np.int64)

    def encode_response(response: str) -> Response:
        return _response(tokenizer, response, masks, tail)

    return encode_prompt, encode_response


def _compile(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"rpo.mask_patterns: {pattern!r} is not a regular expression ({error})") from None


def _chat_encoders(tokenizer: Tokenizer, tokenizer_dir: Path, masks: list[re.Pattern]) -> tuple[Callable, Callable]:
    from megatron_medllm.data.tokenizer import load_tokenizer  # transformers is slow to import

    chat = load_tokenizer(tokenizer_dir)
    if chat.chat_template is None:
        raise UserError(f"{tokenizer_dir}: rpo.template=chat, but the tokenizer has no chat template")

    def messages(content: str | list, role: str) -> list:
        return content if isinstance(content, list) else [{"role": role, "content": content}]

    def encode_prompt(prompt: str | list) -> np.ndarray:
        text = chat.apply_chat_template(messages(prompt, "user"), tokenize=False, add_generation_prompt=True)
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_response(response: str | list) -> Response:
        text = response if isinstance(response, str) else response[-1]["content"]
        return _response(tokenizer, text, masks, [chat.eos_token_id])

    return encode_prompt, encode_response


def _eos_id(tokenizer: Tokenizer, tokenizer_dir: Path) -> int:
    """The end token that a base model was trained with: generation_config's or config's eos, never a guess."""
    for name in ("generation_config.json", "config.json"):
        path = tokenizer_dir / name
        if path.is_file():
            import orjson

            eos = orjson.loads(path.read_bytes()).get("eos_token_id")
            if eos is not None:
                return int(eos[0] if isinstance(eos, list) else eos)
    raise UserError(f"{tokenizer_dir}: neither generation_config.json nor config.json has an eos_token_id")


def _response(tokenizer: Tokenizer, text: str, masks: list[re.Pattern], tail: list[int]) -> Response:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    preferred = np.ones(len(encoding.ids) + len(tail), dtype=bool)
    for mask in masks:
        for match in mask.finditer(text):
            for index, (start, end) in enumerate(encoding.offsets):
                if start < match.end() and end > match.start():
                    preferred[index] = False
    return Response(np.array([*encoding.ids, *tail], dtype=np.int64), preferred)


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
