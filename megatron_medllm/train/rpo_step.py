"""Preference optimization: packed pairs against cached reference log-probabilities."""

import logging
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import RpoConfig
from megatron_medllm.data.pairs import Pair, PairMicroBatch, pack_pairs, plan_micro_batches
from megatron_medllm.data.reference import ReferenceCache
from megatron_medllm.errors import UserError
from megatron_medllm.losses.rpo import PairLogprobs, rpo_loss
from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.train.response_sums import sum_by_response
from megatron_medllm.train.scoring import load_run_pairs, reference_key

log = logging.getLogger(__name__)

# |margin| of a pair before the first update, where policy and reference are the same numbers computed twice.
_ZERO_MARGIN = {"float32": 1e-3, "bfloat16": 0.5}

_NAMES = (
    *("preference_loss", "nll", "accuracy", "margin", "chosen_reward", "rejected_reward"),
    *("chosen_logprob", "rejected_logprob", "reference_chosen_logprob", "reference_rejected_logprob"),
    *("chosen_logprob_per_token", "rejected_logprob_per_token"),
    *("reference_chosen_logprob_per_token", "reference_rejected_logprob_per_token"),
    *("kl", "chosen_tokens", "rejected_tokens"),
)


class RpoStep:
    """Pairs in a seeded order, epoch after epoch; each global batch is packed afresh."""

    unit = "pairs"
    end_token_id = None
    metric_names = ("loss", "count", "tokens", "unshared_tokens", *_NAMES)

    def __init__(self, run: RunConfig, config: RpoConfig, runtime: Runtime) -> None:
        self._config, self._runtime = config, runtime
        self._backend, self._dtype = run.model.backend, run.model.dtype
        self._share_prompt = config.share_prompt and run.model.backend == "torch"
        self._seed = run.seed
        pair_set = load_run_pairs(run, config)
        self.pairs, self.dropped = pair_set.pairs, pair_set.dropped
        self.total_steps = max(1, math.floor(config.epochs * len(self.pairs) / config.global_batch_size))
        self._weight = {pair.row: pair.weight for pair in self.pairs}
        self._unshared_tokens = {pair.row: pair.packed_length(share_prompt=False) for pair in self.pairs}
        self._reference: dict[int, tuple[float, float]] = {}
        if config.loss.kind not in ("simpo", "sft"):
            cache = ReferenceCache(config.reference or run.run_dir / "reference")
            key = reference_key(run, config, pair_set)
            self._reference = cache.load(key, [pair.row for pair in self.pairs])
        self._falling = 0
        self._last_chosen = math.inf

    @property
    def stream_length(self) -> int:
        return self._config.micro_batch_size * self._config.sequence_length

    def _batch(self, step: int) -> list[Pair]:
        size, total = self._config.global_batch_size, len(self.pairs)
        places = range(step * size, (step + 1) * size)
        return [self.pairs[_epoch_order(self._seed, place // total, total)[place % total]] for place in places]

    def micro_batches(self, step: int) -> list[PairMicroBatch]:
        batch = self._batch(step)
        lengths = [pair.packed_length(share_prompt=self._share_prompt) for pair in batch]
        plan = plan_micro_batches(lengths, capacity=self.stream_length, replicas=self._runtime.dp_size)
        # A pipeline exchanges tensors of one fixed shape; without one, padding would be wasted work.
        fixed = self.stream_length if self._runtime.layout.pp > 1 else None
        return [
            pack_pairs(
                [batch[i] for i in stream],
                share_prompt=self._share_prompt,
                stream_length=fixed,
                multiple=self._runtime.layout.tp,
            )
            for stream in plan[self._runtime.dp_rank]
        ]

    def forward(self, iterator: Iterator[PairMicroBatch], chunk: nn.Module) -> tuple[Tensor, Any]:
        micro_batch = next(iterator)
        inputs = micro_batch.model_inputs(self._runtime.device, backend=self._backend)
        return chunk(**inputs), partial(self._loss, micro_batch)

    def _loss(self, micro_batch: PairMicroBatch, output: Tensor) -> tuple[Tensor, Tensor, dict]:
        device = output[0].device
        count = torch.tensor(len(micro_batch.rows), dtype=torch.int32, device=device)
        tokens = {
            "tokens": torch.tensor(len(micro_batch.tokens)),
            "unshared_tokens": torch.tensor(sum(self._unshared_tokens[row] for row in micro_batch.rows)),
        }
        if not micro_batch.rows:
            zeros = dict.fromkeys(("loss", *_NAMES), torch.zeros(()))
            return output[0].sum() * 0.0, count, {"count": count, **tokens, **zeros}
        logprobs = sum_by_response(output[0], micro_batch)
        reference = [self._reference.get(row, (0.0, 0.0)) for row in micro_batch.rows]
        pairs = PairLogprobs(
            **logprobs,
            reference_chosen=torch.tensor([chosen for chosen, _ in reference], device=device),
            reference_rejected=torch.tensor([rejected for _, rejected in reference], device=device),
        )
        loss, metrics = rpo_loss(pairs, self._config.loss)
        weights = torch.tensor([self._weight[row] for row in micro_batch.rows], device=device)
        total = (loss * weights).sum()
        sums = {name: metrics[name].sum() for name in _NAMES}
        return total, count, {"loss": total.detach(), "count": count, **tokens, **sums}

    def consumed(self, step: int) -> list[Any]:
        return [pair.row for pair in self._batch(step)]

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        count = max(sums["count"], 1)
        means = {name: sums[name] / count for name in ("loss", *_NAMES)}
        return {**means, "pairs": sums["count"], "tokens": sums["tokens"], "unshared_tokens": sums["unshared_tokens"]}

    def check(self, step: int, metrics: dict[str, float]) -> None:
        if step == 0 and self._reference:
            self._check_start(metrics)
        if abs(metrics["margin"]) > self._config.rpo_guard.max_margin:
            raise UserError(
                f"rpo: the mean margin is {metrics['margin']:.4g}, beyond rpo_guard.max_margin="
                f"{self._config.rpo_guard.max_margin:g}; lower the learning rate or raise beta"
            )
        self._falling = self._falling + 1 if metrics["chosen_reward"] < min(self._last_chosen, 0.0) else 0
        self._last_chosen = metrics["chosen_reward"]
        if self._falling == self._config.rpo_guard.chosen_fall_steps:
            log.warning(
                "the chosen log-probability has fallen for %d steps (likelihood displacement, arXiv 2410.08847): "
                "raise loss.alpha or lower the learning rate",
                self._falling,
            )

    def _check_start(self, metrics: dict[str, float]) -> None:
        """Before the first update the policy is the reference: any margin means that one of them is wrong."""
        if abs(metrics["margin"]) > _ZERO_MARGIN[self._dtype]:
            raise UserError(
                f"rpo: the mean margin before the first update is {metrics['margin']:.4g}, not 0; the reference "
                "log-probabilities are not those of this model"
            )
        if self._config.loss.kind == "rpo" and abs(metrics["preference_loss"] - math.log(2)) > 0.05:
            raise UserError(f"rpo: the preference loss starts at {metrics['preference_loss']:.4f}, not ln 2")

    def validate(self, chunks: list[nn.Module]) -> dict[str, float]:
        return {}


def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
