import math

import pytest

from megatron_medllm.config.train import CptConfig, DataSource, GuardConfig, OptimizerConfig
from megatron_medllm.errors import UserError
from megatron_medllm.train.guard import LossGuard
from megatron_medllm.train.schedule import learning_rate


def rates(total_steps=10, **settings):
    config = OptimizerConfig(lr=1.0, **settings)
    return [round(learning_rate(step, total_steps=total_steps, config=config), 4) for step in range(total_steps)]


def test_schedules_by_hand():
    assert rates(5, schedule="linear", warmup_ratio=0.2, min_lr_ratio=0.1) == [1.0, 1.0, 0.7, 0.4, 0.1]
    assert rates(4, schedule="cosine", warmup_ratio=0.5, min_lr_ratio=0.0) == [0.5, 1.0, 1.0, 0.0]
    assert rates(10, schedule="wsd", warmup_ratio=0.2, decay_ratio=0.3, min_lr_ratio=0.0) == [
        0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0,
    ]  # fmt: skip
    assert rates(3, schedule="constant", warmup_ratio=0.0) == [1.0, 1.0, 1.0]


def test_guard_skips_rolls_back_and_stops():
    guard = LossGuard(GuardConfig(loss_spike_factor=2.0, window=3, roll_back_after=2, stop_after=4))
    assert guard.problem(0, math.nan) == "the loss is nan"
    for loss in (1.0, 1.2, 1.1):
        assert guard.problem(1, 9.0) is None  # the window is not full yet
        assert guard.note(1, loss, skipped=False) is False
    assert guard.problem(2, 2.1) is None
    assert guard.problem(2, 2.3) == "the loss is 2.3, 2x beyond the median 1.1"
    assert guard.note(2, 9.0, skipped=True) is False
    assert guard.note(3, 9.0, skipped=True) is True
    # After the roll-back the same data are left out, at no further cost.
    assert guard.problem(2, 1.0) == "left out since the roll-back"
    assert guard.note(2, 1.0, skipped=True) is False
    assert guard.problem(4, 1.0) is None
    assert guard.note(4, 9.0, skipped=True) is False
    with pytest.raises(UserError, match="4 steps had to be skipped"):
        guard.note(5, 9.0, skipped=True)


def test_batch_ramp_grows_in_whole_rounds_and_uses_the_rows_once():
    from megatron_medllm.train.cpt_step import batch_sizes

    config = CptConfig(
        data=(DataSource(path="x"),), train_tokens=1, sequence_length=8, global_batch_size=8, batch_ramp_steps=3,
        optimizer=OptimizerConfig(lr=1.0),
    )  # fmt: skip
    assert batch_sizes(30, config, 2) == [2, 4, 6, 8, 8]
