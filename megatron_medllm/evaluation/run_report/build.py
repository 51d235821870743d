"""Gather what a run left behind, and write summary.json and report.html.

A run may lack any part (no preference training, no controls, no exam): the report shows what is there and says what
is not. Numbers come from the answers, metrics and manifests on disk; nothing is taken from a log's text.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from megatron_medllm.errors import UserError
from megatron_medllm.evaluation.run_report.examples import answer_examples, exam_questions
from megatron_medllm.evaluation.run_report.numbers import (
    Examined,
    chance_accuracy,
    compare_models,
    is_chance,
    read_examined,
    score_model,
    split_scores,
)
from megatron_medllm.evaluation.run_report.training import read_trainings, training_charts, training_facts
from megatron_medllm.evaluation.run_report.words import (
    CONTROLS,
    change_sentence,
    credit_sentence,
    gap_effect,
    gap_sentence,
    judge_effect,
    model_label,
    model_order,
    preference_round,
)
from megatron_medllm.pages.intervals import Dot, IntervalChart
from megatron_medllm.pages.numbers import rate, signed
from megatron_medllm.pages.page import write_page
from megatron_medllm.storage import read_json, read_jsonl, write_json

# Fields of the invented exam's questions_metadata.jsonl: the key in summary.json, and what yes and no are called.
SPLITS = {
    "seen_in_preference_training": ("entity in preference training", "seen", "unseen"),
    "confused_by_careless_writers": ("fact that careless writers confuse", "confused", "never confused"),
    "known_to_base": ("entity in the base corpus", "known", "new"),
}


def build_report(run_dir: Path) -> dict[str, Any]:
    """Write `run_dir`/summary.json and `run_dir`/report.html.

    Returns:
        The contents of summary.json: `models` (a `score_model` each, with `label`, `effect` and `splits`), `effect`
        (see `judge_effect`), `credit` (see `credit_sentence`), `differences` between models, `chance`, `at_chance`,
        `trainings`, `corpora`, `pairs`, `stages`, `environment`.

    Raises:
        UserError: `run_dir` holds nothing of a run, or one of its files is broken (named).
    """
    examined = _read_all_examined(run_dir)
    config = _read_config(run_dir)
    names = sorted({path.parent.name for path in run_dir.glob("*/metrics.jsonl")}, key=model_order)
    trainings = read_trainings(run_dir, names)
    if not (config or examined or trainings):
        raise UserError(f"{run_dir}: holds nothing of a run (no run.yaml, eval/*/summary.json or */metrics.jsonl)")
    summary = {
        "name": config.get("name", run_dir.resolve().name),
        "invented": config.get("demo") is not None,
        **_exam_part(run_dir, examined),
        "trainings": {name: training_facts(rows) for name, rows in trainings.items()},
        "corpora": {path.parent.name: _corpus(path) for path in sorted(run_dir.glob("corpus/*/manifest.json"))},
        "pairs": {path.parent.name: _pairs(path) for path in sorted(run_dir.glob("pairs*/manifest.json"))},
        "stages": _stages(run_dir),
        "environment": _optional_json(run_dir / "environment.json"),
    }
    _write_page(run_dir, summary, examined, trainings, config)
    write_json(run_dir / "summary.json", summary)
    return summary


def table(summary: Mapping[str, Any]) -> Table:
    """The run's table for the terminal: models by answer only, explained and gap, with 95 % intervals."""
    effect = summary["effect"]
    claims = [f"{'✓' if check['holds'] else '✗'} {check['claim']}: {check['figures']}" for check in effect["checks"]]
    notes = [note["text"] for note in _notes(summary)]
    found = Table(
        title=Text(f"{summary['name']}: accuracy on {summary['questions']} questions, with 95 % intervals"),
        caption=Text(
            "\n".join([effect["headline"], *claims, *([summary["credit"]] if summary["credit"] else []), *notes])
        ),
        caption_justify="left",
        title_justify="left",
    )
    found.add_column("model", no_wrap=True)
    for column in ("answer only", "explained", "gap"):
        found.add_column(column, justify="right", no_wrap=True)
    for numbers in summary["models"].values():
        found.add_row(
            Text(numbers["label"]),  # names are text, never markup
            *(
                _two_lines(rate(cell["accuracy"]), cell["ci95"], rate) if cell else "–"
                for cell in (numbers["answer_only"], numbers["explained"])
            ),
            "–" if numbers["gap"] is None else _two_lines(signed(numbers["gap"]), numbers["gap_ci95"], signed),
        )
    return found


