"""The ledger: which documents or pairs each step consumed, one JSON line a step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from megatron_medllm.storage import atomic_write, read_jsonl


class Ledger:
    """Append-only record beside the checkpoints. One process writes it; a resume cuts it back to its step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, consumed: list[Any], **more: Any) -> None:
        """Record what `step` used, in order; as step 0 what no step will use (`held_out`)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as stream:
            stream.write(orjson.dumps({"step": step, "consumed": consumed, **more}) + b"\n")

    def cut(self, step: int) -> None:
        """Forget what was recorded after `step` (work that a resume repeats), and a last line cut by a crash."""
        if not self.path.is_file():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        with atomic_write(self.path) as stream:
            stream.writelines(line for line in whole if orjson.loads(line)["step"] <= step)

    def __iter__(self) -> Iterator[dict]:
        return read_jsonl(self.path)
