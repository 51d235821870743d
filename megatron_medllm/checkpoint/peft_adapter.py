"""Adapters to and from PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT puts an adapter on every HF linear; ours sit on Megatron's fused ones. Ours become PEFT's exactly: q, k and v (or
gate and up) get the same A and their own rows of B. PEFT's become ours exactly, too, but where q, k and v have each
their own A, the fused adapter holds all of them one below the other, B is zero outside each part's own columns, and
the rank grows; other layers are padded with zeros to that rank. `alpha` grows along, so that alpha / rank stays.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_medllm.checkpoint.convert import check_files, newest_checkpoint
from megatron_medllm.checkpoint.hf_target import DIGESTS_NAME, partial_dir, refuse_existing
from megatron_medllm.checkpoint.names import Weight, hf_shape, local_pieces, model_weights
from megatron_medllm.checkpoint.open_model import open_checkpoint
from megatron_medllm.checkpoint.peft_settings import CONFIG_NAME, PeftSettings, read_settings
from megatron_medllm.checkpoint.safetensors_file import digest_tensor
from megatron_medllm.config.model import ModelShape
from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.errors import UserError
from megatron_medllm.models.adapters import LINEARS
from megatron_medllm.models.gpt import global_parameters, unwrap
from megatron_medllm.storage import full_disk_error, read_json, write_json

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What torch.compile, FSDP, activation checkpointing and DDP put into parameters' names.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}


@dataclass(frozen=True)
class Adapter:
    """A whole LoRA adapter in Megatron's order: parameter name (layers over the whole model) -> tensor."""

    config: AdapterConfig
    tensors: dict[str, Tensor]  # ...lora_a [r, k] and ...lora_b [n, r]


def adapted_weights(shape: ModelShape) -> Iterator[tuple[Weight, str]]:
    """The weights that may carry an adapter, each with its linear's name."""
    for weight in model_weights(shape):
        module, _, kind = weight.mcore.rpartition(".")
        linear = module.rpartition(".")[2]
        if kind == "weight" and linear in LINEARS:
            yield weight, linear


