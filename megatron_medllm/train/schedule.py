"""The learning rate as a pure function of the step."""

import math

from megatron_medllm.config.train import OptimizerConfig


def learning_rate(step: int, *, total_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of step `step` (from 0) of `total_steps`.

    Linear warm-up over `warmup_ratio` of the steps to the peak, then: `cosine` or `linear` down to
    `min_lr_ratio` x peak at the last step; `wsd` stays at the peak and goes down linearly over the last `decay_ratio`
    of the steps (MiniCPM, arXiv 2404.06395); `constant` stays.
    """
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    floor = config.lr * config.min_lr_ratio
    if config.schedule == "constant":
        return config.lr
    first = warmup_steps
    if config.schedule == "wsd":
        first = max(warmup_steps, total_steps - math.ceil(config.decay_ratio * total_steps))
        if step < first:
            return config.lr
    done = (step - first) / max(1, total_steps - 1 - first)
    share = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return floor + (config.lr - floor) * share
