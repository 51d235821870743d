"""From the user's run to a small one with the same layout: folded sizes, a shrunken model of the same divisibility.

What decides how a tensor is cut stays as it is: tied or untied embeddings, query heads a KV head, whether KV heads are
fewer than tensor-parallel ranks, whether the vocabulary and the FFN are padded, uneven stages, model chunks. Sizes,
data and the optimizer's numbers are the certificate's own.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_medllm.config.layout import LayoutConfig, padded_vocab_size
from megatron_medllm.config.model import ModelShape
from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import AdapterConfig, CptConfig, RpoConfig
from megatron_medllm.errors import UserError
from megatron_medllm.parallel.overlap import overlaps

STEPS = 4  # three that are compared and saved, one behind the save
SAVED_AFTER = 3
MARKER = "7 8"  # stands for the recipe's `loss_after`
_LARGEST = 2  # a folded size
_BUCKET = 10_000  # numbers: a model of this size has several buckets to overlap, too
_BLOCK = 128  # of FP8
# Adam divides a gradient by its own size: with the usual eps, a difference in rounding would decide the smallest
# updates. With this one an update differs no more than its gradient does, and the gradient's scale is seen.
_OPTIMIZER = {
    "lr": 0.02, "schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.1, "eps": 1e-3, "clip_grad": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Shrunken:
    """The run that is certified in the user's place."""

    run: RunConfig  # in the user's layout, folded
    shape: ModelShape
    notes: tuple[str, ...]  # what stands for what


def shrink(run: RunConfig, place: Path, *, max_ranks: int, has_nf4: bool) -> Shrunken:
    """The run of a few steps whose layout stands for the user's.

    Args:
        run: the user's.
        place: folder of the inputs (`world.write_inputs`) and of what the processes write.
        max_ranks: most processes that this machine shall run; a larger layout is folded.
        has_nf4: whether an NF4 base can be held here.

    Raises:
        UserError: even folded, the layout has more ranks.
    """
    section = run.stage_config()
    layout, notes = fold(run.layout, max_ranks=max_ranks)
    adapter = _adapter(section.adapter, notes, has_nf4=has_nf4)
    blocks = section.fp8 != "none" or (adapter is not None and adapter["base"] != "bf16")
    shape = shrink_shape(run.model.resolve_shape(), run.layout, layout, blocks=blocks)
    if run.model.backend == "te":
        notes.append("model.backend te -> torch: Transformer Engine needs CUDA")
    if run.model.dtype != "float32":
        notes.append(f"model.dtype {run.model.dtype} -> float32: differences are of rounding alone")
    training: dict[str, Any] = {
        "sequence_length": _multiple_of(64, layout.stream_multiple),
        "micro_batch_size": min(section.micro_batch_size, 2),
        "optimizer": _OPTIMIZER | {"betas": section.optimizer.betas},
        "adapter": adapter,
        "fp8": section.fp8,
        "checkpoint": {"async_save": section.checkpoint.async_save},
    }
    # Where the FFN is padded, one process pads it as much, so that it can load the layout's save.
    ffn_multiple = _BLOCK * layout.tp if blocks or run.model.ffn_multiple else None
    special = _rpo(section, place, layout) if isinstance(section, RpoConfig) else _cpt(section, place, layout)
    settings = {
        "name": "certificate",
        "run_dir": place / "layout",
        "seed": run.seed,
        "stage": run.stage,
        "model": {"path": place / "model", "dtype": "float32", "ffn_multiple": ffn_multiple},
        "layout": layout,
        run.stage: training | special,
    }
    return Shrunken(RunConfig.model_validate(settings), shape, tuple(notes))


def in_one_process(run: RunConfig, output: Path) -> RunConfig:
    """The same run without any parallelism, writing elsewhere."""
    training = run.stage_config().model_dump() | ({"reference": None} if run.stage == "rpo" else {})
    layout = {"distributed_optimizer": run.layout.distributed_optimizer}  # the two write other states
    return RunConfig.model_validate(run.model_dump() | {"layout": layout, "run_dir": output, run.stage: training})