def export_peft(
    ckpt_dir: Path,
    adapter_dir: Path,
    *,
    base_model: str | None,
    source_dir: Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the adapter of a training checkpoint, ours or Megatron-Bridge's or NeMo's, as PEFT loads it.

    Args:
        ckpt_dir: a checkpoint that holds an adapter, or a training run's folder of them: then the newest. Its stored
            digests are checked.
        adapter_dir: takes its name only when whole; must not exist.
        base_model: directory or hub name that PEFT will look for the base under.
        source_dir: HF directory with the base's config.json; default: what the checkpoint carries, or `base_model`.
        dtype: of the tensors written; default: the checkpoint's.

    Raises:
        UserError: the checkpoint holds no adapter or is damaged, or the result exists, or the disk is full.
    """
    refuse_existing(adapter_dir)
    opened = open_checkpoint(
        newest_checkpoint(ckpt_dir), source_dir, base_dir=None if base_model is None else Path(base_model)
    )
    config, shape = opened.adapter, opened.shape
    if config is None:
        raise UserError(f"{ckpt_dir}: holds no adapter (a whole model is exported to a Hugging Face directory)")
    check_files(opened.place.weights)
    stored = opened.adapter_reader()
    tensors: dict[str, Tensor] = {}
    for weight, _ in adapted_weights(shape):
        halves = stored.halves(weight)
        if halves is not None:
            dtype = dtype or halves[0].dtype
            tensors |= {name: t.to(dtype).contiguous() for name, t in _split(weight, shape, *halves).items()}
    partial = partial_dir(adapter_dir)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, partial / WEIGHTS_NAME)
    except OSError as error:
        raise full_disk_error(error, partial / WEIGHTS_NAME) from error
    write_json(partial / CONFIG_NAME, _peft_config(config, tensors, base_model))
    digests = {name: digest_tensor(tensor) for name, tensor in sorted(tensors.items())}
    write_json(partial / DIGESTS_NAME, {"algorithm": "sha256", "tensors": digests})
    partial.rename(adapter_dir)


def _split(weight: Weight, shape: ModelShape, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """PEFT's tensors of one fused adapter."""
    if weight.axis == 1:
        a = a[:, : hf_shape(weight.hf[0], shape)[1]]
        return _named(weight.hf[0], a, b)
    parts = {name: b.new_empty(hf_shape(name, shape)[0], b.shape[1]) for name in weight.hf}
    at = 0
    for piece in local_pieces(weight, shape, local_size=b.shape[0], tp_rank=0, tp_size=1):
        if piece.hf is not None:
            parts[piece.hf][piece.start : piece.stop] = b[at : at + len(piece)]
        at += len(piece)
    tensors: dict[str, Tensor] = {}
    for name, rows in parts.items():
        tensors |= _named(name, a.clone(), rows)
    return tensors


def _named(hf_name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    stem = _PREFIX + hf_name.removesuffix("weight")
    return {f"{stem}lora_A.weight": a, f"{stem}lora_B.weight": b}


def _peft_config(config: AdapterConfig, tensors: dict[str, Tensor], base_model: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def read_peft(adapter_dir: Path, shape: ModelShape) -> Adapter:
    """Read a PEFT LoRA adapter into Megatron's order.

    Rank and alpha may differ from linear to linear: the narrower are padded with zeros to the widest, and B takes up
    what a linear's alpha / r has beyond the adapter's.

    Args:
        adapter_dir: adapter_config.json and adapter_model.safetensors.
        shape: of the base model, unpadded.

    Raises:
        UserError: not plain LoRA on the base's attention and MLP linears, tensors missing, extra or mis-shaped, or
            settings and tensors that contradict each other.
    """
    settings = read_settings(adapter_dir)
    path = adapter_dir / WEIGHTS_NAME
    found = _plain_names(path, _load(path))
    _check_digests(adapter_dir, found)
    scale = settings.lora_alpha / settings.r**0.5 if settings.use_rslora else settings.lora_alpha / settings.r
    fused = {}
    for weight, _ in adapted_weights(shape):
        parts = _take_parts(path, weight, shape, found, settings)
        if parts:
            fused[weight.mcore.removesuffix("weight")] = _fuse(weight, shape, parts, settings, scale)
    if found:
        raise UserError(f"{path}: tensor {min(found)!r} belongs to no linear of this model")
    if not fused:
        raise UserError(f"{path}: no adapter tensors")
    widest = max(a.shape[0] for a, _ in fused.values())
    tensors = {}
    for stem, (a, b) in fused.items():
        missing = widest - a.shape[0]
        tensors[f"{stem}lora_a"] = torch.cat((a, a.new_zeros(missing, a.shape[1])))
        tensors[f"{stem}lora_b"] = torch.cat((b, b.new_zeros(b.shape[0], missing)), dim=1)
    used = {stem.split(".")[-2] for stem in fused}
    names = get_args(get_args(AdapterConfig.model_fields["targets"].annotation)[0])
    config = AdapterConfig(
        rank=widest,
        alpha=scale * widest,
        dropout=settings.lora_dropout,
        targets=tuple(name for name in names if name in used),
    )
    return Adapter(config, tensors)


def _load(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        others = sorted(p.name for p in path.parent.glob("adapter_model*") if p.is_file())
        there = f"; {others[0]} is there: load it with PEFT and save_pretrained() it" if others else ""
        raise UserError(f"{path}: no such file (only safetensors are read{there})")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    for name, tensor in found.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{path}: tensor {name!r} has type {tensor.dtype}, expected a float of 16 or 32 bits")
    return found


def _plain_names(path: Path, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under PEFT's own names, without what other trainers write into them.

    `base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.default.weight` and its like: the names of
    wrappers, and the adapter's name between `lora_A` and `weight`.
    """
    plain: dict[str, Tensor] = {}
    adapters: set[str] = set()
    for name, tensor in found.items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        if len(parts) > 2 and parts[-3] in ("lora_A", "lora_B") and parts[-1] == "weight":
            adapters.add(parts.pop(-2))
        key = _PREFIX + ".".join(parts).removeprefix(_PREFIX)
        if key in plain:
            raise UserError(f"{path}: tensor {name!r} is there twice, under another spelling of its name")
        plain[key] = tensor
    if len(adapters) > 1:
        raise UserError(f"{path}: holds several adapters: {', '.join(sorted(adapters))}; save one alone")
    return plain


def _check_digests(adapter_dir: Path, tensors: dict[str, Tensor]) -> None:
    """An adapter that this package wrote records a digest per tensor."""
    path = adapter_dir / DIGESTS_NAME
    for name, digest in (read_json(path)["tensors"] if path.exists() else {}).items():
        if name in tensors and digest_tensor(tensors[name]) != digest:
            raise UserError(f"{adapter_dir / WEIGHTS_NAME}: tensor {name!r} does not match its digest: a damaged file")


def _take_parts(
    path: Path, weight: Weight, shape: ModelShape, found: dict[str, Tensor], settings: PeftSettings
) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r, k] and B [n, r] in fp32 of each HF linear inside one fused one; they are taken out of `found`."""
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for name in weight.hf:
        module = name.removesuffix(".weight")
        names = [f"{_PREFIX}{module}.lora_{half}.weight" for half in "AB"]
        pair = [found.pop(key, None) for key in names]
        if pair[0] is None and pair[1] is None:
            if settings.target_modules is not None and settings.covers(module) and not settings.starts_at_nothing:
                raise UserError(f"{path}: tensor {names[0]!r} is missing, and would start at random values")
            continue
        if not settings.covers(module):
            raise UserError(f"{path}: tensor {names[0]!r} is there, but {CONFIG_NAME} puts no adapter on {module}")
        rank, (rows, columns) = settings.rank_of(module), hf_shape(name, shape)
        halves: list[Tensor] = []
        for key, tensor, wanted in zip(names, pair, ((rank, columns), (rows, rank)), strict=True):
            if tensor is None or tuple(tensor.shape) != wanted:
                has = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
                raise UserError(f"{path}: tensor {key!r} {has}, expected {list(wanted)}")
            halves.append(tensor.float())
        parts[name] = (halves[0], halves[1])
    return parts


def _fuse(
    weight: Weight, shape: ModelShape, parts: dict[str, tuple[Tensor, Tensor]], settings: PeftSettings, scale: float
) -> tuple[Tensor, Tensor]:
    """A and B of one fused linear, for an adapter that is scaled by `scale`."""
    scaled = {}
    for name, (a, b) in parts.items():
        own = settings.scale_of(name.removesuffix(".weight"))
        scaled[name] = (a, b if own == scale else b * (own / scale))
    every_a = [a for a, _ in scaled.values()]
    if weight.axis == 1:
        return next(iter(scaled.values()))
    shared = all(torch.equal(a, every_a[0]) for a in every_a)
    stacked = every_a[0] if shared else torch.cat(every_a)
    ranks = [0, *(a.shape[0] for a in every_a[:-1])]
    column = {name: 0 if shared else sum(ranks[: number + 1]) for number, name in enumerate(scaled)}
    size = sum(hf_shape(name, shape)[0] for name in weight.hf)
    fused = torch.zeros(size, stacked.shape[0])
    at = 0
    for piece in local_pieces(weight, shape, local_size=size, tp_rank=0, tp_size=1):
        if piece.hf in scaled:
            b = scaled[piece.hf][1]
            fused[at : at + len(piece), column[piece.hf] : column[piece.hf] + b.shape[1]] = b[piece.start : piece.stop]
        at += len(piece)
    return stacked, fused


@torch.no_grad()
def load_adapter(model_chunks: list[nn.Module], adapter: Adapter, *, tp_rank: int, tp_size: int) -> None:
    """Fill the adapters of this rank's chunks; call it after `models.adapters.add_adapters(adapter.config)`.

    Linears that the adapter does not cover in a layer get zeros, so they change nothing.

    Raises:
        ValueError: the chunks' adapters have another rank than `adapter.config`.
    """
    for chunk in map(unwrap, model_chunks):
        padding = chunk.config.ffn_hidden_size - chunk.shape.ffn_hidden_size
        for name, parameter in global_parameters(chunk):
            linear, _, half = name.rpartition(".")
            if half not in ("lora_a", "lora_b"):
                continue
            whole = adapter.tensors.get(name)
            if whole is None:
                parameter.zero_()
                continue
            linear = linear.rpartition(".")[2]
            local = _local(whole, linear, half, ffn_padding=padding, tp_rank=tp_rank, tp_size=tp_size)
            if local.shape != parameter.shape:
                raise ValueError(f"{name}: {list(local.shape)} does not fit {list(parameter.shape)}")
            parameter.copy_(local)


def _local(whole: Tensor, linear: str, half: str, *, ffn_padding: int, tp_rank: int, tp_size: int) -> Tensor:
    """One TP rank's slice: B of a column-parallel linear by rows, A of a row-parallel one by columns."""
    _, split = LINEARS[linear]
    if split == "column" and half == "lora_b":
        blocks = [whole]
        if linear == "linear_fc1":  # gate and up are padded and split each on its own
            blocks = [F.pad(block, (0, 0, 0, ffn_padding)) for block in whole.chunk(2)]
        return torch.cat([block.chunk(tp_size)[tp_rank] for block in blocks])
    if split == "row" and half == "lora_a":
        if linear == "linear_fc2":
            whole = F.pad(whole, (0, ffn_padding))
        return whole.chunk(tp_size, dim=1)[tp_rank]
    return whole
