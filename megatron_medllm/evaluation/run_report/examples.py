"""Explanations of two models beside each other, question by question, in exam order: nobody picked the pretty ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_medllm.errors import UserError
from megatron_medllm.evaluation.run_report.numbers import Examined
from megatron_medllm.exams.loading import load_exam
from megatron_medllm.exams.question import Question

# Verdict before and after → heading and how many are shown.
_KINDS = {
    (False, True): ("wrong, then right", 3),
    (True, False): ("right, then wrong", 3),
    (False, False): ("wrong both times", 2),
    (True, True): ("right both times", 1),
}
_LONGEST = 1500


def exam_questions(run_dir: Path, examined: Examined) -> dict[str, Question]:
    """The questions that were asked, by problem_id; empty when they are not where the evaluation read them."""
    section = examined.summary["config"]["exam"]
    try:
        exam = load_exam(section["name"], [_moved(run_dir, Path(path)) for path in section["data"]])
    except UserError:  # the answers are enough for a report; questions may have been moved since
        return {}
    return {question.problem_id: question for question in exam.questions}


def _moved(run_dir: Path, path: Path) -> Path:
    """`path`, or what stands for it in a run directory that was moved or is read from another place."""
    inside = run_dir / "world" / path.name
    return inside if not path.exists() and path.parent.name == "world" and inside.exists() else path


def answer_examples(
    run_dir: Path, examined: Mapping[str, Examined], *, before: str | None, after: str | None
) -> dict[str, Any] | None:
    """Explained answers of `before` and `after` to the same questions, the first ones of each kind.

    Returns:
        None where there is nothing to compare; else `before`, `after` (names) and `kinds`: heading, how many of the
        common questions are of that kind, and `items` to show.
    """
    if before not in examined or after not in examined or before is None or after is None:
        return None
    first, second = (examined[name].rows.get("explained", {}) for name in (before, after))
    common = [problem_id for problem_id in second if problem_id in first]
    if not common:
        return None
    questions = exam_questions(run_dir, examined[after])
    kinds = []
    for verdicts, (heading, most) in _KINDS.items():
        found = [p for p in common if (first[p]["correct"], second[p]["correct"]) == verdicts]
        items = [
            {**_asked(second[p], questions.get(p)), "before": _answer(first[p]), "after": _answer(second[p])}
            for p in found[:most]
        ]
        kinds.append({"heading": heading, "count": len(found), "items": items})
    return {"before": before, "after": after, "n": len(common), "kinds": kinds}


def _asked(row: Mapping[str, Any], question: Question | None) -> dict[str, Any]:
    if question is None:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        text, choices = prompt, []
    else:
        text = question.problem_text
        choices = [
            {"label": label, "text": choice, "right": any(label in keys for keys in question.accepted)}
            for label, choice in zip(question.labels, question.choices, strict=False)
        ]
    gold = " or ".join(", ".join(item) for item in row["gold"])
    return {"problem_id": row["problem_id"], "question": text, "choices": choices, "gold": gold}


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    output = row["output"].strip()
    return {
        "output": output if len(output) <= _LONGEST else output[:_LONGEST] + " …",
        "correct": row["correct"],
        "parsed": ", ".join(row["parsed"]) if row["parsed"] is not None else f"no answer ({row['malformed_reason']})",
    }
