"""`fused_linear_logprob`: token log-probabilities from hidden states and the head's weight, logits never kept.

The problem: 16,384 tokens x 152,064 words of fp32 logits take 9.3 GiB, their gradient as much again. The method: make
the logits of a chunk of tokens, reduce them to three numbers a row (max, sum of exponentials, target's logit), and
forget them. Under tensor parallelism each rank does so for its own slice of the vocabulary, and those three numbers
are all that ranks exchange.

What the backward pass costs depends on what is known in the forward pass:

    mode     when                                            GEMMs  held between the passes
    score    no gradient wanted                              1      nothing
    frozen   the weight is not trained                       2      d log p / d hidden, one row a token
    uniform  upstream gradient known up to one scalar (CPT)  3      d hidden and d weight, but for that scalar
    general  any upstream gradient, weight trained (RPO)     4      hidden, log-sum-exp; logits are made again

The general backward walks over the vocabulary instead of the tokens, so that each slice of d weight is written once,
in the weight's dtype, from one fp32-summed GEMM: it needs no fp32 copy of d weight. `uniform` does need one.

T = tokens, H = hidden size, V = vocabulary rows on this rank, R = rows that are not ignored.
"""

import logging
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_medllm.errors import UserError
from megatron_medllm.kernels.backend import triton_installed
from megatron_medllm.kernels.logprob import rows_torch
from megatron_medllm.kernels.logprob.products import add_product, operand_dtype, project_rows, tiles

log = logging.getLogger(__name__)

Mode = Literal["score", "frozen", "uniform", "general"]
_BUFFER_BYTES = {"cpu": 160 * 2**20, "cuda": 512 * 2**20}
# The general backward works in slices of the vocabulary, beside d weight: its GEMMs lose nothing by smaller ones.
_SLICES_PER_BUFFER = {"cpu": 4, "cuda": 2}
_UNIFORM_TOLERANCE = 1e-4  # relative to the largest upstream gradient


@dataclass(frozen=True)
class _Plan:
    """Everything about one call that is not a differentiable tensor."""

    mode: Mode
    rows: ModuleType  # rows_torch or rows_triton
    tp_group: dist.ProcessGroup | None
    vocab_start: int
    valid_rows: int  # rows of this rank's weight that are real words
    vocab_size: int  # real words over all ranks
    ignore_index: int
    logits_dtype: torch.dtype
    chunk_tokens: int
    uniform_grad: Tensor | None
    kept_rows: Tensor | None  # as the caller counted them; None: found here


def fused_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    frozen_weight: bool | None = None,
    uniform_grad: Tensor | float | None = None,
    kept_rows: Tensor | None = None,
    backend: Literal["auto", "torch", "triton"] = "auto",
) -> tuple[Tensor, Tensor]:
    """log softmax(l)[target] and logsumexp(l) per token, l = hidden weight^T.

    Tensor parallelism: `hidden` and `target` are the same on every rank of `tp_group` (gather a sequence-parallel
    hidden first); `weight` is the rank's slice of the vocabulary. The gradient that reaches `hidden` is this rank's
    part of it: the caller's Megatron mapping sums the parts (`copy_to_tensor_model_parallel_region`, or
    `gather_from_sequence_parallel_region`, whose backward is a reduce-scatter). Every rank must call, with the same
    rows ignored.

    Args:
        hidden: [T, H], bf16, fp16 or fp32.
        weight: [V, H], same dtype. Its gradient is summed in fp32 and returned in its own dtype.
        target: [T] int64, indices into the whole vocabulary, or `ignore_index`.
        tp_group: ranks that share the vocabulary; None: this rank has all of it.
        vocab_start: first word of this rank's slice.
        valid_vocab: real words over all ranks; rows behind them are padding and get probability 0. None: all rows of
            all ranks, which must then be equally many.
        ignore_index: target of rows that cost no work, give 0 for both results and take no gradient.
        logits_dtype: of the chunk buffer. Rounding logits to bf16 costs 0.012 rms in the log-probs; fp32 5e-7.
        chunk_tokens: the buffer holds this many tokens' logits; None: what fits 160 MiB (CPU) or 512 MiB (CUDA).
        frozen_weight: True where the weight takes no gradient; None: as `weight.requires_grad` says.
        uniform_grad: the upstream gradient of the log-probs, [T] or one number for all, where it is known now up to
            one scalar factor (CPT: minus the loss weight of each token). The gradients are then formed in the forward
            pass, and backward only finds the factor; it fails if upstream was not proportional to `uniform_grad`.
            The log-sum-exp is not differentiable in this mode. Without effect on a frozen weight.
        kept_rows: [R] int64, ascending indices of the targets that are not `ignore_index`, where the caller knows them:
            finding them here waits for a CUDA device.
        backend: row passes over the logits in `torch` or `triton`; `auto` takes triton on CUDA where installed.

    Returns:
        token_logprobs [T] fp32 and log-sum-exp [T] fp32.

    Raises:
        ValueError: shapes or dtypes that do not fit each other; targets outside the vocabulary, or other rows kept
            than those that count (both a RuntimeError on CUDA).
        UserError: `backend="triton"` where triton cannot run.
    """
    _check_arguments(hidden, weight, target)
    tp_size = dist.get_world_size(tp_group) if tp_group is not None else 1
    vocab_size = weight.shape[0] * tp_size if valid_vocab is None else valid_vocab
    frozen = not weight.requires_grad if frozen_weight is None else frozen_weight
    mode = _mode(hidden, weight, frozen=frozen, uniform=uniform_grad is not None)
    plan = _Plan(
        mode=mode,
        rows=row_backend(backend, hidden.device.type),
        tp_group=tp_group if tp_size > 1 else None,
        vocab_start=vocab_start,
        valid_rows=min(max(vocab_size - vocab_start, 0), weight.shape[0]),
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        logits_dtype=logits_dtype,
        chunk_tokens=chunk_tokens or _default_chunk(hidden.device.type, weight.shape[0], logits_dtype),
        uniform_grad=_upstream(uniform_grad, len(target), hidden.device) if mode == "uniform" else None,
        kept_rows=kept_rows,
    )
    return _FusedLinearLogprob.apply(hidden, weight.detach() if frozen else weight, target, plan)


