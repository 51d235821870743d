"""Our core attention: packed segments, never across documents. The te backend uses it too where layout.cp > 1.

t: tokens of the stream, np: heads on this rank, ng: KV heads on this rank, hn: width of a head.

On CUDA, variable-length flash attention: a response's keys are its prompt's and its own, and the causal mask is
aligned to the last key. On Hopper cuDNN is used where it can be had (`models/attention_choice.py`). On a CPU, and in
fp32, pieces of similar length become right-padded batches for torch's SDPA: a causal mask alone hides the padding from
every real query. A response's batch row then has slots for its prompt's queries, whose outputs are thrown away:
attention is not shared, all the matrix products around it are.

Under context parallelism the queries are this rank's, and K and V are gathered: 2*ng*hn numbers a token. They stay
for the backward pass, unless `recompute` drops them (it then gathers once more).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_medllm.kernels.rope import rotate
from megatron_medllm.parallel.context import gather_stream
from megatron_medllm.parallel.packed import PackedSequences

# 2.11 takes fewer KV heads as they are; from 2.12 on that has to be asked for.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if Version(torch.__version__) >= Version("2.12") else {}


Attend = Callable[[Tensor, Tensor, Tensor, PackedSequences, float], Tensor]


class PackedAttention(nn.Module):
    """Drop-in `core_attention` for Megatron-Core's SelfAttention, without parameters."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        ranks = config.tensor_model_parallel_size
        self.heads = (config.num_attention_heads // ranks, max(1, config.num_query_groups // ranks))  # np, ng
        self.width, self.dtype = config.kv_channels, config.params_dtype
        self.attend: Attend = attend_by_default

    def forward(
        self,
        query: Tensor,  # [t/cp, 1, np, hn]
        key: Tensor,  # [t/cp, 1, ng, hn]
        value: Tensor,  # [t/cp, 1, ng, hn]
        attention_mask: None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """Rotate q and k to their positions and attend within segments.

        Returns:
            [t/cp, 1, np*hn], in the query's dtype.
        """
        if packed_seq_params is None:
            raise ValueError("PackedAttention needs PackedSequences")
        if packed_seq_params.rotation is None:
            raise ValueError("PackedSequences without the angles of their positions")
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        query, key = (rotate(x, *packed_seq_params.rotation) for x in (query, key))
        if packed_seq_params.split.size != (1 if self.cp_group is None else self.cp_group.size()):
            raise ValueError(f"the stream is split {packed_seq_params.split.size} ways, the layout another")
        if self.cp_group is not None:
            key, value = gather_stream(torch.cat((key, value), dim=1), self.cp_group).chunk(2, dim=1)  # [t, ng, hn]
        out = self.attend(query, key, value.contiguous(), packed_seq_params, self.scale)
        return out.reshape(query.shape[0], 1, -1)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict:
        return {}


def attend_by_default(query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float) -> Tensor:
    """[t, np, hn]: by what every machine has: flash attention on CUDA in 16 bits, else torch's SDPA."""
    flash = query.is_cuda and query.dtype is not torch.float32
    return (flash_varlen if flash else padded_sdpa)(query, key, value, packed, scale)


def padded_sdpa(query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float) -> Tensor:
    """[t, np, hn]: attention of padded batches of documents, by torch alone; exact on every device."""
    out = torch.zeros_like(query)
    for batch in packed.padded_batches(query.device):
        q = query[batch.queries].transpose(1, 2)  # [n, np, l, hn]
        k, v = (x[batch.keys].transpose(1, 2) for x in (key, value))  # [n, ng, l, hn]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        out = out.index_copy(0, batch.tokens, y.transpose(1, 2).flatten(0, 1)[batch.slots])
    return out


def flash_varlen(query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float) -> Tensor:
    """[t, np, hn]: the same by FlashAttention's kernel for documents of any lengths (CUDA, bf16 or fp16)."""
    from torch.nn.attention.varlen import varlen_attn

    outputs = []
    for plan in packed.varlen_plans(query.device):
        out = varlen_attn(
            query[plan.queries],
            key[plan.kv_rows],
            value[plan.kv_rows],
            plan.cu_seqlens_q,
            plan.cu_seqlens_kv,
            plan.max_q,
            plan.max_kv,
            scale=scale,
            window_size=(-1, 0),
            **_GROUPED,
        )
        assert isinstance(out, Tensor)  # a tuple only where the log-sum-exp is asked for too
        outputs.append(out)
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def dense_sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[t, np, hn]: causal attention of one document that fills the stream, by cuDNN inside torch on CUDA.

    Query, key and value are views, not copies, and so is what is returned.
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))  # [1, n, t, hn]
    backends = [SDPBackend.CUDNN_ATTENTION] if query.is_cuda else [SDPBackend.MATH]
    with sdpa_kernel(backends):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)
