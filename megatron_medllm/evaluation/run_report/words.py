"""What a run's numbers mean, in sentences: no more than the intervals carry."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from megatron_medllm.pages.numbers import rate, signed_interval

_LABELS = {
    "base": "Base",
    "cpt": "CPT",
    "rpo-sft": "SFT only (control)",
    "rpo-dpo": "DPO only (control)",
}
CONTROLS = ("rpo-sft", "rpo-dpo")
_ROUND = re.compile(r"rpo(?:-(\d+))?$")
HEADLINES = {
    "yes": "The effect shows in this run.",
    "partly": "The effect shows in part.",
    "no": "The effect does not show in this run.",
    "unknown": "This run cannot show the effect.",
}


def preference_round(name: str) -> int:
    """1 for `rpo`, 2 for `rpo-2`, …; 0 for what is not a round of preference training."""
    found = _ROUND.match(name)
    return int(found.group(1) or 1) if found else 0


def model_label(name: str, known: Collection[str]) -> str:
    """How the model is called in tables; `known` are all models of the run."""
    number = preference_round(name)
    if not number:
        return _LABELS.get(name, name)
    label = "CPT + RPO" if "cpt" in known else "RPO"
    return label if number == 1 else f"{label}, round {number}"


def model_order(name: str) -> tuple[int, int, str]:
    """Sort key: the recipe's order, then the controls, then anything else."""
    number = preference_round(name)
    if number:
        return 2, number, name
    return {"base": 0, "cpt": 1, "rpo-sft": 3, "rpo-dpo": 4}.get(name, 5), 0, name


def gap_effect(numbers: Mapping[str, Any]) -> str:
    """`loses`, `gains`, `unclear` (the interval holds 0), or `unknown` (a mode was not run)."""
    if numbers["gap_ci95"] is None:
        return "unknown"
    low, high = numbers["gap_ci95"]
    return "loses" if high < 0 else "gains" if low > 0 else "unclear"


def gap_sentence(label: str, numbers: Mapping[str, Any]) -> str:
    """Explained against answer only, for one model."""
    effect = gap_effect(numbers)
    if effect == "unknown":
        return f"{label} was examined in one mode only: no gap."
    figures = (
        f"{rate(numbers['answer_only']['accuracy'])} answer only, {rate(numbers['explained']['accuracy'])} explained, "
        f"gap {signed_interval(numbers['gap'], numbers['gap_ci95'])}"
    )
    if effect == "unclear":
        n = numbers["explained"]["n"]
        return f"{label}: no difference that {n} questions can tell from none ({figures})."
    return f"{label} {effect} accuracy when it explains ({figures})."


def change_sentence(label: str, change: Mapping[str, Any], *, against: str) -> str:
    """One model's explained answers against another's."""
    explained = change["explained"]
    if explained is None:
        return f"{label} and {against} were not both examined explaining."
    low, high = explained["ci95"]
    figures = signed_interval(explained["estimate"], explained["ci95"])
    if low > 0 or high < 0:
        return f"Explained, {label} is {'better' if low > 0 else 'worse'} than {against}: {figures}."
    return f"Explained, {label} and {against} cannot be told apart: {figures}."


def credit_sentence(changes: Iterable[Mapping[str, Any]]) -> str | None:
    """Whether what preference training gained may be credited to its preference term; None without the control."""
    for change in changes:
        if change["first"] == "rpo-sft" and change["explained"] is not None:
            if change["explained"]["ci95"][0] > 0:
                return "It explains better than SFT on the same chosen answers: the preference term earns credit."
            return "SFT on the same chosen answers cannot be told to be worse: nothing credits the preference term."
    return None


def judge_effect(
    models: Mapping[str, Mapping[str, Any]],
    *,
    before: str | None,
    after: str | None,
    change: Mapping[str, Any] | None,
    at_chance: bool,
) -> dict[str, Any]:
    """Does the run show the published pattern: a loss when explaining, that preference training mends for nothing?

    Args:
        models: `score_model` by name.
        before, after: the models that preference training started from and ended in.
        change: `compare_models(before, after)`.
        at_chance: no model is above blind guessing, so that there is nothing to lose or to mend.

    Returns:
        `shows` (yes, partly, no, unknown), `headline`, and `checks`: claims with `holds` and the figures.
        `partly` means that the starting model loses and the gap narrows, but another check fails.
    """
    usable = before is not None and after is not None and change is not None and change["gap"] is not None
    if not usable or before is None or after is None or change is None:
        headline = f"{HEADLINES['unknown']} It needs a model before and one after preference training, in both modes."
        return {"shows": "unknown", "headline": headline, "checks": []}
    label = {name: model_label(name, models) for name in models}
    checks = [
        _check(
            f"{label[name]} loses accuracy when it explains",
            gap_effect(models[name]) == "loses",
            "gap",
            models[name]["gap"],
            models[name]["gap_ci95"],
        )
        for name in dict.fromkeys(("base", before))
        if name in models and models[name]["gap"] is not None
    ]
    starting_loses = gap_effect(models[before]) == "loses"
    narrowed, short = change["gap"], change["answer_only"]
    narrows = narrowed["ci95"][0] > 0
    checks += [
        _check(
            f"Preference training narrows the gap of {label[before]}",
            narrows,
            "change of the gap",
            narrowed["estimate"],
            narrowed["ci95"],
        ),
        _check(
            f"{label[after]} shows no loss when it explains",
            gap_effect(models[after]) != "loses",
            "gap",
            models[after]["gap"],
            models[after]["gap_ci95"],
        ),
        _check(
            f"{label[after]} shows no loss in short answers against {label[before]}",
            short["ci95"][1] >= 0,
            "change",
            short["estimate"],
            short["ci95"],
        ),
    ]
    if at_chance:
        shows = "unknown"
    elif starting_loses and narrows:
        shows = "yes" if all(check["holds"] for check in checks) else "partly"
    else:
        shows = "no"
    return {"shows": shows, "headline": HEADLINES[shows], "checks": checks}


def _check(claim: str, holds: bool, what: str, value: float, ci95: list[float]) -> dict[str, Any]:
    return {"claim": claim, "holds": holds, "figures": f"{what} {signed_interval(value, ci95)}"}
