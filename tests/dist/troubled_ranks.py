"""One rank of a training in which one rank is in trouble: `python -m tests.dist.troubled_ranks RECIPE RANK TROUBLE`.

TROUBLE: `slow` sleeps in every forward pass, `hang` never returns from one in the third step.
"""

import os
import sys
import time
from pathlib import Path

from megatron_medllm.config.run import load
from megatron_medllm.train import cpt_step
from megatron_medllm.train.loop import train

SLEEP_S = 0.1
FORWARDS_BEFORE_THE_HANG = 8


def main(recipe: Path, troubled: int, trouble: str) -> int:
    forward, calls = cpt_step.CptStep.forward, 0

    def slow_forward(self, iterator, chunk):
        nonlocal calls
        calls += 1
        if trouble == "slow":
            time.sleep(SLEEP_S)
        elif calls > FORWARDS_BEFORE_THE_HANG:
            time.sleep(3600)
        return forward(self, iterator, chunk)

    if int(os.environ["RANK"]) == troubled:
        cpt_step.CptStep.forward = slow_forward
    return train(load(recipe, []))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
