"""The commands that ask a model in shards, `medllm eval run` and `medllm pairs`: their options, and the order of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_medllm.cli.options import print_text
from megatron_medllm.errors import UserError

ShardOption = Annotated[
    str | None, typer.Option("--shard", metavar="I/N", help="answer part I of N into a log of its own, and stop there")
]
MergeOption = Annotated[
    bool, typer.Option("--merge", help="make the results of the shards' answers; refuse when some are missing")
]


@dataclass(frozen=True)
class Part:
    """What this call is asked to do: one shard (a `megatron_medllm.shard.Shard`), the merge, or all of it."""

    shard: Any
    merge: bool

    @classmethod
    def of(cls, shard: str | None, *, merge: bool) -> "Part":
        """What `--shard` and `--merge` say.

        Raises:
            UserError: both are given, or the shard is none.
        """
        from megatron_medllm.shard import Shard

        if shard is not None and merge:
            raise UserError("--shard and --merge: give one of them")
        return cls(None if shard is None else Shard.parse(shard), merge)

    def run(
        self,
        engine: Any,
        command: Sequence[str],
        output: Path,
        *,
        answer: Callable[[Any], Mapping[str, float]],
        make: Callable[[bool], dict[str, Any]],
    ) -> dict[str, Any] | None:
        """Do it, so that a kill or `USR1` loses no answer.

        Args:
            engine: the section `engine`; with several replicas all shards run at once, as processes of this machine.
            command: what follows `medllm` to run this command again.
            output: its folder.
            answer: answers one shard; returns what it took.
            make: makes the results, given whether it has to do without asking (`merge`).

        Returns:
            The results; None after a shard, of which a line is printed.
        """
        from megatron_medllm.inference.interruption import resumable
        from megatron_medllm.inference.replicas import run_replicas

        with resumable():
            if self.shard is not None:
                print_text(_shard_line(self.shard, answer(self.shard)))
                return None
            if engine.replicas > 1 and not self.merge:
                run_replicas(engine, command, output)
            return make(self.merge)


def _shard_line(shard: Any, timing: Mapping[str, float]) -> str:
    answered, kept = (int(timing.get(name, 0)) for name in ("answered", "taken_from_log"))
    return f"shard {shard}: {answered} requests answered, {kept} had been before"
