import pytest
import torch

from megatron_medllm.losses.cpt import cpt_loss


def test_sum_over_counted_tokens_by_hand():
    logprobs = torch.tensor([-1.0, -2.0, -4.0])
    log_sum_exp = torch.tensor([3.0, 5.0, 2.0])
    counted = torch.tensor([True, False, True])
    assert cpt_loss(logprobs, log_sum_exp, counted, z_loss=0.0).item() == 5.0
    assert cpt_loss(logprobs, log_sum_exp, counted, z_loss=0.1).item() == pytest.approx(6.3)
