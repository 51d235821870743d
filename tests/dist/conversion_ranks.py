"""One rank of test_conversion: weights through every layout of four processes, all in one launch.

Arguments: a directory that holds `tied`, `untied` and `qwen3` HF directories and `tied_ckpt` and so on, imported.
"""

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megatron_medllm.checkpoint.convert import export_checkpoint
from megatron_medllm.checkpoint.hf_reader import load_hf_weights
from megatron_medllm.checkpoint.hf_writer import export_hf
from megatron_medllm.checkpoint.state_writer import StateWriter
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig
from megatron_medllm.errors import UserError
from megatron_medllm.models.gpt import build_model
from megatron_medllm.parallel import mcore, runtime
from megatron_medllm.parallel.packed import PackedSequences, Segment
from tests.worlds.ranks import next_rendezvous
from tests.worlds.model_dir import assert_same_tensors, read_tensors

CASES = (
    (LayoutConfig(tp=4), "untied"),  # more ranks than KV groups
    (LayoutConfig(tp=2, pp=2, sp=True), "tied"),
    (LayoutConfig(pp=2, vpp=2, dp=2), "tied"),
    (LayoutConfig(pp=4, first_stage_layers=1, last_stage_layers=3), "untied"),
    (LayoutConfig(tp=2, dp=2), "tied"),
    (LayoutConfig(tp=4), "qwen3"),
    (LayoutConfig(tp=2, pp=2, sp=True), "qwen3"),
)


def logits(chunk: nn.Module, ids: torch.Tensor, here: runtime.Runtime, vocab_size: int) -> torch.Tensor:
    positions = torch.arange(len(ids))
    packed = PackedSequences.from_segments((Segment(0, len(ids)),), positions, backend="torch")
    local = chunk(ids[None], positions[None], None, packed_seq_params=packed)[0].contiguous()
    parts = [torch.empty_like(local) for _ in range(here.layout.tp)]
    dist.all_gather(parts, local, group=here.tp_group)
    return torch.cat(parts, dim=1)[:, :vocab_size]


@torch.no_grad()
def check_layout(layout: LayoutConfig, work: Path, name: str) -> None:
    here = runtime.start(layout, seed=1, timeout_s=120)
    hf_dir, ckpt = work / name, work / f"{name}_ckpt"
    model = ModelConfig(path=hf_dir, dtype="float32")
    shape = model.resolve_shape()
    chunks = build_model(model, layout, device=here.device)
    expected = read_tensors(hf_dir)

    load_hf_weights(chunks, hf_dir, shape, tp_rank=here.tp_rank, tp_size=layout.tp)
    if layout.pp == 1:
        reference = torch.load(work / f"{name}.logits.pt")
        gap = (logits(chunks[0], torch.arange(40), here, shape.vocab_size) - reference).abs().max()
        assert gap <= 1e-4 * reference.abs().max(), gap
    export = {"runtime": here, "source_dir": hf_dir, "dtype": torch.float32, "shard_bytes": 100_000}
    export_hf(chunks, shape, work / "exported", **export)
    assert_same_tensors(read_tensors(work / "exported"), expected)
    try:
        export_hf(chunks, shape, work / "exported", **export)
    except UserError as error:
        assert "already exists" in str(error)
    else:
        raise AssertionError("overwrote a directory")

    saved = work / "saved"
    if here.is_main:
        saved.mkdir()
    dist.barrier()
    StateWriter().start(mcore.sharded_state(chunks, None, is_loading=False), saved, wait=True)
    dist.barrier()
    if here.is_main:
        export_checkpoint(saved, work / "from_saved", source_dir=hf_dir)
        assert_same_tensors(read_tensors(work / "from_saved"), expected)
    dist.barrier()

    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.fill_(7.0)
    mcore.restore(chunks, None, mcore.load_sharded(mcore.sharded_state(chunks, None, is_loading=True), ckpt))
    export_hf(chunks, shape, work / "again", **export)
    assert_same_tensors(read_tensors(work / "again"), expected)
    dist.barrier()
    if here.is_main:
        for directory in ("exported", "saved", "from_saved", "again"):
            shutil.rmtree(work / directory)
        assert not list(work.glob(".*partial"))
    dist.barrier()
    runtime.stop()


def main(work: Path) -> None:
    torch.set_num_threads(1)
    for layout, name in CASES:
        next_rendezvous()
        check_layout(layout, work, name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
