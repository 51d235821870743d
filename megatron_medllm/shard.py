"""A part of a stage's work, told as `I/N`: what `--shard` takes and what a task of a job array is."""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_medllm.errors import UserError


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` of `count`, counted from 1: every `count`-th unit of work."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`I/N`.

        Raises:
            UserError: the text is no such pair, or I is not one of 1 to N.
        """
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--shard {text}: expected I/N with I from 1 to N, such as 2/3")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of_unit(cls, number: int, count: int) -> "Shard":
        """Who works off unit `number` (from 0) when there are `count` shards."""
        return cls(number % count + 1, count)

    def owns(self, number: int) -> bool:
        """Whether it works off unit `number` (from 0)."""
        return self.of_unit(number, self.count) == self

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def file(self, whole: Path) -> Path:
        """This shard's own file beside the one of the whole: `answers.2-of-3.jsonl` beside `answers.jsonl`."""
        return whole.with_name(f"{whole.stem}.{self.index}-of-{self.count}{whole.suffix}")
