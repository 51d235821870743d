"""Every rank of a recipe's layout, one after the other in this process. `python -m tests.dist.lone_ranks RECIPE OUT`"""

import sys
from pathlib import Path

import torch

from megatron_medllm.bench.rank import RankSettings, measure_rank
from megatron_medllm.config.run import load

if __name__ == "__main__":
    torch.set_num_threads(1)
    run = load(Path(sys.argv[1]), [])
    for index in range(run.layout.world_size):
        measure_rank(run, RankSettings(rank=index, output=Path(sys.argv[2]), steps=1, warmup_steps=1))
