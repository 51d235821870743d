"""What a training run needs and how fast it goes, before a GPU is asked for. Standard library and config only."""

from megatron_medllm.planner.hardware import Hardware, known_hardware, load_hardware
from megatron_medllm.planner.plan import Plan, plan, require_fit
from megatron_medllm.planner.report import plan_report, plan_values, search_report
from megatron_medllm.planner.search import search
from megatron_medllm.planner.workload import Workload

__all__ = [
    "Hardware",
    "Plan",
    "Workload",
    "known_hardware",
    "load_hardware",
    "plan",
    "plan_report",
    "plan_values",
    "require_fit",
    "search",
    "search_report",
]