def fold(layout: LayoutConfig, *, max_ranks: int) -> tuple[LayoutConfig, list[str]]:
    """The layout itself, or with sizes above 2 made 2, and what was folded.

    Raises:
        UserError: as `shrink`.
    """
    sizes = {"dp": layout.data_parallel_size, "tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp}
    overlapped = overlaps(layout, "cuda")  # what the GPUs will do, gloo does here
    kept = layout.model_dump() | {
        "nodes": 1,
        "gpus_per_node": None,
        "overlap_grad_reduce": "on" if overlapped.grad_reduce else "off",
        "overlap_param_gather": "on" if overlapped.param_gather else "off",
        "bucket_size": _BUCKET,
    }
    if layout.world_size <= max_ranks:
        return LayoutConfig.model_validate(kept | {"dp": sizes["dp"]}), []
    folded = {name: min(size, _LARGEST) for name, size in sizes.items()}
    ranks = math.prod(folded[name] for name in ("dp", "tp", "pp", "cp"))
    if ranks > max_ranks:
        sizes_text = " ".join(f"{name}={folded[name]}" for name in ("tp", "pp", "cp", "dp"))
        raise UserError(
            f"layout: folded to {sizes_text} it still takes {ranks} processes, more than --max-ranks {max_ranks}"
        )
    for name in ("first_stage_layers", "last_stage_layers"):
        if kept[name] is not None:
            kept[name] = 1 if name == "first_stage_layers" else 3
    notes = [f"layout.{name} {size} -> {folded[name]}" for name, size in sizes.items() if size != folded[name]]
    return LayoutConfig.model_validate(kept | folded), notes


def shrink_shape(shape: ModelShape, layout: LayoutConfig, folded: LayoutConfig, *, blocks: bool) -> ModelShape:
    """A small shape that the folded layout cuts as `layout` cuts the user's.

    Args:
        blocks: weights in blocks (FP8, NF4): every rank's slice is whole blocks of 128, but the FFN's where it is
            padded.
    """
    tp = folded.tp
    shared = -(-layout.tp // shape.num_query_groups)  # ranks that share a KV head
    groups = max(1, tp // shared) if shared > 1 else max(2, tp)
    heads = groups * max(1, min(shape.num_attention_heads // shape.num_query_groups, 8))
    heads = _multiple_of(heads, math.lcm(groups, tp))
    width, ffn_unit = 8, 4 * tp
    if blocks:
        groups, heads, width, ffn_unit = 2 * tp, 4 * tp, 32, _BLOCK * tp
        # Not whole blocks on every rank, where the user's are not: then it is padded.
    hidden = heads * width
    ffn = _multiple_of(2 * hidden, ffn_unit)
    if blocks and shape.ffn_hidden_size % (_BLOCK * layout.tp):
        ffn = hidden + _BLOCK // 2
    vocab = 512 * tp
    if padded_vocab_size(shape.vocab_size, 128 * layout.tp) != shape.vocab_size:
        vocab -= 72
    return shape.model_copy(
        update={
            "num_layers": _layers(folded),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_query_groups": groups,
            # Where heads have a width of their own, theirs is not hidden_size / heads here either.
            "head_dim": None if shape.head_dim is None else 2 * width,
            "ffn_hidden_size": ffn,
            "vocab_size": vocab,
            "max_position_embeddings": 2048,
        }
    )


def _layers(layout: LayoutConfig) -> int:
    """Two layers in a chunk; one where the chunks are many."""
    fixed = [n for n in (layout.first_stage_layers, layout.last_stage_layers) if n is not None]
    chunks = layout.pp * layout.vpp
    each = 2 if chunks <= 4 else 1
    return sum(fixed) + each * (chunks - len(fixed))


def _multiple_of(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _adapter(adapter: AdapterConfig | None, notes: list[str], *, has_nf4: bool) -> dict[str, Any] | None:
    if adapter is None:
        return None
    settings = adapter.model_dump() | {"rank": min(adapter.rank, 8), "path": None}
    settings["alpha"] = adapter.alpha / adapter.rank * settings["rank"]
    if adapter.path is not None:
        notes.append("adapter.path: a new adapter stands for it")
    if adapter.dropout:
        notes.append(f"adapter.dropout {adapter.dropout:g} -> 0: pipeline stages and replicas draw other numbers")
        settings["dropout"] = 0.0
    if adapter.base == "nf4" and not has_nf4:
        notes.append("adapter.base nf4 -> bf16: bitsandbytes is not installed here")
        settings["base"] = "bf16"
    return settings


def _replicas_rows(layout: LayoutConfig) -> int:
    """Micro-batches of a replica: enough to fill the pipeline, in whole rounds of interleaved stages."""
    return layout.pp if layout.vpp > 1 and layout.pp > 1 else max(2, layout.pp)


def _cpt(section: CptConfig, place: Path, layout: LayoutConfig) -> dict[str, Any]:
    size = min(section.micro_batch_size, 2)
    batch = size * layout.data_parallel_size * _replicas_rows(layout)
    return {
        "data": [{"path": place / "corpus"}],
        "train_tokens": STEPS * batch * _multiple_of(64, layout.stream_multiple),
        "global_batch_size": batch,
        "loss_after": [MARKER] if section.loss_after else [],
        "z_loss": section.z_loss,
    }


def _rpo(section: RpoConfig, place: Path, layout: LayoutConfig) -> dict[str, Any]:
    return {
        "pairs": place / "pairs.jsonl",
        "global_batch_size": max(8, 4 * layout.data_parallel_size),
        "micro_batch_size": 2,
        "sequence_length": _multiple_of(64, layout.stream_multiple),
        "loss": section.loss,
        "share_prompt": section.share_prompt,
        "add_eos": section.add_eos,
    }
