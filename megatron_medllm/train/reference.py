"""The reference of a preference run: which model it is, and the key that its cached log-probabilities stand under."""

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_medllm.checkpoint.peft_adapter import CONFIG_NAME, WEIGHTS_NAME
from megatron_medllm.config.hf_files import digested_files
from megatron_medllm.config.megatron_dirs import find_megatron
from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import AdapterConfig, RpoConfig
from megatron_medllm.data.pairs import PairSet
from megatron_medllm.data.reference import ReferenceKey, digest_pairs
from megatron_medllm.errors import UserError
from megatron_medllm.storage import digest_file, digest_value
from megatron_medllm.train.model import resolve_adapter


def quantized_base(config: RpoConfig) -> AdapterConfig | None:
    """The adapter whose base is not held in the model's own dtype, so that it is a reference of its own."""
    return config.adapter if config.adapter is not None and config.adapter.base != "bf16" else None


def reference_adapter(run: RunConfig, config: RpoConfig) -> AdapterConfig | None:
    """The adapter that the reference is built with: what the policy starts from must be the reference.

    A new adapter changes nothing (its B is zero), so a dense base does without; under a quantized base it stands for
    the format. An adapter that the run starts from (`adapter.path`) is part of the reference.

    Raises:
        UserError: `adapter.path` is no plain LoRA adapter of this model.
    """
    starts_from_one = config.adapter is not None and config.adapter.path is not None
    if starts_from_one or quantized_base(config) is not None:
        return resolve_adapter(config.adapter, run.model.resolve_shape())
    return None


def reference_key(run: RunConfig, config: RpoConfig, pair_set: PairSet) -> ReferenceKey:
    """What the reference log-probabilities of this run depend on. Collective: the ranks share the model's files out."""
    adapter, path = quantized_base(config), None if config.adapter is None else config.adapter.path
    return ReferenceKey(
        weights=digest_random_weights(run) if run.model.path is None else digest_weights(run.model.path),
        pairs=digest_pairs(pair_set),
        template=config.template,
        tokenizer=digest_file(run.tokenizer_file()),
        dtype=run.model.dtype,
        base=adapter.base if adapter is not None else f"{config.fp8_gemms} products" if config.fp8_gemms else "dense",
        adapter=digest_adapter(path) if path is not None else "none",
    )


def digest_weights(model_dir: Path) -> str:
    """Digest of the tensors and the shape in an HF directory or a Megatron checkpoint. Collective.

    Of a process group one rank reads each file.

    Raises:
        UserError: a file cannot be read; raised on every rank.
    """
    together = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    # The first rank says what there is: not every node need see a new file of a shared folder at the same time.
    names: list[Any] = [_weight_files(model_dir)]
    if together:
        dist.broadcast_object_list(names, src=0)
    mine: dict[str, str] = {}
    problem = None
    try:
        for name in names[0][rank::size]:
            mine[name] = digest_file(model_dir / name)
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
    parts: list[Any] = [(mine, problem)]
    if together:
        parts *= size
        dist.all_gather_object(parts, (mine, problem))
    problem = next((told for _, told in parts if told is not None), None)
    if problem is not None:
        raise UserError(problem)
    return digest_value({name: digest for part, _ in parts for name, digest in part.items()})


def _weight_files(model_dir: Path) -> list[str]:
    """What the model's weights and shape depend on, as paths from its directory."""
    place = find_megatron(model_dir)
    if place is None:
        return digested_files(model_dir)
    return [os.path.relpath(path, model_dir) for path in place.files()]


def digest_adapter(adapter_dir: Path) -> str:
    """Digest of a PEFT adapter: its tensors, and its settings, which hold their scale."""
    return digest_value({name: digest_file(adapter_dir / name) for name in (CONFIG_NAME, WEIGHTS_NAME)})


def digest_random_weights(run: RunConfig) -> str:
    """Digest of what random weights are drawn from."""
    return digest_value(["random", run.seed, run.model.init_std, run.model.resolve_shape().model_dump()])
