"""In every rank: train one recipe after another. `python -m tests.dist.train_ranks RECIPE...`"""

import sys
from pathlib import Path

from megatron_medllm.config.run import load
from megatron_medllm.train.loop import train
from tests.worlds.ranks import next_rendezvous

if __name__ == "__main__":
    for recipe in sys.argv[1:]:
        next_rendezvous()
        status = train(load(Path(recipe), []))
        assert status == 0, f"{recipe}: exit status {status}"
