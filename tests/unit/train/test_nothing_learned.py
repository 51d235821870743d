"""Steps that teach nothing are an error, not a loss of 0; rounding is no foreign reference."""

from types import SimpleNamespace

import pytest

from megatron_medllm.config.train import RpoLossConfig
from megatron_medllm.errors import UserError
from megatron_medllm.train.cpt_step import CptStep
from megatron_medllm.train.rpo_step import RpoStep


def test_steps_without_a_learned_token_stop_the_run() -> None:
    step = SimpleNamespace(_empty_steps=0, total_steps=100)
    for counted in [0] * 9 + [5] + [0] * 9:  # a long document's rows may teach nothing for a while
        CptStep.check(step, 0, {"counted_tokens": counted})
    with pytest.raises(UserError, match=r"nothing was learned in 10 steps.*loss_after"):
        CptStep.check(step, 0, {"counted_tokens": 0})
    short = SimpleNamespace(_empty_steps=0, total_steps=2)
    CptStep.check(short, 0, {"counted_tokens": 0})
    with pytest.raises(UserError, match="nothing was learned in 2 steps"):
        CptStep.check(short, 1, {"counted_tokens": 0})


@pytest.mark.parametrize(
    ("dtype", "tokens", "margin", "right"),
    [
        ("bfloat16", 112, 0.61, True),  # a real 0.5B model's rounding
        ("bfloat16", 4, 0.1, True),
        ("bfloat16", 112, 1.2, False),
        ("bfloat16", 1000, 4.9, True),
        ("bfloat16", 1000, 5.1, False),
        ("float32", 112, 0.01, False),
    ],
)
def test_the_zero_margin_allows_rounding_alone(dtype: str, tokens: float, margin: float, right: bool) -> None:
    step = SimpleNamespace(
        _quantized=False,
        _run=SimpleNamespace(model=SimpleNamespace(dtype=dtype)),
        _config=SimpleNamespace(loss=RpoLossConfig(kind="dpo_norm")),
    )
    metrics = {"chosen_tokens": tokens / 2, "rejected_tokens": tokens / 2, "abs_margin": margin, "preference_loss": 0.7}
    if right:
        RpoStep.check_start(step, metrics)
    else:
        with pytest.raises(UserError, match="before the first update"):
            RpoStep.check_start(step, metrics)
