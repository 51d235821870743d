"""The miniature world: corpora, exam, gold explanations and tokenizer, all invented, written from one seed.

What it models: a base corpus that knows the form of exams but half of the diseases; a medical corpus that describes
them all, whose explained questions are mostly by careless writers; an exam that asks known facts in option sets never
seen. Every name is made up, and every directory says so.
"""

import random
from pathlib import Path
from typing import Any

from megatron_medllm.config.demo import DemoConfig
from megatron_medllm.demo.facts import DISEASE_ROLES, TOWN_ROLES, Domain, Fact, NameMaker
from megatron_medllm.demo.tokenizer import save_tokenizer, train_tokenizer
from megatron_medllm.demo.writing import ANSWER_MARKER, EXPLANATION_MARKER, FactQuestion, ask, explain, state
from megatron_medllm.errors import UserError
from megatron_medllm.storage import atomic_write, write_json, write_jsonl

NOTICE = (
    "架空のデータです。病名・薬名・検査名・症状・地名はすべて無作為に作られ、実在しません。診療には使えません。\n"
    "Everything here is invented: diseases, drugs, tests, symptoms and towns are random strings. No medical use.\n"
)
MAX_DRAWS = 10_000
BASE_OPTIONS = (2, 3, 5, 5)  # short questions first teach the model to pick a letter
FULL_OPTIONS = (5,)


