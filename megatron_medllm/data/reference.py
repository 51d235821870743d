"""Reference log-probabilities: computed once, stored beside what they depend on, refused when stale."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from megatron_medllm.data.pairs import PairSet
from megatron_medllm.errors import UserError
from megatron_medllm.storage import atomic_write, digest_value, read_json, write_json

KEY_NAME = "key.json"
_COLUMNS = ("row", "chosen_logprob", "rejected_logprob", "chosen_tokens", "rejected_tokens")


@dataclass(frozen=True)
class ReferenceKey:
    """What reference log-probabilities depend on. Layout and packing are not among them."""

    weights: str  # digest of the model's tensors
    pairs: str  # digest of the tokenized pairs and their masks
    template: str
    tokenizer: str  # digest of tokenizer.json
    dtype: str
    base: str  # how the weights are held: "dense", or the quantized format under an adapter
    adapter: str = "none"  # digest of the adapter that training starts from; keys of old caches lack it

    def differences(self, stored: dict[str, str]) -> list[str]:
        """Names of the parts in which a stored key differs; all of them where it lacks them."""
        stored = {"adapter": "none"} | stored
        return [name for name, value in asdict(self).items() if stored.get(name) != value]


def digest_pairs(pair_set: PairSet) -> str:
    """Digest of every pair's tokens and masks."""
    return digest_value(
        [
            [
                pair.row,
                pair.prompt.tolist(),
                pair.chosen.ids.tolist(),
                pair.chosen.preferred.tolist(),
                pair.rejected.ids.tolist(),
                pair.rejected.preferred.tolist(),
            ]
            for pair in pair_set.pairs
        ]
    )


class ReferenceCache:
    """A folder of Parquet parts and the key that they were computed under."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def open_for_writing(self, key: ReferenceKey) -> set[int]:
        """Prepare to write under `key`; parts of an interrupted run under the same key are kept.

        Returns:
            rows that are already there.
        """
        key_path = self.directory / KEY_NAME
        if key_path.is_file() and key.differences(read_json(key_path)):
            for part in self.directory.glob("part-*.parquet"):
                part.unlink()
        write_json(key_path, asdict(key))
        return {row for part in self._parts() for row in part["row"].tolist()}

    def write_part(self, number: int, columns: dict[str, np.ndarray]) -> None:
        """Write part `number` atomically."""
        table = pa.table({name: columns[name] for name in _COLUMNS})
        with atomic_write(self.directory / f"part-{number:05d}.parquet") as stream:
            parquet.write_table(table, stream)

    def load(self, key: ReferenceKey, rows: list[int]) -> dict[int, tuple[float, float]]:
        """Log-probabilities (chosen, rejected) of `rows`.

        Raises:
            UserError: there is no cache, it was computed under another key (says what differs), or rows are missing.
        """
        if not (self.directory / KEY_NAME).is_file():
            raise UserError(f"{self.directory}: no reference log-probabilities; run `medllm score` first")
        different = key.differences(read_json(self.directory / KEY_NAME))
        if different:
            raise UserError(
                f"{self.directory}: stale reference log-probabilities, computed with other {', '.join(different)}; "
                "run `medllm score` again"
            )
        found: dict[int, tuple[float, float]] = {}
        for part in self._parts():
            logprobs = zip(part["chosen_logprob"].tolist(), part["rejected_logprob"].tolist(), strict=True)
            found |= dict(zip(part["row"].tolist(), logprobs, strict=True))
        missing = [row for row in rows if row not in found]
        if missing:
            raise UserError(
                f"{self.directory}: {len(missing)} of {len(rows)} pairs have no reference log-probabilities "
                f"(first: row {missing[0]}); run `medllm score` again"
            )
        return {row: found[row] for row in rows}

    def _parts(self) -> list[dict[str, Any]]:
        paths = sorted(self.directory.glob("part-*.parquet"))
        return [
            {
                name: column.to_numpy()
                for name, column in zip(_COLUMNS, parquet.read_table(p).select(_COLUMNS).columns, strict=True)
            }
            for p in paths
        ]