def _mode(hidden: Tensor, weight: Tensor, *, frozen: bool, uniform: bool) -> Mode:
    """How much is computed now, by what is known of the backward pass."""
    if not torch.is_grad_enabled() or not (hidden.requires_grad or (weight.requires_grad and not frozen)):
        return "score"
    if frozen:
        return "frozen"
    return "uniform" if uniform else "general"


def _upstream(uniform_grad: Tensor | float | None, tokens: int, device: torch.device) -> Tensor:
    """`uniform_grad` as [T] fp32 on the device."""
    if not isinstance(uniform_grad, Tensor):  # filled there: a copy of a number would wait for the device
        uniform_grad = torch.full((), float(uniform_grad or 0.0), device=device)
    return uniform_grad.to(device, torch.float32).expand(tokens)


class _FusedLinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        token_logprobs = torch.zeros(len(target), dtype=torch.float32, device=hidden.device)
        lse = torch.zeros_like(token_logprobs)
        kept = _kept_rows(target, plan)
        words = weight[: plan.valid_rows]
        x, local_target = _take(hidden, kept), _take(target, kept) - plan.vocab_start
        if plan.mode in ("score", "general"):
            row_lse, target_logit = _reduce_chunks(x, words, local_target, plan)
            saved = [x, weight, local_target, row_lse] if plan.mode == "general" else []
        else:
            ones = torch.ones_like(x[:, 0], dtype=torch.float32)
            u = ones if plan.uniform_grad is None else _take(plan.uniform_grad, kept)
            row_lse, target_logit, dx, dw = _reduce_and_differentiate_chunks(x, words, local_target, u, plan)
            saved = [dx, weight, local_target] if dw is None else [dx, dw, weight, u]
        _put(token_logprobs, kept, target_logit - row_lse)
        _put(lse, kept, row_lse)
        ctx.save_for_backward(kept, *saved)
        if plan.mode == "uniform":
            ctx.mark_non_differentiable(lse)
        return token_logprobs, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprob: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        plan: _Plan = ctx.plan
        kept, *saved = ctx.saved_tensors
        like = grad_lse if grad_logprob is None else grad_logprob
        if like is None:
            return None, None, None, None
        total = len(like)
        g = torch.zeros(len(saved[0]), device=like.device) if grad_logprob is None else _take(grad_logprob, kept)
        g_lse = torch.zeros_like(g) if grad_lse is None else _take(grad_lse, kept)
        dx: Tensor | None
        dw: Tensor | None = None
        if plan.mode == "frozen":
            held, weight, local_target = saved
            dx = _frozen_backward(held, weight, local_target, g, None if grad_lse is None else g_lse, plan)
        elif plan.mode == "uniform":
            held, held_dw, weight, u = saved
            dx, dw = _uniform_backward(held, held_dw, weight, u, g)
        else:
            x, weight, local_target, row_lse = saved
            dx, dw = _general_backward(x, weight, local_target, row_lse, g, g_lse, plan, ctx.needs_input_grad)
        dx = _scatter(dx, kept, total) if dx is not None and ctx.needs_input_grad[0] else None
        return dx, dw, None, None