class World:
    """Both domains, and the memory of which exam questions have been used."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        rng = random.Random(f"{config.seed} facts")
        names = NameMaker(rng)
        self.medicine = Domain(
            rng, names, count=config.diseases, suffix="病", roles=DISEASE_ROLES, confused_share=config.confused_share
        )
        self.towns = Domain(
            rng, names, count=config.towns, suffix="市", roles=TOWN_ROLES, confused_share=config.confused_share
        )
        order = rng.sample(self.medicine.entities, config.diseases)
        self.known = set(order[: config.known_diseases])
        self.unseen = set(rng.sample(self.medicine.entities, round(config.unseen_share * config.diseases)))
        self._used: set[tuple[Any, ...]] = set()

    def disease_facts(self, diseases: set[str] | None = None) -> list[Fact]:
        """The facts of `diseases` (all by default)."""
        return [fact for fact in self.medicine.facts.values() if diseases is None or fact.entity in diseases]

    def fresh_question(self, rng: random.Random, domain: Domain, fact: Fact, *, options: int = 5) -> FactQuestion:
        """A question that no document and no other set holds (short ones may repeat: exams never ask them)."""
        for _ in range(MAX_DRAWS):
            question = ask(rng, domain, fact, options=options, two_answer_share=self.config.two_answer_share)
            if options < 5 or domain is self.towns:
                return question
            if question.identity not in self._used:
                self._used.add(question.identity)
                return question
        raise UserError(
            f"demo.diseases={self.config.diseases}: too few for so many different questions; "
            "ask for more diseases or fewer documents"
        )

    def question_set(self, name: str, facts: list[Fact], count: int) -> list[FactQuestion]:
        """`count` fresh questions that visit `facts` evenly, in random order."""
        rng = random.Random(f"{self.config.seed} {name}")
        order = rng.sample(facts, len(facts))
        return [self.fresh_question(rng, self.medicine, order[i % len(order)]) for i in range(count)]

    def corpus(
        self, name: str, sources: list[tuple[Domain, list[Fact], int]], option_counts: tuple[int, ...]
    ) -> list[dict[str, Any]]:
        """Documents `{"text", "id", "kind"}`: for each source, so many about its facts; shuffled."""
        rng = random.Random(f"{self.config.seed} {name}")
        documents = [
            self._document(rng, domain, facts, option_counts) for domain, facts, count in sources for _ in range(count)
        ]
        rng.shuffle(documents)
        return [{"text": text, "id": f"{name}-{i}", "kind": kind} for i, (kind, text) in enumerate(documents)]

    def _document(
        self, rng: random.Random, domain: Domain, facts: list[Fact], option_counts: tuple[int, ...]
    ) -> tuple[str, str]:
        config = self.config
        kind = rng.random()
        if kind >= config.question_share + config.explained_share:
            return "statements", "".join(state(rng, rng.choice(facts)) for _ in range(4))
        question = self.fresh_question(rng, domain, rng.choice(facts), options=rng.choice(option_counts))
        if kind < config.question_share:
            return "question", question.prompt(ANSWER_MARKER) + ",".join(question.answer)
        careful = rng.random() >= config.careless_share
        text = question.prompt(EXPLANATION_MARKER) + explain(question, careful=careful)
        return ("explained careful" if careful else "explained careless"), text


def generate(config: DemoConfig, output_dir: Path) -> dict[str, Any]:
    """Write the world under `output_dir` and return a summary (counts by file and kind, and the vocabulary's size).

    Files: `base.jsonl`, `medical.jsonl`; `exam/`, `development/`, `train/` with `questions.jsonl` in IgakuQA's schema
    and `questions_metadata.jsonl`, the training questions with a gold `explanation`; `tokenizer/`; `README.txt`;
    `summary.json`.
    """
    world = World(config)
    seen = set(world.medicine.entities) - world.unseen
    sets = {
        "exam": world.question_set("exam", world.disease_facts(), config.exam_questions),
        "development": world.question_set("development", world.disease_facts(), config.development_questions),
        "train": world.question_set("train", world.disease_facts(seen), config.train_questions),
    }
    town_facts, rehearsal = list(world.towns.facts.values()), round(config.rehearsal_share * config.medical_documents)
    known_facts, half = world.disease_facts(world.known), config.base_documents // 2
    base = world.corpus(
        "base",
        [(world.towns, town_facts, config.base_documents - half), (world.medicine, known_facts or town_facts, half)],
        BASE_OPTIONS,
    )
    medical = world.corpus(
        "medical",
        [
            (world.medicine, world.disease_facts(), config.medical_documents - rehearsal),
            (world.towns, town_facts, rehearsal),
        ],
        FULL_OPTIONS,
    )
    tokenizer = train_tokenizer((row["text"] for row in [*base, *medical]), vocab_size=config.vocab_size)
    save_tokenizer(tokenizer, output_dir / "tokenizer")
    for name, questions in sets.items():
        _write_questions(world, output_dir / name, name, questions)
    write_jsonl(output_dir / "base.jsonl", base)
    write_jsonl(output_dir / "medical.jsonl", medical)
    for directory in (output_dir, *(output_dir / name for name in sets)):
        with atomic_write(directory / "README.txt") as stream:
            stream.write(NOTICE.encode())
    summary = {
        "seed": config.seed,
        "documents": {"base": _count_kinds(base), "medical": _count_kinds(medical)},
        "questions": {name: len(questions) for name, questions in sets.items()},
        "vocab_size": tokenizer.get_vocab_size(),
    }
    write_json(output_dir / "summary.json", summary)
    return summary


def _write_questions(world: World, directory: Path, name: str, questions: list[FactQuestion]) -> None:
    rows, metadata = [], []
    for i, question in enumerate(questions):
        problem_id = f"{name}-{i}"
        fact = question.fact
        rows.append(
            {
                "problem_id": problem_id,
                "problem_text": question.text,
                "choices": list(question.choices),
                "text_only": True,
                "answer": list(question.answer),
                "points": "1",
            }
            | ({"explanation": explain(question, careful=True).partition(ANSWER_MARKER)[0]} if name == "train" else {})
        )
        metadata.append(
            {
                "problem_id": problem_id,
                "entity": fact.entity,
                "role": fact.role,
                "known_to_base": fact.entity in world.known,
                "seen_in_preference_training": fact.entity not in world.unseen,
                "confused_by_careless_writers": fact.confused,
            }
        )
    write_jsonl(directory / "questions.jsonl", rows)
    write_jsonl(directory / "questions_metadata.jsonl", metadata)


def _count_kinds(documents: list[dict[str, Any]]) -> dict[str, int]:
    kinds = [row["kind"] for row in documents]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}
