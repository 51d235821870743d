"""Gradients as data parallelism left them, whole: for checks, not for training."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn


@torch.no_grad()
def reduced_gradients(chunks: Iterable[DistributedDataParallel]) -> dict[nn.Parameter, Tensor]:
    """Every trainable parameter's gradient between the backward pass and the update. Collective.

    With the distributed optimizer a rank holds the sum of its own part of a bucket only; the parts are gathered.

    Args:
        chunks: this rank's, in Megatron-Core's data parallelism.

    Returns:
        copies in fp32, of the parameters' shapes: this rank's slices where tensor parallelism cuts them.
    """
    found: dict[nn.Parameter, Tensor] = {}
    for chunk in chunks:
        for buffer in chunk.buffers:
            size = buffer.data_parallel_group.size() if chunk.ddp_config.use_distributed_optimizer else 1
            whole = {}
            for bucket in buffer.buckets:
                data = bucket.grad_data.clone()
                if size > 1:
                    part = bucket.grad_data.chunk(size)[buffer.data_parallel_group.rank()].clone()
                    dist.all_gather_into_tensor(data, part, group=buffer.data_parallel_group)
                whole[bucket.bucket_id] = (bucket.offset, data)
            for parameter, (start, end, bucket_id) in buffer.param_index_map.items():
                offset, data = whole[bucket_id]
                found[parameter] = data[start - offset : end - offset].view(parameter.shape).float()
    return found
