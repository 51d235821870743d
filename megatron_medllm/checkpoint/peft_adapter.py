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

from megatron_medllm.checkpoint.adapter_merge import AdapterReader
from megatron_medllm.checkpoint.description import CARRIED_DIR, stored_adapter
from megatron_medllm.checkpoint.hf_target import partial_dir, refuse_existing
from megatron_medllm.checkpoint.names import Weight, hf_shape, local_pieces, model_weights
from megatron_medllm.checkpoint.torch_dist import TorchDistReader
from megatron_medllm.config.model import ModelShape, shape_from_hf_config
from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.errors import UserError
from megatron_medllm.models.adapters import LINEARS
from megatron_medllm.models.qwen25 import global_parameters, unwrap
from megatron_medllm.storage import read_json, write_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# A PEFT setting -> the values under which its adapter is plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
}


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


def export_peft(ckpt_dir: Path, adapter_dir: Path, *, base_model: str, dtype: torch.dtype = torch.float32) -> None:
    """Write the adapter of a training checkpoint as PEFT loads it.

    Args:
        ckpt_dir: a checkpoint that holds an adapter.
        adapter_dir: takes its name only when whole; must not exist.
        base_model: directory or hub name that PEFT will look for the base under.
        dtype: of the tensors written.

    Raises:
        UserError: the checkpoint holds no adapter, or the result exists.
    """
    refuse_existing(adapter_dir)
    config = stored_adapter(ckpt_dir)
    if config is None:
        raise UserError(f"{ckpt_dir}: holds no adapter (a whole model is exported to a Hugging Face directory)")
    shape = shape_from_hf_config(ckpt_dir / CARRIED_DIR)
    stored = AdapterReader(TorchDistReader(ckpt_dir), config.targets)
    tensors: dict[str, Tensor] = {}
    for weight, _ in adapted_weights(shape):
        halves = stored.halves(weight)
        if halves is not None:
            tensors |= _split(weight, shape, *halves)
    partial = partial_dir(adapter_dir)
    partial.mkdir(parents=True, exist_ok=True)
    save_file({name: t.to(dtype).contiguous() for name, t in tensors.items()}, partial / WEIGHTS_NAME)
    write_json(partial / CONFIG_NAME, _peft_config(config, tensors, base_model))
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


def _peft_config(config: AdapterConfig, tensors: dict[str, Tensor], base_model: str) -> dict[str, Any]:
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

    Args:
        adapter_dir: adapter_config.json and adapter_model.safetensors.
        shape: of the base model, unpadded.

    Raises:
        UserError: not plain LoRA on the base's attention and MLP linears, or tensors missing, extra or mis-shaped.
    """
    settings = read_json(adapter_dir / CONFIG_NAME)
    for key, plain in _PLAIN.items():
        if settings.get(key, plain[0]) not in plain:
            raise UserError(f"{adapter_dir / CONFIG_NAME}: {key}={settings[key]!r} is not supported")
    rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    scale = alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank
    path = adapter_dir / WEIGHTS_NAME
    try:
        found = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (only safetensors are read)") from None
    except SafetensorError as error:
        raise UserError(f"{path}: {error}") from None
    fused = {
        weight.mcore.removesuffix("weight"): halves
        for weight, _ in adapted_weights(shape)
        if (halves := _fuse(path, weight, shape, found, rank)) is not None
    }
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
        dropout=float(settings.get("lora_dropout", 0.0)),
        targets=tuple(name for name in names if name in used),
    )
    return Adapter(config, tensors)


def _fuse(
    path: Path, weight: Weight, shape: ModelShape, found: dict[str, Tensor], rank: int
) -> tuple[Tensor, Tensor] | None:
    """A and B of one fused linear out of PEFT's tensors, which are taken out of `found`."""
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for name in weight.hf:
        stem = _PREFIX + name.removesuffix("weight")
        pair = [found.pop(f"{stem}lora_{half}.weight", None) for half in "AB"]
        if pair[0] is None and pair[1] is None:
            continue
        rows, columns = hf_shape(name, shape)
        for half, tensor, wanted in zip("AB", pair, ((rank, columns), (rows, rank)), strict=True):
            if tensor is None or tuple(tensor.shape) != wanted:
                has = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
                raise UserError(f"{path}: tensor '{stem}lora_{half}.weight' {has}, expected {list(wanted)}")
        parts[name] = (pair[0].float(), pair[1].float())  # type: ignore[union-attr]
    if not parts:
        return None
    every_a = [a for a, _ in parts.values()]
    shared = all(torch.equal(a, every_a[0]) for a in every_a)
    stacked = every_a[0] if shared else torch.cat(every_a)
    column = {name: 0 if shared else number * rank for number, name in enumerate(parts)}
    size = sum(hf_shape(name, shape)[0] for name in weight.hf)
    fused = torch.zeros(size, stacked.shape[0])
    at = 0
    pieces = local_pieces(weight, shape, local_size=size, tp_rank=0, tp_size=1) if weight.axis == 0 else []
    for piece in pieces:
        if piece.hf in parts:
            fused[at : at + len(piece), column[piece.hf] : column[piece.hf] + rank] = parts[piece.hf][1][
                piece.start : piece.stop
            ]
        at += len(piece)
    return stacked, fused if weight.axis == 0 else next(iter(parts.values()))[1]


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
