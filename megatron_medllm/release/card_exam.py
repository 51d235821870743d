"""The exam in a model card: the hub's `model-index`, and the tables."""

from typing import Any

from megatron_medllm.evaluation.markdown import MODE_NAMES, summary_markdown
from megatron_medllm.pages.markdown import markdown_table
from megatron_medllm.pages.numbers import difference, rate
from megatron_medllm.release.finished_run import FinishedRun
from megatron_medllm.storage import read_json


def model_index(name: str, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Accuracy in each mode, and the gap, as the hub's results."""
    metrics = [
        {"type": "accuracy", "name": f"accuracy, {MODE_NAMES[mode]}", "value": round(row["accuracy"], 4)}
        for mode, row in summary["modes"].items()
    ]
    if "gap" in summary:
        gap = round(summary["gap"]["accuracy"]["estimate"], 4)
        metrics.append({"type": "accuracy", "name": "gap, explained minus answer only", "value": gap})
    task = {"type": "text-generation", "name": "Multiple-choice exam"}
    dataset = {"type": summary["exam"], "name": summary["exam"]}
    return [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]


def exam_section(run: FinishedRun, summary: dict[str, Any]) -> list[str]:
    """The evaluation's own report, then the same figures of the models before."""
    shots = summary["config"]["prompt"]["shots"]
    _, _, *report = summary_markdown(summary).splitlines()  # without its title, which is a path
    lines = [f"## Exam: {summary['exam']}", ""]
    lines += [f"#{line}" if line.startswith("## ") else line for line in report]
    lines += ["", f"{shots} worked examples; temperature {summary['config']['decoding']['temperature']:g}.", ""]
    if summary.get("void_questions"):
        lines += [f"{len(summary['void_questions'])} questions have no right answer and were left out.", ""]
    rows = [_row(run, name) for name in ["base", *run.lineage()]]
    found = list({row[0]: row for row in rows if row is not None}.values())
    if len(found) > 1:
        header = ["model", "answer only", "explained", "gap", "malformed"]
        lines += ["### Before and after", "", *markdown_table(header, found), ""]
    return lines


def _row(run: FinishedRun, name: str) -> list[str] | None:
    path = run.directory / "eval" / name / "summary.json"
    if not path.is_file():
        return None
    summary = read_json(path)
    modes = [summary["modes"].get(mode) for mode in MODE_NAMES]
    malformed = ", ".join(f"{row['malformed_rate']:.1%}" for row in modes if row)
    cells = [
        f"{rate(row['accuracy'])} [{rate(row['accuracy_interval']['low'])}, {rate(row['accuracy_interval']['high'])}]"
        if row
        else "–"
        for row in modes
    ]
    return [name, *cells, difference(summary.get("gap", {}).get("accuracy")), malformed]
