"""`medllm report`: what a pipeline run left behind, as summary.json for machines and report.html for people."""

from megatron_medllm.evaluation.run_report.build import build_report, table

__all__ = ["build_report", "table"]
