"""What a step object hands to the model: one packed stream of tokens."""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_medllm.parallel.context import WHOLE, ContextSplit
from megatron_medllm.parallel.packed import PackedSequences, Segment
from megatron_medllm.parallel.staging import to_device

IGNORED = -100  # label of a token that costs no head work and takes no gradient


@dataclass(frozen=True)
class MicroBatch:
    """A packed stream of t tokens, as numpy arrays on the host."""

    tokens: np.ndarray  # [t] int64
    labels: np.ndarray  # [t] int64; IGNORED where nothing is predicted
    position_ids: np.ndarray  # [t] int64
    segments: tuple[Segment, ...]

    @property
    def counted_tokens(self) -> int:
        """Tokens that are predicted."""
        return int((self.labels != IGNORED).sum())

    @property
    def attended(self) -> int:
        """(query, key) pairs that attention computes, masked ones left out."""
        sizes = ((s.end - s.start, s.prefix_length) for s in self.segments)
        return sum(size * prefix + size * (size + 1) // 2 for size, prefix in sizes)

    def model_inputs(
        self,
        device: torch.device,
        *,
        backend: str,
        uniform_grad: float | None = None,
        split: ContextSplit = WHOLE,
        ahead: bool = False,
    ) -> dict:
        """Keyword arguments for the model's forward: a rank's ids and labels [1, t/cp], and the packing.

        Args:
            device: where they go.
            backend: whose attention the packing is for.
            uniform_grad: d loss / d log-prob of every counted token, where it is one known number.
            split: which tokens are this rank's.
            ahead: never wait for the device: copies are queued, and the host counts the rows that the head works on.
        """
        own = [split.take(array) for array in (self.tokens, self.labels, self.position_ids)]
        if ahead:
            own.append(np.flatnonzero(own[1] != IGNORED))
        tokens, labels, position_ids, *counted = to_device(own, device, ahead=ahead)
        packed = PackedSequences.from_segments(self.segments, position_ids, backend=backend, split=split, ahead=ahead)
        packed.uniform_grad = uniform_grad
        packed.counted_rows = counted[0] if counted else None
        return {
            "input_ids": tokens[None],
            "position_ids": position_ids[None],
            "attention_mask": None,
            "labels": labels[None],
            "packed_seq_params": packed,
        }


def blank(length: int) -> MicroBatch:
    """A stream with nothing to learn, to fill up a batch."""
    zeros = np.zeros(length, dtype=np.int64)
    return MicroBatch(zeros, np.full(length, IGNORED, dtype=np.int64), zeros, (Segment(0, length),))


def concatenate(parts: list[MicroBatch]) -> MicroBatch:
    """Put several streams behind one another."""
    shifted: list[Segment] = []
    offset = 0
    for part in parts:
        shifted += [segment.shifted(offset) for segment in part.segments]
        offset += len(part.tokens)
    return MicroBatch(
        tokens=np.concatenate([part.tokens for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        position_ids=np.concatenate([part.position_ids for part in parts]),
        segments=tuple(shifted),
    )