def _reduce_chunks(x: Tensor, words: Tensor, local_target: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [R] and target logit [R] over the whole vocabulary; one exchange between ranks."""
    stats = torch.empty(3, len(x), dtype=torch.float32, device=x.device)
    buffer = _logits_buffer(x, words, plan)
    for rows in tiles(len(x), plan.chunk_tokens):
        z = buffer[: len(x[rows])]
        project_rows(x[rows], words, out=z)
        stats[:, rows] = _shard_stats(z, local_target[rows], plan)
    return _combine_shards(stats, plan.tp_group)


def _reduce_and_differentiate_chunks(
    x: Tensor, words: Tensor, local_target: Tensor, u: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Log-sum-exp [R], target logit [R], and sum_r u_r d log p_r differentiated by hidden [R, H] and, unless frozen,
    by the words [valid, H] in fp32; one exchange between ranks a chunk."""
    lse, target_logit = torch.empty(2, len(x), dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x)
    dw = None
    if plan.mode == "uniform":
        dw = torch.zeros(words.shape, dtype=torch.float32, device=x.device)
    buffer = _logits_buffer(x, words, plan)
    for rows in tiles(len(x), plan.chunk_tokens):
        z = buffer[: len(x[rows])]
        project_rows(x[rows], words, out=z)
        stats = _shard_stats(z, local_target[rows], plan)
        lse[rows], target_logit[rows] = _combine_shards(stats, plan.tp_group)
        dz = _shard_gradient(z, local_target[rows], lse[rows], u[rows], torch.zeros_like(u[rows]), words, plan)
        part = torch.zeros(z.shape[0], x.shape[1], dtype=torch.float32, device=x.device)
        add_product(part, dz, words)
        dx[rows] = part
        if dw is not None:
            add_product(dw, dz.t(), x[rows])
    return lse, target_logit, dx, dw


def _frozen_backward(
    dx: Tensor, weight: Tensor, local_target: Tensor, g: Tensor, g_lse: Tensor | None, plan: _Plan
) -> Tensor:
    """A row scale: d lse / dx differs from -d log p / dx by the target word's own row of the weight."""
    if g_lse is None:
        return dx * g[:, None].to(dx.dtype)
    here = (local_target >= 0) & (local_target < plan.valid_rows)
    word = weight[local_target.clamp(0, max(plan.valid_rows - 1, 0))]
    return ((g - g_lse)[:, None] * dx.float() + (g_lse * here)[:, None] * word.float()).to(dx.dtype)


def _uniform_backward(dx: Tensor, dw: Tensor, weight: Tensor, u: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Find the factor c with g = c u, check that it is one, and scale what the forward pass has formed.

    In place for dw, which is as large as the weight: autograd then refuses a second backward.
    """
    factor = (g * u).sum() / (u * u).sum().clamp_min(torch.finfo(torch.float32).tiny)
    if len(g):
        far = (g - factor * u).abs().amax() > _UNIFORM_TOLERANCE * g.abs().amax()  # False for nan: not ours to report
        torch._assert_async(~far, "fused_linear_logprob: upstream gradient is not proportional to uniform_grad")
    full = torch.zeros_like(weight) if weight.dtype != torch.float32 or len(dw) < len(weight) else dw
    torch.mul(dw, factor, out=dw)
    if full is not dw:
        full[: len(dw)] = dw
    return dx * factor.to(dx.dtype), full


def _general_backward(
    x: Tensor,
    weight: Tensor,
    local_target: Tensor,
    lse: Tensor,
    g: Tensor,
    g_lse: Tensor,
    plan: _Plan,
    needs_input_grad: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Make the logits again, a slice of the vocabulary at a time."""
    dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    dw = torch.zeros_like(weight) if needs_input_grad[1] else None
    slice_numbers = plan.chunk_tokens * plan.valid_rows // _SLICES_PER_BUFFER.get(x.device.type, 1)
    slice_words = max(slice_numbers // max(len(x), 1) // 128 * 128, 128)
    buffer = torch.empty(len(x) * min(slice_words, plan.valid_rows), dtype=plan.logits_dtype, device=x.device)
    for part in tiles(plan.valid_rows if len(x) else 0, slice_words):
        words = weight[part]
        z = buffer[: len(x) * len(words)].view(len(x), len(words))
        project_rows(x, words, out=z)
        dz = _shard_gradient(z, local_target - part.start, lse, g, g_lse, words, plan)
        if needs_input_grad[0]:
            add_product(dx, dz, words)
        if dw is not None:
            project_rows(dz.t(), x.t().to(dz.dtype), out=dw[part])
    return dx.to(x.dtype), dw


def _shard_stats(z: Tensor, local_target: Tensor, plan: _Plan) -> Tensor:
    if z.shape[1] == 0:  # this rank holds padding only
        return torch.tensor([-torch.inf, 0.0, 0.0], device=z.device)[:, None].expand(3, z.shape[0])
    return plan.rows.row_stats(z, local_target)


def _shard_gradient(
    z: Tensor, local_target: Tensor, lse: Tensor, g: Tensor, g_lse: Tensor, words: Tensor, plan: _Plan
) -> Tensor:
    if z.shape[1] == 0:
        return z.to(operand_dtype(words))
    return plan.rows.logits_gradient(
        z,
        local_target,
        lse=lse,
        grad_logprob=g,
        grad_lse=g_lse,
        dtype=operand_dtype(words),
    )


def _combine_shards(stats: Tensor, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """[3, R] of this rank -> log-sum-exp [R] and target logit [R] over all ranks, the same bits on each."""
    if tp_group is None:
        return stats[0] + stats[1].log(), stats[2]
    stats = stats.contiguous()
    shards = [torch.empty_like(stats) for _ in range(dist.get_world_size(tp_group))]
    dist.all_gather(shards, stats, group=tp_group)
    largest, total, target_logit = torch.stack(shards, 1)  # each [tp, R]
    overall = largest.amax(0)
    return overall + (total * (largest - overall).exp()).sum(0).log(), target_logit.sum(0)


def _kept_rows(target: Tensor, plan: _Plan) -> Tensor | None:
    """Indices of rows that count, None where all do. On CUDA this waits for the device, unless the caller knew them."""
    counted = target != plan.ignore_index
    legal = ~counted | ((target >= 0) & (target < plan.vocab_size))
    if target.is_cuda:
        torch._assert_async(legal.all(), "fused_linear_logprob: a target lies outside the vocabulary")
        if plan.kept_rows is not None:
            torch._assert_async(_are_counted(plan.kept_rows, counted), f"fused_linear_logprob: {_OTHER_ROWS}")
    elif not legal.all():
        row = int(torch.nonzero(~legal)[0])
        raise ValueError(f"target[{row}] is {int(target[row])}: outside the vocabulary of {plan.vocab_size}")
    elif plan.kept_rows is not None and not _are_counted(plan.kept_rows, counted):
        raise ValueError(_OTHER_ROWS)
    kept = counted.nonzero()[:, 0] if plan.kept_rows is None else plan.kept_rows
    return None if len(kept) == len(target) else kept


_OTHER_ROWS = "kept_rows are not the rows whose target counts"


def _are_counted(kept: Tensor, counted: Tensor) -> Tensor:
    """Whether `kept` names every counted row, and no other."""
    marked = torch.zeros_like(counted).index_fill_(0, kept, True)
    return (marked == counted).all() & (counted.sum() == len(kept))


def _take(values: Tensor, kept: Tensor | None) -> Tensor:
    return values if kept is None else values[kept]


def _put(values: Tensor, kept: Tensor | None, rows: Tensor) -> None:
    values[slice(None) if kept is None else kept] = rows


def _scatter(rows: Tensor, kept: Tensor | None, total: int) -> Tensor:
    if kept is None:
        return rows
    return rows.new_zeros(total, rows.shape[1]).index_copy_(0, kept, rows)


def _logits_buffer(x: Tensor, words: Tensor, plan: _Plan) -> Tensor:
    return torch.empty(min(plan.chunk_tokens, len(x)), len(words), dtype=plan.logits_dtype, device=x.device)


def _default_chunk(device_type: str, vocab_rows: int, logits_dtype: torch.dtype) -> int:
    tokens = _BUFFER_BYTES.get(device_type, _BUFFER_BYTES["cuda"]) // (max(vocab_rows, 1) * logits_dtype.itemsize)
    return max(tokens // 64 * 64, 64)


def _check_arguments(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [T, H] and [V, H]")
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [{hidden.shape[0]}], is {target.dtype} {tuple(target.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}: they must be the same")


@lru_cache
def row_backend(name: str, device_type: str) -> ModuleType:
    """The module with the row passes; says once which was chosen."""
    if name not in ("auto", "torch", "triton"):
        raise UserError(f"head backend {name!r}: expected auto, torch or triton")
    if name == "triton" and not triton_installed():
        raise UserError("head backend 'triton': the triton package is not installed; use backend 'torch'")
    if name == "triton" or (name == "auto" and device_type == "cuda" and triton_installed()):
        from megatron_medllm.kernels.logprob import rows_triton

        rows: ModuleType = rows_triton
    else:
        rows = rows_torch
    log.info("fused_linear_logprob: %s row passes on %s (asked for: %s)", rows.__name__, device_type, name)
    return rows
