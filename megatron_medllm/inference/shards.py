"""How requests are divided among replicas: in units that are the same for any number of replicas.

A unit is decoded together and belongs to one shard whole, so that neither a text nor its rounding depends on how many
replicas there are, nor on what an earlier start had finished.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from megatron_medllm.inference.protocol import Request
from megatron_medllm.shard import Shard


def shard_files(whole: Path) -> dict[Path, Shard]:
    """The shards' files that lie beside `whole`, in the order of their shards."""
    form = re.compile(rf"{re.escape(whole.stem)}\.(\d+)-of-(\d+){re.escape(whole.suffix)}")
    names = [path.name for path in whole.parent.iterdir()] if whole.parent.is_dir() else []
    found = [Shard(int(match[1]), int(match[2])) for match in map(form.fullmatch, names) if match is not None]
    return {shard.file(whole): shard for shard in sorted(found, key=lambda shard: (shard.count, shard.index))}


def request_units(requests: Sequence[Request], size: int) -> list[list[Request]]:
    """Requests of like length, `size` in a unit (the last of each answer length may be smaller).

    Samples of one prompt stay together, so that their prompt is read once. Neighbouring units take about the same time:
    dealt out in turn, they make shards of like weight.
    """
    ordered = sorted(requests, key=_weight)  # stable: equal prompts keep their order
    units: list[list[Request]] = []
    for _, group in groupby(ordered, key=lambda request: request.max_new_tokens):
        alike = list(group)
        units += [alike[start : start + size] for start in range(0, len(alike), size)]
    return units


def _weight(request: Request) -> tuple[int, int, str]:
    asked = request.prompt or "".join(message["content"] for message in request.messages)
    return request.max_new_tokens, len(asked), asked
