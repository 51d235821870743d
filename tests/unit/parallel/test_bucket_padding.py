"""Buckets' padding in saved optimizer states; that a save survives it, test_certify.py proves in whole layouts."""

import pytest
import torch

from megatron_medllm.parallel.bucket_padding import with_padding


def test_buckets_go_to_their_places():
    packed = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert with_padding(packed, [(0, 2), (4, 3)], size=8).tolist() == [1, 2, 0, 0, 3, 4, 5, 0]
    assert with_padding(packed, [(0, 5)], size=5).tolist() == packed.tolist()


def test_lengths_that_do_not_add_up_are_refused():
    with pytest.raises(RuntimeError):
        with_padding(torch.zeros(5), [(0, 2), (4, 2)], size=8)
