"""Where explanations of the miniature world go wrong: the hand they are written in, the fact, the letter, the key.

    python tools/miniature_errors.py RUN_DIR [MODEL ...]

For each model (default: cpt rpo) two rows of a Markdown table over the exam of RUN_DIR: as the model explained, and as
it explains when its first words are those of the careful hand. The second shows what the model could do before anybody
taught it to prefer careful explanations.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_medllm.config.demo import DemoConfig
from megatron_medllm.config.exam import EngineConfig
from megatron_medllm.demo.world import World
from megatron_medllm.demo.writing import ANSWER_MARKER, EXPLANATION_MARKER, LETTERS, FactQuestion
from megatron_medllm.inference.protocol import Request
from megatron_medllm.inference.transformers_engine import TransformersEngine
from megatron_medllm.storage import read_jsonl

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Judged:
    """One explanation, step by step."""

    careful: bool
    lookalike: bool  # it recalls a value of the look-alike
    not_offered: bool  # it recalls a value that is no option
    other_letter: bool  # a recalled option carries another option's letter
    other_key: bool  # the answer is not what the explanation names
    right: bool


def exam_questions(run_dir: Path) -> list[FactQuestion]:
    """The run's exam, with the facts behind it."""
    facts = World(DemoConfig(**yaml.safe_load((run_dir / "run.yaml").read_text())["demo"])).medicine.facts
    exam = run_dir / "world" / "exam"
    rows = zip(read_jsonl(exam / "questions.jsonl"), read_jsonl(exam / "questions_metadata.jsonl"), strict=True)
    return [
        FactQuestion(
            fact=facts[about["entity"], about["role"]],
            text=row["problem_text"],
            choices=tuple(row["choices"]),
            answer=tuple(row["answer"]),
            labels=tuple(LETTERS),
        )
        for row, about in rows
    ]


def judge(question: FactQuestion, text: str, *, careful: bool) -> Judged:
    """Read an explanation the way its writers wrote it: values with letters, then the answer."""
    body, _, key = text.partition(ANSWER_MARKER)
    cited = re.findall("([ァ-ヴー]+)([a-e])", body)
    label_of = dict(zip(question.choices, question.labels, strict=True))
    answer = tuple(key.strip().split(","))
    return Judged(
        careful=careful,
        lookalike=any(value in question.fact.lookalike_values for value, _ in cited),
        not_offered=any(value not in label_of for value, _ in cited),
        other_letter=any(label_of.get(value, label) != label for value, label in cited),
        other_key=answer != tuple(label for _, label in cited),
        right=answer == question.answer,
    )


def careful_opening(question: FactQuestion) -> str:
    """The first words of the careful hand."""
    return f"{question.fact.entity}の{question.fact.role}は"


def explanations(run_dir: Path, model: str, questions: Sequence[FactQuestion]) -> list[Judged]:
    """As the model explained in its exam."""
    rows = {row["problem_id"]: row for row in read_jsonl(run_dir / "eval" / model / "results.jsonl")
            if row["mode"] == "explained"}  # fmt: skip
    texts = [rows[f"exam-{i}"]["output"] for i in range(len(questions))]
    return [judge(q, t, careful=t.startswith(careful_opening(q))) for q, t in zip(questions, texts, strict=True)]


def made_careful(run_dir: Path, model: str, questions: Sequence[FactQuestion]) -> list[Judged]:
    """As the model goes on after the careful hand's first words, greedily."""
    engine = TransformersEngine(EngineConfig(dtype="float32"), run_dir / model / "hf")
    requests = [
        Request(
            request_id=str(i),
            prompt=question.prompt(EXPLANATION_MARKER) + careful_opening(question),
            max_new_tokens=MAX_NEW_TOKENS,
        )
        for i, question in enumerate(questions)
    ]
    texts = {completion.request_id: completion.text for completion in engine.generate(requests)}
    return [judge(q, texts[str(i)], careful=True) for i, q in enumerate(questions)]


def main() -> None:
    """Print the table."""
    if len(sys.argv) < 2:
        sys.exit("usage: python tools/miniature_errors.py RUN_DIR [MODEL ...]")
    run_dir, models = Path(sys.argv[1]), sys.argv[2:] or ["cpt", "rpo"]
    questions = exam_questions(run_dir)
    names = list(Judged.__dataclass_fields__)
    print(
        f"| {run_dir.name} | {' | '.join(name.replace('_', ' ') for name in names)} |",
        "|---" * (len(names) + 1) + "|",
        sep="\n",
    )
    for model in models:
        for how, find in (("as it explains", explanations), ("made to begin carefully", made_careful)):
            judged = find(run_dir, model, questions)
            rates = [sum(getattr(one, name) for one in judged) / len(judged) for name in names]
            print(f"| {model}, {how} | {' | '.join(f'{rate:.3f}' for rate in rates)} |")


if __name__ == "__main__":
    main()
