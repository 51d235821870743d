"""The miniature world over many seeds: one row a run, then what varies between runs.

    python tools/miniature_seeds.py /tmp/seed0 /tmp/seed1 ...

Reads each run's summary.json and prints Markdown. An interval in a run is over its questions; the spread between runs
is of worlds, starting weights and samples together, and is given as mean, standard deviation and a 95 % t interval.
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 11: 2.201}


def accuracies(summary: dict[str, Any]) -> dict[str, float]:
    """`MODEL a`, `MODEL e` and `MODEL gap` of every model that the run examined."""
    found = {}
    for name, model in summary["models"].items():
        found[f"{name} a"] = model["answer_only"]["accuracy"]
        found[f"{name} e"] = model["explained"]["accuracy"]
        found[f"{name} gap"] = model["gap"]
    found["change of the gap, cpt to rpo"] = found["rpo gap"] - found["cpt gap"]
    found["change of short answers, cpt to rpo"] = found["rpo a"] - found["cpt a"]
    if "rpo-sft e" in found:
        found["explained, rpo less sft"] = found["rpo e"] - found["rpo-sft e"]
        found["explained, rpo less dpo"] = found["rpo e"] - found["rpo-dpo e"]
    for name in ("yes", "no"):
        split = summary["models"]["rpo"]["splits"]["seen_in_preference_training"][name]
        cpt = summary["models"]["cpt"]["splits"]["seen_in_preference_training"][name]
        found[f"explained, cpt to rpo, disease in the pairs: {name}"] = (
            split["explained"]["accuracy"] - cpt["explained"]["accuracy"]
        )
    return found


def chosen_change(run_dir: Path, training: str) -> float | None:
    """Mean change of the chosen responses' log-probability against the reference, last ten steps."""
    path = run_dir / training / "metrics.jsonl"
    if not path.is_file():
        return None
    steps = [row for row in map(json.loads, path.read_text().splitlines()) if "chosen_logprob" in row][-10:]
    return statistics.fmean(row["chosen_logprob"] - row["reference_chosen_logprob"] for row in steps)


def malformed(summary: dict[str, Any]) -> dict[str, int]:
    """Answers out of the explained ones that no parser could read, by model; those without any left out."""
    counts = {name: model["explained"]["malformed"] for name, model in summary["models"].items()}
    return {name: count for name, count in counts.items() if count}


def runs_table(runs: dict[Path, dict[str, Any]]) -> str:
    """Accuracy, answer only / explained, and the gaps with their intervals over questions."""
    models = list(next(iter(runs.values()))["models"])
    lines = [
        f"| run | {' | '.join(models)} | gap of cpt | gap of rpo | effect | minutes |",
        "|---" * (len(models) + 5) + "|",
    ]
    for run_dir, summary in runs.items():
        cells = [
            f"{model['answer_only']['accuracy']:.3f} / {model['explained']['accuracy']:.3f}"
            for model in summary["models"].values()
        ]
        gaps = [
            f"{model['gap']:+.3f} [{model['gap_ci95'][0]:+.3f}, {model['gap_ci95'][1]:+.3f}]"
            for model in (summary["models"]["cpt"], summary["models"]["rpo"])
        ]
        minutes = sum(stage["seconds"] for stage in summary["stages"]) / 60
        row = [run_dir.name, *cells, *gaps, summary["effect"]["shows"], f"{minutes:.1f}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def spread_table(runs: dict[Path, dict[str, Any]]) -> str:
    """Mean, standard deviation, range and t interval over runs of every figure."""
    rows = [accuracies(summary) for summary in runs.values()]
    lines = ["| | mean | SD over runs | lowest | highest | 95 % t interval of the mean |", "|---" * 6 + "|"]
    for name in rows[0]:
        values = [row[name] for row in rows]
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        half = T_95[len(values) - 1] * deviation / math.sqrt(len(values))
        lines.append(
            f"| {name} | {mean:+.3f} | {deviation:.3f} | {min(values):+.3f} | {max(values):+.3f} "
            f"| {mean - half:+.3f} to {mean + half:+.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print both tables and the changes of the chosen log-probability."""
    directories = [Path(argument) for argument in sys.argv[1:]]
    if not 2 <= len(directories) <= len(T_95) + 1:
        sys.exit(f"usage: python tools/miniature_seeds.py RUN_DIR RUN_DIR ... (2 to {len(T_95) + 1})")
    runs = {directory: json.loads((directory / "summary.json").read_text()) for directory in directories}
    print(runs_table(runs), spread_table(runs), sep="\n\n", end="\n\n")
    for directory, summary in runs.items():
        changes = {name: chosen_change(directory, name) for name in ("rpo", "rpo-dpo")}
        known = ", ".join(f"{name} {change:+.2f}" for name, change in changes.items() if change is not None)
        print(
            f"{directory.name}: log p(chosen) against the reference: {known}; malformed: {malformed(summary) or 'none'}"
        )


if __name__ == "__main__":
    main()
