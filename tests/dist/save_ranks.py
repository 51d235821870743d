"""One rank of the tests of saving. `python -m tests.dist.save_ranks CASE DIRECTORY`"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_medllm.checkpoint import state_writer
from megatron_medllm.checkpoint.state_writer import SaveError, StateWriter
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig, ModelShape
from megatron_medllm.config.train import OptimizerConfig
from megatron_medllm.parallel import mcore, runtime
from megatron_medllm.parallel.foreach import leaves
from megatron_medllm.planner.host_memory import saved_share_bytes
from megatron_medllm.planner.workload import Workload
from tests.worlds.ranks import next_rendezvous
from tests.worlds.shapes import ODD_SHAPE

# Odd widths: a data-parallel rank's range of a parameter starts and ends inside a row.
SHAPE = ModelShape.model_validate(ODD_SHAPE | {"tie_embeddings": True})


def built(layout: LayoutConfig, *, dtype: str = "bfloat16", timeout_s: float = 60) -> tuple[Any, list[Any], Any]:
    """A model and its optimizer after a step with made-up gradients."""
    from megatron_medllm.models.initialize import initialize_weights
    from megatron_medllm.models.gpt import build_model, unwrap

    ranks = runtime.start(layout, seed=7, timeout_s=timeout_s)
    chunks = build_model(ModelConfig(shape=SHAPE, dtype=dtype), layout, device=ranks.device)
    initialize_weights(chunks, seed=1, tp_rank=ranks.tp_rank, tp_size=layout.tp)
    config = unwrap(chunks[0]).config
    chunks = mcore.wrap_ddp(chunks, config, layout)
    optimizer = mcore.build_optimizer(chunks, config, OptimizerConfig(lr=0.01), layout)
    for chunk in chunks:
        chunk.zero_grad_buffer()
        for parameter in chunk.parameters():
            # The same where several ranks hold the same parameter, as norms and tied embeddings; else by place.
            parameter.main_grad.copy_(torch.arange(parameter.numel()).sin().view_as(parameter))
        chunk.start_grad_sync()
        chunk.finish_grad_sync()
    mcore.clip_and_step(optimizer, norm=mcore.gradient_norm(optimizer), clip_grad=1.0)
    return ranks, chunks, optimizer


def own_tensors(optimizer: Any) -> list[Tensor]:
    """This rank's fp32 weights and moments."""
    found = []
    for leaf in leaves(optimizer):
        for group in leaf.optimizer.param_groups:
            for shard in group["params"]:
                state = leaf.optimizer.state[shard]
                found += [shard, state["exp_avg"], state["exp_avg_sq"]]
    return found


def save(chunks: list[Any], optimizer: Any, directory: Path, *, wait: bool = True) -> StateWriter:
    """Save into a directory that all ranks find."""
    directory.mkdir(exist_ok=True)
    dist.barrier()
    writer = StateWriter()
    writer.start(mcore.sharded_state(chunks, optimizer, is_loading=False), directory, wait=wait)
    return writer


def round_trip(directory: Path, layouts: dict[str, Any]) -> None:
    """What is saved comes back, in background saves as it was when they were started; no rank writes another's."""
    for name, layout in layouts.items():
        next_rendezvous()
        ranks, chunks, optimizer = built(LayoutConfig(**layout))
        before = [tensor.detach().clone() for tensor in own_tensors(optimizer)]
        pieces = mcore.local_state(mcore.sharded_state(chunks, optimizer, is_loading=False)).pieces
        state_bytes = sum(p.data.nbytes for p in pieces if p.key.startswith("optimizer.state"))
        if ranks.tp_rank == ranks.pp_rank == 0:  # the fullest: the planner's line is what a copy of its share takes
            workload = Workload(shape=SHAPE, layout=LayoutConfig(**layout), overlap_grad_reduce=False)
            planned = saved_share_bytes(workload, stage=0)[ranks.dp_rank]
            share = sum(p.data.nbytes for p in pieces if isinstance(p.data, Tensor))
            assert abs(share - planned) < 0.01 * planned, (share, planned)
        writer = save(chunks, optimizer, directory / name, wait=False)
        with torch.no_grad():
            for tensor in own_tensors(optimizer):
                tensor.fill_(0.5)
        writer.finished(block=True)
        mcore.restore(
            chunks,
            optimizer,
            mcore.load_sharded(mcore.sharded_state(chunks, optimizer, is_loading=True), directory / name),
        )
        assert all(torch.equal(a, b) for a, b in zip(before, own_tensors(optimizer), strict=True))
        owned = sum(tensor.nbytes for tensor in before)
        if not layout.get("distributed_optimizer", True):
            assert state_bytes < 0.7 * owned  # two ranks have the same, each writes about half
        elif ranks.tp_rank == ranks.pp_rank == 0:
            assert state_bytes == owned
        else:  # what several ranks hold alike, as norms and tied embeddings, the first writes
            assert state_bytes < owned
        runtime.stop()


def failures(directory: Path) -> None:
    """A rank whose disk is full, and a main process that cannot write the index: all ranks hear of it, at once."""
    found = []
    for wait in (True, False):
        next_rendezvous()
        ranks, chunks, optimizer = built(LayoutConfig(dp=2))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if ranks.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # a write beyond fails, as on a full disk
        # A rank left waiting in a collective would fail with the group's timeout, which is no SaveError.
        found.append(failure(chunks, optimizer, directory / f"full-{wait}", wait=wait))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        blocked = directory / f"blocked-{wait}"
        (blocked / ".metadata").mkdir(parents=True, exist_ok=True)
        found.append(failure(chunks, optimizer, blocked, wait=wait))
        save(chunks, optimizer, directory / f"after-{wait}", wait=wait).finished(block=True)
        runtime.stop()
    (directory / f"failures-{ranks.rank}.json").write_text(json.dumps(found))


def failure(chunks: list[Any], optimizer: Any, directory: Path, *, wait: bool) -> str:
    """What a save that must fail says."""
    try:
        save(chunks, optimizer, directory, wait=wait).finished(block=True)
    except SaveError as error:
        return str(error)
    raise AssertionError("the save succeeded")


def slow_disk(directory: Path) -> None:
    """One rank writes for longer than the groups' timeout, which every group has."""
    timeout_s = 3.0
    next_rendezvous()
    ranks, chunks, optimizer = built(LayoutConfig(dp=2), timeout_s=timeout_s)
    groups = list(dist.distributed_c10d._world.pg_map)
    timeouts = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
    assert len(groups) > 5 and timeouts == {timeout_s}, timeouts
    write = state_writer.write_pieces

    def slowly(*arguments: Any, **settings: Any) -> Any:
        time.sleep(2.5 * timeout_s if ranks.rank == 1 else 0)
        return write(*arguments, **settings)

    state_writer.write_pieces = slowly
    save(chunks, optimizer, directory / "slow")
    runtime.stop()


def digests(directory: Path) -> None:
    """Leave what the main process knows of the files."""
    next_rendezvous()
    ranks, chunks, optimizer = built(LayoutConfig(dp=2))
    writer = save(chunks, optimizer, directory / "whole")
    if ranks.is_main:
        (directory / "digests.json").write_text(json.dumps(writer.digests))
    runtime.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    case, place = sys.argv[1], Path(sys.argv[2])
    if case == "round_trip":
        round_trip(place, json.loads(sys.argv[3]))
    else:
        {"failures": failures, "slow_disk": slow_disk, "digests": digests}[case](place)
