"""In every rank: the digest of a model directory, and which of its files this rank read. `... digest_ranks MODEL OUT`"""

import json
import sys
from pathlib import Path

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.errors import UserError
from megatron_medllm.parallel import runtime
from megatron_medllm.train import reference


def main() -> None:
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    read: list[str] = []
    digest_file = reference.digest_file

    def counted(path: Path) -> str:
        read.append(path.name)
        return digest_file(path)

    reference.digest_file = counted
    ranks = runtime.start(LayoutConfig(dp=2), seed=0, timeout_s=60)
    digest = reference.digest_weights(model)
    (model / "config.json").unlink(missing_ok=True)
    runtime.dist.barrier()
    problem = ""
    try:
        reference.digest_weights(model)
    except UserError as error:
        problem = str(error)
    (out / f"{ranks.rank}.json").write_text(json.dumps({"digest": digest, "read": read[:], "problem": problem}))
    runtime.stop()


if __name__ == "__main__":
    main()