def _two_lines(value: str, ci95: Sequence[float], form: Callable[[float], str]) -> str:
    return f"[bold]{value}[/]\n[dim]{form(ci95[0])} … {form(ci95[1])}[/]"


def _read_all_examined(run_dir: Path) -> dict[str, Examined]:
    """Finished evaluations by model, in the recipe's order. (eval writes its summary.json last.)"""
    found = [path.parent for path in run_dir.glob("eval/*/summary.json")]
    return {path.name: read_examined(path) for path in sorted(found, key=lambda path: model_order(path.name))}


def _read_config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "run.yaml"
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a mapping of settings")
    return found


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _corpus(path: Path) -> dict[str, Any]:
    """A corpus' counts: its manifest without digests and settings, which may be long."""
    manifest = read_json(path)
    kept = ("documents_read", "documents", "tokens", "characters_per_token", "dropped")
    sources = {name: {key: facts[key] for key in kept} for name, facts in manifest["sources"].items()}
    return {"tokens": manifest["tokens"], "documents": manifest["documents"], "sources": sources}


def _pairs(path: Path) -> dict[str, Any]:
    """The counts of a set of preference pairs."""
    manifest = read_json(path)
    counts = {key: manifest[key] for key in ("pairs", "questions", "by_tier", "samples_by_tier", "drop_reasons")}
    contamination = manifest["contamination"]
    return counts | {"checked": contamination["checked"], "contaminated": len(contamination["dropped"])}


def _stages(run_dir: Path) -> list[dict[str, Any]]:
    """Stages by the time they ended. The report's own is not over while this runs."""
    rows = [{"name": path.stem, **read_json(path)} for path in run_dir.glob("stages/*.json")]
    return sorted((row for row in rows if row["name"] != "report"), key=lambda row: row["finished_at"])


def _exam_part(run_dir: Path, examined: Mapping[str, Examined]) -> dict[str, Any]:
    before, after = preference_ends(list(examined))
    models: dict[str, Any] = {}
    metadata_path = run_dir / "world" / "exam" / "questions_metadata.jsonl"
    metadata = list(read_jsonl(metadata_path)) if metadata_path.is_file() else []
    for name, one in examined.items():
        numbers = score_model(one)
        splits = {field: split_scores(one, metadata, field) for field in SPLITS}
        models[name] = {
            "label": model_label(name, examined),
            **numbers,
            "effect": gap_effect(numbers),
            "splits": {field: parts for field, parts in splits.items() if parts},
        }
    first = next(iter(examined.values()), None)
    change = compare_models(examined[before], examined[after]) if before and after else None
    chance = _chance(run_dir, first)
    at_chance = all_at_chance(models.values(), chance)
    differences = [compare_models(examined[one], examined[two]) for one, two in _contests(list(examined))]
    return {
        "exam": first.summary["exam"] if first else None,
        "questions": first.summary["questions"] if first else 0,
        "chance": chance,
        "at_chance": at_chance,
        "models": models,
        "effect": judge_effect(models, before=before, after=after, change=change, at_chance=at_chance),
        "credit": None if at_chance else credit_sentence(differences),
        "differences": differences,
    }


def preference_ends(names: Sequence[str]) -> tuple[str | None, str | None]:
    """What preference training started from and what its last round made; None where that was not examined."""
    after = max((name for name in names if preference_round(name)), key=preference_round, default=None)
    before = next((name for name in ("cpt", "base") if name in names), None)
    return before, after


def _contests(names: Sequence[str]) -> list[tuple[str, str]]:
    """Which models to compare: every step of the recipe, and the last one with each control."""
    before, after = preference_ends(names)
    pairs = [("base", "cpt"), (before, after), ("rpo-sft", after), ("rpo-dpo", after)]
    return [(one, two) for one, two in pairs if one in names and two in names and one is not None and two is not None]


