"""plan-STAGE.html: what a training needs per GPU and what it will reach."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_medllm.pages.page import write_page

_GIB = 2**30


def write_plan_page(path: Path, stage: str, values: Mapping[str, Any]) -> None:
    """Write the page of a plan, given as `planner.report.plan_values` returns it."""
    memory = values["memory_bytes"]
    fullest = max(memory, key=lambda number: sum(memory[number].values()))
    layout = {name: value for name, value in values["layout"].items() if value not in (None, False)}
    write_page(
        path,
        "megatron_medllm.pages",
        "plan.html.jinja",
        stage=stage,
        values=values,
        fullest=fullest,
        memory=[(name, size / _GIB) for name, size in memory[fullest].items()],
        total_gib=sum(memory[fullest].values()) / _GIB,
        limit_gib=values["memory_limit_bytes"] / _GIB,
        step_parts=[(name, seconds) for name, seconds in values["step_parts_s"].items() if seconds],
        layout=[(name.replace("_", " "), str(value)) for name, value in layout.items()],
    )
