"""What the loop asks of an algorithm. CPT and RPO differ in their step objects alone."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Step(Protocol):
    """One training algorithm: which data a step consumes, what the model returns for it, and the loss."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    def unit(self) -> str:
        """What the batch counts: "rows" or "pairs"."""

    @property
    def end_token_id(self) -> int | None:
        """What ends a document in the training data, where they say so."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Sums that the loss functions return; "count" is the divisor."""

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Names of what `validate` reports; none where nothing is held out."""

    @property
    def held_out(self) -> Sequence[Any]:
        """What never trains, for the ledger; empty where the data keep it apart themselves."""

    @property
    def stream_length(self) -> int:
        """Tokens of a micro-batch's stream, as the pipeline schedule needs them."""

    def micro_batches(self, step: int) -> list[Any]:
        """This replica's micro-batches of step `step` (from 0); the same number on every replica."""

    def forward(self, iterator: Iterator[Any], chunk: nn.Module) -> tuple[Tensor, Any]:
        """Megatron's forward_step_func: run one micro-batch, return the output and its loss function."""

    def consumed(self, step: int) -> list[Any]:
        """What the global batch of `step` consists of, for the ledger."""

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Readable metrics from the sums over the global batch; "loss" is among them."""

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Warn about, or refuse to go on with, numbers that this algorithm must not show.

        Raises:
            UserError: the run has gone wrong.
        """

    def validate(self, chunks: list[nn.Module]) -> dict[str, float]:
        """Metrics on held-out data; empty where there are none."""