def _chance(run_dir: Path, examined: Examined | None) -> float | None:
    """Blind guessing's accuracy; None when the questions are no longer where the evaluation read them."""
    questions = exam_questions(run_dir, examined) if examined else {}
    asked = {problem_id for rows in examined.rows.values() for problem_id in rows} if examined else set()
    if examined is None or not asked or not asked <= questions.keys():
        return None
    revealed = examined.summary["config"]["prompt"]["reveal_count"]
    return chance_accuracy([questions[problem_id] for problem_id in sorted(asked)], count_revealed=revealed)


def all_at_chance(models: Iterable[Mapping[str, Any]], chance: float | None) -> bool:
    """Whether there are scores, and none of them is above blind guessing."""
    modes = [numbers[mode] for numbers in models for mode in ("answer_only", "explained") if numbers[mode] is not None]
    return bool(modes) and all(is_chance(mode, chance) for mode in modes)


def _notes(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Warnings that belong above every number."""
    notes = []
    if summary["invented"]:
        text = "Invented content: every disease, drug, fact and question of this run was made up by a generator."
        notes.append({"title": "Invented content", "text": text})
    if summary["at_chance"]:
        text = f"Scores are chance: no model is above blind guessing ({summary['chance']:.3f}); gaps mean nothing here."
        notes.append({"title": "Chance", "text": text})
    return notes


def _write_page(
    run_dir: Path,
    summary: dict[str, Any],
    examined: Mapping[str, Examined],
    trainings: Mapping[str, list[dict[str, Any]]],
    config: dict[str, Any],
) -> None:
    before, after = preference_ends(list(examined))
    if after is None and list(examined) != [before]:
        before, after = "base", before  # no preference training: show what continued pretraining changed
    write_page(
        run_dir / "report.html",
        "megatron_medllm.evaluation.run_report",
        "run.html.jinja",
        summary=summary,
        notes=_notes(summary),
        chance_cells={
            (name, mode): is_chance(numbers[mode], summary["chance"])
            for name, numbers in summary["models"].items()
            for mode in ("answer_only", "explained")
        },
        gap_sentences=[gap_sentence(numbers["label"], numbers) for numbers in summary["models"].values()],
        change_sentences=[
            change_sentence(model_label(row["second"], examined), row, against=model_label(row["first"], examined))
            for row in summary["differences"]
        ],
        controls=[name for name in summary["models"] if name in CONTROLS],
        accuracy=_accuracy_chart(summary),
        splits=_split_tables(summary),
        charts=training_charts(trainings),
        labels={name: model_label(name, trainings) for name in trainings},
        examples=answer_examples(run_dir, examined, before=before, after=after),
        config=yaml.safe_dump(config, allow_unicode=True, sort_keys=False) if config else "",
        stages=_stage_times(summary["stages"]),
        world=_optional_json(run_dir / "world" / "summary.json"),
    )


def _stage_times(stages: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Name and seconds of every stage, and of all together."""
    rows = [(row["name"] + ("" if row["status"] == "done" else " (not finished)"), row["seconds"]) for row in stages]
    return [*rows, ("all stages", sum(seconds for _, seconds in rows))]


def _accuracy_chart(summary: Mapping[str, Any]) -> IntervalChart | None:
    """Both modes of every model on a scale from 0 to 1, with intervals; a dotted line marks blind guessing."""
    if not summary["models"]:
        return None
    rows = [
        (
            numbers["label"],
            [
                Dot(series, numbers[mode]["accuracy"], *numbers[mode]["ci95"])
                for mode, series in (("answer_only", "answer only"), ("explained", "explained"))
                if numbers[mode] is not None
            ],
        )
        for numbers in summary["models"].values()
    ]
    return IntervalChart("accuracy", rows, chance=summary["chance"])


def _split_tables(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table a split: title, and rows of model, part and numbers."""
    tables = []
    for field, (title, *names) in SPLITS.items():
        rows = [
            {"model": numbers["label"], "part": name, **numbers["splits"][field][key]}
            for numbers in summary["models"].values()
            for key, name in zip(("yes", "no"), names, strict=True)
            if key in numbers["splits"].get(field, {})
        ]
        if rows:
            tables.append({"title": title, "rows": rows})
    return tables
