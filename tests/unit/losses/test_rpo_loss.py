"""The preference losses against numbers worked out by hand, and against float64 autograd."""

import math

import pytest
import torch
from pydantic import ValidationError

from megatron_medllm.config.train import RpoLossConfig
from megatron_medllm.losses.rpo import PairLogprobs, rpo_loss


def pairs(
    chosen=(-10.0,), rejected=(-12.0,), reference=((-11.0,), (-11.5,)), tokens=((5.0,), (4.0,)), dtype=torch.float64
):
    def t(values):
        return torch.tensor(values, dtype=dtype)

    return PairLogprobs(
        chosen=t(chosen),
        rejected=t(rejected),
        chosen_full=t(chosen) - 1.0,
        reference_chosen=t(reference[0]),
        reference_rejected=t(reference[1]),
        chosen_tokens=t(tokens[0]),
        rejected_tokens=t(tokens[1]),
        chosen_full_tokens=t(tokens[0]) + 1.0,
    )


# chosen reward +1, rejected reward -0.5, margin 1.5; NLL 11 / 6.
SIGMOID = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
BY_HAND = {
    "rpo": (RpoLossConfig(beta=0.1, alpha=1.0), -math.log(SIGMOID(0.15)) + 11 / 6),
    "dpo": (RpoLossConfig(beta=0.1, alpha=0.0), 0.6209565),
    "dpo_norm": (RpoLossConfig(kind="dpo_norm", beta=5.0, alpha=0.0), -math.log(SIGMOID(5 * (1 / 5 + 0.5 / 4)))),
    "cdpo": (
        RpoLossConfig(kind="cdpo", beta=0.1, alpha=0.0, label_smoothing=0.1),
        -0.9 * math.log(SIGMOID(0.15)) - 0.1 * math.log(SIGMOID(-0.15)),
    ),
    "hinge": (RpoLossConfig(kind="hinge", beta=0.1, alpha=0.0), 0.85),
    "ipo": (RpoLossConfig(kind="ipo", beta=0.1, alpha=0.0), (0.325 - 5.0) ** 2),
    "dpop, chosen above the reference": (RpoLossConfig(kind="dpop", beta=0.1, alpha=0.0), -math.log(SIGMOID(0.15))),
    "simpo": (
        RpoLossConfig(kind="simpo", beta=2.0, alpha=0.0, simpo_gamma=0.5),
        -math.log(SIGMOID(2 * (-10 / 5 + 12 / 4) - 0.5)),
    ),
    "sft": (RpoLossConfig(kind="sft", alpha=2.0), 22 / 6),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_loss_by_hand(name):
    config, expected = BY_HAND[name]
    loss, _ = rpo_loss(pairs(), config)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_dpop_punishes_a_chosen_response_below_the_reference():
    below = pairs(chosen=(-11.25,))  # chosen reward -0.25, margin 0.25
    loss, _ = rpo_loss(below, RpoLossConfig(kind="dpop", beta=0.1, alpha=0.0, dpop_lambda=4.0))
    assert loss.item() == pytest.approx(-math.log(SIGMOID(0.1 * (0.25 - 4.0 * 0.25))), abs=1e-9)


def test_before_the_first_update_the_loss_is_ln_2_plus_the_nll_and_the_margin_is_0():
    same = pairs(reference=((-10.0,), (-12.0,)))
    loss, metrics = rpo_loss(same, RpoLossConfig())
    assert metrics["margin"].item() == 0.0
    assert loss.item() == pytest.approx(math.log(2) + 11 / 6)


def test_metrics_by_hand():
    _, metrics = rpo_loss(pairs(), RpoLossConfig(beta=0.1))
    expected = {
        "margin": 1.5,
        "accuracy": 1.0,
        "chosen_reward": 0.1,
        "rejected_reward": -0.05,
        "nll": 11 / 6,
        "chosen_logprob_per_token": -2.0,
        "rejected_logprob_per_token": -3.0,
        "reference_chosen_logprob_per_token": -2.2,
        "kl": math.exp(-0.5 / 9) - 1 + 0.5 / 9,
    }
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("name", BY_HAND)
def test_gradients_agree_with_finite_differences(name):
    config, _ = BY_HAND[name]

    def loss_of(chosen, rejected):
        batch = pairs(reference=((-11.0, -9.0), (-11.5, -13.0)), tokens=((5.0, 3.0), (4.0, 7.0)))
        batch = PairLogprobs(**{**vars(batch), "chosen": chosen, "rejected": rejected, "chosen_full": chosen * 1.1,
                                "chosen_full_tokens": batch.chosen_tokens})  # fmt: skip
        return rpo_loss(batch, config)[0]

    chosen = torch.tensor([-10.0, -8.5], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-12.0, -14.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss_of, (chosen, rejected))


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "orpo"},
        {"kind": "cdpo"},
        {"kind": "rpo", "label_smoothing": 0.1},
        {"kind": "sft", "alpha": 0.0},
        {"beta": 0.0},
    ],
)
def test_unknown_and_contradictory_options_are_refused(settings):
    with pytest.raises(ValidationError):
        RpoLossConfig(**settings)
