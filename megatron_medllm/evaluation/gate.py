"""Requirements such as `gap >= -0.02`, so that a job chain can stop on a model that is not good enough."""

import operator
import re
from collections.abc import Sequence
from typing import Any

from megatron_medllm.errors import UserError

_EXPRESSION = re.compile(r"\s*([a-z_.]+)\s*(>=|<=|>|<)\s*([-+]?\d*\.?\d+)\s*$")
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_MODE_METRICS = ("accuracy", "points_rate", "malformed_rate")
_GAP_METRICS = ("gap", "gap.low", "gap.high", "gap.mcnemar_p")


def metric_names(modes: Sequence[str]) -> list[str]:
    """What a requirement may name, given the modes that are run."""
    names = [*_MODE_METRICS, *(f"{mode}.{metric}" for mode in modes for metric in _MODE_METRICS)]
    return names + (list(_GAP_METRICS) if {"answer_only", "explained"} <= set(modes) else [])


def parse_requirement(expression: str, *, modes: Sequence[str]) -> tuple[str, str, float]:
    """Metric, comparison and bound.

    Raises:
        UserError: not `METRIC >= NUMBER`, or the metric does not exist for these modes.
    """
    found = _EXPRESSION.match(expression)
    if found is None:
        raise UserError(f"requirement {expression!r}: expected METRIC >= NUMBER (or <=, >, <)")
    name, comparison, bound = found.groups()
    if name not in metric_names(modes):
        raise UserError(f"requirement {expression!r}: unknown metric {name!r}; known: {', '.join(metric_names(modes))}")
    return name, comparison, float(bound)


def summary_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """Flat metrics of a summary. A bare `accuracy` or `points_rate` is the worse of the modes, `malformed_rate` too."""
    modes = summary["modes"]
    metrics = {f"{mode}.{metric}": row[metric] for mode, row in modes.items() for metric in _MODE_METRICS}
    for metric in _MODE_METRICS:
        worst = max if metric == "malformed_rate" else min
        metrics[metric] = worst(row[metric] for row in modes.values())
    if "gap" in summary:
        gap = summary["gap"]
        metrics |= {
            "gap": gap["accuracy"]["estimate"],
            "gap.low": gap["accuracy"]["low"],
            "gap.high": gap["accuracy"]["high"],
            "gap.mcnemar_p": gap["mcnemar_p"],
        }
    return metrics


def check_requirements(expressions: Sequence[str], summary: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a requirement: expression, value, met.

    Raises:
        UserError: as `parse_requirement`.
    """
    metrics = summary_metrics(summary)
    rows = []
    for expression in expressions:
        name, comparison, bound = parse_requirement(expression, modes=list(summary["modes"]))
        value = metrics[name]
        # Rates are ratios of small integers: 0.85 may come out as 0.8499999999999999.
        met = _COMPARE[comparison](round(value, 12), bound)
        rows.append({"expression": expression, "value": value, "met": met})
    return rows
