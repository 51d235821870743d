"""Preference optimization: packed pairs against cached reference log-probabilities."""

import logging
import math
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import RpoConfig
from megatron_medllm.data.held_out import HeldOut, hold_out
from megatron_medllm.data.pair_streams import PairMicroBatch
from megatron_medllm.data.pairs import Pair, PairSet
from megatron_medllm.data.reference import ReferenceCache
from megatron_medllm.errors import UserError
from megatron_medllm.losses.rpo import PairLogprobs, rpo_loss
from megatron_medllm.parallel import mcore
from megatron_medllm.parallel.reduce import sum_metrics
from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.parallel.staging import runs_ahead, to_device
from megatron_medllm.storage import write_json
from megatron_medllm.train.reference import quantized_base, reference_key
from megatron_medllm.train.response_sums import sum_by_response
from megatron_medllm.train.scoring import load_run_pairs, pack_batch, shares_prompt

log = logging.getLogger(__name__)

# |margin| per token before the first update, where policy and reference are the same numbers computed twice. Another
# layout or packing sums in another order; FP8 then rounds some activations to their neighbours.
_ZERO_MARGIN = {"float32": 1e-5, "bfloat16": 5e-3}
# Rounding errors of single tokens are independent, so that a short pair's margin is up to this x sqrt(tokens): seen on
# a real 0.5B model in bf16, where 112 tokens gave 0.61.
_ZERO_MARGIN_SHORT = {"float32": 0.0, "bfloat16": 0.1}
_ZERO_MARGIN_FP8 = 2e-2

_NAMES = (
    *("preference_loss", "nll", "accuracy", "margin", "chosen_reward", "rejected_reward"),
    *("chosen_logprob", "rejected_logprob", "reference_chosen_logprob", "reference_rejected_logprob"),
    *("chosen_logprob_per_token", "rejected_logprob_per_token"),
    *("reference_chosen_logprob_per_token", "reference_rejected_logprob_per_token"),
    *("kl", "chosen_tokens", "rejected_tokens"),
)
_AGAINST_REFERENCE = {
    "chosen_reward",
    "rejected_reward",
    "kl",
    *(name for name in _NAMES if name.startswith("reference_")),
}


