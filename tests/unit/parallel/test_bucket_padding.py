"""Buckets' padding in saved optimizer states; that a save survives it, test_certify.py proves in whole layouts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_medllm.parallel.bucket_padding import Padded, with_padding


def test_buckets_go_to_their_places():
    packed = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert with_padding(packed, [(0, 2), (4, 3)], size=8).tolist() == [1, 2, 0, 0, 3, 4, 5, 0]
    assert with_padding(packed, [(0, 5)], size=5).tolist() == packed.tolist()


def test_lengths_that_do_not_add_up_are_refused():
    with pytest.raises(RuntimeError):
        with_padding(torch.zeros(5), [(0, 2), (4, 2)], size=8)


@pytest.mark.parametrize("packed", [True, False])
def test_a_state_that_has_its_padding_is_left_alone(packed: bool):
    """A version that puts it in by itself must not get it twice."""
    buckets = [SimpleNamespace(offset=0, numel_unpadded=2), SimpleNamespace(offset=4, numel_unpadded=3)]
    whole = [1.0, 2.0, 0.0, 0.0, 3.0, 4.0, 5.0, 0.0]
    value = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0] if packed else whole)
    saved: dict[Any, Any] = {0: {"dtype": {"param": value, "numel_unpadded": 5}}, "buckets_coalesced": True}
    optimizer: Any = SimpleNamespace(
        buffers=[SimpleNamespace(buckets=buckets, numel=8)], get_parameter_state_dp_zero=lambda: saved
    )
    assert Padded(optimizer)()[0]["dtype"]["param"].tolist() == whole  # type: ignore[index]
