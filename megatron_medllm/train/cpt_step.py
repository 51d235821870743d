"""Continued pretraining: packed rows, token-mean loss."""

import logging
import math
from collections.abc import Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import CptConfig
from megatron_medllm.data.cpt import (
    CptRows,
    dataset_config,
    resolve_blend,
    sample_documents,
    training_rows,
    validation_rows,
)
from megatron_medllm.data.loss_after import LossAfter, check_markers
from megatron_medllm.data.microbatch import IGNORED, MicroBatch, blank, concatenate
from megatron_medllm.errors import UserError
from megatron_medllm.losses.cpt import cpt_loss
from megatron_medllm.parallel import mcore
from megatron_medllm.parallel.reduce import sum_metrics
from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.parallel.staging import runs_ahead
from megatron_medllm.storage import digest_value, write_json

log = logging.getLogger(__name__)

# A row may hold the later part of one long marked document alone, so that a single step may teach nothing.
_EMPTY_STEPS = 10


class CptStep:
    """Rows `[k * batch, (k + 1) * batch)` of the blend make up step k, in any layout."""

    unit = "rows"
    held_out: tuple[Any, ...] = ()  # the corpora's split keeps it apart
    metric_names = ("loss", "count", "tokens", "attended")

    def __init__(self, run: RunConfig, config: CptConfig, runtime: Runtime, *, output_dir: Path) -> None:
        self._config, self._runtime, self._backend = config, runtime, run.model.backend
        self._ahead = runs_ahead(run.kernels.copies, runtime.device)
        blend = resolve_blend(config.data)
        self.end_token_id = blend.eod_id
        vocab_size = run.model.resolve_shape().vocab_size
        if blend.vocab_size > vocab_size:
            raise UserError(
                f"cpt.data was tokenized with {blend.vocab_size} ids, but the model's vocabulary has {vocab_size}"
            )
        self._round = per_round = config.micro_batch_size * runtime.dp_size * _multiple_of_micro_batches(runtime)
        if config.global_batch_size % per_round:
            raise UserError(
                f"global_batch_size={config.global_batch_size} is not a multiple of "
                f"micro_batch_size x dp = {config.micro_batch_size} x {runtime.dp_size}"
                + (f" x pp = {runtime.layout.pp} (interleaved stages)" if runtime.layout.vpp > 1 else "")
            )
        runtime.layout.check_stream(self.stream_length)
        tokens = config.train_tokens or int((config.epochs or 0) * blend.train_tokens)
        self._batch_sizes = batch_sizes(tokens // config.sequence_length, config, per_round)
        if not self._batch_sizes:
            raise UserError(f"{tokens} tokens do not fill one batch of {config.global_batch_size} rows")
        self._starts = [0]
        for size in self._batch_sizes:
            self._starts.append(self._starts[-1] + size)
        self.total_steps = len(self._batch_sizes)
        self._empty_steps = 0
        loss_after = LossAfter(config.loss_after, run.tokenizer_file()) if config.loss_after else None
        settings = dataset_config(
            config, blend, seed=run.seed, loss_after=loss_after, cache_dir=output_dir / "index-cache"
        )
        if loss_after is not None:
            sources = {
                name: sample_documents(settings, prefix)
                for name, prefix in zip(blend.names, blend.prefixes, strict=True)
            }
            check_markers(loss_after, sources)
        self._rows = training_rows(settings, self._starts[-1])
        self._validation, held_out = validation_rows(settings, blend)
        if config.validate_every_steps and not self._validation:
            held_out.require("give the split a larger validation share, or set validate_every_steps=0")
            raise UserError("validate_every_steps is set, but the corpora's split holds nothing out for validation")
        if runtime.is_main:
            write_json(output_dir / "account.json", held_out.to_json())
            for line in held_out.losses():
                log.warning("validation: %s", line)
        shares = list(zip(blend.names, blend.weights, strict=True))
        # What decides which rows a step reads: a run that differs in it must not go on from this one's checkpoints.
        self.rows_digest = digest_value(
            [run.seed, config.sequence_length, shares, blend.tokens, blend.digest, self._batch_sizes]
        )

    @property
    def stream_length(self) -> int:
        return self._config.stream_length

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        suffixes = ["", *(f"_{name}" for name in self._validation)] if self._validation else []
        return tuple(name for suffix in suffixes for name in _named(suffix, 0.0, 0.0))

    def micro_batches(self, step: int) -> list[MicroBatch]:
        return self._assemble(self._rows, self._starts[step], self._batch_sizes[step])

    def _assemble(self, rows: CptRows, first: int, count: int) -> list[MicroBatch]:
        """This replica's micro-batches of rows [first, first + count), blank rows behind the last."""
        size, replica, replicas = self._config.micro_batch_size, self._runtime.dp_rank, self._runtime.dp_size
        starts = range(first + replica * size, first + count, size * replicas)
        filler = blank(self._config.sequence_length)
        return [
            concatenate([rows[i] if i < len(rows) else filler for i in range(start, start + size)]) for start in starts
        ]

    def forward(self, iterator: Iterator[MicroBatch], chunk: nn.Module) -> tuple[Tensor, Any]:
        micro_batch = next(iterator)
        # Every counted token's loss is -log p: its gradient is known before the backward pass.
        uniform_grad = None if self._config.z_loss else -1.0
        inputs = micro_batch.model_inputs(
            self._runtime.device,
            backend=self._backend,
            uniform_grad=uniform_grad,
            split=self._runtime.split,
            ahead=self._ahead,
        )
        counted = inputs["packed_seq_params"].counted_rows
        return chunk(**inputs), partial(
            self._loss, micro_batch, inputs["labels"][0] != IGNORED if counted is None else counted
        )

    def _loss(
        self, micro_batch: MicroBatch, counted: Tensor, output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, dict]:
        """`counted`: a mask [t/cp], or the rows' indices."""
        loss = cpt_loss(output[0], output[1], counted, z_loss=self._config.z_loss)
        if counted.dtype is torch.bool:
            count = counted.sum()
        else:
            count = torch.full((), len(counted), dtype=torch.int64, device=counted.device)
        # Context-parallel ranks hold the same stream: each counts its own tokens, one of them what all attend to.
        attended = micro_batch.attended if self._runtime.cp_rank == 0 else 0
        work = {"tokens": torch.tensor(len(output[0])), "attended": torch.tensor(attended)}
        return loss, count.int(), {"loss": loss.detach(), "count": count, **work}

    def consumed(self, step: int) -> list[Any]:
        start = self._starts[step]
        rows = range(start, start + self._batch_sizes[step])
        return [[astuple(span) for span in self._rows.spans(row)] for row in rows]

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        return {
            "loss": sums["loss"] / max(sums["count"], 1),
            "counted_tokens": sums["count"],
            "tokens": sums["tokens"],
            "attended": sums["attended"],
        }

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """The language-model loss has no signs of its own; the loop watches for NaN and spikes.

        Raises:
            UserError: nothing was learned for many steps: a loss of 0 is no success.
        """
        self._empty_steps = 0 if metrics["counted_tokens"] else self._empty_steps + 1
        if self._empty_steps >= min(_EMPTY_STEPS, self.total_steps):
            raise UserError(
                f"cpt: nothing was learned in {self._empty_steps} steps: no row of theirs holds a token to learn; "
                "look at loss_after, and at documents that are longer than sequence_length"
            )

    def validate(self, chunks: list[nn.Module]) -> dict[str, float]:
        """Loss and perplexity over all held-out rows and over each source's, at most `validation_batches` of each."""
        metrics: dict[str, float] = {}
        loss = count = 0.0
        for name, rows in self._validation.items():
            used = min(len(rows), self._config.validation_batches * self._config.global_batch_size)
            filled = -(-used // self._round) * self._round
            parts = mcore.run_micro_batches(
                self.forward,
                chunks,
                self._assemble(rows.first(used), 0, filled),
                stream_length=self.stream_length,
                forward_only=True,
            )
            sums = sum_metrics(parts, self.metric_names, self._runtime)
            metrics |= _named(f"_{name}", sums["loss"], sums["count"])
            loss, count = loss + sums["loss"], count + sums["count"]
        return _named("", loss, count) | metrics if count else {}


def _named(suffix: str, loss: float, count: float) -> dict[str, float]:
    mean = loss / max(count, 1)
    return {f"validation_loss{suffix}": mean, f"validation_perplexity{suffix}": math.exp(min(mean, 700.0))}


def _multiple_of_micro_batches(runtime: Runtime) -> int:
    """What the number of micro-batches must be a multiple of: interleaved stages pass them on in groups of pp."""
    return runtime.layout.pp if runtime.layout.vpp > 1 else 1


def batch_sizes(rows: int, config: CptConfig, per_round: int) -> list[int]:
    """Rows of every step: a linear ramp in whole rounds, then the full batch, as long as rows last."""
    sizes: list[int] = []
    used = 0
    while True:
        full, step = config.global_batch_size, len(sizes)
        size = full
        if step < config.batch_ramp_steps:
            size = max(per_round, full * (step + 1) // (config.batch_ramp_steps + 1) // per_round * per_round)
        if used + size > rows:
            return sizes
        sizes.append(size)
        used += size
