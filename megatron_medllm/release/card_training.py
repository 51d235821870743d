"""Training in a model card: settings, results, hardware and hours."""

from typing import Any

from megatron_medllm.config.train import CptConfig, RpoConfig
from megatron_medllm.evaluation.run_report.training import read_trainings, training_facts
from megatron_medllm.pages.markdown import markdown_table
from megatron_medllm.pages.numbers import count, seconds_text
from megatron_medllm.recipe.records import Record
from megatron_medllm.release.finished_run import FinishedRun
from megatron_medllm.storage import read_json


def training_section(run: FinishedRun, *, hardware: str | None) -> list[str]:
    """A column for each training that led to the model."""
    names = run.lineage()
    metrics = read_trainings(run.directory, names)
    facts = {name: training_facts(metrics[name]) if name in metrics else {} for name in names}
    columns = [
        _settings(run, name) | _results(facts[name]) | _exported(run, name) | {"time": _time(run, name)}
        for name in names
    ]
    settings = dict.fromkeys(key for column in columns for key in column)
    rows = [[key, *(column.get(key, "–") for column in columns)] for key in settings]
    lines = ["## Training", "", *markdown_table(["", *names], rows), ""]
    layout = run.config.layout
    processes = f"{layout.world_size} process{'' if layout.world_size == 1 else 'es'}"
    lines += [
        f"Model in {run.config.model.dtype}; {processes} (tensor parallel {layout.tp}, pipeline {layout.pp}, context "
        f"{layout.cp}). {_machine(run, hardware)}",
        "",
    ]
    return lines


def _settings(run: FinishedRun, name: str) -> dict[str, str]:
    section = run.section(name)
    optimizer, adapter = section.optimizer, section.adapter
    found = {
        "tokens a row": count(section.sequence_length),
        "rows or pairs a step": count(section.global_batch_size),
        "peak learning rate": f"{optimizer.lr:g} ({optimizer.schedule})",
        "weight decay": f"{optimizer.weight_decay:g}",
        "trained": "all weights" if adapter is None else f"LoRA, rank {adapter.rank}, base in {adapter.base}",
        "FP8": section.fp8,
    }
    if isinstance(section, RpoConfig):
        loss = section.loss
        found |= {"loss": f"{loss.kind}, β {loss.beta:g}, α {loss.alpha:g}", "epochs": f"{section.epochs:g}"}
        suffix = run.round_suffix(name)
        if run.config.pairs is not None and suffix is not None:
            found["pairs"] = count(run.pairs_manifest(suffix)["pairs"])
    elif isinstance(section, CptConfig) and section.epochs is not None:
        found["epochs"] = f"{section.epochs:g}"
    return found


def _results(facts: dict[str, Any]) -> dict[str, str]:
    if not facts:
        return {}
    found = {"steps": count(facts["steps"]), "tokens": count(facts["tokens"])}
    found["loss, first and last"] = f"{facts['first_loss']:.3f}, {facts['last_loss']:.3f}"
    if facts["validation_loss"] is not None:
        found["validation loss"] = f"{facts['validation_loss']:.3f}"
    return found


def _exported(run: FinishedRun, name: str) -> dict[str, str]:
    found = run.exported(name)
    if not found or found["step"] == found["ended"]:
        return {}
    return {"exported step": f"{count(found['step'])}, the best by {found['metric']}"}


def _time(run: FinishedRun, name: str) -> str:
    seconds = Record(run.directory / "stages" / f"{name}.json").seconds()
    if not seconds:
        return "–"
    hours = seconds / 3600 * run.config.layout.world_size
    return f"{seconds_text(seconds)} ({hours:,.1f} device-hours)" if hours >= 0.1 else seconds_text(seconds)


def _machine(run: FinishedRun, hardware: str | None) -> str:
    if hardware is not None:
        return f"Hardware: {hardware}."
    path = run.directory / "environment.json"
    found = read_json(path) if path.is_file() else {}
    machine = found.get("machine", {})
    if not machine:
        return "Hardware: not recorded."
    gpus = machine.get("gpus") or []
    kinds = ", ".join(f"{gpus.count(kind)} × {kind}" for kind in dict.fromkeys(gpus)) or "no GPU recorded"
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items() if version)
    return f"The pipeline's machine: {kinds}, {machine.get('cores')} CPU cores. Software: {versions}."
