"""Core attention of the torch backend: packed segments, never across documents.

t: tokens of the stream, np: heads on this rank, ng: KV heads on this rank, hn: width of a head.

On CUDA, variable-length flash attention: a response's keys are its prompt's and its own, and the causal mask is
aligned to the last key. On a CPU, and in fp32, segments of similar length become right-padded batches for torch's
SDPA: a causal mask alone hides the padding from every real query. A response's batch row then holds its prompt's
queries again, whose outputs are thrown away: attention is not shared, all the matrix products around it are.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn

from megatron_medllm.parallel.packed import PackedSequences

# 2.11 takes fewer KV heads as they are; from 2.12 on that has to be asked for.
_GROUPED = {"enable_gqa": True} if Version(torch.__version__) >= Version("2.12") else {}


class PackedAttention(nn.Module):
    """Drop-in `core_attention` for Megatron-Core's SelfAttention, without parameters."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,  # [t, 1, np, hn]
        key: Tensor,  # [t, 1, ng, hn]
        value: Tensor,  # [t, 1, ng, hn]
        attention_mask: None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """Attend within segments.

        Returns:
            [t, 1, np*hn], in the query's dtype.
        """
        if packed_seq_params is None:
            raise ValueError("PackedAttention needs PackedSequences")
        flash = query.is_cuda and query.dtype is not torch.float32
        attend = _flash_varlen if flash else _padded_sdpa
        out = attend(query[:, 0], key[:, 0], value[:, 0], packed_seq_params, self.scale)
        return out.reshape(query.shape[0], 1, -1)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict:
        return {}


def _padded_sdpa(query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float) -> Tensor:
    out = torch.zeros_like(query)
    for rows, stream, slots in packed.padded_batches(query.device):
        q, k, v = (x[rows].transpose(1, 2) for x in (query, key, value))  # [n, heads, l, hn]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        out = out.index_copy(0, stream, y.transpose(1, 2).flatten(0, 1)[slots])
    return out


def _flash_varlen(query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    plan = packed.varlen_plan(query.device)
    if plan.kv_rows is not None:
        key, value = key[plan.kv_rows], value[plan.kv_rows]
    return varlen_attn(
        query,
        key,
        value,
        plan.cu_seqlens_q,
        plan.cu_seqlens_kv,
        plan.max_q,
        plan.max_kv,
        scale=scale,
        window_size=(-1, 0),
        **_GROUPED,
    )
