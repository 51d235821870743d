"""One rank of the RPO layout tests: does the jobs of a file, one runtime after the other."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_medllm.config.run import RunConfig
from tests.worlds.first_step import first_step
from tests.worlds.ranks import next_rendezvous


def main() -> None:
    from megatron_medllm.train.loop import train
    from megatron_medllm.train.scoring import score

    for job in json.loads(Path(sys.argv[1]).read_text()):
        next_rendezvous()
        run = RunConfig.model_validate(job["settings"])
        if job["do"] == "score":
            score(run)
        elif job["do"] == "train":
            train(run)
        else:
            found = first_step(run)
            torch.save(found, f"{job['out']}.{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
