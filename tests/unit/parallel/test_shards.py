"""A range of a flattened tensor as boxes."""

import math

import pytest
import torch

from megatron_medllm.parallel.shards import boxes

SHAPES = [(7,), (3, 5), (1, 6), (6, 1), (2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_are_the_range_in_order(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    whole = torch.arange(numel).view(shape)
    for start in range(numel + 1):
        for end in range(start, numel + 1):
            parts = []
            for offsets, sizes in boxes(shape, start, end):
                part = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
                assert part.shape == sizes and part.numel() > 0
                parts.append(part.flatten())
            assert torch.cat(parts).tolist() == list(range(start, end)) if parts else start == end
            assert len(parts) <= 2 * len(shape) - 1


def test_boxes_of_a_matrix() -> None:
    assert list(boxes((4, 5), 3, 18)) == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 3))]
    assert list(boxes((4, 5), 6, 9)) == [((1, 1), (1, 3))]
    assert list(boxes((4, 5), 0, 20)) == [((0, 0), (4, 5))]
