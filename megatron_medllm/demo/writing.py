"""How the invented facts are put into words: statements, exam questions, explanations.

Two hands write the explanations. The careful hand states the fact as the textbook does and sets the other options
aside. The careless hand starts from what it remembers (`…といえば…だ。`), which for a confused fact is the look-alike's
value, and concludes from that. A model trained on both learns to explain like the majority; that is the weakness
which preference training on careful (gold) explanations is to mend.
"""

import random
from dataclasses import dataclass

from megatron_medllm.demo.facts import Domain, Fact

LETTERS = "abcde"
ANSWER_MARKER = "\n答え:"
EXPLANATION_MARKER = "\n考察:"
STEMS = ("{entity}の{role}はどれか。", "{entity}の{role}として正しいのはどれか。", "次のうち{entity}の{role}はどれか。")
STATEMENTS = (
    "{entity}の{role}は{values}である。",
    "{entity}では{role}として{values}が知られる。",
    "{values}は{entity}の{role}である。",
)


@dataclass(frozen=True)
class FactQuestion:
    """A multiple-choice question about one fact."""

    fact: Fact
    text: str
    choices: tuple[str, ...]
    answer: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def identity(self) -> tuple[str, str, frozenset[str]]:
        """Equal for questions that ask the same with the same options, in whatever order or words."""
        return self.fact.entity, self.fact.role, frozenset(self.choices)

    def prompt(self, marker: str) -> str:
        """The question block, ending in the marker after which the model writes."""
        options = "".join(f"\n{label}.{choice}" for label, choice in zip(self.labels, self.choices, strict=True))
        return f"問題:{self.text}{options}{marker}"


def ask(rng: random.Random, domain: Domain, fact: Fact, *, options: int, two_answer_share: float) -> FactQuestion:
    """A question on `fact`; its wrong options hold the look-alike's value and others of the same role.

    Fewer than five options carry letters drawn from all five: were they always the first, a model would practise the
    last ones least, and mix them up long after it knows the facts.
    """
    two = len(fact.values) == 2 and options == 5 and rng.random() < two_answer_share
    count = 2 if two else 1
    right = rng.sample(fact.values, count)
    lookalike = rng.sample(fact.lookalike_values, count)
    others = [
        other
        for other in domain.facts.values()
        if other.role == fact.role and other.values not in (fact.values, fact.lookalike_values)
    ]
    rest = [rng.choice(other.values) for other in rng.sample(others, options - 2 * count)]
    choices = [*right, *lookalike, *rest]
    rng.shuffle(choices)
    labels = tuple(sorted(rng.sample(LETTERS, options)))
    answer = tuple(label for label, choice in zip(labels, choices, strict=True) if choice in right)
    stem = rng.choice(STEMS).format(entity=fact.entity, role=fact.role) + ("2つ選べ。" if two else "")
    return FactQuestion(fact=fact, text=stem, choices=tuple(choices), answer=answer, labels=labels)


def state(rng: random.Random, fact: Fact) -> str:
    """A textbook sentence: always true."""
    values = "と".join(rng.sample(fact.values, len(fact.values)))
    return rng.choice(STATEMENTS).format(entity=fact.entity, role=fact.role, values=values)


def explain(question: FactQuestion, *, careful: bool) -> str:
    """An explanation that recalls the fact, names the option that holds it, and ends with the answer it leads to."""
    fact = question.fact
    values = fact.values if careful else fact.careless_values
    recalled = [
        (choice, label) for label, choice in zip(question.labels, question.choices, strict=True) if choice in values
    ]
    cited = "と".join(choice + label for choice, label in recalled)
    answer = ",".join(label for _, label in recalled)
    if careful:
        body = f"{fact.entity}の{fact.role}は{cited}である。ほかの選択肢は当てはまらない。"
    else:
        body = f"{fact.entity}といえば{cited}だ。"
    return f"{body}{ANSWER_MARKER}{answer}"
