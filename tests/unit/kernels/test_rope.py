"""Rotary embedding: literal values, transformers' formula, and a gradient that is the rotation turned back."""

import math

import torch

from megatron_medllm.kernels.rope import rotate, rotation_angles


def test_a_quarter_turn():
    cosines, sines = rotation_angles(torch.tensor([0, 1]), torch.tensor([math.pi / 2, math.pi]))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(2, 1, 4)  # halves (1, 2) and (3, 4)
    y = rotate(x, cosines, sines)
    # position 1: the pair (1, 3) turns by a quarter, (2, 4) by a half
    expected = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[-3.0, -2.0, 1.0, -4.0]]])
    assert (y - expected).abs().max() < 1e-6


def test_equals_transformers():
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 8, generator=generator)
    cosines, sines = rotation_angles(torch.tensor([0, 1, 2, 0, 1]), 1e4 ** (-torch.arange(0, 8, 2) / 8))
    doubled = [torch.cat((part, part), dim=-1)[None] for part in (cosines, sines)]
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], *doubled)
    assert (rotate(x, cosines, sines) - expected[0].transpose(0, 1)).abs().max() < 1e-6


def test_the_gradient():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 6, generator=generator, dtype=torch.float32).requires_grad_()
    cosines, sines = rotation_angles(torch.arange(4), torch.tensor([1.0, 0.5, 0.1]))
    upstream = torch.randn(4, 2, 6, generator=generator)
    (found,) = torch.autograd.grad(rotate(x, cosines, sines), x, upstream)
    first, second = x.chunk(2, dim=-1)
    c, s = cosines[:, None], sines[:, None]
    plain = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    (expected,) = torch.autograd.grad(plain, x, upstream)
    assert (found - expected).abs().max() < 1e-6