class RpoStep:
    """Pairs in a seeded order, epoch after epoch; each global batch is packed afresh."""

    unit = "pairs"
    end_token_id = None
    metric_names = ("loss", "count", "tokens", "pair_tokens", "unshared_tokens", "abs_margin", *_NAMES)

    def __init__(self, run: RunConfig, config: RpoConfig, runtime: Runtime) -> None:
        self._run, self._config, self._runtime = run, config, runtime
        self._share_prompt = shares_prompt(run, config)
        self._ahead = runs_ahead(run.kernels.copies, runtime.device)
        self._quantized = quantized_base(config) is not None or config.fp8_gemms is not None
        pair_set = load_run_pairs(run, config)
        held_out = hold_out(pair_set.pairs, config.validation_share)
        held_out_rows = set(held_out.rows)
        if config.validate_every_steps and not held_out_rows:
            raise UserError("validate_every_steps is set, but rpo.validation_share holds nothing out for validation")
        if runtime.is_main:
            _report_pairs(pair_set, held_out, run.output_dir() / "pairs-report.json")
        self.held_out, self.held_out_digest = sorted(held_out_rows), held_out.digest()
        most = config.validation_batches * config.global_batch_size
        self._validation_rows = held_out.rows[:most]
        if len(held_out_rows) > most:
            log.info(
                "%d of %d held-out pairs validate (validation_batches x global_batch_size)", most, len(held_out_rows)
            )
        self.pairs = {pair.row: pair for pair in pair_set.pairs}
        self._rows = [row for row in self.pairs if row not in held_out_rows]
        self.total_steps = max(1, math.floor(config.epochs * len(self._rows) / config.global_batch_size))
        self._reference: dict[int, tuple[float, float]] = {}
        if config.loss.needs_reference:
            cache = ReferenceCache(config.reference or run.run_dir / "reference")
            self._reference = cache.load(reference_key(run, config, pair_set), list(self.pairs))
        self._chosen_rewards: deque[float] = deque(maxlen=config.guard.chosen_fall_steps)

    @property
    def _compared(self) -> tuple[str, ...]:
        """Means over pairs that mean something under this loss."""
        return ("loss", *(name for name in _NAMES if self._reference or name not in _AGAINST_REFERENCE))

    @property
    def stream_length(self) -> int:
        return self._config.stream_length

    def _batch(self, step: int) -> list[Pair]:
        size, total = self._config.global_batch_size, len(self._rows)
        order: list[int] = []
        for epoch in range(step * size // total, ((step + 1) * size - 1) // total + 1):
            order += [self._rows[i] for i in np.random.default_rng([self._run.seed, epoch]).permutation(total)]
        first = step * size % total
        return [self.pairs[row] for row in order[first : first + size]]

    def micro_batches(self, step: int) -> list[PairMicroBatch]:
        return pack_batch(self._batch(step), self._run, self._config, self._runtime)

    def forward(self, iterator: Iterator[PairMicroBatch], chunk: nn.Module) -> tuple[Tensor, Any]:
        micro_batch = next(iterator)
        inputs = micro_batch.model_inputs(
            self._runtime.device, backend=self._run.model.backend, split=self._runtime.split, ahead=self._ahead
        )
        return chunk(**inputs), partial(self._loss, micro_batch)

    def _loss(self, micro_batch: PairMicroBatch, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict]:
        device = output[0].device
        count = torch.full((), len(micro_batch.rows), dtype=torch.int32, device=device)
        pairs = [self.pairs[row] for row in micro_batch.rows]
        tokens = {
            "tokens": torch.tensor(len(micro_batch.tokens)),
            "pair_tokens": torch.tensor(sum(pair.packed_length(share_prompt=self._share_prompt) for pair in pairs)),
            "unshared_tokens": torch.tensor(sum(pair.packed_length(share_prompt=False) for pair in pairs)),
        }
        if not pairs:
            zeros = dict.fromkeys(("loss", "abs_margin", *_NAMES), torch.zeros(()))
            return output[0].sum() * 0.0, *self._counted_once(count, {**tokens, **zeros})
        columns = [
            *zip(*(self._reference.get(row, (0.0, 0.0)) for row in micro_batch.rows), strict=True),
            [pair.weight for pair in pairs],
        ]
        chosen, rejected, weights = to_device(
            [np.array(column, np.float32) for column in columns], device, ahead=self._ahead
        )
        logprobs = PairLogprobs(
            **sum_by_response(output[0], micro_batch, self._runtime, ahead=self._ahead),
            reference_chosen=chosen,
            reference_rejected=rejected,
        )
        loss, metrics = rpo_loss(logprobs, self._config.loss)
        total = (loss * weights).sum()
        sums = {name: metrics[name].sum() for name in _NAMES} | {"abs_margin": metrics["margin"].abs().sum()}
        return total, *self._counted_once(count, {"loss": total.detach(), **tokens, **sums})

    def _counted_once(self, count: Tensor, metrics: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """What the loss function returns beside the loss: zeros on all but one of the ranks that share the pairs."""
        once = int(self._runtime.cp_rank == 0)
        return count * once, {name: value * once for name, value in (metrics | {"count": count}).items()}

    def consumed(self, step: int) -> list[Any]:
        return [pair.row for pair in self._batch(step)]

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over the batch's pairs, `loss` weighted; `tokens` counts padding, `tokens_saved` is by sharing."""
        count = max(sums["count"], 1)
        return {
            **{name: sums[name] / count for name in ("abs_margin", *self._compared)},
            "pairs": sums["count"],
            "tokens": sums["tokens"],
            "unshared_tokens": sums["unshared_tokens"],
            "tokens_saved": sums["unshared_tokens"] - sums["pair_tokens"],
        }

    def check(self, step: int, metrics: dict[str, float]) -> None:
        guard = self._config.guard
        if step == 0 and self._reference and not self._starts_with_noise():
            self.check_start(metrics)
        if abs(metrics["margin"]) > guard.max_margin:
            raise UserError(
                f"rpo: the mean margin is {metrics['margin']:.4g}, beyond guard.max_margin={guard.max_margin:g}; "
                "lower the learning rate or raise beta"
            )
        if metrics["grad_norm"] > guard.max_grad_norm:
            raise UserError(
                f"rpo: the gradient norm is {metrics['grad_norm']:.4g}, beyond guard.max_grad_norm="
                f"{guard.max_grad_norm:g}; lower the learning rate, or look at step {step + 1}'s pairs in the ledger"
            )
        if self._reference:
            self._watch_chosen(metrics["chosen_reward"])

    def _watch_chosen(self, reward: float) -> None:
        """Warn when, over the guard's steps, chosen log-probs fell and ended below the reference's."""
        rewards = self._chosen_rewards
        rewards.append(reward)
        if len(rewards) < max(rewards.maxlen or 0, 2):
            return
        middle = len(rewards) // 2
        before, after = fmean(list(rewards)[:middle]), fmean(list(rewards)[middle:])
        if after < min(before, 0.0):
            log.warning(
                "the chosen log-probability has fallen over the last %d steps and is below the reference's "
                "(likelihood displacement, arXiv 2410.08847): raise loss.alpha or lower the learning rate",
                len(rewards),
            )
            rewards.clear()

    def _starts_with_noise(self) -> bool:
        """Dropout on an adapter that is no longer zero: the first step's policy is not the reference, by design."""
        adapter = self._config.adapter
        return adapter is not None and adapter.path is not None and adapter.dropout > 0

    def check_start(self, metrics: dict[str, float]) -> None:
        """Before the first update the policy is the reference: any margin means that one of them is wrong."""
        dtype = self._run.model.dtype
        per_token = _ZERO_MARGIN_FP8 if self._quantized else _ZERO_MARGIN[dtype]
        tokens = metrics["chosen_tokens"] + metrics["rejected_tokens"]
        tolerance = max(per_token * tokens, _ZERO_MARGIN_SHORT[dtype] * math.sqrt(tokens))
        if metrics["abs_margin"] > tolerance:
            raise UserError(
                f"rpo: the mean |margin| before the first update is {metrics['abs_margin']:.4g}, not 0 (to "
                f"{tolerance:.2g}); the reference log-probabilities are not those of this model"
            )
        loss = self._config.loss
        if loss.kind == "rpo" and abs(metrics["preference_loss"] - math.log(2)) > loss.beta * tolerance:
            raise UserError(f"rpo: the preference loss starts at {metrics['preference_loss']:.6f}, not ln 2")

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        return tuple(f"validation_{name}" for name in self._compared) if self._validation_rows else ()

    def validate(self, chunks: list[nn.Module]) -> dict[str, float]:
        """What training reports of its pairs, over the held-out ones, against the same reference."""
        if not self._validation_rows:
            return {}
        pairs = [self.pairs[row] for row in self._validation_rows]
        parts = mcore.run_micro_batches(
            self.forward,
            chunks,
            pack_batch(pairs, self._run, self._config, self._runtime),
            stream_length=self.stream_length,
            forward_only=True,
        )
        found = self.summarize(sum_metrics(parts, self.metric_names, self._runtime))
        return {f"validation_{name}": found[name] for name in (*self._compared, "pairs")}


def _report_pairs(pair_set: PairSet, held_out: HeldOut, path: Path) -> None:
    """Leave beside the metrics which pairs train, which validate, which do neither and why; say so in the log."""
    report = pair_set.report() | {"held_out": held_out.report()}
    write_json(path, report)
    if held_out.questions:
        log.info("%d pairs of %d questions validate and never train", len(held_out.rows), len(held_out.questions))
    log.info(
        "%d pairs; sharing prompts saves %.1f %% of their tokens", report["pairs"], 100 * report["saved_by_sharing"]
    )
    for reason, count in report["dropped"].items():
        log.warning("dropped %d pairs: %s (rows in %s)", count, reason, path)
    for warning in pair_set.account.warnings():
        log.warning("%s; see rpo.sequence_length and rpo.too_long", warning)
    if report["near_identical"]:
        log.warning(
            "%d pairs have nearly identical answers, where likelihood displacement is worst (arXiv 2410.08847): "
            "see %s; rpo.filters.min_edit_distance drops them",
            report["near_identical"],
            path,
        )
