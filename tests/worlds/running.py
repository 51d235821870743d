"""A running one-process Megatron model for tests, and its logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron_medllm.checkpoint.hf_reader import load_hf_weights
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig
from megatron_medllm.models.gpt import build_model, unwrap
from megatron_medllm.parallel import runtime
from megatron_medllm.parallel.packed import PackedSequences, Segment

IDS = torch.arange(60) * 5 % 307


@contextmanager
def running(
    hf_dir: Path, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Iterator[tuple[nn.Module, runtime.Runtime]]:
    """The model of an HF directory in a runtime of one process."""
    layout = LayoutConfig()
    here = runtime.start(layout, seed=1)
    try:
        model = ModelConfig(path=hf_dir, dtype=dtype)
        chunks = build_model(model, layout, device=here.device)
        load_hf_weights(chunks, hf_dir, model.resolve_shape(), tp_rank=0, tp_size=1)
        yield unwrap(chunks[0]), here
    finally:
        runtime.stop()


@torch.no_grad()
def megatron_logits(chunk: nn.Module) -> Tensor:
    """[t, v] float32 for `IDS`."""
    positions = torch.arange(len(IDS))
    packed = PackedSequences.from_segments((Segment(0, len(IDS)),), positions, backend="torch")
    return chunk.eval()(IDS[None], positions[None], None, packed_seq_params=packed)[0, :, :307]


@torch.no_grad()
def transformers_logits(hf_dir: Path) -> Tensor:
    """[t, v] float32 for `IDS`, computed in float32."""
    return AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)(IDS[None]).logits[0]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Largest difference relative to the largest expected value."""
    gap = (found - expected).abs().max() / expected.abs().max()
    assert gap <= tolerance, gap
