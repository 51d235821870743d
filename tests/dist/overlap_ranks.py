"""In every rank: train one run after another, some without the gather that a save needs. `... overlap_ranks JOBS`"""

import json
import sys
from pathlib import Path
from typing import Any

from megatron_medllm.checkpoint import hf_writer
from megatron_medllm.config.run import RunConfig
from megatron_medllm.parallel import mcore
from megatron_medllm.parallel.overlap import gather_parameters
from megatron_medllm.train import loop
from megatron_medllm.train.scoring import score
from tests.worlds.ranks import next_rendezvous


def leave_stale(_: Any) -> None:
    """What a trainer without `gather_parameters` does before it reads parameters."""


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        for reader in (mcore, hf_writer, loop):
            reader.gather_parameters = leave_stale if job.get("stale") else gather_parameters
        run = RunConfig.model_validate(job["settings"])
        next_rendezvous()
        if job.get("score"):
            score(run)
        else:
            assert loop.train(run) == 0, job["name"]


if __name__ == "__main__":
    main()
